"""Contents that are well-formed and wrong: what mutated bytes seldom get as far as.

Records of every kind under the names that the contract knows, with values and arrays of every type:
each reader gives a value or a WireError.
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import WireError
from common.link.npy import DTYPES
from common.secagg.wire import StepReply
from common.statistics_plan import StatisticsPlan
from common.wire import EvaluateReply, RoundRequest, StatisticsReply, StatisticsRequest, TrainReply
from tests.fuzz.decoders import (
    CELLS,
    DIMENSION,
    SUMS,
    message,
    plan,
    read_masked,
    read_step,
    statistics_plan,
)

READERS = {
    "round request": lambda content: RoundRequest.of(message(content)),
    "train reply": lambda content: TrainReply.of(content, plan(), DIMENSION),
    "train reply, central": lambda content: TrainReply.of(
        content, plan(), DIMENSION, clip_norm=1.0
    ),
    "evaluate reply": lambda content: EvaluateReply.of(content, cells=CELLS, largest=1000),
    "evaluate reply, none": EvaluateReply.of,
    "statistics request": lambda content: StatisticsRequest.of(message(content)),
    "statistics reply": lambda content: StatisticsReply.of(content, SUMS),
    "masked reply": read_masked,
    "secagg step": read_step,
    "secagg step's reply": StepReply.of,
}

NUMBERS = (0, 1, -1, 2**63 - 1, -(2**63), 0.0, -0.0, 0.5, 1.0, 5e-324, 1e308, np.inf, -np.inf)


def plan_texts() -> st.SearchStrategy[str]:
    """Plans, honest ones among them, with one value of the JSON replaced."""
    honest: list[str] = [plan().to_json(), statistics_plan().to_json()]
    values = ("null", "[]", "{}", "-1", "1e999", "NaN", '"x"', "9" * 400)
    return st.tuples(st.sampled_from(honest), st.sampled_from(values), st.integers(0, 40)).map(
        lambda parts: _replaced(*parts)
    ) | st.sampled_from(honest)


def _replaced(text: str, value: str, place: int) -> str:
    head, *fields = text.split(":")
    place %= max(1, len(fields))
    rest = fields[place].partition(",")[1:]
    fields[place] = value + "".join(rest)
    return ":".join((head, *fields))


floats = st.sampled_from((*map(float, NUMBERS), float("nan")))
integers = st.sampled_from([number for number in NUMBERS if isinstance(number, int)])
scalars = st.one_of(floats, integers)
metrics = st.one_of(scalars, st.lists(floats, max_size=3), st.lists(integers, max_size=3))
configs = st.one_of(
    metrics,
    st.booleans(),
    st.binary(max_size=20),
    st.sampled_from(["run-1", "", "..", "a" * 101, "\x00", "r/1"]),
    plan_texts(),
)
arrays = hnp.arrays(
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from([(), (0,), (CELLS,), (DIMENSION,), (SUMS,), (2, 2), (1, DIMENSION)]),
).map(Array)

array_names = st.sampled_from(["parameters", "update", "histogram", "sums", "masked", "other"])
value_names = st.sampled_from(
    [
        *("run-id", "server-round", "plan", "statistics-plan", "clip-norm", "weight", "within"),
        *("body", "accuracy", "a" * 60, "\x1b[2J"),
    ]
)
records = st.one_of(
    st.dictionaries(array_names, arrays, max_size=2).map(ArrayRecord),
    st.dictionaries(value_names, configs, max_size=4).map(ConfigRecord),
    st.dictionaries(value_names, metrics, max_size=4).map(MetricRecord),
)
contents = st.dictionaries(
    st.sampled_from(["arrays", "config", "metrics", "secagg", "other"]), records, max_size=4
).map(RecordDict)


@settings(max_examples=150)
@given(content=contents)
@pytest.mark.parametrize("name", READERS)
def test_every_content_is_read_or_refused(name: str, content: RecordDict) -> None:
    with suppress(WireError):
        READERS[name](content)


def test_honest_contents_are_read() -> None:
    vector = np.zeros(DIMENSION, np.float32)
    assert READERS["round request"](RoundRequest("r", 1, plan(), vector).records())
    assert READERS["train reply"](TrainReply(vector, 1.0).records())
    assert READERS["evaluate reply"](EvaluateReply({}, np.zeros(CELLS, int)).records())
    assert READERS["statistics reply"](StatisticsReply(np.zeros(SUMS, int)).records())
    request = StatisticsRequest("r", statistics_plan())
    assert isinstance(READERS["statistics request"](request.records()).plan, StatisticsPlan)
