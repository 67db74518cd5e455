"""``sotto simulate``: an experiment in this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sotto.options import Settings, shared_options
from sotto.show import (
    Rounds,
    Screen,
    comparison_rows,
    evaluation_note,
    evaluation_rows,
    guarantee,
    write_json,
)
from sotto.sums import show_sums

if TYPE_CHECKING:  # it needs torch
    from common.plan import TrainingPlan

__all__ = ["simulate"]


@shared_options
def simulate(
    settings: Settings,
    task: Annotated[str, typer.Argument(help="Name of the task; see 'sotto tasks'.")],
    data: Annotated[
        Path | None, typer.Option(help="A file of your own, CSV or Parquet, to divide.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="How local training is computed: batched, opacus or ray.")
    ] = "batched",
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster, as ray://…; a local one if left out.")
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(help="P: a holder stays silent in a round with probability P.")
    ] = None,
    straggle: Annotated[
        str | None,
        typer.Option(
            help="P:SECONDS: with probability P an answer takes longer, so much on average."
        ),
    ] = None,
    byzantine: Annotated[
        str | None,
        typer.Option(
            help="P:ATTACK: a share P lies, by sign-flip, scale, noise, nan, zero, little, "
            "longest or label-flip."
        ),
    ] = None,
    pace: Annotated[
        str | None,
        typer.Option(
            help="SECONDS:SIGMA: an answer takes SECONDS, by a factor of each holder's own with "
            "deviation SIGMA of its logarithm."
        ),
    ] = None,
) -> None:
    """Simulate a federation in this process: the same apps and plan, seeded, without Ray."""
    # torch takes seconds to import; flags are checked, and help is shown, without it.
    from client.trainer import pick_device
    from common.data.own_file import OwnFile
    from common.settings import plan_for
    from common.tasks import load
    from simulations.experiment import Experiment, run_experiment
    from simulations.faults import Faults
    from simulations.results import document
    from sotto.report import write_report

    screen = Screen(settings.output)
    faults = Faults.parsed(dropout, straggle, byzantine, pace)
    loaded = load(task, settings.source, settings.preprocessing)
    if data is not None:
        loaded.source = OwnFile(data, loaded.source)
    holders = list(loaded.source.tables(settings.holders))
    wanted = dict(settings.plan)
    rounds = wanted.get("strategy") != "fedbuff"  # which has a buffer in place of a quorum
    plain = wanted.get("aggregation", "plain") == "plain"  # a masked sum has its threshold
    if rounds and plain:
        everyone = min(len(holders), wanted.get("cohort") or len(holders))
        wanted = {"min_holders": everyone if faults is None else 1, **wanted}
    plan = plan_for(loaded, wanted, holders=settings.holders)
    if rounds and plain and faults is not None and "min_holders" not in settings.plan:
        plan = _with_smallest_quorum(plan)
    if "evaluate" not in settings.plan and plan.evaluation.kind == "local":
        # Twenty points make a curve; evaluating more often would cost more than it shows.
        plan = plan.model_copy(update={"evaluate_every": max(1, plan.rounds // 20)})
    first = plan.seed
    experiment = Experiment(
        task=loaded,
        plan=plan,
        seeds=range(first, first + settings.seeds),
        holders=settings.holders,
        device=pick_device(settings.device),
        engine=engine,
        address=address,
        baselines=settings.baselines,
        faults=faults,
        folder=settings.output.folder_for(task),
    )
    screen.say(
        f"Simulating {task} on {plan.source} ({plan.preprocessing}): {len(holders)} holders, "
        f"{plan.rounds} rounds, {settings.seeds} seed(s)."
    )
    stages = 1 + (len(holders) + 1 if settings.baselines else 0)
    with Rounds(screen, stages * plan.rounds * settings.seeds) as progress:
        result = run_experiment(
            experiment, lambda stage, seed, _: progress.advance(f"seed {seed}: {stage}")
        )
    written = document(result)
    report = write_report(experiment.folder, result.runs[0], loaded, written)
    screen.table(f"{task} on {plan.source}", *comparison_rows(written))
    if "evaluation" in written:
        screen.table("From noised histograms", *evaluation_rows(written))
        if note := evaluation_note(written):
            screen.say(note)
    show_sums(screen, written)
    screen.say(guarantee(plan, loaded, simulated=True))
    if "simulated_seconds" in written:
        screen.say(_how_long(written["simulated_seconds"]))
    if faults is not None:
        screen.say(_what_went_wrong(written["faults"]))
    screen.say(f"Everything about this run: {report}")
    write_json(settings.output.json, written)


def _with_smallest_quorum(plan: TrainingPlan) -> TrainingPlan:
    """As few updates as the strategy can work with: where holders fail, not everyone answers."""
    from common.frozen import validated
    from common.plan import TrainingPlan
    from server.aggregation import STRATEGIES

    kind = STRATEGIES.get(plan.strategy.name)
    if kind is None:
        return plan  # which is refused, with the names that there are, when the run begins
    fewest = kind.fewest(plan.strategy)
    return validated(TrainingPlan, {**plan.model_dump(), "min_holders": fewest})


def _how_long(simulated: Mapping[str, float]) -> str:
    """Simulated time, in one sentence."""
    return (
        f"In simulated time the run takes {simulated['total']:.4g} seconds, and half of its rounds "
        f"{simulated['round_median']:.3g} or less."
    )


def _what_went_wrong(faults: Mapping[str, Any]) -> str:
    """The faults of a document, in one sentence."""
    return (
        f"Faults: {faults['dropped']} answers never came, {faults['late']} came after the "
        f"deadline, {faults['spare']} when the round had closed, and {faults['attacked']} of those "
        f"that came in time were forged; half of the "
        f"rounds waited {faults['waited_median']:.3g} simulated seconds or less for stragglers."
    )
