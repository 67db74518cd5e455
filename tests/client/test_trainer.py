"""Local DP-SGD is the mechanism the accountant prices: sample, clip, sum, noise, public divisor."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn

from client import trainer as trainer_module
from client.trainer import Trainer
from common.errors import ConfigurationError
from common.guarantees import SENSITIVITY_MARGIN
from common.plan import TrainingPlan
from common.privacy.noise import OsRandomness, SeededRandomness
from common.settings import plan_for
from common.tasks import load
from common.tasks.base import Examples, HolderData, Task
from common.tasks.parameters import initial_parameters, load_shared, named_shared, shared_of
from tests.tiny import FEATURES, TinyTask, table

TASK = TinyTask()
CPU = torch.device("cpu")
SILENT = 1e-9
"""A noise multiplier that is as good as none, for comparing signals."""


def make_plan(noise: float | None = None, **settings: object) -> TrainingPlan:
    plan = plan_for(TASK, {"epsilon": 5.0, "rounds": 1, **settings})
    if noise is None:
        return plan
    return plan.model_copy(
        update={"privacy": plan.privacy.model_copy(update={"noise_multiplier": noise})}
    )


def examples(rows: int, seed: int = 0) -> Examples:
    return TASK.examples(table(rows, seed))


def start() -> Tensor:
    return torch.tensor(initial_parameters(TASK, 3))


def update_of(
    plan: TrainingPlan, data: Examples, *, seed: int = 0, divisor: float | None = None
) -> Tensor:
    trainer = Trainer(TASK, data, CPU)
    update, _ = trainer.train(
        plan,
        start(),
        None,
        SeededRandomness(seed),
        divisor=plan.expected_batch_size if divisor is None else divisor,
    )
    return update


def clipped_gradients(data: Examples, clip: float) -> Tensor:
    """By brute force, one example at a time: [N, D]."""
    rows = []
    for i in range(len(data)):
        model = nn.Linear(FEATURES, 1)
        with torch.no_grad():
            model.weight.copy_(start()[:FEATURES].view(1, -1))
            model.bias.copy_(start()[FEATURES:])
        loss = TASK.loss(model, data.take(torch.tensor([i]))).sum()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        flat = torch.cat([g.reshape(-1) for g in grads])
        rows.append(flat * min(1.0, clip / float(flat.norm())))
    return torch.stack(rows)


def test_one_step_is_the_clipped_sum_over_the_public_batch_size() -> None:
    data, plan = examples(30), make_plan(SILENT, clip_norm=0.3)
    expected = -plan.learning_rate * clipped_gradients(data, 0.3).sum(0) / plan.expected_batch_size
    assert torch.allclose(update_of(plan, data), expected, atol=1e-6)


def test_the_divisor_does_not_follow_the_data() -> None:
    """A mean over the actual batch would give the same update for the data taken twice."""
    plan = make_plan(SILENT)
    once = update_of(plan, examples(20))
    twice = update_of(plan, Examples.concatenate([examples(20), examples(20)]))
    assert torch.allclose(twice, 2 * once, atol=1e-6)
    assert not torch.allclose(twice, once, atol=1e-3)


def test_one_record_moves_the_sum_by_at_most_the_clip_norm() -> None:
    plan = make_plan(SILENT, clip_norm=0.5)
    data = examples(25)
    wild = Examples({"x": torch.full((1, FEATURES), 1e4), "y": torch.ones(1)})
    with_it = Examples.concatenate([data, wild])
    moved = (update_of(plan, with_it) - update_of(plan, data)).norm()
    assert float(moved) <= plan.learning_rate * 0.5 / plan.expected_batch_size * (1 + 1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_record_without_a_finite_gradient_counts_zero(value: float) -> None:
    plan, data = make_plan(SILENT), examples(25)
    bad = Examples({"x": torch.full((1, FEATURES), value), "y": torch.ones(1)})
    got = update_of(plan, Examples.concatenate([data, bad]))
    assert torch.isfinite(got).all()
    assert torch.allclose(got, update_of(plan, data), atol=1e-7)


def noise_samples(scale: float = 1.0, rounds: int = 700) -> np.ndarray:
    """Updates of a holder without data, in units of the noise they should have.

    Args:
        scale: of the trainer's noise; other than 1 it is a mutant.
    """
    plan = make_plan(2.0)
    std = plan.learning_rate * 2.0 * 1.0 / plan.expected_batch_size
    mutant = make_plan(2.0 * scale)
    trainer = Trainer(TASK, examples(1).take(torch.tensor([], dtype=torch.long)), CPU)
    updates = [
        trainer.train(
            mutant, torch.zeros(FEATURES + 1), None, SeededRandomness(i),
            divisor=plan.expected_batch_size,
        )[0]
        for i in range(rounds)
    ]  # fmt: skip
    return torch.cat(updates).numpy() / std


def test_the_noise_is_gaussian_with_the_plans_deviation_and_empty_batches_get_it_too() -> None:
    """2,800 draws; a false alarm has probability 1e-4, and the seeds are fixed."""
    assert kstest(noise_samples(), "norm").pvalue > 1e-4


@pytest.mark.parametrize("scale", [2 / 3, 3 / 2])
def test_other_noise_would_be_noticed(scale: float) -> None:
    assert kstest(noise_samples(scale), "norm").pvalue < 1e-4


def test_sampling_is_poisson() -> None:
    """With all gradients alike, the update counts who was sampled: binomial, not constant."""
    units, rate, rounds = 40, 0.25, 400
    data = Examples({"x": torch.ones(units, FEATURES), "y": torch.ones(units)})
    plan = make_plan(SILENT, batch_size=10)
    assert plan.sampling_rate == rate
    trainer = Trainer(TASK, data, CPU)
    one = update_of(make_plan(SILENT), data.take(torch.tensor([0])), divisor=1.0).norm()
    counts = []
    for seed in range(rounds):
        update, _ = trainer.train(plan, start(), None, SeededRandomness(seed), divisor=1.0)
        counts.append(round(float(update.norm() / one)))
    # Mean 10 and variance 7.5; 5 standard errors of each.
    assert abs(np.mean(counts) - 10) < 5 * math.sqrt(7.5 / rounds)
    assert abs(np.var(counts) - 7.5) < 5 * 7.5 * math.sqrt(2 / rounds)


def test_local_steps_with_momentum_are_sgd() -> None:
    plan = make_plan(SILENT, local_steps=4, momentum=0.5, clip_norm=1e6)
    data = examples(40)
    model = nn.Linear(FEATURES, 1)
    with torch.no_grad():
        model.weight.copy_(start()[:FEATURES].view(1, -1))
        model.bias.copy_(start()[FEATURES:])
    optimizer = torch.optim.SGD(model.parameters(), lr=plan.learning_rate, momentum=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        (TASK.loss(model, data).sum() / plan.expected_batch_size).backward()
        optimizer.step()
    expected = torch.cat([p.detach().reshape(-1) for p in model.parameters()]) - start()
    # Opacus' clip at 1e6 with σ=1e-9 leaves noise of std 1e-3/40 a step.
    assert torch.allclose(update_of(plan, data), expected, atol=1e-3)


def test_large_batches_go_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, data = make_plan(SILENT), examples(33)
    whole = update_of(plan, data)
    monkeypatch.setattr(trainer_module, "LARGEST_GRADIENT_CHUNK", 4 * (FEATURES + 1))
    assert torch.allclose(update_of(plan, data), whole, atol=1e-6)


def sum_plan(**settings: object) -> TrainingPlan:
    """Whose noise is in the sum of three holders."""
    chosen = {"aggregation": "secure-sum", "epsilon": 5.0, **settings}
    return plan_for(TASK, chosen, holders=3)


def sum_of(data: Examples, plan: TrainingPlan) -> Tensor:
    total, _ = Trainer(TASK, data, CPU).gradient_sum(plan, start(), None, SeededRandomness(0))
    return total


def test_a_part_of_a_sum_is_the_clipped_sum_of_all_units_in_double_precision() -> None:
    data, plan = examples(30), sum_plan(clip_norm=0.3)
    total = sum_of(data, plan)
    assert total.dtype == torch.float64
    assert torch.allclose(total, clipped_gradients(data, 0.3).double().sum(0), rtol=1e-6, atol=0)
    nobody = data.take(torch.arange(0))
    assert sum_of(nobody, plan).tolist() == [0.0] * 4


def test_a_part_of_a_sum_leaves_nothing_for_the_next_one() -> None:
    """A warm trainer: the same data and parameters, the same sum, whatever came between."""
    trainer, plan = Trainer(TASK, examples(30), CPU), sum_plan()
    first, _ = trainer.gradient_sum(plan, start(), None, SeededRandomness(0))
    trainer.train(make_plan(), start(), None, SeededRandomness(0), divisor=40)
    again, _ = trainer.gradient_sum(plan, start(), None, SeededRandomness(1))
    assert torch.equal(first, again)


def test_a_part_of_a_sum_goes_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    data, plan = examples(30), sum_plan(clip_norm=0.3)
    whole = sum_of(data, plan)
    monkeypatch.setattr(trainer_module, "LARGEST_GRADIENT_CHUNK", 4 * 7)
    assert torch.allclose(sum_of(data, plan), whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 1e30])
def test_no_record_moves_a_part_of_a_sum_by_more_than_the_clip_norm(value: float) -> None:
    """To a millionth of C, where the noise has room for a thousandth."""
    plan, data = sum_plan(clip_norm=0.3), examples(30)
    tensors = {name: tensor.clone() for name, tensor in data.tensors.items()}
    tensors["x"][-1] = value
    others = sum_of(data.take(torch.arange(29)), plan)
    moved = float((sum_of(Examples(tensors), plan) - others).norm())
    assert moved <= 0.3 * (1 + 1e-6)
    if not math.isfinite(value):
        assert moved == 0
    if value == 1e30:
        assert moved >= 0.3 * (1 - 1e-6), "the bound is reached, so it is tested"


def test_a_sum_of_many_units_rounds_to_far_less_than_one_of_them() -> None:
    """Of 40,000 gradients that all point one way: float32 would lose a hundredth of C and more."""
    plan, one = sum_plan(clip_norm=0.3), examples(1)
    many = Examples({name: x.repeat_interleave(40_000, 0) for name, x in one.tensors.items()})
    exact = sum_of(one, plan)
    error = float((sum_of(many, plan) - 40_000 * exact).norm())
    assert error <= 1e-6 * 0.3
    rounded = torch.zeros(4)
    for _ in range(40_000):
        rounded += exact.float()
    assert float((rounded.double() - 40_000 * exact).norm()) > 1e-2 * 0.3


def test_a_sum_without_its_full_noise_is_for_no_other_plan() -> None:
    with pytest.raises(ConfigurationError, match="the plan's privacy is 'dp'"):
        sum_of(examples(5), make_plan())


def test_a_users_vector_takes_the_same_step_beside_a_sum_as_beside_an_update(
    shop: tuple[Task, HolderData],
) -> None:
    task, data = shop
    settings = {"epsilon": 5.0, "rounds": 1, "local_steps": 1, "batch_size": "full"}
    one = plan_for(task, {**settings, "momentum": 0.0})
    summed = plan_for(task, {**settings, "aggregation": "secure-sum"}, holders=4)
    parameters = torch.tensor(initial_parameters(task, 3))
    trainer = Trainer(task, data.train, CPU, seed=0)
    _, after = trainer.train(
        one, parameters, None, SeededRandomness(5), divisor=one.expected_batch_size
    )
    _, beside = trainer.gradient_sum(summed, parameters, None, SeededRandomness(5))
    assert after.keys() == beside.keys() == {"users.weight"}
    assert torch.equal(after["users.weight"], beside["users.weight"])
    fresh = Trainer(task, data.train, CPU, seed=0)
    _, untouched = fresh.gradient_sum(summed, parameters, None, SeededRandomness(6))
    assert not torch.equal(untouched["users.weight"], after["users.weight"]), "other draws"


def test_without_privacy_it_is_the_mean_gradient() -> None:
    plan, data = make_plan(no_dp=True, epsilon=None), examples(30)
    expected = -plan.learning_rate * clipped_gradients(data, 1e9).mean(0)
    assert torch.allclose(update_of(plan, data), expected, atol=1e-6)


def test_one_warm_trainer_serves_plans_with_and_without_privacy() -> None:
    private, exact, data = make_plan(SILENT), make_plan(no_dp=True, epsilon=None), examples(30)
    trainer = Trainer(TASK, data, CPU)
    results = [
        trainer.train(plan, start(), None, SeededRandomness(0), divisor=40.0)[0]
        for plan in (private, exact, private, exact)
    ]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    assert torch.allclose(results[1], update_of(exact, data))


def test_the_proximal_term_pulls_back() -> None:
    data = examples(30)
    free = update_of(make_plan(SILENT, local_steps=10), data)
    held = update_of(make_plan(SILENT, local_steps=10, strategy="fedprox", proximal_mu=1.0), data)
    assert held.norm() < 0.8 * free.norm()


class BatchNormTask(TinyTask):
    def model(self, units: int) -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))


def test_layers_that_mix_examples_are_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"1.*BatchNorm1d.*GroupNorm"):
        Trainer(BatchNormTask(), examples(5), CPU)


class FlatteningTask(TinyTask):
    """Three records of each user, fed to the layer as if each were a unit of its own."""

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        rows = batch["x"].repeat_interleave(3, dim=0)
        return model(rows).view(len(batch), 3).mean(1)


class MixingTask(TinyTask):
    """Losses relative to the batch: one unit changes every other's."""

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        return super().loss(model, batch) - batch["x"].mean()


