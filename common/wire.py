"""The message contract: typed requests and replies ↔ Flower records, and nothing unchecked.

A model travels as one flat float32 vector of its shared parameters, because many small objects
are what makes stock transports slow. Replies are validated here, before any strategy sees them:
a bad reply costs its holder the round, not the run.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from common.errors import ConfigurationError, Refusal, WireError
from common.plan import TrainingPlan

__all__ = [
    "ARRAYS",
    "CONFIG",
    "FAILED",
    "METRICS",
    "PARAMETERS",
    "WEIGHT",
    "EvaluateReply",
    "RoundRequest",
    "TrainReply",
    "Vector",
    "array_of",
    "error_message",
    "refusal_error",
    "request_id",
    "vector_of",
]

Vector = npt.NDArray[np.float32]
"""Flat float32 vector, [D]."""

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
PARAMETERS, UPDATE, WEIGHT = "parameters", "update", "weight"
NUMPY = "numpy.ndarray"

REFUSED = 1000
"""Flower error code of a refusal; its reason is a sentence that may be shown."""
FAILED = 1001
"""Flower error code of a failure on the holder; its reason is an exception's type name."""


def array_of(vector: Vector) -> Array:
    """A Flower Array of a flat vector, with one copy instead of ``np.save``'s three."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, np.lib.format.header_data_from_array_1_0(vector))
    data = b"".join((buffer.getvalue(), np.ascontiguousarray(vector).view(np.uint8).data))
    return Array(dtype=str(vector.dtype), shape=vector.shape, stype=NUMPY, data=data)


def vector_of(array: Array, *, what: str) -> Vector:
    """The flat float32 vector in a Flower Array, without a copy and without pickle.

    Args:
        array: from a record.
        what: names the vector in errors.

    Raises:
        WireError: not a finite, flat float32 vector.
    """
    if array.stype != NUMPY:
        raise WireError(f"{what}: serialization {array.stype!r}, expected {NUMPY!r}")
    head = io.BytesIO(array.data[:1024])
    try:
        version = np.lib.format.read_magic(head)
        if version != (1, 0):
            raise ValueError(f"npy version {version}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(head)
    except ValueError as error:
        raise WireError(f"{what}: not an npy array ({error})") from None
    if dtype != np.float32 or len(shape) != 1 or fortran:
        raise WireError(f"{what}: {dtype}{list(shape)}, expected a flat float32 vector")
    if len(array.data) - head.tell() != 4 * shape[0]:
        raise WireError(
            f"{what}: {len(array.data) - head.tell()} bytes, expected {4 * shape[0]} "
            f"for {shape[0]} numbers"
        )
    vector: Vector = np.frombuffer(array.data, dtype=np.float32, offset=head.tell())
    with np.errstate(over="ignore", invalid="ignore"):
        # One pass without a temporary; only where it overflows is every number looked at.
        suspicious = not np.isfinite(np.dot(vector, vector))
    if suspicious and not np.isfinite(vector).all():
        raise WireError(f"{what}: holds NaN or infinite values")
    return vector


def request_id(run_id: str, number: int) -> str:
    """The name of round ``number`` of a run in a holder's ledger and among its answers."""
    return f"{run_id}/{number:06d}"


@dataclass(frozen=True)
class RoundRequest:
    """What the coordinator asks of a holder, to train or to evaluate.

    Args:
        run_id: names the run; the same in every round of it.
        round: 1-based.
        plan: the whole, public plan.
        parameters: of the shared part, [D] float32.
    """

    run_id: str
    round: int
    plan: TrainingPlan
    parameters: Vector

    @property
    def request_id(self) -> str:
        """Names this request in the holder's ledger; asked again, it is the same request."""
        return request_id(self.run_id, self.round)

    def arrays(self) -> ArrayRecord:
        """The parameters, as a strategy wants them."""
        return ArrayRecord({PARAMETERS: array_of(self.parameters)})

    def config(self) -> ConfigRecord:
        """Everything else."""
        return ConfigRecord(
            {"run-id": self.run_id, "server-round": self.round, "plan": self.plan.to_json()}
        )

    def records(self) -> RecordDict:
        """The content of the message."""
        return RecordDict({ARRAYS: self.arrays(), CONFIG: self.config()})

    @classmethod
    def of(cls, message: Message) -> RoundRequest:
        """Read a message.

        Raises:
            WireError: a record is missing or is not what it should be.
        """
        arrays, config = _only_array(message.content, PARAMETERS), message.content.get(CONFIG)
        if not isinstance(config, ConfigRecord):
            raise WireError(f"the request has no {CONFIG!r} record")
        run_id, number, plan = (config.get(key) for key in ("run-id", "server-round", "plan"))
        if not (isinstance(run_id, str) and isinstance(number, int) and isinstance(plan, str)):
            raise WireError("the request needs run-id (str), server-round (int) and plan (str)")
        if not _RUN_ID.fullmatch(run_id):
            raise WireError("run-id must be 1-100 letters, digits, '-' or '_'")
        try:
            parsed = TrainingPlan.from_json(plan)
        except ConfigurationError as error:
            raise WireError(f"the request's plan is not valid: {error}") from None
        if not 1 <= number <= parsed.rounds:
            raise WireError(f"server-round must be in 1..{parsed.rounds}, got {number}")
        return cls(run_id, number, parsed, vector_of(arrays, what="parameters"))


