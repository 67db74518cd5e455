"""A Grid that learns sums: the coordinator's side of masked rounds, around another Grid.

The strategy asks each holder to train and sees one reply that speaks for all of them. In between
lie the protocol's five exchanges (:mod:`common.secagg.coordinator`):

    AdvertiseKeys           → each holder's fresh keys, signed
    ShareKeys               the roster            → shares of its secrets, for each of the others
    MaskedInputCollection   the model, and shares → its part, masked
    ConsistencyCheck        who remained          → a signature of just these
    Unmasking               everybody's signature → shares that undo what the masks left in the sum

Whoever stays silent, declines or breaks the contract in one of them has dropped out. As long as
the plan's ``min_holders`` remain, the sum of those whose part arrived comes out, exactly; with
fewer the round is lost, and the summary says why of each holder.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from flwr.app import Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from common.aggregation import Masked
from common.errors import AggregationFailed, WireError
from common.flower import Around, BaseGrid, holder_name, stamp
from common.link.signing import Trust
from common.plan import TrainingPlan
from common.privacy import distributed
from common.secagg import coordinator, messages
from common.secagg.messages import Advertisement, Confirmation, EncryptedShares, Unmasking
from common.secagg.ring import RingVector
from common.secagg.wire import (
    MaskedReply,
    Step,
    StepReply,
    StepRequest,
    message_type_of,
    model_digest,
    with_delivery,
)
from common.wire import RoundRequest, TrainReply, Vector, dropped_error, lost_error

__all__ = ["TRAINING_SHARE", "SecureGrid", "mean_update", "secured"]

LIGHT_SHARE = 0.1
"""Each exchange but the one in which holders train may take this share of the round's deadline."""

TRAINING_SHARE = 1 - 2 * LIGHT_SHARE
"""When that one ends two are still to come, whose time waiting for a holder must not cost; not even
where the Grid gives a holder that makes progress more time than it was asked to."""


def secured(grid: Grid, plan: TrainingPlan) -> Grid:
    """The Grid that a plan's aggregation asks for, around one that reaches holders."""
    sums = isinstance(grid, BaseGrid) and grid.sums_unseen
    return grid if sums or plan.aggregation.kind == "plain" else SecureGrid(grid, plan)


class SecureGrid(Around):
    """Gives the weighted mean of a cohort's updates, and no update.

    Args:
        grid: reaches the holders.
        plan: with masked aggregation.
    """

    def __init__(self, grid: Grid, plan: TrainingPlan) -> None:
        super().__init__(grid)
        self._plan = plan
        self._speaks_for: WeakKeyDictionary[Message, Sequence[int]] = WeakKeyDictionary()

    @property
    def sums_unseen(self) -> bool:
        """That is what it is for."""
        return True

    def answered_by(self, reply: Message) -> Sequence[int]:
        """The holders whose sum a reply is."""
        return self._speaks_for.get(reply, [reply.metadata.src_node_id])

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Training requests get one reply for all that remained, and an error for each other one.

        Everything else goes through as it is.
        """
        asked = list(messages)
        if not asked or asked[0].metadata.message_type != MessageType.TRAIN:
            return list(self._grid.send_and_receive(asked, timeout=timeout))
        for message in asked:
            stamp(message, message.metadata.message_id or None)
        seconds = self._plan.round_deadline if timeout is None else timeout
        masked = _MaskedRound(self._grid, self._plan, asked, seconds)
        try:
            nodes, update = masked.run()
        except AggregationFailed as error:
            return masked.errors(lost_error(str(error)))
        reply = Message(update.records(), reply_to=masked.asked[nodes[0]])
        self._speaks_for[reply] = nodes
        return [reply, *masked.errors(without=nodes)]


def mean_update(plan: TrainingPlan, steps: npt.NDArray[np.int64], weight: float) -> Vector:
    """What a strategy sees of a sum: the weighted mean of updates, or one step on everybody's data.

    Args:
        plan: with masked aggregation.
        steps: the sum over holders, in steps of the ring: [D].
        weight: the sum of their weights.
    """
    if plan.privacy.kind == "distributed":
        return distributed.mean_update(steps, round(weight), plan)
    ring = _masked(plan).encoding(plan)
    return np.asarray(steps * (ring.step / weight), dtype=np.float32)


def _masked(plan: TrainingPlan) -> Masked:
    assert isinstance(plan.aggregation, Masked)  # whoever is here has looked
    return plan.aggregation


_Kind = TypeVar("_Kind", bound=messages.Message)
_Taken = TypeVar("_Taken", contravariant=True)


class _Stage(Protocol[_Taken]):
    """A stage of the protocol, as far as collecting goes."""

    rejected: dict[str, str]

    def receive(self, name: str, message: _Taken) -> None:
        """Take a holder's message."""
        ...


