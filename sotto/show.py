"""What a person sees in a terminal: a live table while work goes on, plain lines elsewhere."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from sotto.options import Output

if TYPE_CHECKING:  # they need torch
    from common.plan import TrainingPlan
    from common.tasks.base import Task

__all__ = [
    "SEEDED",
    "LiveTable",
    "Rounds",
    "Screen",
    "Share",
    "comparison_rows",
    "counted",
    "drawn",
    "evaluation_note",
    "evaluation_rows",
    "figure",
    "guarantee",
    "plain",
    "setting_text",
    "spread",
    "sweep_rows",
    "write_json",
]


SEEDED = (
    "This was a simulation: its noise was seeded and its metrics are exact; neither is for real "
    "releases."
)


def figure(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.{digits}f}"


def counted(number: int, noun: str) -> str:
    """``1 holder``, ``2 holders``."""
    return f"{number} {noun}" + "s" * (number != 1)


def spread(summary: Mapping[str, Any] | None, *, several: bool, sign: str = " ± ") -> str:
    """Mean ± standard deviation over seeds, of a metric in a document."""
    if summary is None:
        return figure(None)
    return figure(summary["mean"]) + (f"{sign}{figure(summary['sd'])}" if several else "")


def guarantee(plan: TrainingPlan, task: Task, *, simulated: bool) -> str:
    """The guarantee of a run, with what limits it.

    Args:
        plan: of the run.
        task: for its caveat.
        simulated: whether the noise was seeded.
    """
    parts = (*_guarantees(plan), task.caveat, SEEDED if simulated else "")
    return " ".join(part for part in parts if part)


def _guarantees(plan: TrainingPlan) -> tuple[str, ...]:
    """What holds for what leaves, and what the coordinator gets to see of it."""
    return (*_promises(plan), *_sees(plan))


def _sees(plan: TrainingPlan) -> tuple[str, ...]:
    """What masks keep from the coordinator, and from how many helpers of it."""
    from common.aggregation import Masked, SecureSum

    aggregation = plan.aggregation
    if not isinstance(aggregation, Masked):
        return ()
    fewest, helpers = plan.min_holders, aggregation.tolerated_helpers(plan)
    own = "its own part" if helpers == 1 else "their own parts"
    help_ = (
        f" and has the help of {counted(helpers, 'holder')}, which can tell it {own} and no other"
        if helpers
        else ""
    )
    masks = (
        f"Each holder's part is masked: of a round the coordinator sees the sum of at least "
        f"{fewest} of {plan.cohort} and nothing else, even if it lies{help_}."
    )
    if not isinstance(aggregation, SecureSum):
        return (masks,)
    unknown = counted(fewest - aggregation.coalition, "holder")
    return (masks, f"ε is that of a sum with noise of {unknown} that it does not know.")


def _promises(plan: TrainingPlan) -> tuple[str, ...]:
    """The guarantee of what leaves, with the evaluations in it where they have a price."""
    price = plan.evaluation
    if price.kind != "histogram":
        return (plan.privacy.guarantee(),)
    times = f"{plan.evaluations} noised histogram" + "s" * (plan.evaluations != 1)
    evaluations = f"{times} of held-out units, at ({price.epsilon:g}, {price.delta:g})"
    if plan.privacy.kind not in ("dp", "distributed"):
        return (plan.privacy.guarantee(), f"Evaluations: {evaluations}.")
    from common.privacy.accounting import epsilon

    total = epsilon(plan.composition(), plan.privacy.delta)
    releases = "updates" if plan.privacy.kind == "dp" else "sums of updates"
    return (
        plan.privacy.guarantee(f"{total:.3g}"),
        f"That is {releases}, at ({plan.privacy.epsilon:g}, {plan.privacy.delta:g}), and "
        f"{evaluations}.",
    )


def evaluation_rows(written: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of what the released histograms show."""
    rows = [
        [name, figure(found["value"]), _bar(found) if found["value"] is not None else "–"]
        for name, found in written["evaluation"].items()
    ]
    return ["metric", "all holders", "95 % error bar"], rows


def _bar(found: Mapping[str, float | None]) -> str:
    return f"{figure(found['low'])} to {figure(found['high'])}"


def evaluation_note(written: Mapping[str, Any]) -> str:
    """Why figures of the released histograms are missing; empty where none is."""
    if all(found["value"] is not None for found in written["evaluation"].values()):
        return ""
    return (
        "–: too few held-out units for the noise at this price. Pay more (--evaluation-epsilon), "
        "evaluate less often, or have more holders."
    )


