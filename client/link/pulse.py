"""When a holder says that it is at work: by a clock, so that no step's duration leaves."""

from __future__ import annotations

import math

__all__ = ["LEAST_EVERY", "Pulse"]

LEAST_EVERY = 1.0
"""Seconds. A coordinator that asks for more would learn how long single steps take, and with that
how many records a random batch has: timings are data."""


class Pulse:
    """Whether to say, at the next tick of a clock, that a local step was completed.

    What leaves is one bit for each tick: whether at least one step was completed since the last
    one. Ticks are evenly spaced from the beginning of the work, whenever steps end.

    Args:
        least_every: seconds between two ticks that a coordinator gets at least.
    """

    def __init__(self, least_every: float = LEAST_EVERY) -> None:
        self._least_every = least_every
        self._every = 0.0
        self._tick = math.inf
        self._stepped = False

    def step(self) -> None:
        """A local step was completed; called on the thread that works."""
        self._stepped = True  # one word, so that no lock slows a step down

    def begin(self, every: float, now: float) -> None:
        """Work begins.

        Args:
            every: seconds between two ticks, as the coordinator asks; anything that is no positive
                number is for none.
            now: on a monotonic clock.
        """
        self._stepped = False
        asked = math.isfinite(every) and every > 0.0
        self._every = max(every, self._least_every) if asked else math.inf
        self._tick = now + self._every

    def end(self) -> None:
        """Nobody is at work."""
        self._tick = math.inf

    def wait(self, now: float) -> float | None:
        """Seconds until the next tick; None if there is none."""
        return None if self._tick == math.inf else max(0.0, self._tick - now)

    def ticked(self, now: float) -> bool:
        """Whether a tick has come since the last call at which there is something to say."""
        if now < self._tick:
            return False
        self._tick += self._every * (1 + (now - self._tick) // self._every)
        stepped, self._stepped = self._stepped, False
        return stepped
