"""A task's own code, run once for many holders, gives each its own numbers.

Held against per-unit gradients by ``torch.func`` of the same task, one holder at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from common.errors import ConfigurationError
from common.settings import plan_for
from common.tasks.base import Examples, HolderData, Task
from common.tasks.parameters import named_shared
from simulations.jobs import Assignment, jobs_of
from simulations.stack import StackedModel
from simulations.workers import BlockTrainer
from tests.tiny import TinyTask

CPU = torch.device("cpu")
HOLDERS, UNITS, WIDTH = 3, 5, 4


class Net(TinyTask):
    """Squared error of whatever module is given; ``x`` holds numbers."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self._make = make

    def model(self, units: int) -> nn.Module:
        return self._make()

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        return (model(batch["x"]).flatten(1).sum(1) - batch["y"]).square()

    def predict(self, model: nn.Module, units: Examples) -> Tensor:
        return model(units["x"]).flatten(1)


class Private(Net):
    """The same, with a layer that stays with the holder."""

    private_parameters: ClassVar[frozenset[str]] = frozenset({"own.weight", "own.bias"})
    private_learning_rate = 0.1


class TiedLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


class Twice(nn.Module):
    """One layer, called twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Unused(nn.Module):
    """A layer that nobody calls, and one whose result is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.never, self.ignored = nn.Linear(7, 2), nn.Linear(WIDTH, 3)
        self.used = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.ignored(x)
        return self.used(x)


class Scale(nn.Module):
    """A parameter of its own beside a layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.layer = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.scale)


def inplace_relu() -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, 6), nn.ReLU(inplace=True), nn.Linear(6, 2), nn.ELU(inplace=True)
    )


def units_of(count: int, seed: int = 0) -> Examples:
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=chance)
    return Examples({"x": x, "y": torch.randn(count, generator=chance)})


def flat_parameters(task: Task, seed: int = 0) -> Tensor:
    """Other ones for every holder, [H, D]."""
    count = sum(p.numel() for _, p in named_shared(task, task.model(1)))
    return torch.randn(HOLDERS, count, generator=torch.Generator().manual_seed(seed)) / 2


def named(task: Task, row: Tensor) -> dict[str, Tensor]:
    """A holder's row, cut as the vector that travels is."""
    shared = list(named_shared(task, task.model(1)))
    parts = row.split([parameter.numel() for _, parameter in shared])
    return {n: part.view_as(p) for (n, p), part in zip(shared, parts, strict=True)}


def unit_gradients(
    task: Task, parameters: Mapping[str, Tensor], units: Examples
) -> dict[str, Tensor]:
    """Plain ``torch.func``: each unit's own gradient, [B, ...] by parameter."""
    model = task.model(1)

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, rows: dict[str, Tensor]) -> Tensor:
            return task.loss(self.inner, Examples(rows))

    outer = Called()

    def loss(parameters: dict[str, Tensor], row: dict[str, Tensor]) -> Tensor:
        single = {name: value.unsqueeze(0) for name, value in row.items()}
        whole = {f"inner.{name}": value for name, value in parameters.items()}
        return functional_call(outer, whole, (single,)).squeeze(0)

    found = vmap(grad(loss), in_dims=(None, 0))(dict(parameters), dict(units.tensors))
    return {name: value.detach() for name, value in found.items()}


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "a single layer": lambda: nn.Linear(WIDTH, 1),
    "tied": TiedLayers,
    "twice": Twice,
    "unused": Unused,
    "own parameter": Scale,
    "in place": inplace_relu,
    "norm": lambda: nn.Sequential(nn.Linear(WIDTH, 6), nn.LayerNorm(6), nn.Linear(6, 1)),
}


