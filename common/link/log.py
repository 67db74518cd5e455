"""Log lines about peers: a few of each kind a minute, and then a count of the rest.

Whoever can make a process write a line could otherwise fill its disk with them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from common.words import shown

__all__ = ["LOG", "RationedLog"]

LOG = "log"
"""The event of a line that has no word of its own."""

_MOST_KINDS = 10_000


@dataclass
class _Ration:
    """What was written of one kind since ``began``, in seconds."""

    began: float
    written: int = 0
    withheld: int = 0


class RationedLog:
    """Writes at most ``burst`` lines of one kind about one peer in any ``period``.

    Texts in a line are cut to one printable line each. In JSON a line has its event and, where it
    is about one, the holder (:mod:`sotto.logs`).

    Args:
        log: gets the lines.
        burst: lines of one kind before the rest is only counted.
        period: seconds until there may be as many again.
        clock: tells the time in seconds.
    """

    def __init__(
        self,
        log: logging.Logger,
        *,
        burst: int = 5,
        period: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._burst = burst
        self._period = period
        self._clock = clock
        self._rations: dict[tuple[str, str], _Ration] = {}

    def debug(self, peer: str, line: str, *values: object, event: str = LOG) -> None:
        """Note something for those who look for a fault."""
        self._write(logging.DEBUG, peer, line, values, event)

    def info(self, peer: str, line: str, *values: object, event: str = LOG) -> None:
        """Note something ordinary about a peer."""
        self._write(logging.INFO, peer, line, values, event)

    def warning(self, peer: str, line: str, *values: object, event: str = LOG) -> None:
        """Note something that a peer should not have done.

        Args:
            peer: the holder's name, or ``""`` for all strangers together.
            line: as of :mod:`logging`; lines are of one kind if this is the same.
            values: of the line.
            event: a word that says to machines what it is about.
        """
        self._write(logging.WARNING, peer, line, values, event)

    def exception(self, peer: str, line: str, *values: object) -> None:
        """Note the exception that is being handled, with its traceback."""
        self._write(logging.ERROR, peer, line, values, LOG, traceback=True)

    def _write(
        self,
        level: int,
        peer: str,
        line: str,
        values: tuple[object, ...],
        event: str,
        *,
        traceback: bool = False,
    ) -> None:
        ration = self._ration(peer, line)
        if ration.written >= self._burst:
            ration.withheld += 1
            return
        ration.written += 1
        cut = (shown(value) if isinstance(value, str) else value for value in values)
        about = {"event": event, "fields": {"holder": peer} if peer else {}}
        self._log.log(level, line, *cut, exc_info=traceback, extra=about)

    def _ration(self, peer: str, line: str) -> _Ration:
        now = self._clock()
        ration = self._rations.get((peer, line))
        if ration is not None and now - ration.began < self._period:
            return ration
        if ration is not None and ration.withheld:
            self._log.warning("%d more lines like the next were left out", ration.withheld)
        if len(self._rations) >= _MOST_KINDS:
            self._rations.clear()
        fresh = self._rations[peer, line] = _Ration(now)
        return fresh
