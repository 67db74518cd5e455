"""Messages of a masked round as Flower records: which step, of which round, and its bytes.

A masked round is five exchanges (Bonawitz et al. 2017, figure 4). Four are queries with actions of
their own; the third is the training request itself, with the other holders' shares beside the model
and the masked vector in the reply.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from common.aggregation import Masked
from common.errors import WireError
from common.plan import TrainingPlan
from common.secagg.ring import RingVector
from common.wire import (
    ARRAYS,
    CONFIG,
    METRICS,
    WEIGHT,
    Vector,
    array_of,
    elements_of,
    only_array,
    read_plan,
    read_weight,
    round_of,
)

__all__ = [
    "STEPS",
    "MaskedReply",
    "Step",
    "StepReply",
    "StepRequest",
    "delivery_of",
    "is_masked",
    "message_type_of",
    "model_digest",
    "with_delivery",
]

Step = Literal["advertise_keys", "share_keys", "consistency_check", "unmasking"]
STEPS: tuple[Step, ...] = get_args(Step)
"""The steps that are queries, by the paper's names."""

SECAGG, BODY, MASKED = "secagg", "body", "masked"


def message_type_of(step: Step) -> str:
    """Flower's message type of a step."""
    return f"query.{step}"


@dataclass(frozen=True)
class StepRequest:
    """A step that is a query.

    Args:
        step: which.
        run_id: of the run.
        round: of the run, from 1.
        body: of the step's message; empty in the first.
        plan: in the first step only; what everything after it is bound to.
    """

    step: Step
    run_id: str
    round: int
    body: bytes = b""
    plan: TrainingPlan | None = None

    def records(self) -> RecordDict:
        """The content of the message."""
        plan = {} if self.plan is None else {"plan": self.plan.to_json()}
        config = ConfigRecord({"run-id": self.run_id, "server-round": self.round, **plan})
        return RecordDict({CONFIG: config, SECAGG: _body(self.body)})

    @classmethod
    def of(cls, message: Message) -> StepRequest:
        """Read a message.

        Raises:
            WireError: a record is missing or is not what it should be.
        """
        step = next((s for s in STEPS if message_type_of(s) == message.metadata.message_type), None)
        if step is None:
            raise WireError(f"no step is called {message.metadata.message_type[:64]!r}")
        config = message.content.get(CONFIG)
        run_id, number = round_of(config)
        plan = read_plan(config) if step == "advertise_keys" else None
        if plan is not None and number > plan.rounds:
            raise WireError(f"server-round must be in 1..{plan.rounds}, got {number}")
        return cls(step, run_id, number, _read_body(message.content), plan)


@dataclass(frozen=True)
class StepReply:
    """What a holder says in a step that is a query."""

    body: bytes

    def records(self) -> RecordDict:
        """The content of the reply."""
        return RecordDict({SECAGG: _body(self.body)})

    @classmethod
    def of(cls, content: RecordDict) -> StepReply:
        """Read a reply; raises WireError."""
        return cls(_read_body(content))


@dataclass(frozen=True)
class MaskedReply:
    """A holder's masked vector.

    Args:
        vector: [D] in the ring of the plan.
        weight: the holder's public aggregation weight.
    """

    vector: RingVector
    weight: float

    def records(self) -> RecordDict:
        """The content of the reply."""
        return RecordDict(
            {
                ARRAYS: ArrayRecord({MASKED: array_of(self.vector)}),
                METRICS: MetricRecord({WEIGHT: float(self.weight)}),
            }
        )

    @classmethod
    def of(cls, content: RecordDict, plan: TrainingPlan, aggregation: Masked) -> MaskedReply:
        """Read and validate a reply. Of what is masked only length and type can be looked at.

        Raises:
            WireError: says what is wrong with it.
        """
        wanted = aggregation.encoding(plan).dtype
        vector = elements_of(only_array(content, MASKED), np.dtype(wanted), "masked update")
        if len(vector) != aggregation.dimension:
            raise WireError(
                f"masked update: {len(vector)} numbers, the model has {aggregation.dimension}"
            )
        return cls(vector, read_weight(content, plan.largest_weight))


def with_delivery(content: RecordDict, delivery: bytes) -> RecordDict:
    """A training request with the other holders' shares beside the model."""
    return RecordDict({**content, SECAGG: _body(delivery)})


def delivery_of(content: RecordDict) -> bytes:
    """The other holders' shares in a training request; raises WireError."""
    return _read_body(content)


def model_digest(parameters: Vector) -> bytes:
    """Names the model of a round: what holders sign that they were all sent."""
    return hashlib.sha256(np.ascontiguousarray(parameters).view(np.uint8).data).digest()


def is_masked(message: Message) -> bool:
    """Whether a request belongs to a masked round."""
    return message.has_content() and SECAGG in message.content


def _body(body: bytes) -> ConfigRecord:
    return ConfigRecord({BODY: body})


def _read_body(content: RecordDict) -> bytes:
    record = content.get(SECAGG)
    body = record.get(BODY) if isinstance(record, ConfigRecord) else None
    if not isinstance(body, bytes):
        raise WireError(f"the message has no {BODY!r} (bytes) in a record {SECAGG!r}")
    return body