@pytest.mark.parametrize("name", MODELS)
def test_norms_and_sums_are_those_of_torch_func(name: str) -> None:
    task = Net(MODELS[name])
    parameters, units = flat_parameters(task), units_of(HOLDERS * UNITS)
    stacked = StackedModel(task, CPU)
    assert stacked.dimension == parameters.shape[1]
    stacked.bind(parameters, {}, training=True)
    factors = torch.rand(HOLDERS, UNITS, generator=torch.Generator().manual_seed(1))
    assert stacked.backward(units, torch.ones(HOLDERS, UNITS)) == {}
    into = torch.zeros_like(parameters)
    stacked.add_sums(factors, into)
    for holder in range(HOLDERS):
        own = units.take(torch.arange(holder * UNITS, (holder + 1) * UNITS))
        found = unit_gradients(task, named(task, parameters[holder]), own)
        rows = torch.cat([value.flatten(1) for value in found.values()], dim=1)
        torch.testing.assert_close(
            stacked.square_norms()[holder], rows.square().sum(1), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(into[holder], factors[holder] @ rows, rtol=1e-4, atol=1e-5)


def test_parameters_that_nobody_called_get_no_gradient() -> None:
    task = Net(Unused)
    parameters = flat_parameters(task)
    stacked = StackedModel(task, CPU)
    stacked.bind(parameters, {}, training=True)
    stacked.backward(units_of(HOLDERS * UNITS), torch.ones(HOLDERS, UNITS))
    into = torch.zeros_like(parameters)
    stacked.add_sums(torch.ones(HOLDERS, UNITS), into)
    touched = named(task, into[0])
    assert {n for n, value in touched.items() if value.any()} == {"used.weight", "used.bias"}


def test_units_that_only_fill_up_have_no_gradient() -> None:
    task = Net(MODELS["twice"])
    parameters, units = flat_parameters(task), units_of(HOLDERS * UNITS)
    counted = torch.ones(HOLDERS, UNITS)
    counted[1, 2:] = 0.0
    stacked = StackedModel(task, CPU)
    stacked.bind(parameters, {}, training=True)
    stacked.backward(units, counted)
    assert not stacked.square_norms()[1, 2:].any()
    assert stacked.square_norms()[1, :2].all()


@pytest.mark.parametrize("name", MODELS)
def test_predictions_are_each_holders_own(name: str) -> None:
    task = Net(MODELS[name])
    parameters, units = flat_parameters(task), units_of(HOLDERS * UNITS)
    stacked = StackedModel(task, CPU)
    stacked.bind(parameters, {}, training=False)
    found = stacked.predict(units)
    for holder in range(HOLDERS):
        own = units.take(torch.arange(holder * UNITS, (holder + 1) * UNITS))
        expected = functional_call(task.model(1), named(task, parameters[holder]), (own["x"],))
        rows = found[holder * UNITS : (holder + 1) * UNITS]
        torch.testing.assert_close(rows, expected.flatten(1), rtol=1e-4, atol=1e-5)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.unsqueeze(1) + torch.arange(3.0).view(1, -1, 1))


