"""``sotto serve``: the coordinator's process."""

from __future__ import annotations

import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.link.keepalive import KEEPALIVE
from sotto.logs import LogFormat, LogFormatOption, screen_for
from sotto.options import Settings, shared_options
from sotto.pages import KeepaliveOption, MetricsOption, health_page, observed
from sotto.show import (
    LiveTable,
    Screen,
    counted,
    evaluation_note,
    evaluation_rows,
    guarantee,
    write_json,
)
from sotto.sums import missed_words, show_sums

if TYPE_CHECKING:
    from common.link.keys import CoordinatorKeys
    from common.tasks.base import Task
    from server.grid import LinkGrid
    from server.runs import RunFolder, RunResult
    from server.summaries import RoundSummary

__all__ = ["interrupt", "keys_of", "serve"]

SHOWN = 12  # rounds in the table


@shared_options
def serve(
    settings: Settings,
    task: Annotated[str, typer.Argument(help="Name of the task; see 'sotto tasks'.")],
    state: Annotated[Path, typer.Option(help="Folder of keys, runs and checkpoints.")],
    listen: Annotated[str, typer.Option(help="HOST:PORT to listen on.")] = "127.0.0.1:7443",
    host_name: Annotated[
        list[str] | None,
        typer.Option(help="Name or address that holders will use; may be repeated."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Plain text, on loopback only.")
    ] = False,
    keep_checkpoints: Annotated[
        int, typer.Option(min=1, help="How many to keep; more than one, in case of damage.")
    ] = 2,
    metrics: MetricsOption = None,
    health: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Answer gRPC health probes there, of anybody, in plain text.",
        ),
    ] = None,
    keepalive: KeepaliveOption = KEEPALIVE,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> None:
    """Coordinate one run; with the same --state, go on where it stopped."""
    from common.durable import locked
    from common.errors import ConfigurationError
    from common.limits import largest_reply
    from common.settings import plan_for
    from common.tasks import load
    from server.grid import LinkGrid
    from server.runs import RunFolder, resume_or_begin
    from server.status import Watch

    del log_format  # taken before any other flag
    screen = screen_for("serve", settings.output)
    if settings.seeds != 1 or settings.baselines:
        raise ConfigurationError(
            "a coordinator makes one run and has no data to compare with; leave --seeds and "
            "--baselines to 'sotto simulate' and 'sotto demo'"
        )
    loaded = load(task, settings.source, settings.preprocessing)
    asked = settings.plan
    if asked.get("aggregation", "plain") == "plain":  # a masked sum has a threshold of its own
        asked = {"min_holders": 2, **asked}
    plan = plan_for(loaded, asked, holders=settings.holders)
    keys = None if insecure else keys_of(screen, state, listen, host_name)

    with ExitStack() as pages:  # closed last: until then they say that the coordinator drains
        pages.enter_context(locked(state, "sotto serve"))
        grid = LinkGrid(
            listen,
            keys=keys,
            max_message_bytes=largest_reply(plan, loaded),
            keepalive=keepalive,
            deadline_extensions=plan.deadline_extensions,
        )
        pages.enter_context(health_page(screen, health, grid.health))
        with grid:
            # After the address is taken: a wrong one begins no run.
            finished = RunFolder.last_finished(state / "runs")
            folder = resume_or_begin(state, plan, keep_checkpoints)
            _say_begin(screen, folder, listen, finished)
            watch = Watch(
                grid,
                folder.plan,
                folder.run_id,
                listen,
                roster=keys.roster if keys else None,
                history=folder.history(),
                done=folder.rounds_done,
            )
            note = pages.enter_context(observed(screen, grid, watch, state, metrics))
            pages.enter_context(draining_on_sigterm(grid))
            result = _coordinate(screen, grid, loaded, folder, note)
            watch.finish()

        _say_end(screen, settings, loaded, folder, result)
        folder.close()  # the very last: until then a restart ends this run, and begins no other


def _coordinate(
    screen: Screen,
    grid: LinkGrid,
    task: Task,
    folder: RunFolder,
    note: Callable[[RoundSummary], None],
) -> RunResult:
    """Run to the end, with a table of the rounds.

    Args:
        screen: where.
        grid: reaches the holders.
        task: of the plan.
        folder: of the run.
        note: called with every round's summary.
    """
    from server.app import build_app

    results: list[RunResult] = []
    plan = folder.plan
    with RoundTable(screen, f"{task.name}, run {folder.run_id}", plan.rounds) as table:

        def on_round(summary: RoundSummary) -> None:
            note(summary)
            table.show(summary)

        app = build_app(lambda _: (plan, task, folder), on_round, results.append, closes=False)
        run(app, grid)
    (result,) = results
    return result


