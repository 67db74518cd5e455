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
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from common.errors import ConfigurationError, Refusal, WireError
from common.link.npy import read_header
from common.plan import TrainingPlan
from common.statistics_plan import StatisticsPlan

__all__ = [
    "ARRAYS",
    "CONFIG",
    "FAILED",
    "LOST_WITH_ITS_ROUND",
    "METRICS",
    "PARAMETERS",
    "WEIGHT",
    "EvaluateReply",
    "RoundRequest",
    "StatisticsReply",
    "StatisticsRequest",
    "TrainReply",
    "Vector",
    "array_of",
    "dropped_error",
    "elements_of",
    "error_message",
    "integers_of",
    "lost_error",
    "only_array",
    "read_plan",
    "read_weight",
    "refusal_error",
    "request_id",
    "round_of",
    "vector_of",
]

Vector = npt.NDArray[np.float32]
"""Flat float32 vector, [D]."""
Integers = npt.NDArray[np.int64]
"""Flat int64 vector, [D]."""

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
PARAMETERS, UPDATE, WEIGHT, WITHIN = "parameters", "update", "weight", "within"
CLIP_NORM = "clip-norm"
SUMS, HISTOGRAM = "sums", "histogram"
NUMPY = "numpy.ndarray"

REFUSED = 1000
"""Flower error code of a refusal; its reason is a sentence that may be shown."""
FAILED = 1001
"""Flower error code of a failure on the holder; its reason is an exception's type name."""
LOST = 1002
"""Flower error code of what the coordinator itself notes of a holder in a masked round."""


def array_of(vector: npt.NDArray[Any]) -> Array:
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
    vector: Vector = elements_of(array, np.dtype(np.float32), what)
    with np.errstate(over="ignore", invalid="ignore"):
        # One pass without a temporary; only where it overflows is every number looked at.
        suspicious = not np.isfinite(np.dot(vector, vector))
    if suspicious and not np.isfinite(vector).all():
        raise WireError(f"{what}: holds NaN or infinite values")
    return vector


def integers_of(array: Array, *, what: str) -> Integers:
    """The flat int64 vector in a Flower Array, as :func:`vector_of` reads numbers.

    Raises:
        WireError: not a flat int64 vector.
    """
    return elements_of(array, np.dtype(np.int64), what)


