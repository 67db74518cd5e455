"""The batched engine computes the mechanism that a holder computes with Opacus.

Unit: a record, or a user. Neighbours: add or remove one. Adversary: the coordinator, who sees each
update. Event: ``local_steps`` Poisson-subsampled Gaussians. The Opacus path (client/trainer.py) is
what is deployed; here the batched one is held against it, with the same draws and without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor, nn

from client.trainer import Trainer
from common.errors import ConfigurationError
from common.plan import TrainingPlan
from common.privacy.noise import SeededRandomness, simulation_key
from common.settings import plan_for
from common.tasks import load
from common.tasks.base import Examples, Task
from common.tasks.parameters import initial_parameters, private_of
from simulations.batched import Block, Terms, train
from simulations.randomness import BlockRandomness, DeviceRandomness, block_randomness
from simulations.stack import StackedModel
from tests.simulations.networks import Convolutional, Perceptron, Transformer
from tests.tiny import FEATURES, TinyTask, table

CPU = torch.device("cpu")
SIZES = (40, 7, 1, 23)
"""Units of four holders: a large one, a small one, and one with a single unit."""


def plan_of(task: Task, **settings: object) -> TrainingPlan:
    defaults = {"epsilon": 8.0, "rounds": 1, "local_steps": 3, "batch_size": 8, "holder_size": 40}
    return plan_for(task, {**defaults, "learning_rate": 0.2, **settings})


def start_of(task: Task) -> Tensor:
    return torch.tensor(initial_parameters(task, 3))


def key_of(holder: int, seed: int = 0) -> bytes:
    return simulation_key("test", seed, holder)


def by_opacus(
    task: Task, data: Examples, plan: TrainingPlan, holder: int, seed: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    trainer = Trainer(task, data, CPU, seed=holder)
    return trainer.train(
        plan,
        start_of(task),
        None,
        SeededRandomness.of_key(key_of(holder, seed)),
        divisor=plan.divisor(max(1, len(data))),
    )


def private_start(task: Task, units: int, holder: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(holder)
        return private_of(task, task.model(units))


def in_a_block(
    task: Task, data: Sequence[Examples], plans: Sequence[TrainingPlan], seed: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    own = [private_start(task, len(part), holder) for holder, part in enumerate(data)]
    units = max(len(part) for part in data)
    private = {
        name: torch.stack(
            [nn.functional.pad(each[name], (0, 0, 0, units - len(each[name]))) for each in own]
        )
        for name in own[0]
    }
    return train(
        StackedModel(task, CPU),
        Block.of(data, task.padding, CPU),
        Terms.of(plans, [max(1, len(part)) for part in data], CPU),
        start_of(task).expand(len(data), -1),
        private,
        block_randomness([key_of(holder, seed) for holder in range(len(data))], CPU),
    )


def distance(one: Tensor, other: Tensor) -> float:
    """Relative to the second."""
    return float((one - other).norm() / other.norm())


# -- the same draws -------------------------------------------------------------------------------

SETTINGS = {
    "dp": {},
    "every unit": {"batch_size": "full"},
    "often empty": {"batch_size": 0.5, "holder_size": 40},
    "momentum": {"momentum": 0.9},
    "adam": {"optimizer": "adam", "learning_rate": 0.01},
    "fedprox": {"strategy": "fedprox", "proximal_mu": 0.5},
    "by size": {"weighting": "size"},
    "no dp": {"epsilon": None, "no_dp": True},
    "no dp, often empty": {"epsilon": None, "no_dp": True, "batch_size": 0.5},
    "no dp, momentum": {"epsilon": None, "no_dp": True, "momentum": 0.9, "batch_size": 0.5},
    "no dp, adam": {
        "epsilon": None,
        "no_dp": True,
        "optimizer": "adam",
        "learning_rate": 0.01,
        "batch_size": 0.5,
    },
}


@pytest.mark.parametrize(
    "task", [Perceptron(), Convolutional(), Transformer()], ids=lambda t: type(t).__name__
)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_updates_are_those_of_opacus(task: Task, settings: dict[str, object]) -> None:
    plan = plan_of(task, **settings)
    data = [task.data(size, holder) for holder, size in enumerate(SIZES)]
    updates, _ = in_a_block(task, data, [plan] * len(data))
    for holder, part in enumerate(data):
        expected, _ = by_opacus(task, part, plan, holder)
        if float(expected.norm()) == 0.0:
            assert float(updates[holder].norm()) == 0.0
        else:
            assert distance(updates[holder], expected) < 1e-5


@pytest.mark.parametrize("settings", [{}, {"no_dp": True, "epsilon": None}], ids=["dp", "no dp"])
def test_recommendation_too_with_what_each_user_keeps(settings: dict[str, object]) -> None:
    task = load("recommendation")
    plan = plan_of(task, batch_size=5, holder_size=10, **settings)
    holders = list(task.holder_data(60).values())[:4]
    data = [holder.train for holder in holders]
    data[1] = data[1].take(torch.arange(2))
    updates, private = in_a_block(task, data, [plan] * len(data))
    for holder, part in enumerate(data):
        expected, kept = by_opacus(task, part, plan, holder)
        assert distance(updates[holder], expected) < 1e-5
        own = private["users.weight"][holder, : len(part)]
        assert distance(own, kept["users.weight"]) < 1e-5


def test_holders_of_a_block_may_have_different_plans() -> None:
    task = Perceptron()
    plans = [
        plan_of(task, epsilon=1.0, local_steps=1),
        plan_of(task, epsilon=8.0, local_steps=4, learning_rate=0.05),
        plan_of(task, clip_norm=0.1, batch_size=20),
        plan_of(task, momentum=0.5, batch_size="full"),
    ]
    data = [task.data(30, holder) for holder in range(4)]
    updates, _ = in_a_block(task, data, plans)
    for holder, part in enumerate(data):
        expected, _ = by_opacus(task, part, plans[holder], holder)
        assert distance(updates[holder], expected) < 1e-5


def test_who_else_is_in_the_block_changes_nothing() -> None:
    task, sizes = Perceptron(), (30, 12, 50, 5, 40, 8)
    plan = plan_of(task)
    data = [task.data(size, holder) for holder, size in enumerate(sizes)]
    together, _ = in_a_block(task, data, [plan] * len(data))
    alone, _ = in_a_block(task, data[:1], [plan])
    assert distance(alone[0], together[0]) < 1e-6


def test_holders_without_units_send_noise_alone() -> None:
    task = Perceptron()
    plan = plan_of(task)
    nobody = task.data(1, 0).take(torch.tensor([], dtype=torch.int64))
    for data in ([nobody, nobody], [nobody, task.data(9, 1)]):
        updates, _ = in_a_block(task, data, [plan] * 2)
        expected, _ = by_opacus(task, nobody, plan, 0)
        assert distance(updates[0], expected) < 1e-5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_unit_without_a_finite_gradient_counts_zero(value: float) -> None:
    task = Perceptron()
    plan = plan_of(task, batch_size="full")
    data = task.data(20, 0)
    x = data["x"].clone()
    x[3] = value
    spoiled = Examples({"x": x, "y": data["y"]})
    updates, _ = in_a_block(task, [spoiled, data], [plan] * 2)
    expected, _ = by_opacus(task, spoiled, plan, 0)
    assert torch.isfinite(updates).all()
    assert distance(updates[0], expected) < 1e-5
    untouched, _ = in_a_block(task, [data, data], [plan] * 2)
    assert distance(updates[1], untouched[1]) < 1e-6


def test_large_samples_go_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    task = load("recommendation")
    plan = plan_of(task, holder_size=10, batch_size="full")
    data = [holder.train for holder in list(task.holder_data(30).values())[:3]]
    whole, kept = in_a_block(task, data, [plan] * 3)
    monkeypatch.setattr("simulations.batched.LARGEST_PASS", 3 * 64 * 4)
    parts, kept_in_parts = in_a_block(task, data, [plan] * 3)
    assert distance(parts[0], whole[0]) < 1e-5
    assert distance(kept_in_parts["users.weight"], kept["users.weight"]) < 1e-5


# -- other draws, the same distribution -----------------------------------------------------------

LINEAR = TinyTask()
DRAWS = 1500
LINEAR_PLAN = plan_for(
    LINEAR,
    {"epsilon": 5.0, "rounds": 1, "batch_size": 4, "holder_size": 40, "clip_norm": 0.5},
)
LINEAR_DATA = LINEAR.examples(table(40, 5))
SIGMA = 0.9
"""Little noise, so that the clip and the divisor show too."""


def quiet_plan() -> TrainingPlan:
    privacy = LINEAR_PLAN.privacy.model_copy(update={"noise_multiplier": SIGMA})
    return LINEAR_PLAN.model_copy(update={"privacy": privacy})


def samples_of_opacus() -> np.ndarray:
    trainer, start = Trainer(LINEAR, LINEAR_DATA, CPU), start_of(LINEAR)
    plan = quiet_plan()
    updates = [
        trainer.train(
            plan, start, None, SeededRandomness("opacus", i), divisor=plan.expected_batch_size
        )[0]
        for i in range(DRAWS)
    ]
    return torch.stack(updates).numpy()


def samples_of_a_block(
    kind: type[BlockRandomness | DeviceRandomness] = BlockRandomness,
) -> np.ndarray:
    plan, keys = quiet_plan(), [simulation_key("block", i) for i in range(DRAWS)]
    updates, _ = train(
        StackedModel(LINEAR, CPU),
        Block.of([LINEAR_DATA], {}, CPU, which=[0] * DRAWS),
        Terms.of([plan] * DRAWS, [40] * DRAWS, CPU),
        start_of(LINEAR).expand(DRAWS, -1),
        {},
        BlockRandomness(keys) if kind is BlockRandomness else DeviceRandomness(keys, CPU),
    )
    return updates.numpy()


def samples_by_hand(
    *, noise: float = 1.0, clip: float = 1.0, actual_size: bool = False
) -> np.ndarray:
    """DP-SGD in ten lines of numpy, and what it becomes with one of its parts broken."""
    rng = np.random.default_rng(7)
    plan = quiet_plan()
    x, y = LINEAR_DATA["x"].numpy(), LINEAR_DATA["y"].numpy()
    start = start_of(LINEAR).numpy()
    residual = 1 / (1 + np.exp(-(x @ start[:FEATURES] + start[FEATURES]))) - y
    gradients = residual[:, None] * np.hstack([x, np.ones((len(x), 1))])
    bound = clip * plan.privacy.clip_norm
    clipped = gradients * np.minimum(1, bound / np.linalg.norm(gradients, axis=1))[:, None]
    updates = []
    for _ in range(DRAWS):
        taken = rng.random(len(x)) < plan.sampling_rate
        total = clipped[taken].sum(0)
        # The noise that the accountant was told of, whatever the clip is.
        total += rng.normal(0, noise * SIGMA * plan.privacy.clip_norm, len(total))
        size = max(1, taken.sum()) if actual_size else plan.expected_batch_size
        updates.append(-plan.learning_rate * total / size)
    return np.array(updates)


def smallest_p(one: np.ndarray, other: np.ndarray) -> float:
    """Of two-sample Kolmogorov–Smirnov tests of each coordinate and the norm, times how many."""
    with_norm = [np.column_stack([s, np.linalg.norm(s, axis=1)]) for s in (one, other)]
    columns = [ks_2samp(a, b).pvalue for a, b in zip(*(s.T for s in with_norm), strict=True)]
    return min(1.0, len(columns) * min(columns))


@pytest.fixture(scope="module")
def of_opacus() -> np.ndarray:
    return samples_of_opacus()


def test_the_distribution_is_that_of_opacus(of_opacus: np.ndarray) -> None:
    """A false alarm has probability 1e-3 (Bonferroni), and the seeds are fixed."""
    assert smallest_p(samples_of_a_block(), of_opacus) > 1e-3
    assert smallest_p(samples_by_hand(), of_opacus) > 1e-3


def test_a_gpus_own_randomness_gives_the_same_distribution(of_opacus: np.ndarray) -> None:
    """Its generator is made of integer operations that a CPU has too."""
    assert smallest_p(samples_of_a_block(DeviceRandomness), of_opacus) > 1e-3


@pytest.mark.parametrize(
    "broken", [{"noise": 2 / 3}, {"clip": 1.5}, {"actual_size": True}], ids=str
)
def test_a_broken_mechanism_would_be_noticed(
    of_opacus: np.ndarray, broken: dict[str, float | bool]
) -> None:
    assert smallest_p(samples_by_hand(**broken), of_opacus) < 1e-3


# -- what cannot be stacked -----------------------------------------------------------------------


class Direct(TinyTask):
    """Computes with a parameter without calling its layer."""

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        return super().loss(model, batch) + model.weight.square().sum()


class Rows(TinyTask):
    """Gives its layer more rows than units."""

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        return model(batch["x"].repeat(2, 1)).squeeze(-1)[: len(batch)]


class Mean(TinyTask):
    """One loss for everybody."""

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        return super().loss(model, batch).mean()


@pytest.mark.parametrize(
    ("task", "words"),
    [(Direct(), "without calling the layer"), (Rows(), "rows for"), (Mean(), "has shape")],
)
def test_tasks_that_cannot_be_stacked_are_told_why(task: Task, words: str) -> None:
    data = task.examples(table(10))
    with pytest.raises(ConfigurationError, match=words):
        in_a_block(task, [data, data], [plan_of(task)] * 2)