def comparison_rows(written: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table that compares federation, local and pooled training."""
    baselines = written.get("baselines", {})
    several = len(written["seeds"]) > 1
    columns = ["metric", "federation", *(["± over seeds"] if several else []), *baselines]
    rows = [
        [
            name,
            figure(value["mean"]),
            *([figure(value["sd"])] if several else []),
            *(figure(baselines[kind].get(name)) for kind in baselines),
        ]
        for name, value in written["metrics"].items()
    ]
    return columns, rows


def setting_text(name: str, value: object) -> str:
    """A setting's value for people; in a document, ε is null where there is no privacy."""
    if name == "epsilon" and value is None:
        return "no DP"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def sweep_rows(written: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a sweep's table: a row for each setting, the headline metric.

    Figures are written without spaces: a narrow terminal would break them there.
    """
    several, headline = len(written["seeds"]) > 1, written["headline"]
    points = written["points"]
    kinds = list(points[0].get("baselines", {}))
    failures = any(point["failed"] for point in points)
    rounds = "rounds" not in written["swept"]  # recommended ones may depend on ε
    columns = [
        *("ε" if name == "epsilon" else name.replace("_", " ") for name in written["swept"]),
        *(["rounds"] if rounds else []),
        "federation",
        *kinds,
        *(["failed"] if failures else []),
    ]
    rows = [
        [
            *(setting_text(name, value) for name, value in point["settings"].items()),
            *([str(point["rounds"])] if rounds else []),
            spread(point["metrics"].get(headline), several=several, sign="±"),
            *(
                spread(point["baselines"][kind].get(headline), several=several, sign="±")
                for kind in kinds
            ),
            *([str(len(point["failed"]))] if failures else []),
        ]
        for point in points
    ]
    return columns, rows


class Screen:
    """Where words go: standard output, or standard error when JSON has standard output.

    Args:
        output: the command's output options.
    """

    def __init__(self, output: Output) -> None:
        stream = sys.stderr if output.json == "-" else sys.stdout
        self.live = not output.quiet and stream.isatty()
        self.quiet = output.quiet
        self.console = Console(file=stream, highlight=False, soft_wrap=not stream.isatty())

    def say(self, sentence: str, event: str = "note", **fields: object) -> None:
        """A plain sentence, without the control characters that others may have put into it.

        Args:
            sentence: for people.
            event: a word that says to machines what it is about (:mod:`sotto.logs`).
            fields: the event's figures, for machines; they are in the sentence already.
        """
        del event, fields
        self.console.print(plain(sentence))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first column is text, the others are numbers."""
        self.console.print(drawn(title, columns, rows))


def drawn(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1
) -> Table:
    """A table to print.

    Args:
        title: of it.
        columns: names; the first are text, the others numbers.
        rows: cells.
        texts: how many columns are text.
    """
    table = Table(title=plain(title, "bold"), title_justify="left", box=SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(plain(column), justify="left" if number < texts else "right")
    for row in rows:
        table.add_row(*map(plain, row))
    return table


def plain(text: str, style: str = "") -> Text:
    """Text as it stands: no markup, and nothing but printable characters and line ends."""
    return Text("".join(c for c in text if c.isprintable() or c == "\n"), style)


class LiveTable(AbstractContextManager["LiveTable"]):
    """A table that is redrawn on a terminal; elsewhere ``line`` is printed at each update.

    Args:
        screen: where.
        title: of the table.
        columns: names.
    """

    def __init__(self, screen: Screen, title: str, columns: Sequence[str]) -> None:
        self._screen, self._title, self._columns = screen, title, columns
        self._live = Live(console=screen.console, refresh_per_second=8) if screen.live else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(
        self, rows: Sequence[Sequence[str]], line: str, event: str = "note", **fields: object
    ) -> None:
        """Draw ``rows``, or say ``line``; event and fields as for :meth:`Screen.say`."""
        if self._live is not None:
            self._live.update(drawn(self._title, self._columns, rows))
        else:
            self._screen.say(line, event, **fields)


class _Bar(AbstractContextManager["_Bar"]):
    """A bar with the time left, where the screen is live.

    Args:
        screen: where.
        total: length of the bar.
        done: shows how much of it is done.
    """

    def __init__(self, screen: Screen, total: float, done: ProgressColumn) -> None:
        self._screen, self._total = screen, total
        self._progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            done,
            TimeRemainingColumn(),
            console=screen.console,
            disable=not screen.live,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()


class Rounds(_Bar):
    """Progress of an experiment: one bar over all of its rounds.

    Args:
        screen: where.
        total: rounds of all stages and seeds.
    """

    def __init__(self, screen: Screen, total: int) -> None:
        super().__init__(screen, total, MofNCompleteColumn())
        self._done, self._stage = 0, ""

    def advance(self, stage: str) -> None:
        """One more round of ``stage``."""
        self._done += 1
        self._progress.update(self._task, advance=1, description=stage)
        if not self._screen.live and stage != self._stage:
            self._screen.say(f"{stage} ({self._done - 1} of {self._total} rounds done)")
        self._stage = stage


class Share(_Bar):
    """Progress of work that is weighed, not counted; a few lines where there is no terminal.

    Args:
        screen: where.
    """

    STEP, SECONDS = 0.05, 2.0
    """A line is printed after that share of the work, and that time, at the earliest."""

    def __init__(self, screen: Screen) -> None:
        super().__init__(screen, 1.0, TaskProgressColumn())
        self._begin = self._said_at = time.monotonic()
        self._said = 0.0

    def reached(self, share: float, what: str) -> None:
        """So much of the work is done, and ``what`` is going on."""
        self._progress.update(self._task, completed=share, description=what)
        now = time.monotonic()
        if self._screen.live or share < self._said + self.STEP:
            return
        if now >= self._said_at + self.SECONDS:
            self._said, self._said_at = share, now
            left = (now - self._begin) * (1 - share) / share
            self._screen.say(f"{share:.0%} done, about {_duration(left)} left ({what})")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def write_json(target: str | None, document: Mapping[str, Any]) -> None:
    """Write ``document`` to a file or, for ``-``, to standard output; None does nothing."""
    if target is None:
        return
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        Path(target).write_text(text)
