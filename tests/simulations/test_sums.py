"""Sums in fixed point: the same bits in any order, in any grouping, on either side of a pipe."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from simulations.sums import LARGEST_TERM, ExactSum
from simulations.travel import Travels

NUMBERS = st.floats(-LARGEST_TERM, LARGEST_TERM, allow_nan=False)
TERMS = st.lists(NUMBERS, min_size=1, max_size=30)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sum_of(values: list[float]) -> ExactSum:
    total = ExactSum(1)
    for value in values:
        total.add(vector(value))
    return total


@given(st.data(), TERMS)
def test_no_order_and_no_grouping_changes_a_bit(data: st.DataObject, values: list[float]) -> None:
    forth = sum_of(values).total()
    shuffled = data.draw(st.permutations(values))
    assert torch.equal(sum_of(shuffled).total(), forth)
    place = data.draw(st.integers(0, len(values)))
    left, right = sum_of(shuffled[:place]), sum_of(shuffled[place:])
    left.merge(right)
    assert torch.equal(left.total(), forth)
    assert torch.equal(right.total(), sum_of(shuffled[place:]).total()), "merging took from it"


def test_sums_of_floats_do_change() -> None:
    """Else the tests here would show nothing."""
    values = np.random.default_rng(0).normal(size=1000).tolist()
    assert sum(values) != sum(reversed(values))
    assert torch.equal(sum_of(values).total(), sum_of(values[::-1]).total())


@given(TERMS)
def test_the_total_is_that_of_fractions(values: list[float]) -> None:
    """Each term is moved by at most 2^-52, and the result is rounded twice."""
    exact = sum(map(Fraction, values))
    cut, rounding = Fraction(len(values), 2**52), Fraction(2 * math.ulp(float(abs(exact))))
    assert abs(Fraction(float(sum_of(values).total())) - exact) <= cut + rounding


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (-1.0, -1.0),
        (-(2.0**-52), -(2.0**-52)),
        (-(2.0**-53), -(2.0**-52)),  # cut downwards, never towards zero
        (2.0**-53, 0.0),
        (1 / 3, math.floor(2**52 / 3) / 2**52),
        (LARGEST_TERM, LARGEST_TERM),
        (-LARGEST_TERM, -LARGEST_TERM),
    ],
)
def test_single_terms(value: float, kept: float) -> None:
    assert sum_of([value]).total().tolist() == [kept]


def test_terms_that_cancel_leave_nothing_of_their_size() -> None:
    small, large = 0.1, 2.0**31 + 0.7
    assert abs(float(sum_of([large, small, -large]).total()) - small) < 3 * 2.0**-52
    assert abs((large + small) - large - small) > 2.0**-30, "as floats they do"


def test_as_many_of_the_largest_terms_as_promised_fit() -> None:
    """2^20 of them, by doubling; the sums' integers stay below 2^63."""
    for largest in (LARGEST_TERM, -LARGEST_TERM, math.nextafter(LARGEST_TERM, 0)):
        total = sum_of([largest])
        for _ in range(20):
            copy = ExactSum(1)
            copy.merge(total)
            total.merge(copy)
        assert total.total().tolist() == [2**20 * largest]


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, math.nextafter(LARGEST_TERM, math.inf)]
)
def test_a_term_that_does_not_fit_is_refused_and_leaves_no_trace(value: float) -> None:
    total = ExactSum(2)
    total.add(vector(1.0, 2.0))
    for refused in (vector(value, 0.0), vector(0.0, -value)):
        with pytest.raises(ValueError, match="not finite or above"):
            total.add(refused)
    assert total.total().tolist() == [1.0, 2.0]


def test_coordinates_do_not_mix() -> None:
    total = ExactSum(3)
    total.add(vector(1.0, -2.0, 0.25))
    total.add(vector(0.5, 0.0, -1.0))
    assert total.total().tolist() == [1.5, -2.0, -0.75]
    assert total.dimension == 3


def test_nothing_is_zero() -> None:
    assert ExactSum(2).total().tolist() == [0.0, 0.0]
    assert ExactSum(0).total().tolist() == []


# -- travel ---------------------------------------------------------------------------------------


@given(TERMS)
def test_a_sum_that_went_to_another_process_has_its_bits(values: list[float]) -> None:
    total = sum_of(values)
    arrived: ExactSum = pickle.loads(pickle.dumps(total))  # noqa: S301 - what a pipe does
    assert torch.equal(arrived.total(), total.total())
    arrived.add(vector(1.0))  # its numbers are its own, and may be written to
    total.add(vector(1.0))
    assert torch.equal(arrived.total(), total.total())


class Parcel(Travels):
    def __init__(self) -> None:
        self.deep = {0: {"w": torch.arange(3.0)}, 1: {"w": torch.arange(2)}}
        self.plain = ["a", 1]


def test_tensors_go_as_arrays_however_deep_in_mappings() -> None:
    parcel = Parcel()
    packed = parcel.__getstate__()["deep"]
    assert all(isinstance(inner["w"], np.ndarray) for inner in packed.values())
    assert b"torch" not in pickle.dumps(parcel)
    arrived: Parcel = pickle.loads(pickle.dumps(parcel))  # noqa: S301
    assert arrived.plain == parcel.plain
    for key, inner in parcel.deep.items():
        assert torch.equal(arrived.deep[key]["w"], inner["w"])
        assert arrived.deep[key]["w"].dtype == inner["w"].dtype


def test_what_arrives_does_not_share_memory_with_what_is_read_only() -> None:
    """Ray hands out arrays that nobody may write to."""
    parcel = Parcel()
    state = parcel.__getstate__()
    state["deep"][0]["w"].flags.writeable = False
    other = Parcel.__new__(Parcel)
    other.__setstate__(state)
    other.deep[0]["w"][0] = 9.0
    assert parcel.deep[0]["w"][0] == 0.0
