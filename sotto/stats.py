"""``sotto stats``: private statistics over all holders, and scalings of a task's inputs."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import ConfigurationError
from sotto.options import Output
from sotto.serve import interrupt, keys_of
from sotto.show import Screen, counted, write_json

if TYPE_CHECKING:  # they need torch
    from common.statistics_plan import StatisticsPlan
    from common.tasks.base import Task
    from server.statistics import Gathered, StatisticsFolder

__all__ = ["stats"]

SEEDED_NOISE = (
    "This was a simulation: its noise was seeded, so whoever knows the seed can subtract it; it is "
    "not for real releases."
)


def stats(
    task: Annotated[str, typer.Argument(help="Name of the task; see 'sotto tasks'.")],
    epsilon: Annotated[float, typer.Option(help="ε that each holder pays.")] = 1.0,
    delta: Annotated[float | None, typer.Option(help="δ; the source's own.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="A,B,…: ask about these only, the more exactly.")
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(help="COLUMN=LOW:HIGH, a public range to look in; may be repeated."),
    ] = None,
    bins: Annotated[int | None, typer.Option(help="Of histograms; 16.")] = None,
    scaling: Annotated[
        Path | None,
        typer.Option(help="Ask about the model's inputs, and write a scaling for plans here."),
    ] = None,
    source: Annotated[str | None, typer.Option(help="Whose schema the data follow.")] = None,
    preprocessing: Annotated[str | None, typer.Option(help="Preparation of the source.")] = None,
    holders: Annotated[int | None, typer.Option(help="How the source is cut.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A file of your own, CSV or Parquet, to divide.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of a simulation's split and noise.")] = 0,
    listen: Annotated[
        str | None, typer.Option(help="HOST:PORT: ask holders that join, instead of simulating.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="With --listen: the coordinator's folder.")
    ] = None,
    host_name: Annotated[
        list[str] | None,
        typer.Option(help="With --listen: a name that holders will use; may be repeated."),
    ] = None,
    min_holders: Annotated[
        int | None, typer.Option(help="With fewer answers there is no result; 2, or everyone.")
    ] = None,
    round_deadline: Annotated[
        float, typer.Option(help="Seconds until a silent holder is left out.")
    ] = 600.0,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="With --listen: plain text, on loopback only.")
    ] = False,
    json: Annotated[
        str | None, typer.Option(help="Write the figures as JSON; - for standard output.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report and figures.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say less.")] = False,
) -> None:
    """Means, quantiles, histograms and counts over all holders, noised and paid for.

    In this process over the holders of a source; or, with --listen, of holders that have joined
    with 'sotto join' and whose policy lets statistics leave.
    """
    from common.data.own_file import OwnFile
    from common.statistics_plan import statistics_plan_for
    from common.tasks import load
    from sotto.stats_report import write_statistics

    output = Output(json=json, out=out, quiet=quiet)
    screen = Screen(output)
    _check(listen, state, data, host_name, insecure=insecure)
    loaded = load(task, source, preprocessing)
    if data is not None:
        loaded.source = OwnFile(data, loaded.source)
    everyone = len(loaded.source.tables(holders)) if listen is None else 2
    plan = statistics_plan_for(
        loaded,
        epsilon,
        delta,
        subject="columns" if scaling is None else "inputs",
        columns=_words(columns),
        ranges=dict(_range(text) for text in limit or ()),
        bins=bins,
        min_holders=min_holders or everyone,
        round_deadline=round_deadline,
        seed=seed,
    )
    if listen is None or state is None:
        from simulations.statistics import simulate_statistics

        gathered = simulate_statistics(loaded, plan, holders=holders, seed=seed)
        folder = output.folder_for(f"stats-{task}")
        written = _document(loaded, gathered, simulated=True)
    else:
        gathered, kept = _ask(screen, plan, listen, state, host_name, insecure=insecure)
        folder = out or kept.path
        written = _document(loaded, gathered, simulated=False)
        kept.finish(written)
    _say(screen, written)
    if scaling is not None:
        _write_scaling(scaling, loaded, gathered, simulated=listen is None)
        screen.say(f"Wrote {scaling}; train with --scaling {scaling}.")
    report = write_statistics(folder, written)
    screen.say(written["guarantee"])
    screen.say(f"Everything about these statistics: {report}")
    write_json(json, written)


def _check(
    listen: str | None,
    state: Path | None,
    data: Path | None,
    names: list[str] | None,
    *,
    insecure: bool,
) -> None:
    """Refuse flags of one way with the other.

    Raises:
        ConfigurationError: says which.
    """
    if (listen is None) != (state is None):
        raise ConfigurationError(
            "to ask holders that join, give both --listen HOST:PORT and --state DIR; to simulate, "
            "neither"
        )
    if listen is None and (names or insecure):
        raise ConfigurationError("--host-name and --insecure belong to --listen")
    if listen is not None and data is not None:
        raise ConfigurationError(
            "a coordinator has no data; holders bring theirs with 'sotto join --data FILE'"
        )


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in text.split(",")] if text else []


def _range(text: str) -> tuple[str, tuple[float, float]]:
    """A flag like ``age=20:80``.

    Raises:
        ConfigurationError: it is not one.
    """
    name, _, bounds = text.rpartition("=")
    low, _, high = bounds.partition(":")
    try:
        return name, (float(low), float(high))
    except ValueError:
        raise ConfigurationError(
            f"--limit must be COLUMN=LOW:HIGH with two numbers, got {text!r}"
        ) from None


def _ask(
    screen: Screen,
    plan: StatisticsPlan,
    listen: str,
    state: Path,
    names: list[str] | None,
    *,
    insecure: bool,
) -> tuple[Gathered, StatisticsFolder]:
    """Ask holders that join; with the same --state, a second attempt costs them nothing more."""
    from common.limits import largest_statistics
    from server.grid import LinkGrid
    from server.statistics import StatisticsFolder, gather

    keys = None if insecure else keys_of(screen, state, listen, names)
    signal.signal(signal.SIGTERM, interrupt)
    with LinkGrid(listen, keys=keys, max_message_bytes=largest_statistics(plan)) as grid:
        folder = StatisticsFolder.resume_or_begin(state, plan)
        screen.say(f"Statistics {folder.run_id}: listening on {listen}.")
        screen.say(f"Waiting for at least {counted(plan.min_holders, 'holder')}.")
        return gather(grid, plan, folder.run_id), folder


def _document(task: Task, gathered: Gathered, *, simulated: bool) -> dict[str, Any]:
    """Everything that is written down."""
    from common.statistics import document

    plan = gathered.plan
    parts = (plan.guarantee(), task.caveat, SEEDED_NOISE if simulated else "")
    return {
        "task": plan.task,
        "source": plan.source,
        "preprocessing": plan.preprocessing,
        "subject": plan.subject,
        "unit": plan.unit,
        "epsilon": plan.epsilon,
        "delta": plan.delta,
        "noise_multiplier": plan.noise_multiplier,
        "run": gathered.run_id,
        "holders": list(gathered.holders),
        "missed": dict(gathered.missed),
        "simulated": simulated,
        "guarantee": " ".join(part for part in parts if part),
        "statistics": document(gathered.statistics),
    }


def _write_scaling(path: Path, task: Task, gathered: Gathered, *, simulated: bool) -> None:
    from common.statistics import scaling_of
    from common.tasks.scaling import scaling_text

    plan = gathered.plan
    comment = (
        f"Scaling of {task.name} on {plan.source} ({plan.preprocessing}), from statistics of "
        f"{len(gathered.holders)} holders:\nrun {gathered.run_id}, for which each holder paid "
        f"ε={plan.epsilon:g} at δ={plan.delta:g}.\nA run that uses it costs that and its own ε "
        "together."
    )
    if simulated:
        comment += "\nSimulated: the noise was seeded."
    path.write_text(scaling_text(scaling_of(gathered.statistics, task.scalable), comment))


def _say(screen: Screen, written: dict[str, Any]) -> None:
    from sotto.stats_report import category_rows, number_rows

    units = written["statistics"]["units"]
    screen.say(
        f"About {units['value']:.0f} ± {units['error']:.0f} {written['unit']}s at "
        f"{len(written['holders'])} holders (ε={written['epsilon']:g}, δ={written['delta']:g}); "
        "± is 95 %, of the noise."
    )
    for name, why in written["missed"].items():
        screen.say(f"{name}: {why}")
    tables: Sequence[tuple[str, tuple[list[str], list[list[str]]]]] = (
        ("Numbers", number_rows(written)),
        ("Categories", category_rows(written)),
    )
    for title, (head, rows) in tables:
        if rows:
            screen.table(title, head, rows)
