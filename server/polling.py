"""Flower's own Grid, asked without waiting as ours are asked."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

from flwr.app import Message
from flwr.serverapp import Grid

from common.flower import Around

__all__ = ["PollingGrid"]

POLL = 0.5
"""Seconds between two looks for replies."""


class PollingGrid(Around):
    """Gives a Grid that is not ours the deadlines of one that is; it has to be asked for replies.

    Args:
        grid: Flower's.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self._ends: dict[str, float] = {}

    def push_messages(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[str]:
        """Ask through the other Grid, which returns at once."""
        keys = list(self._grid.push_messages(messages))
        end = math.inf if timeout is None else time.monotonic() + timeout
        self._ends |= dict.fromkeys(keys, end)
        return keys

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies that were found while waiting."""
        keys = list(message_ids)
        self._look(keys)
        return super().pull_messages(keys)

    def wait(self, message_ids: Iterable[str], timeout: float) -> None:
        """Look again and again."""
        keys, end = list(message_ids), time.monotonic() + timeout
        while not self._look(keys) and (left := end - time.monotonic()) > 0:
            if any(self._ends[key] <= time.monotonic() for key in keys if key in self._ends):
                return
            time.sleep(min(POLL, left))

    def overdue(self, message_ids: Iterable[str]) -> list[str]:
        """Requests whose time is over; the other Grid drops what nobody pulls."""
        now = time.monotonic()
        over = [key for key in list(message_ids) if self._ends.get(key, math.inf) <= now]
        self.forget(over)
        return over

    def forget(self, message_ids: Iterable[str]) -> None:
        """Want no reply any more."""
        for key in list(message_ids):
            self._ends.pop(key, None)
            self._replies.pop(key, None)

    def _look(self, keys: list[str]) -> bool:
        """Take what has come; whether there is anything."""
        for reply in self._grid.pull_messages([key for key in keys if key in self._ends]):
            key = reply.metadata.reply_to_message_id
            if self._ends.pop(key, None) is not None:
                self._replies[key] = reply
        return any(key in self._replies for key in keys)