class MixingBatchTask(TinyTask):
    """Units relative to each other: the loss is clean, but what it sees is not."""

    def batch(self, units: Examples, draws: Tensor) -> Examples:
        return Examples({"x": units["x"] - units["x"].mean(), "y": units["y"]})


class SwappedDrawsTask(TinyTask):
    """A unit's noise is another unit's draw: who else is sampled changes it."""

    draws = 1

    def batch(self, units: Examples, draws: Tensor) -> Examples:
        return Examples({"x": units["x"] + draws.flip(0).float(), "y": units["y"]})


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (FlatteningTask(), r"'weight' got 192 gradients for 64 units"),
        (MixingTask(), "another value when a second is in the batch"),
        (MixingBatchTask(), "another value when a second is in the batch"),
        (SwappedDrawsTask(), "another value when a second is in the batch"),
    ],
)
def test_a_task_whose_gradients_are_not_one_a_unit_is_refused(task: TinyTask, says: str) -> None:
    """Otherwise each row would be clipped to C, and one unit could move the sum by many C."""
    with pytest.raises(ConfigurationError, match=says):
        Trainer(task, examples(30), CPU).train(
            make_plan(SILENT), start(), None, SeededRandomness(0), divisor=40.0
        )


# -- a task with draws and private parameters -----------------------------------------------------