_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")  # it names a folder on the holder: no dots


@dataclass(frozen=True)
class TrainReply:
    """A holder's contribution to a round.

    Args:
        update: new − old shared parameters, [D] float32.
        weight: the holder's public aggregation weight. A Grid that sums gives the weighted mean of
            several updates, and the sum of their weights.
    """

    update: Vector
    weight: float

    def records(self) -> RecordDict:
        """The content of the reply."""
        return RecordDict(
            {
                ARRAYS: ArrayRecord({UPDATE: array_of(self.update)}),
                METRICS: MetricRecord({WEIGHT: float(self.weight)}),
            }
        )

    @classmethod
    def of(
        cls, content: RecordDict, plan: TrainingPlan, dimension: int, *, holders: int = 1
    ) -> TrainReply:
        """Read and validate a reply: shape, dtype, finite, norm ≤ what the plan allows.

        Args:
            content: of the reply.
            plan: of the run.
            dimension: of the shared parameters.
            holders: how many it speaks for.

        Raises:
            WireError: says what is wrong with it.
        """
        update = vector_of(_only_array(content, UPDATE), what="update")
        if len(update) != dimension:
            raise WireError(f"update: {len(update)} parameters, the model has {dimension}")
        norm, bound = _norm(update), plan.largest_update_norm(dimension)
        if not norm <= bound:
            raise WireError(f"update: norm {norm:.3g} is above {bound:.3g}, the plan's bound")
        metrics = content.get(METRICS)
        weight = metrics.get(WEIGHT) if isinstance(metrics, MetricRecord) else None
        largest = holders * plan.largest_weight
        if not isinstance(weight, float) or not 0 < weight <= largest:
            raise WireError(f"weight: {weight!r}, expected one in (0, {largest:g}]")
        return cls(update, weight)

    def parameters(self, old: Vector) -> RecordDict:
        """The reply in the form that Flower's strategies average: new parameters, not updates."""
        return RecordDict(
            {
                ARRAYS: ArrayRecord({PARAMETERS: array_of(old + self.update)}),
                METRICS: MetricRecord({WEIGHT: self.weight}),
            }
        )


@dataclass(frozen=True)
class EvaluateReply:
    """What a holder says of the model: nothing, unless its policy shares exact metrics.

    Args:
        metrics: name → value; NaN where undefined. Empty unless shared.
    """

    metrics: dict[str, float]

    def records(self) -> RecordDict:
        """The content of the reply."""
        return RecordDict({METRICS: MetricRecord({WEIGHT: 1.0, **self.metrics})})

    @classmethod
    def of(cls, content: RecordDict) -> EvaluateReply:
        """Read and validate a reply; a value that is not finite counts as undefined.

        Raises:
            WireError: says what is wrong with it.
        """
        record = content.get(METRICS)
        if not isinstance(record, MetricRecord) or len(record) > 100:
            raise WireError("the evaluation has no (or an oversized) metrics record")
        for name in record:
            if not _METRIC_NAME.fullmatch(name):
                raise WireError(
                    f"metric {name[:50]!r}: expected 1-50 letters, digits, '@', '.', '_' or '-'"
                )
        metrics = {
            name: float(value) if math.isfinite(value) else math.nan
            for name, value in record.items()
            if name != WEIGHT and isinstance(value, int | float)
        }
        return cls(metrics)


_METRIC_NAME = re.compile(r"[A-Za-z0-9@._-]{1,50}")  # it is shown: nothing a terminal acts on


def refusal_error(refusal: Refusal) -> Error:
    """A refusal as it travels: its rule and its sentence."""
    return Error(REFUSED, f"{refusal.code}: {refusal.sentence}")


def error_message(error: Error) -> str:
    """An error reply as the coordinator shows it.

    Only a refusal's text is shown: any other text could hold data that a holder did not mean
    to send. It is one line of at most 300 printable characters, so that a terminal can show it.
    """
    reason = error.reason or ""
    if error.code == REFUSED:
        message = f"declined: {reason}"
    else:
        message = f"failed: {reason if reason.isidentifier() else f'error {error.code}'}"
    return "".join(filter(str.isprintable, message))[:300]


def _norm(vector: Vector) -> float:
    with np.errstate(over="ignore"):
        return float(np.linalg.norm(vector))


def _only_array(content: RecordDict, name: str) -> Array:
    record = content.get(ARRAYS)
    if not isinstance(record, ArrayRecord) or list(record) != [name]:
        raise WireError(f"expected one array {name!r} in the record {ARRAYS!r}")
    return record[name]