def elements_of(array: Array, wanted: np.dtype[Any], what: str) -> npt.NDArray[Any]:
    """The elements of a flat array of one type, in the memory of the array.

    Raises:
        WireError: it is not flat, not of that type, or shorter or longer than it says.
    """
    if array.stype != NUMPY:
        raise WireError(f"{what}: serialization {array.stype!r}, expected {NUMPY!r}")
    head = read_header(array.data, what)
    if head.dtype != wanted or len(head.shape) != 1 or head.fortran:
        raise WireError(f"{what}: {head.dtype}{list(head.shape)}, expected a flat {wanted} vector")
    given, needed = len(array.data) - head.start, wanted.itemsize * head.shape[0]
    if given != needed:
        raise WireError(f"{what}: {given} bytes, expected {needed} for {head.shape[0]} numbers")
    return np.frombuffer(array.data, dtype=wanted, offset=head.start)


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
        clip_norm: L2 bound of the whole update in this round, where holders are the unit.
    """

    run_id: str
    round: int
    plan: TrainingPlan
    parameters: Vector
    clip_norm: float | None = None

    @property
    def request_id(self) -> str:
        """Names this request in the holder's ledger; asked again, it is the same request."""
        return request_id(self.run_id, self.round)

    def arrays(self) -> ArrayRecord:
        """The parameters, as a strategy wants them."""
        return ArrayRecord({PARAMETERS: array_of(self.parameters)})

    def config(self) -> ConfigRecord:
        """Everything else."""
        clip = {} if self.clip_norm is None else {CLIP_NORM: self.clip_norm}
        return ConfigRecord(
            {"run-id": self.run_id, "server-round": self.round, "plan": self.plan.to_json(), **clip}
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
        arrays, config = only_array(message.content, PARAMETERS), message.content.get(CONFIG)
        if not isinstance(config, ConfigRecord):
            raise WireError(f"the request has no {CONFIG!r} record")
        run_id, number = round_of(config)
        parsed = read_plan(config)
        if number > parsed.rounds:
            raise WireError(f"server-round must be in 1..{parsed.rounds}, got {number}")
        clip_norm = _clip_norm(config, parsed)
        return cls(run_id, number, parsed, vector_of(arrays, what="parameters"), clip_norm)


def round_of(config: object) -> tuple[str, int]:
    """Run and round in a request's config record; raises WireError."""
    run_id, number = (
        config.get(key) if isinstance(config, ConfigRecord) else None
        for key in ("run-id", "server-round")
    )
    if not (isinstance(run_id, str) and isinstance(number, int) and number >= 1):
        raise WireError("the request needs run-id (str) and server-round (int, from 1)")
    if not _RUN_ID.fullmatch(run_id):
        raise WireError("run-id must be 1-100 letters, digits, '-' or '_'")
    return run_id, number


def read_plan(config: object) -> TrainingPlan:
    """The plan in a request's config record; raises WireError."""
    plan = config.get("plan") if isinstance(config, ConfigRecord) else None
    if not isinstance(plan, str):
        raise WireError("the request needs plan (str)")
    try:
        return TrainingPlan.from_json(plan)
    except ConfigurationError as error:
        raise WireError(f"the request's plan is not valid: {error}") from None


def _clip_norm(config: ConfigRecord, plan: TrainingPlan) -> float | None:
    """The bound that a request states, which only plans with holders as the unit have."""
    value = config.get(CLIP_NORM)
    if value is None:
        return None
    if plan.privacy.kind != "central":
        raise WireError(f"{CLIP_NORM} is for plans whose unit is the holder, got {value!r}")
    if not isinstance(value, float) or not 0 < value < math.inf:
        raise WireError(f"{CLIP_NORM} must be a positive number, got {value!r}")
    return value


_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")  # it names a folder on the holder: no dots


@dataclass(frozen=True)
class TrainReply:
    """A holder's contribution to a round.

    Args:
        update: new − old shared parameters, [D] float32.
        weight: the holder's public aggregation weight. A Grid that sums gives the weighted mean of
            several updates, and the sum of their weights.
        within: where holders are the unit, of how many of them the update needed no clipping;
            None elsewhere.
    """

    update: Vector
    weight: float
    within: int | None = None

    def records(self) -> RecordDict:
        """The content of the reply."""
        return RecordDict(
            {
                ARRAYS: ArrayRecord({UPDATE: array_of(self.update)}),
                METRICS: MetricRecord({WEIGHT: float(self.weight), **self._within()}),
            }
        )

    def _within(self) -> dict[str, int]:
        return {} if self.within is None else {WITHIN: self.within}

    @classmethod
    def of(
        cls,
        content: RecordDict,
        plan: TrainingPlan,
        dimension: int,
        *,
        holders: int = 1,
        clip_norm: float | None = None,
    ) -> TrainReply:
        """Read and validate a reply: shape, dtype, finite, norm ≤ what the plan allows.

        Args:
            content: of the reply.
            plan: of the run.
            dimension: of the shared parameters.
            holders: how many it speaks for.
            clip_norm: that the request stated, if it did.

        Raises:
            WireError: says what is wrong with it.
        """
        update = vector_of(only_array(content, UPDATE), what="update")
        if len(update) != dimension:
            raise WireError(f"update: {len(update)} parameters, the model has {dimension}")
        norm, bound = _norm(update), plan.largest_update_norm(dimension, clip_norm)
        if not norm <= bound:
            raise WireError(f"update: norm {norm:.3g} is above {bound:.3g}, the plan's bound")
        weight = read_weight(content, holders * plan.largest_weight)
        if clip_norm is None:
            return cls(update, weight)
        if weight != holders:  # bits are centred by it: a holder of less than 1 would count more
            raise WireError(f"weight: {weight!r}, expected {holders:g}, as holders weigh the same")
        return cls(update, weight, _count_within(content.get(METRICS), holders))

    def parameters(self, old: Vector) -> RecordDict:
        """The reply in the form that Flower's strategies average: new parameters, not updates."""
        return RecordDict(
            {
                ARRAYS: ArrayRecord({PARAMETERS: array_of(old + self.update)}),
                METRICS: MetricRecord({WEIGHT: self.weight}),
            }
        )


def read_weight(content: RecordDict, largest: float) -> float:
    """The aggregation weight in a reply; raises WireError."""
    metrics = content.get(METRICS)
    weight = metrics.get(WEIGHT) if isinstance(metrics, MetricRecord) else None
    if not isinstance(weight, float) or not 0 < weight <= largest:
        raise WireError(f"weight: {weight!r}, expected one in (0, {largest:g}]")
    return weight


def _count_within(metrics: object, holders: int) -> int:
    count = metrics.get(WITHIN) if isinstance(metrics, MetricRecord) else None
    if not isinstance(count, int) or not 0 <= count <= holders:
        raise WireError(f"{WITHIN}: {count!r}, expected a whole number in 0..{holders}")
    return count


@dataclass(frozen=True)
class EvaluateReply:
    """What a holder says of the model: a noised histogram where the plan pays for one, or nothing.

    Args:
        metrics: name → value; NaN where undefined. Empty unless the holder's policy says that its
            data are public.
        histogram: [cells] int64, how many held-out units are in each cell, with noise.
    """

    metrics: dict[str, float]
    histogram: Integers | None = None

    def records(self) -> RecordDict:
        """The content of the reply."""
        records = RecordDict({METRICS: MetricRecord({WEIGHT: 1.0, **self.metrics})})
        if self.histogram is not None:
            records[ARRAYS] = ArrayRecord({HISTOGRAM: array_of(self.histogram)})
        return records

    @classmethod
    def of(cls, content: RecordDict, *, cells: int = 0, largest: int = 0) -> EvaluateReply:
        """Read and validate a reply; a value that is not finite counts as undefined.

        Args:
            content: of the reply.
            cells: of the histogram that the plan asks for; 0 where it asks for none.
            largest: no honest count is beyond this, above or below 0.

        Raises:
            WireError: says what is wrong with it.
        """
        return cls(cls._metrics(content), cls._histogram(content, cells, largest))

    @staticmethod
    def _histogram(content: RecordDict, cells: int, largest: int) -> Integers | None:
        if not cells:
            if ARRAYS in content:
                raise WireError("the evaluation has an array, and the plan asks for none")
            return None
        counts = integers_of(only_array(content, HISTOGRAM), what="histogram")
        if len(counts) != cells:
            raise WireError(f"histogram: {len(counts)} counts, the task has {cells} cells")
        if not -largest <= counts.min() <= counts.max() <= largest:
            raise WireError(f"histogram: a count is beyond ±{largest}, which no honest one reaches")
        return counts

    @staticmethod
    def _metrics(content: RecordDict) -> dict[str, float]:
        record = content.get(METRICS)
        if not isinstance(record, MetricRecord) or len(record) > 100:
            raise WireError("the evaluation has no (or an oversized) metrics record")
        for name in record:
            if not _METRIC_NAME.fullmatch(name):
                raise WireError(
                    f"metric {name[:50]!r}: expected 1-50 letters, digits, '@', '.', '_' or '-'"
                )
        return {
            name: float(value) if math.isfinite(value) else math.nan
            for name, value in record.items()
            if name != WEIGHT and isinstance(value, int | float)
        }


_METRIC_NAME = re.compile(r"[A-Za-z0-9@._-]{1,50}")  # it is shown: nothing a terminal acts on


@dataclass(frozen=True)
class StatisticsRequest:
    """What the coordinator asks of a holder about its rows: once in a run of its own.

    Args:
        run_id: names the exchange.
        plan: the whole, public plan.
    """

    round: ClassVar[int] = 1

    run_id: str
    plan: StatisticsPlan

    @property
    def request_id(self) -> str:
        """Names this request in the holder's ledger; asked again, it is the same request.

        No training run has such a name: there are no dots in a run's.
        """
        return request_id(f"{self.run_id}.statistics", self.round)

    def records(self) -> RecordDict:
        """The content of the message."""
        config = ConfigRecord({"run-id": self.run_id, "statistics-plan": self.plan.to_json()})
        return RecordDict({CONFIG: config})

    @classmethod
    def of(cls, message: Message) -> StatisticsRequest:
        """Read a message.

        Raises:
            WireError: a record is missing or is not what it should be.
        """
        config = message.content.get(CONFIG)
        if not isinstance(config, ConfigRecord):
            raise WireError(f"the request has no {CONFIG!r} record")
        run_id, plan = config.get("run-id"), config.get("statistics-plan")
        if not (isinstance(run_id, str) and isinstance(plan, str)):
            raise WireError("the request needs run-id (str) and statistics-plan (str)")
        if not _RUN_ID.fullmatch(run_id):
            raise WireError("run-id must be 1-100 letters, digits, '-' or '_'")
        try:
            return cls(run_id, StatisticsPlan.from_json(plan))
        except ConfigurationError as error:
            raise WireError(f"the request's plan is not valid: {error}") from None


@dataclass(frozen=True)
class StatisticsReply:
    """A holder's noised sums.

    Args:
        sums: [D] int64; see :class:`common.privacy.statistics.Layout`.
    """

    LARGEST: ClassVar[int] = 2**53

    sums: Integers

    def records(self) -> RecordDict:
        """The content of the reply."""
        return RecordDict({ARRAYS: ArrayRecord({SUMS: array_of(self.sums)})})

    @classmethod
    def of(cls, content: RecordDict, dimension: int) -> StatisticsReply:
        """Read and validate a reply.

        Args:
            content: of the reply.
            dimension: of the plan's layout.

        Raises:
            WireError: says what is wrong with it.
        """
        sums = integers_of(only_array(content, SUMS), what="sums")
        if len(sums) != dimension:
            raise WireError(f"sums: {len(sums)} numbers, the plan's answer has {dimension}")
        # abs() of the least int64 is itself.
        if len(sums) and not -cls.LARGEST <= sums.min() <= sums.max() <= cls.LARGEST:
            raise WireError(f"sums: a number is beyond ±{cls.LARGEST}, which no honest sum reaches")
        return cls(sums)


def refusal_error(refusal: Refusal) -> Error:
    """A refusal as it travels: its rule and its sentence."""
    return Error(REFUSED, f"{refusal.code}: {refusal.sentence}")


def lost_error(why: str) -> Error:
    """What the coordinator notes of holders that did their part in a round that came to nothing."""
    return Error(LOST, LOST_WITH_ITS_ROUND + why)


LOST_WITH_ITS_ROUND = "lost: "
"""How :func:`error_message` begins where a holder did its part and its round came to nothing."""


def dropped_error(why: str) -> Error:
    """What the coordinator notes of a holder that dropped out of a masked round."""
    return Error(LOST, why)


def error_message(error: Error) -> str:
    """An error reply as the coordinator shows it.

    Only a refusal's text is shown, and our own: any other could hold data that a holder did not
    mean to send. It is one line of at most 300 printable characters, that a terminal can show.
    """
    reason = error.reason or ""
    if error.code == REFUSED:
        message = f"declined: {reason}"
    elif error.code == LOST:
        message = reason
    else:
        message = f"failed: {reason if reason.isidentifier() else f'error {error.code}'}"
    return "".join(filter(str.isprintable, message))[:300]


def _norm(vector: Vector) -> float:
    with np.errstate(over="ignore"):
        return float(np.linalg.norm(vector))


def only_array(content: RecordDict, name: str) -> Array:
    """The array of a message that has just one; raises WireError."""
    record = content.get(ARRAYS)
    if not isinstance(record, ArrayRecord) or list(record) != [name]:
        raise WireError(f"expected one array {name!r} in the record {ARRAYS!r}")
    return record[name]
