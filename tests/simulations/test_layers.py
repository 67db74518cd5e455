"""Every rule against the plain layer, one unit at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from common.errors import ConfigurationError
from simulations.layers import AnyModule, Call, rule_for
from simulations.layers import embedding as embedding_module
from simulations.layers.convolution import ConvolutionRule
from simulations.layers.embedding import EmbeddingRule, distinct_square_norms, gathered
from simulations.layers.linear import LinearRule, outer_square_norms
from tests.simulations.layer_checks import Stacked, check, recorded

few = st.integers(1, 3)
quick = settings(max_examples=40, deadline=None)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def twice(layer: Any, inputs: Tensor) -> list[Tensor]:
    """The second call sees what the first one gave."""
    first = layer(inputs)
    mean = first.mean(dim=-1, keepdim=True)
    return [first, layer(torch.tanh(inputs * mean))]


# -- Linear ----------------------------------------------------------------------------------


@quick
@given(few, few, st.lists(st.integers(0, 4), max_size=2), st.integers(1, 6), few, st.booleans())
def test_linear(
    holders: int, units: int, trailing: list[int], width: int, out: int, bias: bool
) -> None:
    layer = nn.Linear(width, out, bias=bias).double()
    inputs = numbers(holders * units, *trailing, width)
    check(layer, inputs, holders=holders)
    if inputs.numel():
        check(layer, inputs, holders=holders, program=twice)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_called_with_a_vector_and_a_sequence(bias: bool) -> None:
    def program(layer: Any, one: Tensor, many: Tensor) -> list[Tensor]:
        return [layer(one), layer(many), layer(input=many * 2)]

    layer = nn.Linear(4, 3, bias=bias).double()
    check(layer, numbers(6, 4), numbers(6, 2, 5, 4), program=program)


@pytest.mark.parametrize(("length", "width", "out"), [(2, 40, 30), (30, 4, 3), (1, 4, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_and_its_gram_matrix_agree(
    length: int, width: int, out: int, bias: bool
) -> None:
    inputs, grads = numbers(2, 3, length, width), numbers(2, 3, length, out)
    product = torch.einsum("hbto,hbti->hboi", grads, inputs).square().sum((2, 3))
    shift = grads.sum(2).square().sum(2) if bias else 0.0
    torch.testing.assert_close(outer_square_norms(inputs, grads, bias=bias), product + shift)


def test_adding_the_squares_of_positions_is_not_the_norm() -> None:
    """Negative control: the tests above would notice a norm that forgets the cross terms."""
    inputs, grads = numbers(2, 3, 4, 5), numbers(2, 3, 4, 6)
    naive = (inputs.square().sum(3) * (grads.square().sum(3))).sum(2)
    right = outer_square_norms(inputs, grads, bias=False)
    assert not torch.isclose(naive, right, rtol=1e-3).any()


def test_a_norm_of_terms_that_cancel_is_not_below_zero() -> None:
    inputs = torch.randn(1, 500, 1, 64).expand(-1, -1, 3, -1)
    two = torch.randn(1, 500, 2, 64)
    grads = torch.cat([two, -two.sum(2, keepdim=True)], dim=2)
    gram = (inputs @ inputs.mT) * (grads @ grads.mT)
    assert (gram.sum((2, 3)) < 0).any(), "this test would notice nothing"
    assert (outer_square_norms(inputs, grads, bias=False) >= 0).all()


# -- Embedding -------------------------------------------------------------------------------


@quick
@given(
    few,
    few,
    st.lists(st.integers(0, 5), max_size=2),
    st.integers(1, 7),
    few,
    st.sampled_from([None, 0, -1]),
    st.sampled_from([1, 8, 2**22]),
    st.booleans(),
)
def test_embedding(
    holders: int,
    units: int,
    trailing: list[int],
    size: int,
    width: int,
    padding: int | None,
    marks: int,
    sparse: bool,
) -> None:
    layer = nn.Embedding(size, width, padding_idx=padding).double()
    index = torch.randint(0, size, (holders * units, *trailing))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding_module, "_MARKS", marks)
        patch.setattr(embedding_module, "_SPARSE", 0 if sparse else 256)
        check(layer, index, holders=holders)
        check(layer, index, index.flip(0), holders=holders, program=both)


def both(layer: Any, one: Tensor, other: Tensor) -> list[Tensor]:
    return [layer(one), layer(other)]


def test_only_rows_that_occur_are_touched() -> None:
    layer = nn.Embedding(50, 4)
    stacked = Stacked.of(layer, 2)
    index = torch.tensor([[3, 3], [49, 0], [7, 7], [7, 8]])
    _, calls, _ = recorded(stacked, lambda layer, i: [layer(i)], [index], 2)
    into = {"weight": torch.zeros(2, 50, 4)}
    stacked.rule.add_sums(stacked.weights, calls, torch.ones(2, 2), into)
    touched = [rows.any(1).nonzero().squeeze(1).tolist() for rows in into["weight"]]
    assert touched == [[0, 3, 49], [7, 8]]


@pytest.mark.parametrize("sparse", [0, 256])
def test_repeated_indices_add_before_the_norm(sparse: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_module, "_SPARSE", sparse)
    index = torch.tensor([[4, 4, 1, 4]])
    grads = torch.tensor([[[1.0], [2.0], [10.0], [-3.0]]])
    assert distinct_square_norms(index, grads, 5).tolist() == [100.0]  # (1+2-3)² + 10²
    assert float(grads.square().sum()) == 114.0  # what forgetting the cross terms would give


def test_gradients_that_were_given_are_left_as_they_were() -> None:
    grads = torch.ones(1, 3, 2)
    distinct_square_norms(torch.zeros(1, 3, dtype=torch.int64), grads, 5)
    assert torch.equal(grads, torch.ones(1, 3, 2))


@pytest.mark.parametrize("wrong", [-1, 5])
def test_an_index_outside_the_table_does_not_read_its_neighbour(wrong: int) -> None:
    flat = torch.randn(2, 30)
    tables = flat[:, 3:13].unflatten(1, (5, 2))
    with pytest.raises(IndexError, match=rf"index {wrong} is not in a table of 5 rows"):
        gathered(tables, torch.tensor([[0, wrong], [0, 0]]))


def test_tables_of_any_layout_are_gathered_from() -> None:
    tables = torch.randn(2, 3, 5).transpose(1, 2)
    index = torch.tensor([[0, 4, 4], [1, 2, 3]])
    expected = torch.cat([tables[0][index[0]], tables[1][index[1]]])
    assert torch.equal(gathered(tables, index), expected)
    assert torch.equal(gathered(tables.contiguous(), index), expected)


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    layer = nn.Embedding(20, 16)
    stacked = Stacked.of(layer, 4)
    index = torch.randint(0, 20, (400, 160))
    _, calls, _ = recorded(stacked, lambda layer, i: [layer(i)], [index], 4)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            into = {"weight": torch.zeros(4, 20, 16)}
            stacked.rule.add_sums(stacked.weights, calls, torch.ones(4, 100), into)
            found.append((into["weight"], stacked.rule.square_norms(stacked.weights, calls)))
    finally:
        torch.set_num_threads(before)
    for sums, norms in found[1:]:
        assert torch.equal(sums, found[0][0])
        assert torch.equal(norms, found[0][1])


@pytest.mark.parametrize("setting", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embeddings_that_mix_units_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"layer 'items' has {next(iter(setting))}"):
        rule_for(nn.Embedding(3, 2, **setting), "items")


# -- convolutions ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@quick
@given(st.data())
def test_convolutions(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    spatial = draw(1, 3)
    groups = draw(1, 2)
    kernel = tuple(draw(1, 3) for _ in range(spatial))
    dilation = tuple(draw(1, 2) for _ in range(spatial))
    padding: Any = data.draw(st.sampled_from(["same", "valid", "numbers"]))
    if padding == "numbers":
        padding = tuple(draw(0, 2) for _ in range(spatial))
    stride = 1 if padding == "same" else tuple(draw(1, 2) for _ in range(spatial))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1](
        groups * draw(1, 2),
        groups * draw(1, 2),
        kernel,  # type: ignore[arg-type]
        stride=stride,  # type: ignore[arg-type]
        padding=padding,
        dilation=dilation,  # type: ignore[arg-type]
        groups=groups,
        bias=draw(0, 1) == 1,
    ).double()
    assert type(rule_for(layer, "conv")) is ConvolutionRule
    holders, units = draw(1, 2), draw(1, 2)
    sizes = [d * (k - 1) + 1 + draw(0, 2) for k, d in zip(kernel, dilation, strict=True)]
    inputs = numbers(holders * units, layer.in_channels, *sizes)
    check(layer, inputs, holders=holders)
    check(layer, inputs, numbers(*inputs.shape[:-1], sizes[-1] + 2), holders=holders, program=both)


@pytest.mark.parametrize("size", [9, 3])
def test_convolutions_by_product_and_by_gram_matrix(size: int) -> None:
    check(nn.Conv2d(4, 6, 3).double(), numbers(4, 4, size, size), holders=2)


def test_other_paddings_have_no_closed_form() -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular").double()
    assert type(rule_for(layer, "conv")) is AnyModule
    check(layer, numbers(4, 2, 4, 4), holders=2)


# -- normalisations --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.LayerNorm(4), (4,)),
        (nn.LayerNorm(4), (3, 2, 4)),
        (nn.LayerNorm(4), (0, 4)),
        (nn.LayerNorm((2, 4)), (2, 4)),
        (nn.LayerNorm((2, 4), eps=0.3), (3, 2, 4)),
        (nn.LayerNorm(4, bias=False), (3, 4)),
        (nn.RMSNorm(4), (4,)),
        (nn.RMSNorm((2, 4), eps=0.3), (3, 2, 4)),
        (nn.GroupNorm(2, 4), (4,)),
        (nn.GroupNorm(2, 4, eps=0.3), (4, 3, 2)),
    ],
    ids=str,
)
def test_normalisations(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer = layer.double()
    assert not isinstance(rule_for(layer, "norm"), AnyModule)
    inputs = numbers(6, *shape)
    check(layer, inputs)
    check(layer, inputs, inputs.flip(0) * 2, program=both)


def test_a_shift_alone() -> None:
    layer = nn.LayerNorm(4).double()
    layer.weight = None  # type: ignore[assignment]
    check(layer, numbers(6, 3, 4))


# -- all -------------------------------------------------------------------------------------

LAYERS: Sequence[tuple[nn.Module, Tensor]] = [
    (nn.Linear(30, 16), torch.randn(12, 30)),
    (nn.Linear(30, 16), torch.randn(12, 5, 30)),
    (nn.Linear(5, 3), torch.randn(12, 9, 5)),
    (nn.Embedding(9, 4), torch.randint(0, 9, (12, 20))),
    (nn.Conv2d(2, 3, 3, padding=1), torch.randn(12, 2, 6, 6)),
    (nn.LayerNorm(6), torch.randn(12, 4, 6)),
    (nn.GroupNorm(2, 6), torch.randn(12, 6, 4)),
    (nn.RMSNorm(6), torch.randn(12, 4, 6)),
    (nn.PReLU(6), torch.randn(12, 6, 4)),
]


@pytest.mark.parametrize(("layer", "inputs"), LAYERS, ids=lambda value: type(value).__name__)
def test_in_single_precision(layer: nn.Module, inputs: Tensor) -> None:
    check(layer, inputs, rtol=1e-5)


@pytest.mark.parametrize(("layer", "inputs"), LAYERS, ids=lambda value: type(value).__name__)
def test_units_that_are_not_kept_add_nothing(layer: nn.Module, inputs: Tensor) -> None:
    """Not even where their input or gradient is not a number."""
    stacked = Stacked.of(layer, 3)
    _, calls, _ = recorded(stacked, lambda layer, x: [layer(x)], [inputs], 3)
    rows = torch.ones(3, 4, dtype=torch.bool)
    rows[1, 2] = rows[2] = False
    factors = torch.rand(3, 4) * rows
    _, clean = stacked.into(layer)
    before = {name: value.clone() for name, value in clean.items()}
    expected = {name: value.clone() for name, value in clean.items()}
    stacked.rule.add_sums(stacked.weights, calls, factors, expected)
    for call in calls:
        assert call.grad is not None
        call.grad[~rows] = torch.nan
        for value in call.saved.values():
            value[~rows] = torch.nan if value.is_floating_point() else 10**6
        call.keep(rows)
    stacked.rule.add_sums(stacked.weights, calls, factors, clean)
    for name, value in clean.items():
        torch.testing.assert_close(value, expected[name])
    assert torch.equal(clean["weight"][2], before["weight"][2])
    assert not stacked.rule.square_norms(stacked.weights, calls)[~rows].any()


@pytest.mark.parametrize(("layer", "inputs"), LAYERS, ids=lambda value: type(value).__name__)
def test_nothing_is_learned_of_parameters_without_a_record(
    layer: nn.Module, inputs: Tensor
) -> None:
    """Prediction: the rule's output is that of the plain layer, and no graph is kept."""
    stacked = Stacked.of(layer, 3)

    def unrecorded(output: Tensor, saved: object, about: object = None) -> Tensor:
        return output

    output = stacked.rule.forward(stacked.weights, 3, unrecorded, inputs)
    assert not output.requires_grad


