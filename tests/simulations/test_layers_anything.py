"""The fallback for modules without a closed form."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.errors import ConfigurationError
from simulations.layers import AnyModule, rule_for
from simulations.layers import anything as anything_module
from tests.simulations.layer_checks import Stacked, check, recorded


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Scale(nn.Module):
    """Nested arguments and results, some of which are not tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.inner = nn.Linear(4, 2)

    def forward(
        self, pair: tuple[Tensor, Tensor | None], *, options: dict[str, Any], shift: Tensor
    ) -> dict[str, Any]:
        rows = pair[0] * self.scale + shift
        if options["doubled"]:
            rows = 2 * rows
        return {
            "rows": rows,
            "more": (self.inner(rows), None, "name"),
            "largest": rows.argmax(dim=1),
            "unused": self.inner(rows * rows),
        }


def scaled(layer: Any, rows: Tensor) -> list[Tensor]:
    shift = torch.arange(4.0, dtype=rows.dtype)  # of no unit
    first = layer((rows, None), options={"doubled": True}, shift=shift)
    assert first["more"][1:] == (None, "name")
    assert first["largest"].dtype == torch.int64
    second = layer((first["rows"], rows), options={"doubled": False}, shift=shift)
    return [first["rows"], second["more"][0]]


@pytest.mark.parametrize("at_once", [2**24, 40, 1])
def test_nested_arguments_and_unused_outputs(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anything_module, "_NUMBERS", at_once)
    check(Scale().double(), numbers(15, 4), program=scaled)


def attended(layer: Any, query: Tensor, other: Tensor, padded: Tensor) -> list[Tensor]:
    output, weights = layer(query, other, other, need_weights=False)
    assert weights is None
    seen, weights = layer(query, query, query, key_padding_mask=padded)
    causal = torch.ones(3, 3, dtype=torch.bool).triu(1)
    masked, _ = layer(query, query, query, attn_mask=causal, need_weights=False)
    return [output, seen, weights, masked]


def test_attention() -> None:
    layer = nn.MultiheadAttention(4, 2, batch_first=True).double()
    padded = torch.zeros(8, 3, dtype=torch.bool)
    padded[::2, -1] = True
    check(layer, numbers(8, 3, 4), numbers(8, 5, 4), padded, holders=2, program=attended)


def test_attention_in_prediction() -> None:
    """Where torch would take a fused path."""
    layer = nn.MultiheadAttention(4, 2, batch_first=True).eval()
    stacked = Stacked.of(layer, 2)
    inputs = torch.randn(6, 3, 4)

    def unrecorded(output: Tensor, saved: object, about: object = None) -> Tensor:
        return output

    with torch.no_grad():
        found, _ = stacked.rule.forward(
            stacked.weights, 2, unrecorded, inputs, inputs, inputs, need_weights=False
        )
        for holder in range(2):
            own = {name: value[holder] for name, value in stacked.weights.items()}
            rows = inputs[3 * holder : 3 * holder + 3]
            expected, _ = torch.func.functional_call(layer, own, (rows, rows, rows))
            torch.testing.assert_close(found[3 * holder : 3 * holder + 3], expected)


class Tied(nn.Module):
    """A language model whose embedding is its last layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4, padding_idx=0)
        self.norm = nn.LayerNorm(4)
        self.last = nn.Linear(4, 6)
        self.last.weight = self.embedding.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.last(self.norm(self.embedding(index)))


def test_a_whole_model_with_tied_parameters() -> None:
    check(Tied().double(), torch.randint(0, 6, (6, 5)))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.PReLU(3), (3, 2)),
        (nn.ConvTranspose1d(3, 2, 2), (3, 4)),
        (nn.InstanceNorm1d(3, affine=True), (3, 4)),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), (4, 3)),
        (nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True), (3, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_modules(layer: nn.Module, shape: tuple[int, ...]) -> None:
    check(layer.double(), numbers(4, *shape), holders=2)


def test_squares_of_calls_do_not_simply_add() -> None:
    """Negative control: contributions of several calls add before the norm is taken."""
    layer = nn.PReLU(3).double()
    stacked = Stacked.of(layer, 2)

    def program(layer: Any, x: Tensor) -> list[Tensor]:
        return [layer(x), layer(x)]

    _, calls, _ = recorded(stacked, program, [-numbers(4, 3).abs()], 2)
    together = stacked.rule.square_norms(stacked.weights, calls)
    apart = sum(stacked.rule.square_norms(stacked.weights, [call]) for call in calls)
    assert not torch.isclose(together, torch.as_tensor(apart), rtol=0.01).all()


class Root(nn.Module):
    """Its gradient at zero is not a number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, rows: Tensor) -> Tensor:
        return (rows * self.scale).abs().sqrt()


def test_a_unit_that_must_not_count_does_not_spoil_the_sum() -> None:
    layer = Root().double()
    stacked = Stacked.of(layer, 2)
    inputs = numbers(6, 3)
    _, calls, _ = recorded(stacked, lambda layer, x: [layer(x)], [inputs], 2)
    factors = torch.rand(2, 3, dtype=torch.float64)
    factors[1, 1] = 0.0
    expected = {"scale": torch.zeros(2, 3, dtype=torch.float64)}
    stacked.rule.add_sums(stacked.weights, calls, factors, expected)
    calls[0].keep(factors > 0)  # the unit's input is zero from now on
    found = {"scale": torch.zeros(2, 3, dtype=torch.float64)}
    stacked.rule.add_sums(stacked.weights, calls, factors, found)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.LSTM(4, 3, batch_first=True), (6, 5, 4)),
        (nn.LSTMCell(4, 3), (6, 4)),
        (nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), (6, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_run_is_refused(layer: nn.Module, shape: tuple[int, ...]) -> None:
    stacked = Stacked.of(layer, 2)
    with pytest.raises(ConfigurationError, match=r"layer 'the\.layer' .*--engine opacus"):
        recorded(stacked, lambda layer, x: [layer(x)], [torch.randn(*shape)], 2)


class Odd(nn.Module):
    """Takes and returns what it is told to."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.result = result

    def forward(self, *inputs: Any) -> Any:
        return self.result(inputs[0] * self.scale if inputs else self.scale)


@pytest.mark.parametrize(
    ("result", "inputs", "message"),
    [
        (lambda rows: rows.mean(), (torch.ones(6),), "one number for all units"),
        (lambda rows: [rows, object()], (torch.ones(6),), "returns a object"),
        (lambda rows: rows, (torch.ones(6), object()), "takes or returns a object"),
        (lambda rows: rows, (), "without a tensor"),
    ],
)
def test_odd_arguments_and_results_are_refused(
    result: Any, inputs: tuple[Any, ...], message: str
) -> None:
    stacked = Stacked.of(Odd(result), 2)
    with pytest.raises(ConfigurationError, match=message):
        recorded(stacked, lambda layer: [layer(*inputs)], [], 2)


def test_each_type_is_warned_of_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anything_module, "_warned", set())
    with caplog.at_level(logging.WARNING, "sotto.simulation"):
        for name in ("one", "two"):
            assert isinstance(rule_for(nn.PReLU(), name), AnyModule)
        rule_for(Tied(), "")
    assert [record.getMessage() for record in caplog.records] == [
        f"layer {name} has no closed form; its per-unit gradients are taken one by one with "
        "torch.func, which is slower"
        for name in ("one (PReLU)", "model (Tied)")
    ]