@dataclass
class _MaskedRound:
    """One masked round, from a strategy's training requests to the sum.

    Args:
        grid: reaches the holders.
        plan: with masked aggregation.
        messages: the strategy's, one for each holder of the cohort.
        timeout: seconds for everything.
        dropped: node → why its holder is not in the sum, or did not stay to the end.
    """

    grid: Grid
    plan: TrainingPlan
    messages: Sequence[Message]
    timeout: float
    dropped: dict[int, Error] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.asked = {message.metadata.dst_node_id: message for message in self.messages}
        self._request = RoundRequest.of(self.messages[0])
        self._session = _masked(self.plan).session(
            self.plan, self._request.run_id, self._request.round
        )
        self._deadline = time.monotonic() + self.timeout
        self._names: dict[int, str] = {}
        self._weights: dict[int, float] = {}

    def run(self) -> tuple[list[int], TrainReply]:
        """All five exchanges.

        Returns:
            Nodes of the holders that are in the sum, ascending, and their weighted mean.

        Raises:
            AggregationFailed: too few remained, or their shares do not fit together.
        """
        shared = self._share_keys(self._advertise_keys())
        summed = self._masked_inputs(shared)
        inside = summed.survivors.names
        survivors = [node for node, name in self._names.items() if name in inside]
        total = self._unmask(self._consistency_check(summed))
        weight = sum(self._weights[node] for node in survivors)
        steps = _masked(self.plan).encoding(self.plan).decode_integers(total)
        return sorted(survivors), TrainReply(mean_update(self.plan, steps, weight), weight)

    def errors(self, others: Error | None = None, without: Iterable[int] = ()) -> list[Message]:
        """An error for each holder that dropped out, and ``others`` for all the others.

        Args:
            others: None for no reply.
            without: nodes that are in the sum; they may have left before the end.
        """
        errors = dict.fromkeys(self.asked, others) | self.dropped
        return [
            Message(why, reply_to=self.asked[node])
            for node, why in errors.items()
            if why is not None and node not in set(without)
        ]

    # -- the five exchanges ------------------------------------------------------------------

    def _advertise_keys(self) -> coordinator.ShareKeys:
        aggregation = _masked(self.plan)
        authority = self.grid.authority if isinstance(self.grid, BaseGrid) else None
        stage = coordinator.AdvertiseKeys(
            self._session,
            aggregation.dimension,
            aggregation.encoding(self.plan).dtype,
            Trust(authority),
        )
        # Its holders' names are what they show, unless the Grid knows better.
        known = isinstance(self.grid, BaseGrid)
        for node, body in self._query("advertise_keys", dict.fromkeys(self.asked, b"")).items():
            advertisement = self._decoded(node, Advertisement, body)
            if advertisement is not None:
                name = holder_name(self.grid, node) if known else advertisement.name
                if name in self._names.values():
                    self._drop(node, f"reply rejected: there is another {name!r} already")
                    continue
                self._names[node] = name
                stage.receive(name, advertisement)
        self._note(stage.rejected)
        return stage.close()

    def _share_keys(self, stage: coordinator.ShareKeys) -> coordinator.MaskedInputCollection:
        roster = stage.roster.to_bytes()
        self._collect("share_keys", dict.fromkeys(self._remaining, roster), EncryptedShares, stage)
        return stage.close()

    def _masked_inputs(
        self, stage: coordinator.MaskedInputCollection
    ) -> coordinator.ConsistencyCheck:
        requests = []
        for node in self._remaining:
            asked, delivery = self.asked[node], stage.deliveries[self._names[node]]
            content = with_delivery(asked.content, delivery.to_bytes())
            requests.append(Message(content, node, asked.metadata.message_type))
        left = self._deadline - time.monotonic()
        timeout = max(0.0, left - (1 - TRAINING_SHARE) * self.timeout)
        for node, content in self._exchange(requests, timeout).items():
            try:
                reply = MaskedReply.of(content, self.plan, _masked(self.plan))
            except WireError as error:
                self._drop(node, f"reply rejected: {error}")
            else:
                self._weights[node] = reply.weight
                stage.receive(self._names[node], reply.vector)
        self._note(stage.rejected)
        return stage.close(model_digest(self._request.parameters))

    def _consistency_check(self, stage: coordinator.ConsistencyCheck) -> coordinator.Unmasking:
        survivors = stage.survivors.to_bytes()
        bodies = dict.fromkeys(self._remaining, survivors)
        self._collect("consistency_check", bodies, Confirmation, stage)
        return stage.close()

    def _unmask(self, stage: coordinator.Unmasking) -> RingVector:
        confirmations = stage.confirmations.to_bytes()
        bodies = dict.fromkeys(self._remaining, confirmations)
        self._collect("unmasking", bodies, Unmasking, stage)
        total = stage.close()
        self._note(stage.rejected)
        return total

    # -- inside ------------------------------------------------------------------------------

    @property
    def _remaining(self) -> list[int]:
        return sorted(self._names.keys() - self.dropped.keys())

    def _collect(
        self,
        step: Step,
        bodies: Mapping[int, bytes],
        kind: type[_Kind],
        stage: _Stage[_Kind],
    ) -> None:
        """Ask everybody who remains, and hand what they say to the stage."""
        for node, body in self._query(step, bodies).items():
            message = self._decoded(node, kind, body)
            if message is not None:
                stage.receive(self._names[node], message)
        self._note(stage.rejected)

    def _query(self, step: Step, bodies: Mapping[int, bytes]) -> dict[int, bytes]:
        """Node → body of what each holder says in a step that is a query."""
        run_id, number = self._request.run_id, self._request.round
        plan = self.plan if step == "advertise_keys" else None
        # Who is sent the same gets the same object, which the link encodes once.
        contents = {
            body: StepRequest(step, run_id, number, body, plan).records()
            for body in set(bodies.values())
        }
        kind = message_type_of(step)
        requests = [Message(contents[body], node, kind) for node, body in bodies.items()]
        found: dict[int, bytes] = {}
        for node, content in self._exchange(requests, LIGHT_SHARE * self.timeout).items():
            try:
                found[node] = StepReply.of(content).body
            except WireError as error:
                self._drop(node, f"reply rejected: {error}")
        return found

    def _exchange(self, requests: Sequence[Message], timeout: float) -> dict[int, RecordDict]:
        """Node → content of each reply, by ascending node; everybody else has dropped out."""
        found: dict[int, RecordDict] = {}
        replies = list(self.grid.send_and_receive(requests, timeout=timeout))
        # A Grid may give ids of its own; Flower's error replies carry the coordinator's node id.
        nodes = {each.metadata.message_id: each.metadata.dst_node_id for each in requests}
        for reply in replies:
            node = nodes.get(reply.metadata.reply_to_message_id)
            if node is None:
                continue
            if reply.has_error():
                self.dropped[node] = reply.error
            else:
                found[node] = reply.content
        asked = {each.metadata.dst_node_id for each in requests}
        for node in sorted(asked - found.keys() - self.dropped.keys()):
            self._drop(node, f"no reply within {timeout:.3g} s")
        return {node: found[node] for node in sorted(found)}

    def _decoded(self, node: int, kind: type[_Kind], body: bytes) -> _Kind | None:
        """A message, unless it cannot be read: then its holder has dropped out."""
        try:
            return kind.from_bytes(body, self._session)
        except WireError as error:
            self._drop(node, f"reply rejected: {error}")
            return None

    def _note(self, rejected: Mapping[str, str]) -> None:
        """Take down whose messages a stage did not take."""
        for node, name in self._names.items():
            if name in rejected and node not in self.dropped:
                self._drop(node, f"reply rejected: {rejected[name]}")

    def _drop(self, node: int, why: str) -> None:
        self.dropped[node] = dropped_error(why)