def test_rules_are_found_by_exact_type() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    assert type(rule_for(nn.Linear(2, 2), "x")) is LinearRule
    assert type(rule_for(nn.Embedding(2, 2), "x")) is EmbeddingRule
    assert type(rule_for(Doubled(2, 2), "x")) is AnyModule
    check(Doubled(2, 3).double(), numbers(6, 2))


def test_other_parameters_under_a_known_type_have_no_closed_form() -> None:
    layer = nn.Linear(2, 2)
    layer.scale = nn.Parameter(torch.ones(2))
    assert type(rule_for(layer, "x")) is AnyModule


def test_kept_calls() -> None:
    call = Call({"input": torch.tensor([[1.0, torch.nan]]), "index": torch.tensor([[[5], [6]]])})
    call.keep(torch.tensor([[True, False]]))
    assert call.saved["input"].tolist() == [[1.0, 0.0]]
    assert call.saved["index"].tolist() == [[[5], [0]]]
    assert call.grad is None


def test_terms_that_cancel_do_not_hide_a_norm() -> None:
    """In single precision the Gram sum of such a unit is rounding error, and may be zero."""
    chance = torch.Generator().manual_seed(0)
    length, width = 4, 64
    inputs = torch.randn(1, 1, 1, width, generator=chance).expand(1, 300, length, width) * 30
    inputs = inputs + 1e-3 * torch.randn(1, 300, length, width, generator=chance)
    grads = 30 * torch.randn(1, 300, length, width, generator=chance)
    grads = grads - grads.mean(2, keepdim=True)
    true = torch.einsum("hbto,hbti->hboi", grads.double(), inputs.double()).square().sum((2, 3))
    found = outer_square_norms(inputs, grads, bias=False).double()
    torch.testing.assert_close(found, true, rtol=1e-3, atol=0)
    products = (inputs @ inputs.transpose(-1, -2)) * (grads @ grads.transpose(-1, -2))
    assert ((products.sum((-1, -2)) - true).abs() > true).any(), "float32 would not do"
