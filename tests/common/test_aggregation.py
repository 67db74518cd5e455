"""What a plan says of aggregation: thresholds, rings, and what does not go together."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.aggregation import MOST_COMPLETE, Masked, Ring, SecureSum, fewest_survivors, masking
from common.errors import ConfigurationError
from common.plan import TrainingPlan
from common.secagg.ring import Encoding
from common.settings import plan_for
from tests.tiny import TinyTask

TASK = TinyTask()


def masked(kind: str = "secure", holders: int = 4, **chosen: object) -> TrainingPlan:
    return plan_for(TASK, {"aggregation": kind, "epsilon": 2.0, **chosen}, holders=holders)


def aggregation_of(plan: TrainingPlan) -> Masked:
    assert isinstance(plan.aggregation, Masked)
    return plan.aggregation


@pytest.mark.parametrize("kind", ["secure", "secure-sum"])
def test_a_masked_plan_knows_who_takes_part(kind: str) -> None:
    plan = masked(kind, holders=10)
    assert (plan.cohort, plan.min_holders) == (10, 7)
    assert aggregation_of(plan).dimension == 4, "three weights and a bias"
    assert TrainingPlan.from_json(plan.to_json()) == plan
    assert TrainingPlan.from_toml(plan.to_toml()) == plan


@given(st.integers(2, MOST_COMPLETE))
def test_fewer_than_a_third_may_drop_out(cohort: int) -> None:
    fewest = masking(cohort, None)["min_holders"]
    assert fewest == fewest_survivors(cohort)
    assert Fraction(cohort - fewest, cohort) < Fraction(1, 3)
    # Bonawitz et al. 2017, section 6.2: 2t > n + c for any coalition of c < n/3 holders.
    assert 2 * fewest > cohort + (cohort - 1) // 3


@pytest.mark.parametrize(
    ("cohort", "dropouts", "fewest"),
    [(8, None, 6), (8, 0.0, 8), (8, 0.25, 6), (10, 0.1, 9), (3, None, 3), (2, None, 2)],
)
def test_dropouts_set_the_threshold(cohort: int, dropouts: float | None, fewest: int) -> None:
    assert masking(cohort, dropouts) == {"min_holders": fewest}


@pytest.mark.parametrize("dropouts", [0.5, 0.34, -0.1, 1.0, float("nan"), float("inf")])
def test_more_dropouts_than_can_be_borne_are_refused(dropouts: float) -> None:
    with pytest.raises(ConfigurationError, match="below a third"):
        masking(9, dropouts)


def test_a_large_cohort_has_neighbours() -> None:
    plan = masked(holders=200)
    aggregation = aggregation_of(plan)
    assert (plan.cohort, plan.min_holders) == (200, 180)
    assert aggregation.neighbours is not None
    assert aggregation.share_threshold is not None
    assert aggregation.neighbours / 2 < aggregation.share_threshold < aggregation.neighbours < 180


def test_a_sum_of_one_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least 2 holders"):
        masked(holders=1)


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({"min_holders": 2}, "min_holders must be at least 3, more than two thirds of cohort=4"),
        ({"aggregation": "masked"}, "aggregation must be 'plain', 'secure' or 'secure-sum'"),
        ({"coalition": 1}, "coalition is for noise that is in the sum only"),
        ({"unit": "holder"}, "aggregation must be 'plain' with privacy 'central'"),
        ({"aggregation": "plain", "dropouts": 0.1}, "dropouts is for masked sums"),
    ],
)
def test_what_does_not_go_together_is_refused(chosen: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        masked(**{"kind": "secure", **chosen})  # type: ignore[arg-type]
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({"local_steps": 2}, "local_steps must be 1 with aggregation 'secure-sum'"),
        ({"batch_size": 5}, "sampling_rate must be 1.0"),
        ({"optimizer": "adam"}, "optimizer must be 'sgd'"),
        ({"weighting": "size"}, "weighting must be 'equal'"),
        ({"coalition": 3}, "coalition must be at most 1"),
    ],
)
def test_a_round_of_secure_sum_is_one_step_over_all(chosen: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        masked("secure-sum", **chosen)
    assert says in str(refused.value)


def test_without_privacy_there_is_no_noise_to_put_into_a_sum() -> None:
    with pytest.raises(ConfigurationError, match="it needs an epsilon"):
        plan_for(TASK, {"aggregation": "secure-sum", "no_dp": True}, holders=4)
    plan = plan_for(TASK, {"aggregation": "secure", "no_dp": True}, holders=4)
    assert plan.privacy.kind == "none"


@given(
    kind=st.sampled_from(["secure", "secure-sum"]),
    holders=st.integers(2, 60),
    epsilon=st.sampled_from([0.1, 1.0, 10.0]),
    clip=st.floats(1e-3, 1e3),
    rate=st.floats(1e-3, 10),
)
def test_no_honest_sum_can_overflow(
    kind: str, holders: int, epsilon: float, clip: float, rate: float
) -> None:
    plan = masked(kind, holders, epsilon=epsilon, clip_norm=clip, learning_rate=rate)
    aggregation = aggregation_of(plan)
    encoding = aggregation.encoding(plan)
    assert encoding.holders == holders
    assert holders * encoding.largest <= Encoding.most(encoding.width)
    assert aggregation._bound(plan) <= encoding.largest * encoding.step


def test_a_plan_with_a_ring_that_is_too_narrow_is_refused() -> None:
    plan = masked()
    ring = aggregation_of(plan).ring
    assert ring is not None
    for changed, says in (
        ({"largest": ring.largest // 2}, "ring.largest must be at least"),
        ({"largest": 2**31}, "could overflow a ring of 32 bits"),
    ):
        values = plan.model_dump()
        values["aggregation"]["ring"] |= changed
        with pytest.raises(ValueError, match=says):
            TrainingPlan.model_validate(values)


def test_a_ring_is_as_narrow_as_it_may_be() -> None:
    assert Ring.fine(2.0**-20, 100.0, 8).width == 32
    assert Ring.fine(2.0**-30, 100.0, 8).width == 64
    with pytest.raises(ConfigurationError, match="does not fit 64 bits"):
        Ring.fine(2.0**-60, 1e6, 8)


def test_noise_in_a_sum_needs_a_masked_sum() -> None:
    """The gravest mistake: a share of noise in an update that the coordinator sees."""
    values = masked("secure-sum").model_dump()
    for kind in ("plain", "secure"):
        aggregation = {"kind": kind} if kind == "plain" else {"kind": kind, "dimension": 4}
        with pytest.raises(ValueError, match="secure-sum"):
            TrainingPlan.model_validate({**values, "aggregation": aggregation})


def test_a_coalition_makes_every_share_larger() -> None:
    def share(coalition: int) -> float:
        plan = masked("secure-sum", 10, coalition=coalition)
        assert isinstance(plan.aggregation, SecureSum)
        assert plan.privacy.kind == "distributed"
        return plan.privacy.share(plan)

    # Variances of min_holders − c = 7 − c holders add up to the same.
    for coalition in (0, 1, 2, 3, 6):
        assert share(coalition) ** 2 * (7 - coalition) == pytest.approx(share(0) ** 2 * 7)


def test_a_threshold_is_set_once() -> None:
    with pytest.raises(ConfigurationError, match="give one of them"):
        masked("secure", 10, dropouts=0.1, min_holders=8)


def test_no_plan_claims_to_withstand_more_helpers_than_its_masks_do() -> None:
    """n = 10, t = 7: with 4 helpers (2t - n) single vectors may be seen, each with a share only."""
    plan = masked("secure-sum", 10, coalition=3)
    assert aggregation_of(plan).tolerated_helpers(plan) == 3
    with pytest.raises(ConfigurationError, match="coalition"):
        masked("secure-sum", 10, coalition=4)
