"""One round of Sotto's secure aggregation in this process, with a price on everybody's part.

Every message is written and read as on the wire. What several holders of one process would share
(signatures that were checked before, a roster, Lagrange's weights) is forgotten before each turn
of a holder that is watched, and of the coordinator, so that a figure is what one machine alone
would need.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np

from common.aggregation import Masked
from common.link import signing
from common.link.signing import Identity, Trust
from common.plan import TrainingPlan
from common.secagg import coordinator, graph, roster, shamir
from common.secagg.holder import (
    Advertised,
    ConsistencyChecked,
    MaskedInput,
    SharedKeys,
    advertise_keys,
)
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
from common.secagg.wire import MaskedReply, model_digest
from common.wire import ARRAYS, Vector
from server.secure import mean_update

__all__ = ["WATCHED", "Cost", "Meter", "masked_round"]

WATCHED = 3
"""Holders whose costs are taken down."""

_Next = TypeVar("_Next")

Vectors = Callable[[int], Vector]
"""Number of a holder, from 0 → its update, [D] float32; the same each time."""


@dataclass
class Meter:
    """Processor seconds and bytes of one party, by stage; every thread of the process counts."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    sent: int = 0
    received: int = 0

    @contextmanager
    def measuring(self, stage: str) -> Iterator[None]:
        """Add what the block takes to a stage."""
        begin = time.process_time()
        try:
            yield
        finally:
            self.seconds[stage] += time.process_time() - begin

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Cost:
    """What a round took.

    Args:
        holders: of those watched.
        coordinator: of the coordinator, whose bytes are not counted.
    """

    holders: Sequence[Meter]
    coordinator: Meter


def masked_round(plan: TrainingPlan, vectors: Vectors, dropped: int = 0, number: int = 1) -> Cost:
    """A round of as many holders as the plan's cohort.

    Args:
        plan: with masked aggregation.
        vectors: the holders' updates.
        dropped: how many of them leave after ShareKeys, when that costs most.
        number: of the round.

    Raises:
        AssertionError: the sum is not exactly that of the encoded updates of who stayed.
    """
    cohort = plan.cohort or 0
    rehearsal = _Round(plan, vectors, cohort - dropped, number)
    shared = rehearsal.share_keys(rehearsal.advertise_keys())
    total = rehearsal.unmask(rehearsal.confirm(rehearsal.mask(shared)))
    expected = sum(rehearsal.encoded(place) for place in range(cohort - dropped))
    assert np.array_equal(total, cast(RingVector, expected)), "the sum is not exact"
    return Cost(list(rehearsal.watched.values()), rehearsal.meter)


