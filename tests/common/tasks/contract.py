"""What every task owes to the rest of the system, checked on any task, some of it on rows only."""

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from opacus import GradSampleModule
from torch import nn

from common.settings import plan_for
from common.tasks.base import Examples, Task
from common.tasks.tabular import BinaryTask

PLAN_KEYS = {
    "rounds",
    "local_steps",
    "batch_size",
    "optimizer",
    "learning_rate",
    "momentum",
    "clip_norm",
    "strategy",
    "server_learning_rate",
    "server_momentum",
    "average_from",
    "weighting",
}


def warmed(task: Task, units: int = 1) -> nn.Module:
    """A model with no parameter at zero, so that every gradient has a say."""
    torch.manual_seed(0)
    model = task.model(units)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5)
    return model


def check_losses_are_per_row(task: BinaryTask, examples: Examples) -> None:
    """Entry i of the loss depends on row i only, in value and in gradient."""
    model = warmed(task)
    together = task.loss(model, examples.take(torch.arange(5)))
    assert together.shape == (5,)
    for row in range(5):
        alone = task.loss(model, examples.take(torch.tensor([row])))
        torch.testing.assert_close(alone[0], together[row])


def check_opacus_gives_each_rows_gradient(task: BinaryTask, examples: Examples) -> None:
    """Opacus's per-example gradients equal those of one row at a time."""
    model = warmed(task)
    wrapped = GradSampleModule(model, loss_reduction="sum")
    batch = examples.take(torch.arange(4))
    with warnings.catch_warnings():  # torch's remark on hooks of a layer whose input is data
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        task.loss(wrapped, batch).sum().backward()
    sampled = {name: parameter.grad_sample for name, parameter in model.named_parameters()}
    wrapped.remove_hooks()
    for row in range(4):
        model.zero_grad()
        task.loss(model, batch.take(torch.tensor([row]))).sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(sampled[name][row], parameter.grad)


def check_rows_encode_alone(task: BinaryTask, table: pd.DataFrame) -> None:
    """A row is encoded the same whatever other rows there are."""
    whole, part = task.examples(table), task.examples(table.iloc[2:4].reset_index(drop=True))
    for name, tensor in part.tensors.items():
        torch.testing.assert_close(tensor, whole[name][2:4])


def check_batches_are_pure(task: Task, units: Examples) -> None:
    """Entry i of a batch depends on unit i and its draws only, in whatever company."""
    units = units.take(torch.arange(5))
    draws = torch.rand(5, task.draws, dtype=torch.float64)
    whole = task.batch(units, draws)
    assert len(whole) == 5
    for order in ([4, 2, 0], [3], []):
        rows = torch.tensor(order, dtype=torch.int64)
        part, expected = task.batch(units.take(rows), draws[rows]), whole.take(rows)
        for name, tensor in expected.tensors.items():
            assert torch.equal(part[name], tensor), name


@torch.no_grad()
def check_predictions_are_per_unit(task: Task, test: Examples) -> None:
    """Entry i of a prediction depends on unit i only, and the model sees the units as they come."""
    model = warmed(task, len(test))
    test = test.take(torch.arange(5))
    together = task.predict(model, test)
    assert len(together) == 5
    for order in ([4, 2, 0], [3], []):
        rows = torch.tensor(order, dtype=torch.int64)
        torch.testing.assert_close(task.predict(model, test.take(rows)), together[rows])


@torch.no_grad()
def check_many_holders_are_judged_as_each_alone(task: Task, tests: Sequence[Examples]) -> None:
    """Predictions and metrics of many holders' units, in one tensor, are those of each holder."""
    tests = [*tests, tests[0].take(torch.tensor([0])), tests[0].take(torch.arange(0)), tests[-1]]
    model = warmed(task, max(len(test) for test in tests))
    whole, sizes = Examples.concatenate(tests, task.padding), [len(test) for test in tests]
    apart = torch.cat([task.predict(model, test) for test in tests])
    predictions = task.predict(model, whole)
    torch.testing.assert_close(predictions, apart)
    together = task.metrics_by_holder(predictions, whole, sizes)
    singly = [
        task.metrics(own, test) for own, test in zip(predictions.split(sizes), tests, strict=True)
    ]
    pd.testing.assert_frame_equal(pd.DataFrame(together), pd.DataFrame(singly))
    assert pd.DataFrame(together).isna().all(axis=1).tolist() == [not size for size in sizes]
    evaluated = pd.DataFrame([task.evaluate(model, test) for test in tests])
    pd.testing.assert_frame_equal(pd.DataFrame(together), evaluated)


@torch.no_grad()
def check_histogram(task: Task, test: Examples) -> None:
    """Adding a held-out unit adds one to one cell, whatever the model says of it.

    That is what the price of an evaluation rests on; it must hold for a model that diverged too.
    """
    for model in (warmed(task, len(test)), _diverged(task, len(test))):
        predictions = task.predictions(model, test)
        cells = task.cells_of(predictions, test)
        assert cells.dtype == torch.int64
        assert cells.shape == (len(test),)
        whole = task.histogram(predictions, test)
        assert whole.shape == (task.cells,)
        assert whole.sum() == len(test)
        for left_out in range(min(5, len(test))):
            rest = torch.tensor([row for row in range(len(test)) if row != left_out])
            part = test.take(rest)
            less = task.histogram(task.predictions(model, part), part)
            assert (whole - less).tolist().count(1) == 1
            assert (whole - less).abs().sum() == 1
    for scale in (1.0, 1e6):
        found = task.metrics_of(scale * whole.double().numpy(), 4.0)
        assert task.headline in found
        for estimate in found.values():
            ends = (estimate.low, estimate.value, estimate.high)
            assert np.isnan(ends).all() or 0 <= ends[0] <= ends[1] <= ends[2] <= 1
    empty = task.histogram(predictions[:0], test.take(torch.arange(0)))
    assert empty.tolist() == [0] * task.cells


def _diverged(task: Task, units: int) -> nn.Module:
    model = warmed(task, units)
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    return model


def check_recommended(task: BinaryTask) -> None:
    """Settings exist for every target, and use the plan's keys only."""
    for epsilon in (None, 100.0, 8.0, 3.0, 1.0, 0.01):
        assert set(task.recommended(epsilon)) == PLAN_KEYS
        if epsilon is not None:
            assert set(task.recommended_for_sum(epsilon)) <= PLAN_KEYS
            chosen = {"aggregation": "secure-sum", "epsilon": epsilon}
            assert plan_for(task, chosen, holders=4).aggregation.kind == "secure-sum"


def train(task: BinaryTask, examples: Examples, steps: int = 150) -> nn.Module:
    """A model trained on all rows by plain gradient descent."""
    torch.manual_seed(0)
    model = task.model(len(examples))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(model, examples).mean().backward()
        optimizer.step()
    return model
