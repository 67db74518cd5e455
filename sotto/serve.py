"""``sotto serve``: the coordinator's process."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sotto.options import Settings, shared_options
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

__all__ = ["interrupt", "keys_of", "serve"]


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
) -> None:
    """Coordinate one run; with the same --state, go on where it stopped."""
    from common.errors import ConfigurationError
    from common.limits import largest_reply
    from common.settings import plan_for
    from common.tasks import load
    from server.app import build_app
    from server.grid import LinkGrid
    from server.runs import resume_or_begin
    from simulations.results import run_document
    from sotto.report import write_report

    screen = Screen(settings.output)
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
    results: list[Any] = []
    rows: list[list[str]] = []

    with LinkGrid(listen, keys=keys, max_message_bytes=largest_reply(plan, loaded)) as grid:
        folder = resume_or_begin(state, plan)  # after the address: a wrong one begins no run
        plan = folder.plan
        screen.say(f"Run {folder.run_id}: listening on {listen}.")
        if done := folder.state(plan, loaded).round:
            screen.say(f"Going on after round {done}.")
        screen.say(f"Waiting for at least {counted(plan.min_holders, 'holder')}.")
        table = LiveTable(
            screen, f"{task}, run {folder.run_id}", ["round", "updates", "seconds", "missed"]
        )

        def on_round(summary: Any) -> None:
            missed = missed_words(summary)
            rows.append(
                [
                    f"{summary.round}/{plan.rounds}",
                    str(len(summary.accepted)),
                    f"{summary.seconds:.2f}",
                    missed,
                ]
            )
            line = f"round {summary.round}/{plan.rounds}: {len(summary.accepted)} updates, "
            line += f"{summary.seconds:.2f} s" + (f"; missed: {missed}" if missed else "")
            table.update(rows[-12:], line)

        signal.signal(signal.SIGTERM, interrupt)
        with table:
            run(build_app(lambda _: (plan, loaded, folder), on_round, results.append), grid)

    written = run_document(results[0], settings.device)
    report = write_report(folder.path, results[0], loaded, written, simulated=False)
    if "evaluation" in written:
        screen.table("Evaluation, from noised histograms", *evaluation_rows(written))
        if note := evaluation_note(written):
            screen.say(note)
    show_sums(screen, written)
    screen.say(guarantee(plan, loaded, simulated=False))
    screen.say(f"Finished. The model and everything about the run: {report}")
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
            "and the holder runs sotto keys install BUNDLE --state DIR."
        )
    for warning in expiry_warnings(keys):
        screen.say(warning)
    return keys
