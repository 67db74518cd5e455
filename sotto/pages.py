"""Where a coordinator or a holder can be looked at while it runs: pages, probes and a socket."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from common.link.keepalive import LONGEST_KEEPALIVE, SHORTEST_KEEPALIVE
from sotto.show import Screen

if TYPE_CHECKING:  # they need torch
    from server.grid import LinkGrid
    from server.link.health import Health
    from server.status import Watch
    from server.summaries import RoundSummary

__all__ = ["KeepaliveOption", "MetricsOption", "health_page", "metrics_page", "observed"]

logger = logging.getLogger("sotto.pages")

KeepaliveOption: Any = Annotated[
    float,
    typer.Option(
        min=SHORTEST_KEEPALIVE,
        max=LONGEST_KEEPALIVE,
        help="Seconds of silence before asking whether the other end is there; less than the "
        "idle time-out of any proxy on the way.",
    ),
]
"""The flag of both ends of the link."""

MetricsOption: Any = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Serve figures for Prometheus there, to anybody; a port alone is of loopback.",
    ),
]
"""The flag of commands that have figures to show."""


class _Metrics(Protocol):
    """What a page shows."""

    content_type: str

    def text(self) -> bytes: ...


@contextmanager
def metrics_page(
    screen: Screen, listen: str | None, metrics: _Metrics, warning: str = ""
) -> Iterator[None]:
    """Serve figures until the block ends.

    Args:
        screen: is told the address.
        listen: ``HOST:PORT`` or a port; None serves nothing.
        metrics: the figures.
        warning: a sentence that goes with the address.

    Raises:
        LinkError: the address cannot be used.
    """
    from common.metrics_page import MetricsPage

    if listen is None:
        yield
        return
    page = MetricsPage(listen, metrics.text, metrics.content_type)
    address = page.start()
    try:
        screen.say(f"Metrics: {address}. {warning}".rstrip(), "metrics", address=address)
        yield
    finally:
        page.stop()


@contextmanager
def health_page(screen: Screen, listen: str | None, health: Health) -> Iterator[None]:
    """Answer probes in plain text until the block ends.

    Args:
        screen: is told the address.
        listen: ``HOST:PORT``; None answers none.
        health: what to say.

    Raises:
        LinkError: the address cannot be used.
    """
    from server.link.health import HealthPage

    if listen is None:
        yield
        return
    page = HealthPage(listen, health)
    address = page.start()
    try:
        screen.say(f"Health probes: {address}.", "health", address=address)
        yield
    finally:
        page.stop()


@contextmanager
def observed(
    screen: Screen, grid: LinkGrid, watch: Watch, state: Path, listen: str | None
) -> Iterator[Callable[[RoundSummary], None]]:
    """Let a run be looked at: with ``sotto status``, and by Prometheus.

    Args:
        screen: is told addresses, and what does not work.
        grid: the link.
        watch: of the run.
        state: the coordinator's folder; it gets the socket.
        listen: of the metrics; None serves none.

    Yields:
        To be called with the summary of every round.

    Raises:
        LinkError: the metrics' address cannot be used.
    """
    from common.errors import StateError
    from server.link.operations import Operations
    from server.metrics import CoordinatorMetrics

    metrics = CoordinatorMetrics(watch.status)

    def note(summary: RoundSummary) -> None:
        watch.note(summary)
        metrics.note(summary)

    with ExitStack() as open_:
        try:
            open_.enter_context(Operations(state, watch.status, grid.health))
        except StateError as error:  # the run can do without
            screen.say(f"{error}.", "no_status")
        open_.enter_context(metrics_page(screen, listen, metrics))
        yield note
