"""What travels is checked: every broken reply is named, none reaches a strategy."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from common.errors import Refusal, WireError
from common.flower import set_identity
from common.plan import TrainingPlan
from common.settings import plan_for
from common.statistics_plan import statistics_plan_for
from common.wire import (
    FAILED,
    REFUSED,
    EvaluateReply,
    RoundRequest,
    StatisticsRequest,
    TrainReply,
    array_of,
    error_message,
    integers_of,
    refusal_error,
    vector_of,
)
from tests.tiny import TinyTask

D = 4


@pytest.fixture(scope="module")
def plan() -> TrainingPlan:
    return plan_for(TinyTask(), {"epsilon": 5.0})


def request_message(content: RecordDict) -> Message:
    set_identity(1)
    return Message(content, 2, "train")


@given(arrays(np.float32, st.integers(0, 50), elements=st.floats(-1e6, 1e6, width=32)))
def test_vectors_travel_exactly(vector: np.ndarray) -> None:
    array = array_of(vector)
    assert np.array_equal(vector_of(array, what="v"), vector)
    assert np.array_equal(array.numpy(), vector), "Flower reads our bytes as its own"


def test_flowers_own_arrays_are_read() -> None:
    vector = np.arange(5, dtype=np.float32)
    assert np.array_equal(vector_of(Array(vector), what="v"), vector)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (Array(np.zeros((2, 2), np.float32)), "flat"),
        (Array(np.zeros(4, np.float64)), "float64"),
        (Array("float32", (4,), "numpy.ndarray", b"nonsense"), "not an npy"),
        (Array("float32", (4,), "pickle", b"nonsense"), "serialization"),
        (
            Array("float32", (4,), "numpy.ndarray", array_of(np.zeros(4, np.float32)).data[:-4]),
            "12 bytes, expected 16",
        ),
        (Array(np.array([1, np.nan], np.float32)), "NaN"),
        (Array(np.array([1, np.inf], np.float32)), "infinite"),
    ],
)
def test_bad_vectors_are_named(array: Array, says: str) -> None:
    with pytest.raises(WireError, match=says):
        vector_of(array, what="v")


def test_large_finite_vectors_pass_although_their_square_overflows() -> None:
    vector = np.full(3, 3e38, np.float32)
    assert np.array_equal(vector_of(array_of(vector), what="v"), vector)


def test_a_request_round_trips(plan: TrainingPlan) -> None:
    sent = RoundRequest("run-1", 2, plan, np.arange(D, dtype=np.float32))
    got = RoundRequest.of(request_message(sent.records()))
    assert (got.run_id, got.round, got.plan) == ("run-1", 2, plan)
    assert np.array_equal(got.parameters, sent.parameters)
    assert got.request_id == "run-1/000002"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"run-id": "../../etc"}, "run-id"),
        ({"run-id": ""}, "run-id"),
        ({"run-id": ".."}, "run-id"),
        ({"run-id": "a" * 101}, "run-id"),
        ({"server-round": 0}, "server-round"),
        ({"server-round": 99}, "server-round"),
        ({"plan": "{}"}, "plan"),
        ({"plan": "]"}, "plan"),
    ],
)
def test_a_malformed_request_is_refused(
    plan: TrainingPlan, changes: dict[str, str | int], says: str
) -> None:
    request = RoundRequest("run-1", 1, plan, np.zeros(D, np.float32))
    config = ConfigRecord({**request.config(), **changes})
    content = RecordDict({"arrays": request.arrays(), "config": config})
    with pytest.raises(WireError, match=says):
        RoundRequest.of(request_message(content))


def test_a_reply_round_trips_and_becomes_parameters(plan: TrainingPlan) -> None:
    update = np.array([0.5, -1, 0, 2], np.float32)
    reply = TrainReply.of(TrainReply(update, 1.0).records(), plan, D)
    assert np.array_equal(reply.update, update)
    old = np.ones(D, np.float32)
    (array,) = reply.parameters(old).array_records["arrays"].values()
    assert np.array_equal(array.numpy(), old + update)


def reply(update: np.ndarray, weight: float | int = 1.0) -> RecordDict:
    return RecordDict(
        {
            "arrays": ArrayRecord({"update": Array(update)}),
            "metrics": MetricRecord({"weight": weight}),
        }
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (reply(np.zeros(D + 1, np.float32)), "5 parameters, the model has 4"),
        (reply(np.full(D, 1e9, np.float32)), "above"),
        (reply(np.full(D, np.nan, np.float32)), "NaN"),
        (reply(np.zeros(D, np.float32), 0.0), "weight"),
        (reply(np.zeros(D, np.float32), 1e9), "weight"),
        (reply(np.zeros(D, np.float32), float("nan")), "weight"),
        (RecordDict(), "one array 'update'"),
        (RecordDict({"arrays": ArrayRecord({"update": Array(np.zeros(D, np.float32))})}), "weight"),
    ],
)
def test_a_bad_reply_is_named(plan: TrainingPlan, content: RecordDict, says: str) -> None:
    with pytest.raises(WireError, match=says):
        TrainReply.of(content, plan, D)


def test_evaluations_round_trip_nan_included() -> None:
    got = EvaluateReply.of(EvaluateReply({"auc": float("nan"), "accuracy": 0.5}).records())
    assert got.metrics["accuracy"] == 0.5
    assert np.isnan(got.metrics["auc"])


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_an_infinite_metric_is_undefined(value: float) -> None:
    got = EvaluateReply.of(EvaluateReply({"auc": value, "hr@10": 1.0}).records())
    assert np.isnan(got.metrics["auc"])
    assert got.metrics["hr@10"] == 1.0


@pytest.mark.parametrize("name", ["", "a b", "auc\n", "\x1b[2J", "[/x]", "é", "a" * 51])
def test_a_metric_with_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(WireError, match="expected 1-50 letters") as caught:
        EvaluateReply.of(EvaluateReply({name: 0.5}).records())
    assert str(caught.value).isprintable()


def test_a_long_and_rich_metric_name_passes() -> None:
    name = "NDCG@10_macro.v-2".ljust(50, "x")
    assert EvaluateReply.of(EvaluateReply({name: 0.5}).records()).metrics == {name: 0.5}


COUNTS = np.array([3, -2, 40], dtype=np.int64)


def test_a_noised_histogram_round_trips() -> None:
    got = EvaluateReply.of(EvaluateReply({}, COUNTS).records(), cells=3, largest=40)
    assert got.metrics == {}
    assert got.histogram is not None
    assert got.histogram.tolist() == [3, -2, 40]


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        (COUNTS[:2], "2 counts, the task has 3 cells"),
        (COUNTS + 1, "beyond ±40"),
        (COUNTS - 43, "beyond ±40"),
        (np.array([0, 0, np.iinfo(np.int64).min]), "beyond ±40"),
        (COUNTS.astype(np.float32), "expected a flat int64 vector"),
        (COUNTS.astype(np.int32), "expected a flat int64 vector"),
        (COUNTS.reshape(3, 1), "expected a flat int64 vector"),
    ],
)
def test_a_histogram_that_no_honest_holder_sends_is_named(counts: np.ndarray, says: str) -> None:
    content = EvaluateReply({}).records()
    content["arrays"] = ArrayRecord({"histogram": Array(counts)})
    with pytest.raises(WireError, match=says):
        EvaluateReply.of(content, cells=3, largest=40)


def test_a_histogram_is_sent_if_and_only_if_it_is_asked_for() -> None:
    with pytest.raises(WireError, match="asks for none"):
        EvaluateReply.of(EvaluateReply({}, COUNTS).records())
    with pytest.raises(WireError, match="one array 'histogram'"):
        EvaluateReply.of(EvaluateReply({}).records(), cells=3, largest=40)


def test_only_a_refusals_text_is_shown() -> None:
    refusal = refusal_error(Refusal("budget", "1.20 of 5.00 is left"))
    assert error_message(refusal) == "declined: budget: 1.20 of 5.00 is left"
    assert error_message(Error(FAILED, "ValueError")) == "failed: ValueError"
    leaky = Error(FAILED, "patient 17 has x=3")
    assert "patient" not in error_message(leaky)


@pytest.mark.parametrize("code", [REFUSED, FAILED])
@given(st.text() | st.text("a\n\x1b\x9b\u202e", min_size=500))
def test_an_error_is_one_short_printable_line(code: int, reason: str) -> None:
    message = error_message(Error(code, reason))
    assert message.isprintable()
    assert len(message) <= 300


def test_control_characters_leave_an_error_readable() -> None:
    assert error_message(Error(REFUSED, "\x1b[2Jbudget: \r\nspent\x07")) == (
        "declined: [2Jbudget: spent"
    )
    assert error_message(Error(FAILED, "E" * 1000)) == "failed: " + "E" * 292


# -- statistics -----------------------------------------------------------------------------------


@given(arrays(np.int64, st.integers(0, 50), elements=st.integers(-(2**63), 2**63 - 1)))
def test_whole_numbers_travel_exactly(vector: np.ndarray) -> None:
    array = array_of(vector)
    assert np.array_equal(integers_of(array, what="v"), vector)
    assert np.array_equal(array.numpy(), vector), "Flower reads our bytes as its own"


def test_whole_numbers_are_not_taken_for_parameters_nor_these_for_them() -> None:
    with pytest.raises(WireError, match="expected a flat int64 vector"):
        integers_of(array_of(np.zeros(3, np.float32)), what="v")
    with pytest.raises(WireError, match="expected a flat float32 vector"):
        vector_of(array_of(np.zeros(3, np.int64)), what="v")


def test_a_request_for_statistics_says_everything() -> None:
    asked = StatisticsRequest("run-1", statistics_plan_for(TinyTask(), 1.0))
    assert StatisticsRequest.of(request_message(asked.records())) == asked


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"run-id": "../up"}, "run-id must be"),
        ({"run-id": "a.statistics"}, "run-id must be"),
        ({"run-id": 3}, r"run-id \(str\)"),
        ({"statistics-plan": "{}"}, "plan is not valid"),
        ({"statistics-plan": "nonsense"}, "plan is not valid"),
    ],
)
def test_a_broken_request_for_statistics_is_refused(changed: dict[str, object], says: str) -> None:
    content = StatisticsRequest("run", statistics_plan_for(TinyTask(), 1.0)).records()
    content["config"].update(changed)
    with pytest.raises(WireError, match=says):
        StatisticsRequest.of(request_message(content))
    with pytest.raises(WireError, match="no 'config' record"):
        StatisticsRequest.of(request_message(RecordDict()))


# -- where holders are the unit -------------------------------------------------------------------


@pytest.fixture(scope="module")
def central() -> TrainingPlan:
    return plan_for(TinyTask(), {"unit": "holder", "epsilon": 5.0, "clip_norm": 0.5}, holders=9)


def long(norm: float, weight: float = 1.0, within: int | None = 1) -> RecordDict:
    update = np.full(D, norm / D**0.5, np.float32)
    return TrainReply(update, weight, within).records()


def test_a_clipped_update_and_its_bit_round_trip(central: TrainingPlan) -> None:
    for norm, within in ((0.5, 1), (2.0, 0)):
        got = TrainReply.of(long(norm, within=within), central, D, clip_norm=norm)
        assert np.linalg.norm(got.update) == pytest.approx(norm)
        assert got.within == within
    several = TrainReply.of(long(0.1, 7.0, 5), central, D, holders=7, clip_norm=0.5)
    assert (several.weight, several.within) == (7.0, 5)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (long(0.501), "norm 0.501 is above 0.5"),
        (long(0.1, within=None), "within: None, expected a whole number in 0..1"),
        (long(0.1, within=2), "within: 2"),
        (long(0.1, within=-1), "within: -1"),
        (long(0.1, weight=0.5), "weight: 0.5, expected 1"),
        (long(0.1, weight=2.0), "weight: 2.0"),
    ],
)
def test_what_would_move_the_sum_or_the_bits_by_more_is_named(
    central: TrainingPlan, content: RecordDict, says: str
) -> None:
    with pytest.raises(WireError, match=says):
        TrainReply.of(content, central, D, clip_norm=0.5)


def test_a_request_states_the_bound_of_its_round(central: TrainingPlan, plan: TrainingPlan) -> None:
    parameters = np.zeros(D, np.float32)
    for clip_norm in (0.25, None):
        request = RoundRequest("run", 1, central, parameters, clip_norm)
        assert RoundRequest.of(request_message(request.records())).clip_norm == clip_norm
    with pytest.raises(WireError, match="for plans whose unit is the holder"):
        RoundRequest.of(request_message(RoundRequest("run", 1, plan, parameters, 0.25).records()))
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        request = RoundRequest("run", 1, central, parameters, wrong)
        with pytest.raises(WireError, match="must be a positive number"):
            RoundRequest.of(request_message(request.records()))
