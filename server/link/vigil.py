"""Holders that are away and owe replies: whether they may still come back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from server.link.admission import Admission, Admitted

__all__ = ["Vigil"]


class Vigil:
    """Watches the roster for holders that are not connected, on their event loop.

    A holder that is connected has its own guard; one that is revoked while it is away would
    otherwise be waited for until the deadline, although nobody can answer in its place.

    Args:
        admission: knows who may come in.
        on_barred: called with the node id, the name, and the reason for people.
    """

    def __init__(self, admission: Admission, on_barred: Callable[[int, str, str], None]) -> None:
        self._admission = admission
        self._on_barred = on_barred
        self._admitted: dict[int, Admitted] = {}
        self._watches: dict[int, asyncio.Task[None]] = {}

    def note(self, node_id: int, admitted: Admitted) -> None:
        """A holder has come in; without a certificate there is nothing to watch."""
        self.end(node_id)
        if admitted.certificate is not None:
            self._admitted[node_id] = admitted

    def begin(self, node_id: int) -> None:
        """A holder is away and owes something; nothing happens if it has never come in."""
        admitted = self._admitted.get(node_id)
        if admitted is not None and node_id not in self._watches:
            self._watches[node_id] = asyncio.create_task(self._watch(node_id, admitted))

    def end(self, node_id: int) -> None:
        """It is back, or owes nothing any more."""
        if watch := self._watches.pop(node_id, None):
            watch.cancel()

    async def _watch(self, node_id: int, admitted: Admitted) -> None:
        sentence = await self._admission.barred(admitted)
        if not self._admission.has_other(admitted):
            self._on_barred(node_id, admitted.name, sentence)
