"""A round of secure aggregation in one process; holders drop out where they are told to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.link.signing import Identity, Trust
from common.secagg import coordinator as coordinating
from common.secagg import holder as holding
from common.secagg.messages import (
    Advertisement,
    Confirmation,
    Confirmations,
    Delivery,
    EncryptedShares,
    Roster,
    Survivors,
    Unmasking,
)
from common.secagg.ring import RingVector
from common.secagg.session import Session, Stage

TRUST = Trust()


def session_of(cohort: int, threshold: int | None = None, **fields: Any) -> Session:
    threshold = max(2, 2 * cohort // 3 + 1) if threshold is None else threshold
    return Session("run", "digest", fields.pop("round", 1), threshold, cohort, **fields)


def names_of(cohort: int) -> list[str]:
    return [f"holder-{i:04d}" for i in range(cohort)]


def identities_of(cohort: int) -> list[Identity]:
    return [Identity.unsigned(name) for name in names_of(cohort)]


def seeded(*parts: object) -> Callable[[int], bytes]:
    """Randomness that repeats, for tests of what is sent."""
    state = hashlib.shake_256(repr(parts).encode())
    at = 0

    def draw(count: int) -> bytes:
        nonlocal at
        at += count
        return state.digest(at)[-count:]

    return draw


@dataclass
class Round:
    """An honest coordinator and honest holders, stage by stage.

    Args:
        session: of the round.
        inputs: holder → its encoded vector.
        drops: holder → the first stage at which it stays silent.
        wire: write and read every message on its way.
        tamper: changes what a holder sends, by stage.
    """

    session: Session
    inputs: Mapping[str, RingVector]
    drops: Mapping[str, Stage] = field(default_factory=dict)
    identities: Mapping[str, Identity] = field(default_factory=dict)
    wire: bool = True
    tamper: Mapping[tuple[str, Stage], Callable[[Any], Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.holders = dict(self.identities) or {n: Identity.unsigned(n) for n in self.inputs}
        vector = next(iter(self.inputs.values()))
        self.advertise = coordinating.AdvertiseKeys(self.session, len(vector), vector.dtype, TRUST)
        self.states: dict[str, Any] = dict.fromkeys(self.holders)
        self.rejected: Mapping[str, str] = {}

    def run(self) -> RingVector:
        return self.unmask(self.check(self.mask(self.share(self.advertised()))))

    def advertised(self) -> coordinating.ShareKeys:
        stage = self.advertise
        for name in self._present(stage):
            self.states[name], sent = holding.advertise_keys(
                self.session, self.holders[name], TRUST
            )
            self._send(stage, name, sent, Advertisement)
        return stage.close()

    def share(self, stage: coordinating.ShareKeys) -> coordinating.MaskedInputCollection:
        roster = self._over_the_wire(stage.roster, Roster)
        for name in self._present(stage):
            self.states[name], sent = self.states[name].share_keys(roster)
            self._send(stage, name, sent, EncryptedShares)
        return stage.close()

    def mask(self, stage: coordinating.MaskedInputCollection) -> coordinating.ConsistencyCheck:
        for name in self._present(stage):
            delivery = self._over_the_wire(stage.deliveries[name], Delivery)
            self.states[name], sent = (
                self.states[name].receive_shares(delivery).masked_input(self.inputs[name])
            )
            self._send(stage, name, sent, None)
        return stage.close()

    def check(self, stage: coordinating.ConsistencyCheck) -> coordinating.Unmasking:
        survivors = self._over_the_wire(stage.survivors, Survivors)
        for name in self._present(stage):
            self.states[name], sent = self.states[name].consistency_check(survivors)
            self._send(stage, name, sent, Confirmation)
        return stage.close()

    def unmask(self, stage: coordinating.Unmasking) -> RingVector:
        confirmations = self._over_the_wire(stage.confirmations, Confirmations)
        for name in self._present(stage):
            self._send(stage, name, self.states[name].unmask(confirmations), Unmasking)
        total = stage.close()
        self.rejected = stage.rejected
        return total

    def _present(self, stage: Any) -> Sequence[str]:
        order = list(Stage)
        silent = {
            name
            for name, first in self.drops.items()
            if order.index(first) <= order.index(stage.stage)
        }
        asked = self.holders if stage.expected is None else stage.expected
        return [name for name in self.holders if name in asked and name not in silent]

    def _send(self, stage: Any, name: str, message: Any, kind: Any) -> None:
        change = self.tamper.get((name, stage.stage), lambda sent: sent)
        message = change(message)
        stage.receive(name, message if kind is None else self._over_the_wire(message, kind))
        self.rejected = stage.rejected

    def _over_the_wire(self, message: Any, kind: Any) -> Any:
        return kind.from_bytes(message.to_bytes(), self.session) if self.wire else message


def vectors(names: Sequence[str], dimension: int, dtype: Any, seed: int = 0) -> dict[str, Any]:
    """Uniform ring elements for every holder."""
    generator = np.random.default_rng(seed)
    top = np.iinfo(dtype).max
    return {
        name: generator.integers(0, top, dimension, dtype=dtype, endpoint=True) for name in names
    }


def total_of(inputs: Mapping[str, Any], names: Sequence[str]) -> Any:
    """What the sum in the ring must be."""
    total = np.zeros_like(next(iter(inputs.values())))
    for name in names:
        total += inputs[name]
    return total