@pytest.fixture(scope="module")
def shop() -> tuple[Task, HolderData]:
    task = load("recommendation")
    return task, task.holder_data(20)["shop-03"]


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_users_clipped_gradient_is_of_the_shared_parameters_only(
    shop: tuple[Task, HolderData], monkeypatch: pytest.MonkeyPatch, chunk: int | None
) -> None:
    """One step by brute force, a user at a time, from the trainer's own draws."""
    task, data = shop
    units, seed = len(data.train), 5
    plan = plan_for(task, {"epsilon": 5.0, "rounds": 1, "local_steps": 1, "clip_norm": 0.01})
    plan = plan.model_copy(
        update={"privacy": plan.privacy.model_copy(update={"noise_multiplier": SILENT})}
    )
    begin = torch.tensor(initial_parameters(task, 3))
    trainer = Trainer(task, data.train, CPU, seed=11)
    if chunk:
        monkeypatch.setattr(trainer_module, "LARGEST_GRADIENT_CHUNK", chunk * len(begin))
    update, private = trainer.train(plan, begin, None, SeededRandomness(seed), divisor=10.0)

    torch.manual_seed(11)
    model = task.model(units)
    load_shared(task, model, begin)
    draws = SeededRandomness(seed).draws(units * task.draws).view(units, task.draws)
    batch = task.batch(data.train, draws)
    total, own = torch.zeros_like(begin), torch.zeros_like(private["users.weight"])
    for user in range(units):
        model.zero_grad()
        task.loss(model, batch.take(torch.tensor([user]))).sum().backward()
        gradient = torch.cat([p.grad.reshape(-1) for _, p in named_shared(task, model)])
        total += gradient * min(1.0, 0.01 / float(gradient.norm()))
        own += model.users.weight.grad
    torch.testing.assert_close(update, -plan.learning_rate * total / 10.0, atol=1e-7, rtol=1e-4)
    moved = model.users.weight.detach() - task.private_learning_rate * own
    torch.testing.assert_close(private["users.weight"], moved)


