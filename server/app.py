"""The coordinator: a run from its plan to its model, resumable; and Flower's ServerApp over it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import ConfigurationError, RunError
from common.flower import quiet_flower
from common.plan import TrainingPlan
from common.settings import plan_for
from common.tasks import load
from common.tasks.base import Task
from common.tasks.parameters import initial_parameters
from server.aggregation import build_strategy
from server.central import Combination, combination_of
from server.checkpoints import Checkpoints, RunState
from server.rounds import RoundSummary, evaluate, rounds, wait_for_quorum
from server.runs import RunFolder, RunResult
from server.secure import secured

__all__ = ["app", "build_app", "federate"]

logger = logging.getLogger("sotto.coordinator")

OnRound = Callable[[RoundSummary], None]


def federate(
    grid: Grid,
    plan: TrainingPlan,
    task: Task,
    folder: RunFolder | None = None,
    on_round: OnRound = lambda _: None,
    combination: Combination | None = None,
) -> RunResult:
    """Run a plan to its end, from where its folder stands.

    Args:
        grid: reaches the holders.
        plan: calibrated.
        task: of the plan.
        folder: checkpoints and figures; None keeps nothing (simulations in memory).
        on_round: called with every round's summary, once it is durable.
        combination: of a round's replies; the plan's, unpredictable, if left out.

    Raises:
        RunError: a round without a quorum; the folder holds the rounds before it.
    """
    strategy = build_strategy(plan)
    grid = secured(grid, plan)
    if folder is None:
        state, history = RunState(uuid4().hex[:12], 0, initial_parameters(task, plan.seed)), []
    else:
        state = folder.state(plan, task)
        history = folder.history(state.round)

    def conclude(state: RunState, summary: RoundSummary) -> None:
        """Evaluate where due, and note the round down; the round itself is durable already."""
        if plan.evaluates(state.round):
            summary = evaluate(grid, plan, task, state, summary)
        if folder is not None:
            folder.note(summary)
        history.append(summary)
        on_round(summary)

    if state.round > 0 and (not history or history[-1].round < state.round):
        # A crash came between the checkpoint and the line about it.
        conclude(state, RoundSummary(state.round, (), {}, 0.0))
    for state, summary in rounds(grid, plan, strategy, state, combination):  # noqa: B020
        if folder is not None:
            Checkpoints(folder.path).save(state, plan)
        conclude(state, summary)
    if folder is not None:
        folder.finish(plan, task, state.released)
    return RunResult(state.run_id, plan, state.released, history)


# -- Flower's ServerApp ---------------------------------------------------------------------------


def build_app(
    prepare: Callable[[Context], tuple[TrainingPlan, Task, RunFolder | None]],
    on_round: OnRound,
    on_end: Callable[[RunResult], None],
    combine: Callable[[TrainingPlan], Combination] = combination_of,
) -> ServerApp:
    """A ServerApp around :func:`federate`.

    Args:
        prepare: the plan, task and folder of a run, from Flower's context.
        on_round: see :func:`federate`.
        on_end: called with the result.
        combine: makes a plan's combination of replies.
    """
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        quiet_flower()
        plan, task, folder = prepare(context)
        _require_holders(grid, plan)
        on_end(federate(grid, plan, task, folder, on_round, combine(plan)))

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
