"""The plan refuses what cannot work, says why, and cannot disagree with its own accountant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigurationError
from common.guarantees import CentralPrivacy, Privacy
from common.plan import TrainingPlan, fits_size_class
from common.privacy.accounting import epsilon
from common.privacy.noise import SeededRandomness
from common.settings import SETTINGS, plan_for
from common.tasks import load
from common.tasks.scaling import InputScaling, scaling_text
from tests.tiny import TinyTask


def test_a_plan_costs_what_it_promises() -> None:
    plan = plan_for(TinyTask(), {"epsilon": 2.0, "rounds": 7, "local_steps": 3})
    spent = epsilon(plan.composition(), plan.privacy.delta)
    assert spent <= 2.0
    assert spent > 1.98, "calibration wastes less than a hundredth"


def test_rounds_compose_to_the_run() -> None:
    plan = plan_for(TinyTask(), {"epsilon": 2.0, "rounds": 5, "batch_size": 10})
    one_round = epsilon(plan.composition(), 1e-4)
    by_hand = epsilon(type(plan.composition()).of(plan.round_event()) * 5, 1e-4)
    assert one_round == by_hand


def test_asking_only_some_holders_claims_no_amplification() -> None:
    """The coordinator sees whom it asks, so a cohort must cost what asking everyone costs."""
    everyone = plan_for(TinyTask(), {"epsilon": 2.0})
    some = plan_for(TinyTask(), {"epsilon": 2.0, "cohort": 1})
    assert some.composition() == everyone.composition()
    assert some.privacy == everyone.privacy


def test_without_privacy_epsilon_is_infinite() -> None:
    plan = plan_for(TinyTask(), {"no_dp": True})
    assert plan.privacy.kind == "none"
    assert epsilon(plan.composition(), 1e-4) == float("inf")


def test_both_forms_round_trip() -> None:
    for chosen in ({"epsilon": 1.0}, {"no_dp": True, "cohort": 5, "strategy": "krum"}):
        plan = plan_for(TinyTask(), chosen)
        assert TrainingPlan.from_json(plan.to_json()) == plan
        assert TrainingPlan.from_toml(plan.to_toml()) == plan
        assert TrainingPlan.from_toml(plan.to_toml()).digest == plan.digest


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"clip_norm": -1.0}, r"clip_norm: .*greater than or equal to 0.000001, got -1.0"),
        ({"epsilon": 0.0}, r"ε|epsilon"),
        ({"delta": 2.0}, "delta"),
        ({"rounds": 0}, "rounds"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"batch_size": "many"}, "batch_size must be a positive number or 'full', got 'many'"),
        ({"batch_size": -3}, "batch_size"),
        ({"cohort": 1, "min_holders": 2}, "cohort must be at least min_holders=2"),
        ({"epsilon": 1.0, "no_dp": True}, "contradict"),
        ({"epsilom": 1.0}, r"no setting 'epsilom'. Did you mean 'epsilon'\? There are: rounds"),
        ({"optimizer": "lion"}, "optimizer"),
    ],
)
def test_errors_name_field_value_and_bound(setting: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        plan_for(TinyTask(), setting)


def test_a_run_goes_on_although_calibration_changed_a_little() -> None:
    plan = plan_for(TinyTask(), {"epsilon": 2.0})
    sigma = {"noise_multiplier": (plan.privacy.noise_multiplier or 0) * (1 + 1e-12)}  # type: ignore[union-attr]
    later = plan.model_copy(update={"privacy": plan.privacy.model_copy(update=sigma)})
    assert later.digest != plan.digest
    assert not later.differences(plan)
    (difference,) = plan_for(TinyTask(), {"epsilon": 2.1, "rounds": plan.rounds}).differences(plan)
    assert difference.startswith("privacy is ")


def test_every_setting_is_understood(tmp_path: Path) -> None:
    """A name in SETTINGS that plan_for drops silently would be a flag that does nothing."""
    scaling = tmp_path / "scaling.toml"
    scaling.write_text(scaling_text([InputScaling(input="x", shift=(1.0,), scale=(2.0,))], ""))
    values: dict[str, object] = {
        "optimizer": "adam", "weighting": "size", "batch_size": 7,
        "epsilon": 3.3, "delta": 3e-5, "holder_size": 77, "momentum": 0.3,
        "trim": 0.11, "average_from": 0.7, "server_momentum": 0.7,
        "evaluate": "every 2", "scaling": scaling,
    }  # fmt: skip
    central: dict[str, object] = {
        "unit": "holder", "clipping": "adaptive", "mechanism": "banded", "bands": 2,
    }  # fmt: skip
    masked: dict[str, object] = {"aggregation": "secure-sum", "dropouts": 0.0, "coalition": 2}
    rounds: dict[str, object] = {"cohort": 9, "over_selection": 0.5}
    buffered: dict[str, object] = {"strategy": "fedbuff", "buffer": 2, "max_staleness": 3}
    default = plan_for(TinyTask(), {})
    together = {**central, **masked, **rounds, **buffered}
    for name in set(SETTINGS) - {"no_dp", "evaluation_epsilon", *together}:
        assert plan_for(TinyTask(), {name: values.get(name, 2)}) != default, name

    priced = plan_for(load("medical-diagnosis"), {"evaluation_epsilon": 2})  # a task with cells
    assert priced != plan_for(load("medical-diagnosis"), {"evaluate": "final"})
    for names in (
        ("unit", "clipping"),
        ("unit", "mechanism", "bands"),
        ("aggregation", "dropouts"),
        ("aggregation", "coalition"),
        ("cohort", "over_selection"),
        ("strategy", "buffer"),
        ("strategy", "max_staleness"),
    ):
        for count, name in enumerate(names):
            without = {known: together[known] for known in names[:count]}
            with_it = {**without, name: together[name]}
            one, other = (plan_for(TinyTask(), each, holders=9) for each in (with_it, without))
            assert one != other, name


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    units=st.integers(0, 1600),
    steps=st.integers(1, 4),
    momentum=st.sampled_from([0.0, 0.5]),
    epsilon=st.sampled_from([0.5, 8.0]),
)
def test_no_honest_update_passes_the_norm_bound(
    seed: int, units: int, steps: int, momentum: float, epsilon: float
) -> None:
    """Units as many as there may be, every gradient at the clip and in one direction."""
    plan = plan_for(
        TinyTask(), {"epsilon": epsilon, "local_steps": steps, "momentum": momentum, "rounds": 2}
    )
    assert isinstance(plan.privacy, Privacy)
    assert plan.admits(plan.holder_size * 10)
    assert fits_size_class(units, plan.holder_size * 10)
    dimension, randomness = 20, SeededRandomness(seed)
    velocity, update = np.zeros(dimension), np.zeros(dimension)
    std = plan.privacy.clip_norm * (plan.privacy.noise_multiplier or 0)
    for _ in range(steps):
        gradient = np.zeros(dimension)
        gradient[0] = units * plan.privacy.clip_norm
        gradient += randomness.normal((dimension,), std=std).numpy()
        velocity = momentum * velocity + gradient / plan.expected_batch_size
        update -= plan.learning_rate * velocity
    assert np.linalg.norm(update) <= plan.largest_update_norm(dimension)


def test_a_norm_bound_that_ignores_the_units_would_be_too_tight() -> None:
    """Negative control of the property above: without the slack the bound is passed."""
    plan = plan_for(TinyTask(), {"epsilon": 8.0, "rounds": 2})
    signal = plan.learning_rate * 40 * plan.holder_size / plan.expected_batch_size
    assert signal > plan.learning_rate


def test_the_guarantee_is_said_in_words() -> None:
    sentence = plan_for(TinyTask(), {"epsilon": 2.0}).privacy.guarantee()
    for part in ("each record", "(2, 0.0001)", "adding or removing", "coordinator"):
        assert part in sentence


HOLDER = {"unit": "holder", "epsilon": 2.0, "rounds": 8}


@pytest.mark.parametrize(
    "chosen", [{"cohort": 5, "clipping": "adaptive"}, {"mechanism": "banded", "bands": 4}], ids=str
)
def test_a_plan_whose_unit_is_the_holder_round_trips(chosen: dict[str, object]) -> None:
    plan = plan_for(TinyTask(), {**HOLDER, **chosen}, holders=50)
    assert isinstance(plan.privacy, CentralPrivacy)
    assert plan.privacy.population == 50
    assert TrainingPlan.from_json(plan.to_json()) == plan
    assert TrainingPlan.from_toml(plan.to_toml()) == plan
    assert not plan.differences(plan.calibrated())


def test_where_holders_are_the_unit_the_sentence_says_whom_to_trust() -> None:
    coins = plan_for(TinyTask(), {**HOLDER, "cohort": 5}, holders=50).privacy.guarantee()
    turns = plan_for(TinyTask(), {**HOLDER, "mechanism": "banded"}, holders=50).privacy.guarantee()
    for sentence in (coins, turns):
        for part in (
            "For each holder, with all that it holds", "(2, 0.0001)", "adding or removing that",
            "whoever sees every model", "The coordinator is trusted", "no guarantee",
        ):  # fmt: skip
            assert part in sentence
    assert "and not who took part" in coins, "amplification by sampling rests on it"
    assert "who took part" not in turns