def test_every_step_has_draws_of_its_own(shop: tuple[Task, HolderData]) -> None:
    task, data = shop
    trainer, randomness = Trainer(task, data.train, CPU), SeededRandomness(0)
    plan = plan_for(task, {"epsilon": 5.0, "batch_size": "full"})
    first, second = (trainer._sample(plan, randomness)["negatives"] for _ in range(2))
    assert not torch.equal(first, second)


def test_metrics_are_the_tasks(shop: tuple[Task, HolderData]) -> None:
    task, data = shop
    trainer = Trainer(task, data.train, CPU, seed=1)
    begin = torch.tensor(initial_parameters(task, 3))
    assert set(trainer.evaluate(begin, None, data.test)) == {
        "hr@10",
        "ndcg@10",
        "hr@10-full",
        "ndcg@10-full",
    }


@pytest.mark.parametrize("units", [1, 9, 40])
@pytest.mark.parametrize("kind", ["dp", "none", "sum"])
def test_steps_are_told_by_their_number_in_the_plan_and_never_by_the_data(
    kind: str, units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large batch goes through in parts; how many there are would count the units."""
    monkeypatch.setattr(trainer_module, "LARGEST_GRADIENT_CHUNK", 4 * (FEATURES + 1))
    told: list[int] = []
    trainer = Trainer(TASK, examples(units), CPU)
    trainer.on_step = lambda: told.append(1)
    if kind == "sum":
        trainer.gradient_sum(sum_plan(), start(), None, SeededRandomness(0))
        assert len(told) == 1
        return
    settings = {"no_dp": True, "epsilon": None} if kind == "none" else {}
    plan = make_plan(local_steps=3, **settings)
    trainer.train(plan, start(), None, SeededRandomness(0), divisor=plan.expected_batch_size)
    assert len(told) == 3


def test_a_step_that_failed_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, plan = Trainer(TASK, examples(30), CPU), make_plan(SILENT)

    def train() -> Tensor:
        return trainer.train(plan, start(), None, SeededRandomness(0), divisor=40.0)[0]

    before = train()
    with monkeypatch.context() as broken:
        broken.setattr(Tensor, "backward", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            train()
    assert torch.equal(train(), before)


def test_whether_units_are_separate_is_not_tried_on_a_model_that_was_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its sender would choose how far rounding parts two losses, and see which units it fails."""
    seen: list[Tensor] = []
    monkeypatch.setattr(
        trainer_module,
        "require_separate_units",
        lambda task, model, _: seen.append(shared_of(task, model)),
    )
    trainer, sent = Trainer(TASK, examples(9), CPU, seed=0), torch.full_like(start(), 1e7)
    for plan in (make_plan(), make_plan(no_dp=True, epsilon=None), make_plan()):
        trainer.train(plan, sent, None, SeededRandomness(0), divisor=9.0)
    (tried,) = seen
    assert float(tried.abs().max()) < 1e3


def crafted() -> tuple[Task, Examples, list[Tensor]]:
    """A task, units of it, and parameters on which the last three units' scores are cancellation.

    Without the first of the units, as many are left over by a kernel that takes four at a time.
    """
    task = load("medical-diagnosis")
    train = max((one.train for one in task.holder_data(None).values()), key=len)
    units = train.take(torch.arange(4 * (len(train) // 4)))
    last = torch.cat([units["features"][-3:].double(), torch.ones(3, 1, dtype=torch.float64)], 1)
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(30):
        direction = torch.randn(last.shape[1], generator=generator, dtype=torch.float64)
        direction -= torch.linalg.lstsq(last, last @ direction).solution
        found.append((1e12 * direction).float())
    return task, units, found


def test_a_unit_moves_the_sum_by_no_more_than_the_margin_whatever_the_parameters() -> None:
    task, units, crafty = crafted()
    plan = plan_for(task, {"aggregation": "secure-sum", "epsilon": 2.0, "rounds": 5}, holders=4)
    trainers = [
        Trainer(task, units.take(torch.arange(first, len(units))), CPU, seed=1) for first in (0, 1)
    ]
    moved = 0.0
    for parameters in crafty:
        whole, less = (
            each.gradient_sum(plan, parameters, None, OsRandomness())[0] for each in trainers
        )
        moved = max(moved, float((whole - less).norm()) / plan.privacy.clip_norm)
    assert moved <= SENSITIVITY_MARGIN - 1e-3


def test_a_unit_moves_the_histogram_of_an_evaluation_by_one_cell_whatever_the_parameters() -> None:
    """The same in predictions: who leaves takes others from one cell to another."""
    task, units, crafty = crafted()
    trainer, moved = Trainer(task, units, CPU, seed=1), 0
    for parameters in crafty:
        counts = []
        for first in (0, 1):
            some = units.take(torch.arange(first, len(units)))
            counts.append(task.histogram(trainer.predictions(parameters, None, some), some))
        moved = max(moved, int((counts[0] - counts[1]).abs().sum()))
    assert moved <= 1
