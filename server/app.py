"""The coordinator: a run from its plan to its model, resumable; and Flower's ServerApp over it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import ConfigurationError, RunError
from common.flower import BaseGrid, quiet_flower
from common.plan import TrainingPlan
from common.settings import plan_for
from common.tasks import load
from common.tasks.base import Task
from server.aggregation import build_strategy, is_buffered
from server.buffered import buffered_rounds
from server.central import Combination, combination_of
from server.checkpoints import RunState
from server.polling import PollingGrid
from server.rounds import evaluate, rounds, timed, wait_for_quorum
from server.runs import InMemory, OnDisk, Records, RunFolder, RunResult
from server.secure import secured
from server.summaries import RoundSummary

__all__ = ["app", "build_app", "federate"]

logger = logging.getLogger("sotto.coordinator")

OnRound = Callable[[RoundSummary], None]
OnEnd = Callable[[RunResult], None]


def federate(
    grid: Grid,
    plan: TrainingPlan,
    task: Task,
    folder: RunFolder | None = None,
    on_round: OnRound = lambda _: None,
    combination: Combination | None = None,
) -> RunResult:
    """Run a plan to its end, from where its folder stands.

    The folder stays as it is then, with its last checkpoints, until it is closed: whoever is killed
    before that ends the same run when started again, and begins no other.

    Args:
        grid: reaches the holders.
        plan: calibrated.
        task: of the plan.
        folder: checkpoints, journal and figures; None keeps nothing (simulations in memory).
        on_round: called with every round's summary, once it is durable.
        combination: of a round's replies; the plan's, unpredictable, if left out.

    Raises:
        RunError: a round without a quorum; the folder holds the rounds before it.
        StorageError: the folder cannot be written to; it holds what it held.
    """
    strategy = build_strategy(plan)
    records: Records = InMemory() if folder is None else OnDisk(folder)
    restored = records.restore(plan, task)
    state, behind = restored.state, Counter(restored.behind)
    buffered = is_buffered(plan.strategy.name)
    if buffered and not isinstance(grid, BaseGrid):
        grid = PollingGrid(grid)
    grid = secured(records.around(grid), plan)
    combination = combination or combination_of(plan, records.randomness)
    if state.round < plan.rounds or restored.unfinished is not None:
        _require_holders(grid, plan)

    def conclude(state: RunState, summary: RoundSummary) -> None:
        """Evaluate where due, and note the round down; the round itself is durable already."""
        if plan.evaluates(state.round):
            with timed(phases := dict(summary.phases), "evaluate"):
                summary = evaluate(grid, plan, task, state, summary)
            summary = replace(summary, phases=phases)
        summary = _with_streaks(summary, behind)
        records.note(summary)
        on_round(summary)

    if restored.unfinished is not None:  # a crash came between the checkpoint and the line about it
        conclude(state, restored.unfinished)
    if buffered:
        training = buffered_rounds(grid, plan, strategy, state)
    else:
        training = rounds(grid, plan, strategy, state, combination, restored.lost)
    try:
        for state, summary in training:
            with timed(phases := dict(summary.phases), "checkpoint"):
                records.save(state, plan, summary)
            conclude(state, replace(summary, phases=phases))
    except RunError:
        records.failed(state.round + 1)
        raise
    return records.finish(plan, task, state)


def _with_streaks(summary: RoundSummary, behind: Counter[str]) -> RoundSummary:
    """The summary with how many rounds in a row each holder has missed.

    Args:
        summary: of a round.
        behind: up to the round before; it is brought up to date.
    """
    for name in summary.accepted:
        behind.pop(name, None)
    missed = {name for name in summary.missed if name not in summary.accepted}
    behind.update(missed)
    return replace(summary, missed_in_a_row={name: behind[name] for name in sorted(missed)})


# -- Flower's ServerApp ---------------------------------------------------------------------------


def build_app(
    prepare: Callable[[Context], tuple[TrainingPlan, Task, RunFolder | None]],
    on_round: OnRound,
    on_end: OnEnd,
    combine: Callable[[TrainingPlan], Combination | None] = lambda _: None,
    *,
    closes: bool = True,
) -> ServerApp:
    """A ServerApp around :func:`federate`.

    Args:
        prepare: the plan, task and folder of a run, from Flower's context.
        on_round: see :func:`federate`.
        on_end: called with the result.
        combine: makes a plan's combination of replies; None for the plan's, unpredictable.
        closes: whether to close the run's folder at the end, or leave that to who made it.
    """
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        quiet_flower()
        plan, task, folder = prepare(context)
        on_end(federate(grid, plan, task, folder, on_round, combine(plan)))
        if folder is not None and closes:
            folder.close()

    return server


def _require_holders(grid: Grid, plan: TrainingPlan) -> None:
    """Wait until enough holders are there for the plan's quorum."""
    present = wait_for_quorum(grid, plan)
    if present < plan.min_holders:
        raise RunError(
            f"{present} of at least {plan.min_holders} holders are there; start the others, or ask "
            "for fewer with --min-holders, or with --cohort where updates are masked"
        )


def _of_run_config(context: Context) -> tuple[TrainingPlan, Task, RunFolder | None]:
    """What ``flwr run . --run-config '…'`` asks for: the task's name and any plan setting."""
    config = dict(context.run_config)
    chosen = {key.replace("-", "_"): value for key, value in config.items() if value != ""}
    name, source, preparation, out = (
        chosen.pop(key, None) for key in ("task", "source", "preprocessing", "out")
    )
    if name is None:
        raise ConfigurationError("the run config needs task=NAME")
    task = load(str(name), *(None if part is None else str(part) for part in (source, preparation)))
    plan = plan_for(task, chosen)
    folder = None if out is None else RunFolder.begin(Path(str(out)), plan)
    return plan, task, folder


def _log_round(summary: RoundSummary) -> None:
    logger.info(
        "round %d: %d updates in %.2f s%s",
        summary.round,
        len(summary.accepted),
        summary.seconds,
        f"; missed: {dict(summary.missed)}" if summary.missed else "",
    )


def _log_end(result: RunResult) -> None:
    logger.info("run %s finished after %d rounds", result.run_id, result.plan.rounds)


app = build_app(_of_run_config, _log_round, _log_end)
