"""What the Task contract gives every task: joining examples, evaluation in parts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from common.errors import ConfigurationError
from common.settings import plan_for
from common.tasks.base import Examples
from tests.common.tasks import contract
from tests.tiny import TinyTask, table

TASK = TinyTask()


def ragged(*shapes: tuple[int, ...]) -> list[Examples]:
    """Examples whose tensor ``x`` has the given shapes, filled with 1, 2, …"""
    return [
        Examples({"x": torch.full(shape, number), "n": torch.arange(shape[0])})
        for number, shape in enumerate(shapes, start=1)
    ]


def test_narrow_tensors_are_filled_up_at_their_ends() -> None:
    joined = Examples.concatenate(ragged((1, 1), (2, 3), (0, 2)), {"x": 9})
    assert joined["x"].tolist() == [[1, 9, 9], [2, 2, 2], [2, 2, 2]]
    assert joined["x"].dtype == torch.int64
    assert joined["n"].tolist() == [0, 0, 1]


def test_every_trailing_dimension_is_filled_up() -> None:
    joined = Examples.concatenate(ragged((1, 2, 1), (1, 1, 2)), {"x": 0})
    assert joined["x"].tolist() == [[[1, 0], [1, 0]], [[2, 2], [0, 0]]]


@pytest.mark.parametrize(
    ("shapes", "padding"), [(((1, 2), (1, 3)), {"n": 0.0}), (((1, 2), (1, 2, 1)), {"x": 0.0})]
)
def test_widths_that_cannot_be_made_one_name_their_tensor(
    shapes: tuple[tuple[int, ...], ...], padding: dict[str, float]
) -> None:
    with pytest.raises(ConfigurationError, match=r"tensor 'x' is .*`padding`"):
        Examples.concatenate(ragged(*shapes), padding)


def test_split_is_the_inverse_of_concatenate() -> None:
    parts = ragged((2, 2), (0, 2), (3, 2))
    again = Examples.concatenate(parts).split([2, 0, 3])
    assert len(again) == 3
    for part, same in zip(parts, again, strict=True):
        assert all(torch.equal(part[name], same[name]) for name in ("x", "n"))
    assert [len(part) for part in Examples.concatenate(parts).split(2)] == [2, 2, 1]


def test_the_contract_holds() -> None:
    holders = [TASK.examples(table(rows, seed=rows)) for rows in (20, 7, 30)]
    contract.check_batches_are_pure(TASK, holders[0])
    contract.check_predictions_are_per_unit(TASK, holders[0])
    contract.check_many_holders_are_judged_as_each_alone(TASK, holders)


class Watched(TinyTask):
    """Remembers how many units were predicted at once, and whether gradients were kept."""

    units_at_a_time = 8

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def predict(self, model: nn.Module, units: Examples) -> Tensor:
        found = super().predict(model, units)
        self.seen.append(len(units))
        assert not found.requires_grad
        return found


def test_evaluation_goes_through_in_parts_without_gradients() -> None:
    task, held_out = Watched(), TASK.examples(table(20))
    model = contract.warmed(task)
    assert task.evaluate(model, held_out) == TASK.evaluate(model, held_out)
    assert task.seen == [8, 8, 4]


def test_nobody_held_out_is_no_error() -> None:
    nobody = TASK.examples(table(20)).take(torch.arange(0))
    assert math.isnan(TASK.evaluate(TASK.model(1), nobody)["accuracy"])


class Stepping(TinyTask):
    """Recommends several steps a round."""

    def recommended(self, epsilon: float | None) -> dict[str, object]:
        several = {"rounds": 4, "local_steps": 5, "learning_rate": 0.5, "batch_size": 10}
        return {**several, "momentum": 0.8, "optimizer": "sgd", "clip_norm": 0.3}


def test_a_task_that_knows_no_better_takes_its_steps_one_a_round() -> None:
    """Where noise is in the sum; the momentum of local steps becomes the coordinator's."""
    plan = plan_for(Stepping(), {"aggregation": "secure-sum", "epsilon": 2.0}, holders=3)
    assert (plan.rounds, plan.local_steps, plan.momentum, plan.sampling_rate) == (20, 1, 0.0, 1.0)
    assert (plan.strategy.name, plan.strategy.momentum) == ("fedavgm", 0.8)
    assert (plan.learning_rate, plan.privacy.clip_norm) == (0.5, 0.3)  # type: ignore[union-attr]
    plain = plan_for(TinyTask(), {"aggregation": "secure-sum", "epsilon": 2.0}, holders=3)
    assert (plain.rounds, plain.strategy.name) == (4, "fedavg")
