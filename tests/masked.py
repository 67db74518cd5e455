"""Masked rounds with real holders in this process, a step at a time, so that a test can cheat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.app import build_app
from client.holder import Holder
from client.policy import Policy
from client.secure import Participant
from client.state import HolderState
from common.aggregation import Masked
from common.flower import set_identity, stamp
from common.link.signing import Identity, Trust
from common.plan import TrainingPlan
from common.privacy.ledger import Budget
from common.secagg.messages import Advertisement, Confirmation, EncryptedShares, Roster
from common.secagg.session import Session
from common.secagg.wire import (
    MaskedReply,
    Step,
    StepReply,
    StepRequest,
    message_type_of,
    with_delivery,
)
from common.settings import plan_for
from common.tasks.base import HolderData
from common.tasks.parameters import initial_parameters
from common.wire import RoundRequest, error_message
from tests.tiny import TinyTask, table

TASK = TinyTask()
NAMES = ("a", "b", "c", "d")


class Declined(Exception):
    """What a holder says instead of an answer, e.g. ``declined: threshold: …``."""


def masked_plan(
    kind: str = "secure", holders: int = len(NAMES), **settings: object
) -> TrainingPlan:
    chosen = {"aggregation": kind, "epsilon": 2.0, "rounds": 5, **settings}
    if chosen.get("no_dp"):
        del chosen["epsilon"]
    return plan_for(TASK, chosen, holders=holders)


def clinic(
    name: str,
    state: HolderState | None = None,
    *,
    identity: Identity | None = None,
    pins: frozenset[str] = frozenset(),
    **rules: object,
) -> Participant:
    """A holder of 40 rows that allows every level of aggregation."""
    seed = sum(name.encode())
    data = HolderData(TASK.examples(table(40, seed)), TASK.examples(table(20, seed + 1)))
    policy = Policy.model_validate(
        {
            "data_set": "patients",
            "budget": Budget(50.0, 1e-4),
            "size_class": 40,
            "aggregation": ("plain", "secure", "secure-sum"),
            "unprotected": True,
            **rules,
        }
    )
    holder = Holder(name, TASK, data, policy, state or HolderState.in_memory(), torch.device("cpu"))
    own = identity or Identity.unsigned(name)
    return Participant(holder, lambda: own, Trust(None, pins))


@dataclass
class Round:
    """A coordinator's round, each step of which may be taken as a test likes.

    Args:
        holders: by name.
        plan: masked.
        number: of the round.
        run: of the run.
    """

    holders: Mapping[str, Participant]
    plan: TrainingPlan = field(default_factory=masked_plan)
    number: int = 1
    run: str = "run"

    def __post_init__(self) -> None:
        set_identity(1)
        self._apps: dict[str, ClientApp] = {
            name: build_app(lambda _, one=one: one) for name, one in self.holders.items()
        }
        self.parameters = initial_parameters(TASK, 0)

    @property
    def aggregation(self) -> Masked:
        assert isinstance(self.plan.aggregation, Masked)
        return self.plan.aggregation

    @property
    def session(self) -> Session:
        return self.aggregation.session(self.plan, self.run, self.number)

    @property
    def request(self) -> RoundRequest:
        return RoundRequest(self.run, self.number, self.plan, self.parameters)

    def send(self, name: str, content: RecordDict, kind: str) -> RecordDict:
        """Raises Declined if there is no answer."""
        message = Message(content, 2, kind)
        stamp(message)
        reply = self._apps[name](message, Context(1, 2, {}, RecordDict(), {}))
        if reply.has_error():
            raise Declined(error_message(reply.error))
        return reply.content

    def step(self, name: str, step: Step, body: bytes = b"") -> bytes:
        plan = self.plan if step == "advertise_keys" else None
        request = StepRequest(step, self.run, self.number, body, plan)
        return StepReply.of(self.send(name, request.records(), message_type_of(step))).body

    # -- the steps, as an honest coordinator takes them ------------------------------------------

    def advertise(self, *names: str) -> Roster:
        names = names or tuple(self.holders)
        shown = (
            Advertisement.from_bytes(self.step(n, "advertise_keys"), self.session) for n in names
        )
        return Roster(tuple(sorted(shown, key=lambda one: one.name)))

    def share(self, roster: Roster, *names: str) -> dict[str, EncryptedShares]:
        body = roster.to_bytes()
        return {
            name: EncryptedShares.from_bytes(self.step(name, "share_keys", body), self.session)
            for name in names or tuple(self.holders)
        }

    def masked(self, name: str, delivery: bytes) -> MaskedReply:
        content = with_delivery(self.request.records(), delivery)
        reply = self.send(name, content, "train")
        return MaskedReply.of(reply, self.plan, self.aggregation)

    def confirm(self, name: str, survivors: bytes) -> Confirmation:
        body = self.step(name, "consistency_check", survivors)
        return Confirmation.from_bytes(body, self.session)


def deliveries(shares: Mapping[str, EncryptedShares]) -> dict[str, dict[str, bytes]]:
    """Recipient → sender → box, of everybody who shared."""
    return {
        name: {sender: own.boxes[name] for sender, own in shares.items() if sender != name}
        for name in shares
    }


def contribution(participant: Participant, one: Round) -> np.ndarray:
    """What the holder would send without a mask, for plans without noise."""
    update, _ = participant.holder.trainer.train(
        one.plan,
        torch.tensor(one.parameters),
        None,
        participant.holder.randomness(one.request),
        divisor=one.plan.divisor(40),
    )
    return update.numpy()
