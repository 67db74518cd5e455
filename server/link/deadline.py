"""When a holder has missed a request: later, while it shows that it is at work."""

from __future__ import annotations

import math

__all__ = ["PROGRESS_EVERY", "Deadline"]

_QUARTER = 0.25
"""Of the time that a call gives: who has shown nothing within the last quarter is not at work."""

PROGRESS_EVERY = _QUARTER / 8
"""Of the time that a call gives: how often a holder says that it has completed a step. So a
holder whose steps are short is heard several times in any quarter, whatever the network delays."""


class Deadline:
    """The time of one request, extended by quarters while its holder shows progress.

    All times are seconds on one monotonic clock.

    Args:
        begin: when the request was made.
        timeout: until the holder has missed it; None for never.
        extensions: how many times ``timeout`` may be added to it at most. A holder that claims
            progress for ever is waited for so long and no longer.
    """

    def __init__(self, begin: float, timeout: float | None, extensions: int = 0) -> None:
        timeout = math.inf if timeout is None else timeout
        self._quarter = _QUARTER * timeout
        self._due = begin + timeout
        self._last = begin + (1 + extensions) * timeout
        self._seen = self._heard = -math.inf
        self.progress_every = PROGRESS_EVERY * timeout if extensions and timeout < math.inf else 0.0
        """Seconds between two signs of life that the holder is asked for; 0 for none."""

    @property
    def due(self) -> float:
        """When to look again whether the time is over."""
        return self._due

    def progressed(self, now: float) -> None:
        """Bytes of the request or of its reply went over, or the holder completed a step."""
        self._seen = now

    def heard(self, now: float) -> bool:
        """The holder says that it has completed a step; False if it was not asked to say so now.

        Half of the time that it was asked for lets one message overtake another's delay.
        """
        if not self.progress_every or now - self._heard < self.progress_every / 2:
            return False
        self._heard = now
        self.progressed(now)
        return True

    def excuse(self, now: float, late: float) -> None:
        """The coordinator itself stood still: what came meanwhile is yet to be read.

        Args:
            now: when it went on.
            late: by how much it missed :attr:`due`, in seconds.
        """
        self._due = now + min(late, self._quarter)
        self._last += late

    def passed(self, now: float) -> bool:
        """Whether the holder has missed the request; if not, :attr:`due` is the next look."""
        while now >= self._due:
            if self._seen < self._due - self._quarter or self._due >= self._last:
                return True
            self._due = min(self._due + self._quarter, self._last)
        return False
