"""``sotto status``: what a coordinator on this machine is doing."""

from __future__ import annotations

import json as json_
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live

from sotto.options import Output
from sotto.show import Screen, counted, drawn, plain, write_json

if TYPE_CHECKING:
    from server.status import HolderStatus, RoundStatus, Status

__all__ = ["status", "view"]

_STATES = {"never_joined": "never joined"}
_PHASES = {
    "waiting": "waiting for holders",
    "asking": "asking for updates",
    "aggregating": "aggregating",
    "evaluating": "evaluating",
    "finished": "finished",
    "stopping": "stopping",
}
_STEPS = {
    "wait": "wait",
    "exchange": "exchange",
    "aggregate": "aggregate",
    "checkpoint": "save",
    "evaluate": "eval",
}
"""Phase of a round → its column; eighty characters are enough for all."""


def status(
    state: Annotated[Path, typer.Option(help="Folder that was given to 'sotto serve --state'.")],
    watch: Annotated[
        bool, typer.Option("--watch", help="Again and again, until the coordinator has ended.")
    ] = False,
    interval: Annotated[float, typer.Option(help="With --watch: seconds between two looks.")] = 1.0,
    json: Annotated[
        str | None,
        typer.Option(
            help="Write the status as JSON; - for standard output, with --watch a line a look."
        ),
    ] = None,
) -> None:
    """Show what a running coordinator on this machine is doing: rounds, holders, traffic.

    Ends with exit code 3 if none runs with that folder.
    """
    from common.errors import ConfigurationError
    from server.link.operations import ask

    if watch and interval <= 0:
        raise ConfigurationError(f"--interval must be positive, got {interval:g}")
    screen = Screen(Output(json=json))
    if watch:
        _watch(screen, state, interval, json)
        return
    found = ask(state)
    if json != "-":
        screen.console.print(view(found))
    write_json(json, found.document())


def _watch(screen: Screen, state: Path, interval: float, json: str | None) -> None:
    """Show the status until the coordinator has ended, or Ctrl-C.

    Raises:
        RunError: the coordinator was not there to begin with.
    """
    from common.errors import RunError
    from server.link.operations import ask

    shows = screen.live and json != "-"
    live = Live(console=screen.console, auto_refresh=False, transient=False) if shows else None
    try:
        if live is not None:
            live.start()
        found = ask(state)
        while True:
            if live is not None:
                live.update(view(found), refresh=True)
            elif json == "-":
                sys.stdout.write(json_.dumps(found.document(), ensure_ascii=False) + "\n")
                sys.stdout.flush()
            else:
                screen.console.print(view(found))
            if json not in (None, "-"):
                write_json(json, found.document())
            time.sleep(interval)
            try:
                found = ask(state)
            except RunError:
                screen.console.print("The coordinator has ended.")
                return
    except KeyboardInterrupt:
        return
    finally:
        if live is not None:
            live.stop()


# -- for people -----------------------------------------------------------------------------------


def view(status: Status) -> RenderableType:
    """A status as a page for a terminal.

    Args:
        status: what was found.
    """
    parts: list[RenderableType] = [plain(_headline(status), "bold"), plain(_about(status)), ""]
    if status.holders:
        parts.append(drawn(f"Holders: {_counts(status)}", *_holder_rows(status.holders), texts=3))
        parts += [plain(line) for line in _misses(status.holders)]
    else:
        parts.append("No holder has joined yet.")
    if status.recent:
        parts.append(drawn("Last rounds, in seconds", *_round_rows(status.recent)))
    parts.append(plain(_traffic(status)))
    return Group(*parts)


def _headline(status: Status) -> str:
    phase = _PHASES.get(status.phase, status.phase)
    present = sum(h.state in ("working", "answered", "connected") for h in status.holders)
    if status.phase == "waiting":
        phase += f" ({present} of at least {status.min_holders} are there)"
    if status.recent and status.phase not in ("finished", "stopping"):
        phase += f", {_duration(status.round_seconds)} since the last one ended"
    if status.phase == "finished":
        return f"{status.task}: finished after {counted(status.rounds, 'round')}"
    return f"{status.task}: round {status.round} of {status.rounds}, {phase}"


def _about(status: Status) -> str:
    return (
        f"Run {status.run}, plan {status.plan[:16]}; {status.software}, process {status.pid}, on "
        f"{status.listen} for {_duration(status.uptime_seconds)}"
    )


def _counts(status: Status) -> str:
    found = {_STATES.get(state, state): count for state, count in status.counted().items()}
    return ", ".join(f"{count} {state}" for state, count in found.items() if count)


def _holder_rows(holders: Iterable[HolderStatus]) -> tuple[list[str], list[list[str]]]:
    columns = ["holder", "state", "address", "missed in a row"]
    rows = [
        [
            holder.name,
            _state(holder),
            holder.address.partition(":")[2] or "–",  # "ipv4:" goes before it
            str(holder.missed_in_a_row or "–"),
        ]
        for holder in holders
    ]
    return columns, rows


def _misses(holders: Iterable[HolderStatus]) -> list[str]:
    """Why those who missed the last round did; in lines, for reasons are long."""
    missed = [holder for holder in holders if holder.missed_in_a_row]
    return [f"  {holder.name} missed the last round: {holder.last_reason}" for holder in missed] + (
        [""] if missed else []
    )


def _state(holder: HolderStatus) -> str:
    if holder.since is None:
        return _STATES.get(holder.state, holder.state)
    left = datetime.fromtimestamp(holder.since, UTC).astimezone()
    away = _duration(max(0.0, time.time() - holder.since))
    return f"{holder.state} since {left:%H:%M:%S} ({away})"


def _round_rows(recent: Iterable[RoundStatus]) -> tuple[list[str], list[list[str]]]:
    columns = ["round", "updates", "missed", "total", *_STEPS.values()]
    rows = [
        [
            f"{summary.round} LOST" if summary.lost else str(summary.round),
            str(summary.accepted),
            str(len(summary.missed) or "–"),
            f"{summary.seconds:.2f}",
            *(f"{summary.phases[s]:.2f}" if s in summary.phases else "–" for s in _STEPS),
        ]
        for summary in recent
    ]
    return columns, rows


def _traffic(status: Status) -> str:
    traffic = status.traffic
    return (
        f"Sent {_size(traffic.bytes_sent)}, received {_size(traffic.bytes_received)}; "
        f"{counted(traffic.requests, 'request')}, {traffic.replies} answered, "
        f"{traffic.replies_dropped} dropped as late; {counted(traffic.connections, 'connection')}, "
        f"{status.reconnections} of them again, {traffic.refused} refused"
    )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