class _Round:
    """Everybody's states; each method is an exchange.

    Args:
        plan: with masked aggregation.
        vectors: the holders' updates.
        staying: how many send a masked input.
        number: of the round.
    """

    def __init__(self, plan: TrainingPlan, vectors: Vectors, staying: int, number: int) -> None:
        assert isinstance(plan.aggregation, Masked), "the plan is plain"
        self.plan, self.aggregation = plan, plan.aggregation
        self.session = self.aggregation.session(plan, "benchmark", number)
        self.encoding = self.aggregation.encoding(plan)
        self.meter = Meter()
        self._vectors, self._staying = vectors, staying
        self._model = np.zeros(self.aggregation.dimension, dtype=np.float32)
        width = len(str(self.session.cohort))
        self._names = [f"holder-{place:0{width}}" for place in range(self.session.cohort)]
        self.watched = {name: Meter() for name in self._names[: min(WATCHED, staying)]}
        self._states: dict[str, Any] = {}

    def encoded(self, place: int) -> RingVector:
        """A holder's input, as :meth:`client.holder.Holder.contribution` encodes it."""
        weight = self.plan.weight(self.plan.holder_size)
        return self.encoding.encode(self._vectors(place).astype(np.float64) * weight)

    def advertise_keys(self) -> coordinator.ShareKeys:
        trust = Trust()
        stage = coordinator.AdvertiseKeys(
            self.session, self.aggregation.dimension, self.encoding.dtype, trust
        )
        identities = {name: Identity.unsigned(name) for name in self._names}

        def answer(name: str, _: bytes) -> tuple[Advertised, bytes]:
            state, message = advertise_keys(self.session, identities[name], trust)
            return state, message.to_bytes()

        self._exchange(stage, dict.fromkeys(self._names, b""), answer, Advertisement)
        return self._closed(stage, stage.close)

    def share_keys(self, stage: coordinator.ShareKeys) -> coordinator.MaskedInputCollection:
        def answer(name: str, body: bytes) -> tuple[SharedKeys, bytes]:
            state: Advertised = self._states[name]
            following, message = state.share_keys(Roster.from_bytes(body, self.session))
            return following, message.to_bytes()

        with self.meter.measuring(str(stage.stage)):
            shown = stage.roster.to_bytes()
        self._exchange(stage, dict.fromkeys(self._names, shown), answer, EncryptedShares)
        return self._closed(stage, stage.close)

    def mask(self, stage: coordinator.MaskedInputCollection) -> coordinator.ConsistencyCheck:
        label = str(stage.stage)
        for place, name in enumerate(self._names[: self._staying]):
            vector = self._vectors(place)
            with self.meter.measuring(label):
                body = stage.deliveries[name].to_bytes()
            meter = self._begin(name)
            with meter.measuring(label):
                state: SharedKeys = self._states[name]
                weight = self.plan.weight(self.plan.holder_size)
                encoded = self.encoding.encode(vector.astype(np.float64) * weight)
                delivery = Delivery.from_bytes(body, self.session)
                model = model_digest(self._model)
                self._states[name], masked = state.receive_shares(delivery).masked_input(
                    encoded, model
                )
                content = MaskedReply(masked, weight).records()
            meter.received += len(body)
            meter.sent += len(content.array_records[ARRAYS]["masked"].data)
            with self.meter.measuring(label):
                reply = MaskedReply.of(content, self.plan, self.aggregation)
                stage.receive(name, reply.vector)
        return self._closed(stage, lambda: stage.close(model_digest(self._model)))

    def confirm(self, stage: coordinator.ConsistencyCheck) -> coordinator.Unmasking:
        def answer(name: str, body: bytes) -> tuple[ConsistencyChecked, bytes]:
            state: MaskedInput = self._states[name]
            following, message = state.consistency_check(Survivors.from_bytes(body, self.session))
            return following, message.to_bytes()

        with self.meter.measuring(str(stage.stage)):
            survivors = stage.survivors.to_bytes()
        asked = dict.fromkeys(self._names[: self._staying], survivors)
        self._exchange(stage, asked, answer, Confirmation)
        return self._closed(stage, stage.close)

    def unmask(self, stage: coordinator.Unmasking) -> RingVector:
        def answer(name: str, body: bytes) -> tuple[None, bytes]:
            state: ConsistencyChecked = self._states[name]
            message = state.unmask(Confirmations.from_bytes(body, self.session))
            return None, message.to_bytes()

        label = str(stage.stage)
        with self.meter.measuring(label):
            confirmations = stage.confirmations.to_bytes()
        asked = dict.fromkeys(self._names[: self._staying], confirmations)
        self._exchange(stage, asked, answer, Unmasking)
        total = self._closed(stage, stage.close)
        with self.meter.measuring(label):
            steps = self.encoding.decode_integers(total)
            mean_update(self.plan, steps, float(self._staying))
        return total

    # -- inside ------------------------------------------------------------------------------

    def _exchange(
        self,
        stage: Any,
        bodies: Mapping[str, bytes],
        answer: Callable[[str, bytes], tuple[Any, bytes]],
        kind: Any,
    ) -> None:
        """Everybody answers; then the coordinator reads what they said."""
        label, said = str(stage.stage), {}
        for name, body in bodies.items():
            meter = self._begin(name)
            with meter.measuring(label):
                self._states[name], said[name] = answer(name, body)
            meter.received += len(body)
            meter.sent += len(said[name])
        _forget()
        with self.meter.measuring(label):
            for name, reply in said.items():
                stage.receive(name, kind.from_bytes(reply, self.session))

    def _closed(self, stage: Any, close: Callable[[], _Next]) -> _Next:
        with self.meter.measuring(str(stage.stage)):
            following = close()
        assert not stage.rejected, stage.rejected
        return following

    def _begin(self, name: str) -> Meter:
        """The meter of a holder whose turn it is."""
        if name not in self.watched:
            return Meter()
        _forget()
        return self.watched[name]


def _forget() -> None:
    """Empty what the protocol's modules remember between calls, as a fresh process would."""
    for module in (signing, roster, shamir, graph):
        for remembered in vars(module).values():
            if hasattr(remembered, "cache_clear"):
                remembered.cache_clear()
