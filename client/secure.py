"""A holder's part in masked rounds: a ClientApp mod around its answers.

The protocol itself is :mod:`common.secagg.holder`: pure states, each of which makes the next. Here
is what holds them between two requests and connects them to the holder's policy, ledger and data:

    AdvertiseKeys            allowed? this round's part not given yet?   → fresh keys, signed
    ShareKeys                who else takes part, and are they who they say?   → shares for each
    MaskedInputCollection    train (reserve … commit)   → the holder's part, masked
    ConsistencyCheck         who remained   → signed
    Unmasking                everybody signed the same?   → shares, one kind for each holder

A round lives in memory only: a holder that is started again in the middle of one has dropped out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable, Mod

from client.answers import Reply, answered
from client.holder import Holder
from common.aggregation import Masked
from common.errors import ProtocolViolation, WireError
from common.link.signing import Identity, Trust
from common.plan import TrainingPlan
from common.secagg.holder import (
    Advertised,
    ConsistencyChecked,
    MaskedInput,
    SharedKeys,
    advertise_keys,
)
from common.secagg.messages import Confirmations, Delivery, Roster, Survivors
from common.secagg.wire import (
    MaskedReply,
    Step,
    StepReply,
    StepRequest,
    delivery_of,
    is_masked,
    model_digest,
)
from common.wire import RoundRequest

__all__ = ["Participant", "masked_rounds"]

MOST_RUNS = 4
"""Runs in which a holder may be in the middle of a round; the oldest is dropped."""


def masked_rounds(find: Callable[[Context], Participant]) -> Mod:
    """A mod that answers what belongs to masked rounds, and lets everything else through.

    Args:
        find: the participant that a context speaks of.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if not is_masked(message):
            return call_next(message, context)
        return answered(message, lambda: find(context).answer(message))

    return mod


@dataclass
class _Round:
    """A masked round in progress: the states so far, each of which serves its step once.

    Args:
        number: of its run.
        advertised: serves ShareKeys; and so on for the others.
        last: digest of the request that was answered last, and its reply, for a link that delivers
            a request twice.
    """

    number: int
    advertised: Advertised
    shared: SharedKeys | None = None
    masked: MaskedInput | None = None
    checked: ConsistencyChecked | None = None
    last: tuple[bytes, Reply] | None = None

    def answered(self, digest: bytes) -> Reply | None:
        """The reply to the last request, if this is the very same."""
        return self.last[1] if self.last is not None and self.last[0] == digest else None

    def step(self, step: Step, body: bytes) -> Reply:
        """Take a step that is a query, with the state that is there for it.

        Raises:
            Refusal: the step is not due, was taken before, or breaks the protocol.
        """
        session = self.advertised.session
        match step:
            case "share_keys":
                roster = Roster.from_bytes(body, session)
                self.shared, shares = self.advertised.share_keys(roster)
                return StepReply(shares.to_bytes())
            case "consistency_check" if self.masked is not None:
                survivors = Survivors.from_bytes(body, session)
                self.checked, confirmation = self.masked.consistency_check(survivors)
                return StepReply(confirmation.to_bytes())
            case "unmasking" if self.checked is not None:
                confirmations = Confirmations.from_bytes(body, session)
                return StepReply(self.checked.unmask(confirmations).to_bytes())
            case _:
                raise _out_of_order(step)


@dataclass(frozen=True)
class _Asked:
    """Run, round and plan, before there is a model to train."""

    run_id: str
    round: int
    plan: TrainingPlan


@dataclass
class Participant:
    """A holder in masked rounds.

    Args:
        holder: whose data it is.
        identity: signs; looked up in every round, as keys are rotated under a running holder.
        trust: whom it believes.
    """

    holder: Holder
    identity: Callable[[], Identity]
    trust: Trust
    _rounds: dict[str, _Round] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def unsigned(cls, holder: Holder) -> Self:
        """With a fresh identity that nobody vouches for: simulations, plain text on loopback."""
        identity = Identity.unsigned(holder.name)
        return cls(holder, lambda: identity, Trust(None, frozenset(holder.policy.holders)))

    def answer(self, message: Message) -> Reply:
        """Answer a request of a masked round.

        Raises:
            Refusal: policy, budget or protocol do not allow it; nothing was computed.
        """
        if message.metadata.message_type == "train":
            return self._masked_input(message)
        request = StepRequest.of(message)
        digest = _digest(message.metadata.message_type, str(request.round), request.body)
        if request.step == "advertise_keys":
            return self._advertise(request, digest)
        live = self._live(request.run_id, request.round)
        reply = live.answered(digest) or live.step(request.step, request.body)
        live.last = (digest, reply)
        return reply

    # -- inside ------------------------------------------------------------------------------

    def _advertise(self, request: StepRequest, digest: bytes) -> Reply:
        plan = request.plan
        if plan is None or not isinstance(plan.aggregation, Masked):
            raise WireError("a masked round needs a plan with masked aggregation")
        live = self._rounds.get(request.run_id)
        if live is not None and live.number == request.round and (same := live.answered(digest)):
            return same
        self.holder.check_contribution(_Asked(request.run_id, request.round, plan))
        session = plan.aggregation.session(plan, request.run_id, request.round)
        identity = self.identity()
        state, advertisement = advertise_keys(session, identity, self.trust.of(identity))
        reply = StepReply(advertisement.to_bytes())
        self._rounds.pop(request.run_id, None)
        self._rounds[request.run_id] = _Round(request.round, state, last=(digest, reply))
        while len(self._rounds) > MOST_RUNS:
            del self._rounds[next(iter(self._rounds))]
        return reply

    def _masked_input(self, message: Message) -> Reply:
        request, body = RoundRequest.of(message), delivery_of(message.content)
        live = self._live(request.run_id, request.round)
        model = model_digest(request.parameters)
        digest = _digest("train", str(request.round), body, model)
        if (same := live.answered(digest)) is not None:
            return same
        state = live.shared
        if state is None or state.session.plan_digest != request.plan.digest:
            raise _out_of_order("a masked input")
        delivery = Delivery.from_bytes(body, state.session)
        received = state.receive_shares(delivery)  # before anything is charged
        contribution = self.holder.contribution(request)
        live.masked, vector = received.masked_input(contribution.vector, model)
        reply = MaskedReply(vector, contribution.weight)
        live.last = (digest, reply)
        return reply

    def _live(self, run_id: str, number: int) -> _Round:
        live = self._rounds.get(run_id)
        if live is None or live.number != number:
            raise ProtocolViolation(
                "out-of-order",
                f"round {number} has not begun here, or is over: it begins with AdvertiseKeys; a "
                "holder that was started again takes part from the next round on",
            )
        return live


def _out_of_order(step: str) -> ProtocolViolation:
    return ProtocolViolation(
        "out-of-order", f"this round is not where {step} is due; each step is taken once"
    )


def _digest(*parts: str | bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()