def _say_begin(screen: Screen, folder: RunFolder, listen: str, finished: str | None) -> None:
    """Which run it is, and what it waits for.

    Args:
        screen: where.
        folder: of the run.
        listen: address.
        finished: the last run that is over, if there is one.
    """
    run_id, plan = folder.run_id, folder.plan
    screen.say(f"Run {run_id}: listening on {listen}.", "listening", run=run_id, address=listen)
    if done := folder.rounds_done:
        sentence = f"It was interrupted; its newest checkpoint is of round {done}."
        screen.say(sentence, "resumed", run=run_id, round=done)
    elif finished is not None and folder.untouched:
        sentence = f"It is a new one, which holders are charged for; {finished} is finished."
        screen.say(sentence, "begun", run=run_id, before=finished)
    fewest = plan.min_holders
    screen.say(
        f"Waiting for at least {counted(fewest, 'holder')}.",
        "waiting",
        run=run_id,
        min_holders=fewest,
    )


class RoundTable(LiveTable):
    """The last rounds of a run, as they end.

    Args:
        screen: where.
        title: of the table.
        rounds: of the plan.
    """

    def __init__(self, screen: Screen, title: str, rounds: int) -> None:
        super().__init__(screen, title, ["round", "updates", "seconds", "missed"])
        self._rounds = rounds
        self._rows: deque[list[str]] = deque(maxlen=SHOWN)

    def show(self, summary: RoundSummary) -> None:
        """One more round is over."""
        missed, name = missed_words(summary), f"{summary.round}/{self._rounds}"
        updates, seconds = len(summary.accepted), f"{summary.seconds:.2f}"
        self._rows.append([name, str(updates), seconds, missed])
        line = f"round {name}: {updates} updates, {seconds} s"
        self.update(
            self._rows,
            line + (f"; missed: {missed}" if missed else ""),
            "round",
            round=summary.round,
            rounds=self._rounds,
            seconds=summary.seconds,
            phases=summary.phases,
            accepted=summary.accepted,
            missed=summary.missed,
            lost=summary.lost,
        )


def _say_end(
    screen: Screen, settings: Settings, task: Task, folder: RunFolder, result: RunResult
) -> None:
    """Write the report, and say what the run gave."""
    from simulations.results import run_document
    from sotto.report import write_report

    written = run_document(result, settings.device)
    report = write_report(folder.path, result, task, written, simulated=False)
    if "evaluation" in written:
        screen.table("Evaluation, from noised histograms", *evaluation_rows(written))
        if note := evaluation_note(written):
            screen.say(note)
    show_sums(screen, written)
    screen.say(guarantee(folder.plan, task, simulated=False), "guarantee", run=folder.run_id)
    screen.say(
        f"Finished. The model and everything about the run: {report}",
        "finished",
        run=folder.run_id,
        report=str(report),
    )
    if settings.output.out is not None:
        shutil.copytree(folder.path, settings.output.out, dirs_exist_ok=True)
    write_json(settings.output.json, written)


def run(app: Any, grid: Any) -> None:
    """Run a ServerApp on a Grid of ours."""
    from flwr.app import Context, RecordDict

    app(grid, Context(grid.run.run_id, 1, {}, RecordDict(), {}))


def interrupt(number: int, frame: FrameType | None) -> None:
    """End like Ctrl-C on a signal."""
    del number, frame
    raise KeyboardInterrupt


@contextmanager
def draining_on_sigterm(grid: LinkGrid) -> Iterator[None]:
    """On SIGTERM, take the replies that are coming in, and then end like Ctrl-C.

    A second one does not wait.
    """
    from common.errors import LinkError

    def drain(number: int, frame: FrameType | None) -> None:
        del number, frame
        grid.drain()
        signal.signal(signal.SIGTERM, interrupt)

    signal.signal(signal.SIGTERM, drain)
    try:
        yield
    except LinkError:
        if grid.draining:
            raise KeyboardInterrupt from None
        raise


def keys_of(screen: Screen, state: Path, listen: str, names: list[str] | None) -> CoordinatorKeys:
    """The coordinator's identity; made, with a word about what holders need, on first use."""
    from common.link.identity import host_of
    from common.link.keys import CoordinatorKeys, is_coordinator
    from sotto.keys_report import expiry_warnings

    known = is_coordinator(state)
    keys = CoordinatorKeys.create_or_load(state, [*(names or []), host_of(listen)])
    if not known:
        screen.say(
            f"Made a federation CA and a server certificate under {keys.folder}.\n"
            "Each holder runs    sotto keys request --name NAME --state DIR\n"
            f"you approve it with sotto keys approve REQUEST --state {state}\n"
            "and the holder runs sotto keys install BUNDLE --state DIR.",
            "keys_made",
            folder=str(keys.folder),
        )
    for warning in expiry_warnings(keys):
        screen.say(warning, "certificate_expires")
    return keys