class Encoders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerEncoder(Encoder().layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.unsqueeze(1) + torch.arange(3.0).view(1, -1, 1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.unsqueeze(1) + torch.arange(3.0).view(1, -1, 1)
        return self.attention(rows, rows, rows)[0]


@pytest.mark.parametrize("make", [Encoder, Encoders, Attention])
def test_attention_predicts_through_its_layers(make: Callable[[], nn.Module]) -> None:
    """torch's shortcuts in evaluation read parameters, which are hidden here, instead."""

    before = torch.backends.mha.get_fastpath_enabled()
    try:
        task = Net(make)
        parameters, units = flat_parameters(task), units_of(HOLDERS * UNITS)
        stacked = StackedModel(task, CPU)
        stacked.bind(parameters, {}, training=False)
        found = stacked.predict(units)
        plain = task.model(1).eval()
        own = units.take(torch.arange(UNITS))
        with torch.no_grad():
            expected = functional_call(plain, named(task, parameters[0]), (own["x"],))
        torch.testing.assert_close(found[:UNITS], expected.flatten(1), rtol=1e-4, atol=1e-5)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# -- private parameters ---------------------------------------------------------------------------


class OwnLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.shared = nn.Linear(WIDTH, 2), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.tanh(self.own(x)))


class OwnTable(nn.Module):
    """A row for each of the holder's units, as in recommendation."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.shared = nn.Embedding(6, 2), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        index = (x[:, 0].abs() * 10).long() % 6
        return self.shared(self.own(index))


@pytest.mark.parametrize("make", [OwnLinear, OwnTable])
def test_private_parameters_get_the_ordinary_gradient_of_the_units_that_count(
    make: Callable[[], nn.Module],
) -> None:
    task = Private(make)
    shared, units = flat_parameters(task), units_of(HOLDERS * UNITS)
    own = {
        name: torch.randn(HOLDERS, *p.shape, generator=torch.Generator().manual_seed(4))
        for name, p in task.model(1).named_parameters()
        if name in task.private_parameters
    }
    counted = torch.ones(HOLDERS, UNITS)
    counted[2, 1] = 0.0
    stacked = StackedModel(task, CPU)
    assert stacked.dimension == 3, "the private layer does not travel"
    stacked.bind(shared, own, training=True)
    moved = stacked.backward(units, counted)
    assert moved.keys() == own.keys()
    for holder in range(HOLDERS):
        mine = units.take(torch.arange(holder * UNITS, (holder + 1) * UNITS))
        parameters = {n: value[holder] for n, value in own.items()}
        found = unit_gradients(task, {**named(task, shared[holder]), **parameters}, mine)
        for name in own:
            expected = torch.tensordot(counted[holder], found[name], dims=1)
            torch.testing.assert_close(moved[name][holder], expected, rtol=1e-4, atol=1e-5)
        rows = torch.cat([found[n].flatten(1) for n in ("shared.weight", "shared.bias")], dim=1)
        norms = rows.square().sum(1) * counted[holder]
        torch.testing.assert_close(stacked.square_norms()[holder], norms, rtol=1e-4, atol=1e-5)


def test_private_and_shared_parameters_in_one_layer_are_refused() -> None:
    class Mixed(Private):
        private_parameters: ClassVar[frozenset[str]] = frozenset({"own.bias"})

    with pytest.raises(ConfigurationError, match=r"layer 'own'.*\(own.bias\).*layer of their own"):
        StackedModel(Mixed(OwnLinear), CPU)


# -- what would give other numbers ----------------------------------------------------------------


def test_an_output_that_the_task_changes_in_place_is_refused() -> None:
    class Changed(Net):
        def loss(self, model: nn.Module, batch: Examples) -> Tensor:
            output = model(batch["x"])
            output += 1.0
            return output.flatten(1).sum(1).square()

    task = Changed(MODELS["a single layer"])
    stacked = StackedModel(task, CPU)
    stacked.bind(flat_parameters(task), {}, training=True)
    with pytest.raises(ConfigurationError, match="changed in place"):
        stacked.backward(units_of(HOLDERS * UNITS), torch.ones(HOLDERS, UNITS))


@pytest.mark.parametrize("number", [0, 1], ids=["first", "later"])
def test_an_activation_of_functional_in_place_is_refused_too(number: int) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for place, layer in enumerate(self.layers):
                x = F.relu_(layer(x)) if place == number else layer(x)
            return x

    task = Net(Functional)
    stacked = StackedModel(task, CPU)
    stacked.bind(flat_parameters(task), {}, training=True)
    with pytest.raises(ConfigurationError, match="changed in place"):
        stacked.backward(units_of(HOLDERS * UNITS), torch.ones(HOLDERS, UNITS))


def test_batch_norm_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="BatchNorm1d, which mixes"):
        StackedModel(Net(lambda: nn.Sequential(nn.Linear(WIDTH, 2), nn.BatchNorm1d(2))), CPU)


READS: Mapping[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "functional": lambda layer, x: F.linear(x, layer.weight),
    "product": lambda layer, x: x @ layer.weight.T,
    "alone": lambda layer, x: layer(x) + layer.weight.square().sum(),
    "data": lambda layer, x: x @ layer.weight.data.T,
    "tied output": lambda layer, x: F.linear(layer(x), layer.weight.T),
    "detached": lambda layer, x: layer(x) * float(layer.bias.detach()),
    "parameters": lambda layer, x: layer(x) + sum(p.sum() for p in layer.parameters()),
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("training", [True, False])
def test_a_parameter_read_without_calling_its_layer_is_refused(name: str, training: bool) -> None:
    """With one on the meta device ``F.linear`` gives numbers, and nobody would notice."""

    class Reads(Net):
        def loss(self, model: nn.Module, batch: Examples) -> Tensor:
            return self.predict(model, batch).sum(1).square()

        def predict(self, model: nn.Module, units: Examples) -> Tensor:
            return READS[name](model, units["x"])

    task = Reads(MODELS["a single layer"])
    stacked = StackedModel(task, CPU)
    stacked.bind(flat_parameters(task), {}, training=training)
    units = units_of(HOLDERS * UNITS)
    with pytest.raises(ConfigurationError, match="without calling the layer"):
        stacked.backward(units, torch.ones(HOLDERS, UNITS)) if training else stacked.predict(units)


def test_what_a_parameter_is_may_be_asked() -> None:
    """Tasks find their device by it."""
    stacked = StackedModel(Net(Twice), CPU)
    for parameter in stacked.template.parameters():
        assert parameter.device == CPU
        assert not parameter.requires_grad
    assert stacked.template.layer.weight.shape == (WIDTH, WIDTH)
    assert sum(p.numel() for p in stacked.template.parameters()) == stacked.dimension


def test_making_a_stacked_model_moves_no_global_randomness() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    StackedModel(Net(Twice), CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_private_layer_that_is_no_table_trains_in_a_whole_round() -> None:
    """Rows of private layers are padded and cut by size; a linear layer has one size."""
    task = Private(OwnLinear)
    data = {name: HolderData(units_of(20, k), units_of(4, k)) for k, name in enumerate("abc")}
    trainer = BlockTrainer(task, data, CPU)
    wanted = plan_for(task, {"epsilon": 3.0, "local_steps": 2})
    assignments = [Assignment(name, name, wanted) for name in data]
    cut = trainer.measure(assignments[0])
    (job,) = jobs_of(assignments, cut, 1, torch.zeros(1, 3))
    kept = trainer.train(job).private
    assert {k: {n: v.shape for n, v in own.items()} for k, own in kept.items()} == {
        k: {"own.weight": (2, WIDTH), "own.bias": (2,)} for k in range(3)
    }
