"""How many streams each identity may have open: one that works, and a few that come or go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Crowded", "Door"]


class Crowded(Exception):
    """An identity has as many streams open as it may."""


class Door:
    """Counts streams by identity, from the first byte to the last.

    A stream that waits for its Hello, or that another has replaced, can hold a megabyte of what
    its peer has sent. So there are few of each identity, however often it connects.

    Args:
        most: streams of one identity at the same time.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: Counter[str] = Counter()

    @contextmanager
    def entered(self, identity: str) -> Iterator[None]:
        """Have one stream more while the block runs.

        Raises:
            Crowded: there are as many as there may be.
        """
        if self._open[identity] >= self._most:
            raise Crowded
        self._open[identity] += 1
        try:
            yield
        finally:
            self._open[identity] -= 1
            if not self._open[identity]:
                del self._open[identity]
