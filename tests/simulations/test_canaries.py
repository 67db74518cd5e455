"""Canaries show the coordinator the mechanism itself, and disturb nobody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from client.holder import Holder
from client.trainer import Trainer
from common.errors import ConfigurationError, DataError
from common.guarantees import Privacy
from common.plan import TrainingPlan
from common.privacy.noise import Randomness, SeededRandomness
from common.settings import plan_for
from common.tasks import load
from common.tasks.base import Examples, HolderData, Task
from common.tasks.separation import require_separate_units
from simulations.canaries import (
    STEEPNESS,
    WHICH,
    CanaryTask,
    MakeHolder,
    canary_scores,
    deployed_holder,
    expected_movement,
    plan_with_canaries,
    with_canaries,
)
from tests.tiny import TinyTask

M = 200


class Louder(SeededRandomness):
    """Noise of ``factor`` times the size that is asked for."""

    factor = 1.0

    def normal(self, shape: Sequence[int], *, std: float, **kind: Any) -> Tensor:
        return super().normal(shape, std=self.factor * std, **kind)


class Unclipped(Trainer):
    """Adds the plan's noise to sums that nobody clipped."""

    def train(
        self,
        plan: TrainingPlan,
        parameters: Tensor,
        private: Mapping[str, Tensor] | None,
        randomness: Randomness,
        *,
        divisor: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        privacy = plan.privacy
        assert isinstance(privacy, Privacy)
        assert privacy.noise_multiplier is not None
        large = 1e6
        loose = privacy.model_copy(
            update={
                "clip_norm": large * privacy.clip_norm,
                "noise_multiplier": privacy.noise_multiplier / large,
            }
        )
        plan = plan.model_copy(update={"privacy": loose})
        return super().train(plan, parameters, private, randomness, divisor=divisor)


def holder_with(noise: float = 1.0, *, clips: bool = True) -> MakeHolder:
    """A holder with seeded noise of another size, or one that does not clip."""

    def make(
        name: str, task: Task, data: HolderData, plan: TrainingPlan, device: torch.device
    ) -> Holder:
        def randomness(request: object) -> Randomness:
            drawn = Louder("audit", plan.seed, request.round)  # type: ignore[attr-defined]
            drawn.factor = noise
            return drawn

        holder = deployed_holder(name, task, data, plan, device)
        holder = replace(holder, randomness=randomness, seed=0)
        if not clips:
            holder.trainer = Unclipped(task, data.train, device, seed=0)
        return holder

    return make


def scored(
    task: Task | None = None, make_holder: MakeHolder = deployed_holder, **settings: object
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Scores and coins of M canaries at the first holder."""
    task = task or TinyTask()
    plan = plan_for(task, {"epsilon": 8.0, **settings})
    name, data = next(iter(task.holder_data().items()))
    included = np.random.default_rng(0).random(M) < 0.5
    return canary_scores(task, name, data, plan, included, make_holder=make_holder), included


# -- what a canary is -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"local_steps": 3, "momentum": 0.9},
        {"strategy": "fedavgm", "server_momentum": 0.9, "clip_norm": 0.3},
        {"weighting": "size"},
        {"average_from": 0.5},
    ],
    ids=["plain", "local momentum", "coordinator momentum", "by size", "averaged"],
)
def test_without_noise_a_canary_moves_its_coordinate_by_exactly_its_share(
    settings: dict[str, object],
) -> None:
    scores, included = scored(make_holder=holder_with(noise=0.0), **settings)
    assert scores == pytest.approx(included.astype(float), abs=1e-4)


def test_without_clipping_it_moves_by_far_more() -> None:
    """The control: what the scores are at without the clip, so that they do show it."""
    scores, included = scored(make_holder=holder_with(noise=0.0, clips=False))
    assert scores[included] == pytest.approx(STEEPNESS, rel=1e-4)


def test_sampled_canaries_move_by_as_much_on_average() -> None:
    scores, included = scored(
        make_holder=holder_with(noise=0.0), batch_size=10, local_steps=4, rounds=25
    )
    assert (scores[~included] == 0).all()
    # 100 samples at q = ¼: the mean of about 100 canaries has sd √(3/100)/√100 = 0.017.
    assert scores[included].mean() == pytest.approx(1.0, abs=4 * 0.017)
    assert scores[included].std() == pytest.approx(np.sqrt(3 / 100), rel=0.4)


@pytest.mark.parametrize("settings", [{}, {"optimizer": "adam", "local_steps": 3}])
def test_the_noise_in_a_score_is_the_plans(settings: dict[str, object]) -> None:
    scores, included = scored(**settings)
    plan = plan_for(TinyTask(), {"epsilon": 8.0, **settings})
    assert isinstance(plan.privacy, Privacy)
    sigma = plan.privacy.noise_multiplier
    assert sigma is not None
    mu = np.sqrt(plan.rounds * plan.local_steps) / sigma
    seen = (scores[included].mean() - scores[~included].mean()) / scores[~included].std()
    # Of M/2 scores the sd is known to 7 % and each mean to 0.1 sd; Adam's signs lose some of μ.
    if plan.optimizer == "sgd":
        assert seen == pytest.approx(mu, abs=4 * np.hypot(0.07 * mu, 0.15))
    else:
        assert 0.4 * mu < seen < 1.3 * mu


def test_canaries_disturb_neither_the_holders_units_nor_each_other() -> None:
    task = TinyTask()
    data = task.holder_data()["h0"].train
    plan = plan_for(task, {"epsilon": 8.0, "rounds": 1})
    few, many = np.arange(4) < 1, np.arange(4) < 4

    def update(included: np.ndarray[Any, Any]) -> Tensor:
        own = CanaryTask(task, 4, slope=10.0)
        trainer = Trainer(own, with_canaries(data, included), torch.device("cpu"), seed=0)
        quiet = Louder("quiet")
        quiet.factor = 0.0
        start = torch.zeros(trainer.dimension)
        return trainer.train(plan, start, None, quiet, divisor=40.0)[0]

    alone = Trainer(task, data, torch.device("cpu"), seed=0)
    quiet = Louder("quiet")
    quiet.factor = 0.0
    expected = alone.train(plan, torch.zeros(alone.dimension), None, quiet, divisor=40.0)[0]
    torch.testing.assert_close(update(few)[:-4], expected)
    torch.testing.assert_close(update(many)[:-4], expected)
    assert update(few)[-4:].count_nonzero() == 1
    assert update(few)[-4] == update(many)[-4]


# -- any task -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["medical-diagnosis", "credit-risk", "recommendation"])
def test_every_task_takes_canaries(name: str) -> None:
    scores, included = scored(load(name), holder_with(noise=0.0), rounds=2)
    assert scores == pytest.approx(included.astype(float), abs=1e-4)


def test_a_canary_task_keeps_its_units_apart_and_its_name() -> None:
    task = load("recommendation")
    units = with_canaries(task.holder_data()["shop-01"].train, np.ones(3, dtype=bool))
    planted = CanaryTask(task, 3, 10.0)
    require_separate_units(planted, planted.model(len(units)), units)
    assert planted.name == task.name
    assert planted.unit == "user"
    names = dict(planted.model(1).named_parameters())
    assert planted.private_parameters == {"own.users.weight"} <= set(names)
    assert units[WHICH][-4:].tolist() == [-1, 0, 1, 2]


def test_planting_keeps_the_holders_units() -> None:
    units = TinyTask().holder_data()["h0"].train
    planted = with_canaries(units, np.array([True, False, True]))
    assert len(planted) == len(units) + 2
    torch.testing.assert_close(planted["x"][:-2], units["x"])
    assert planted[WHICH].tolist() == [-1] * len(units) + [0, 2]


# -- the plan -------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"batch_size": 10, "local_steps": 2}])
def test_the_mechanism_is_the_plans(settings: dict[str, object]) -> None:
    plan = plan_for(TinyTask(), {"epsilon": 8.0, **settings})
    changed = plan_with_canaries(plan, 3000)
    assert changed.privacy == plan.privacy
    assert changed.composition() == plan.composition()
    assert changed.admits(3000)
    assert plan_with_canaries(plan, 5).holder_size == plan.holder_size


def test_momentum_adds_its_powers_up() -> None:
    plan = plan_for(TinyTask(), {"epsilon": 8.0, "local_steps": 2, "momentum": 0.5, "rounds": 3})
    # steps of lr/B and 1.5 lr/B times C, in each of three rounds
    assert expected_movement(plan, 40.0) == pytest.approx(3 * 2.5 * 0.5 / 40)


def test_a_plan_without_privacy_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="units that an audit could contradict"):
        scored(epsilon=None, no_dp=True)


def test_more_canaries_than_delta_allows_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"δ=0\.01 must be below 1/n"):
        scored(delta=0.01)


def test_a_holder_without_units_is_refused() -> None:
    nobody = Examples({"x": torch.zeros(0, 3), "y": torch.zeros(0)})
    with pytest.raises(DataError, match="no training unit"):
        with_canaries(nobody, np.ones(2, dtype=bool))
