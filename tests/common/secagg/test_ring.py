"""The ring: sums come out exactly, overflow cannot happen, and nothing is clipped in silence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigurationError
from common.secagg.ring import Encoding, OutOfRange

WIDTHS = st.sampled_from([32, 64])


@st.composite
def encodings(draw: st.DrawFn) -> Encoding:
    width, holders = draw(WIDTHS), draw(st.integers(1, 100))
    largest = draw(st.integers(1, Encoding.most(width) // holders))
    return Encoding(width, 2.0 ** draw(st.integers(-40, 10)), largest, holders)


@given(encodings(), st.data())
def test_the_sum_of_what_holders_send_comes_out_exactly(
    encoding: Encoding, data: st.DataObject
) -> None:
    number = st.integers(-encoding.largest, encoding.largest)
    vectors = data.draw(
        st.lists(st.lists(number, min_size=3, max_size=3), min_size=1, max_size=encoding.holders)
    )
    total = np.zeros(3, dtype=encoding.dtype)
    for vector in vectors:
        total += encoding.encode_integers(np.array(vector, dtype=np.int64))
    exact = [sum(column) for column in zip(*vectors, strict=True)]
    assert encoding.decode_integers(total).tolist() == exact


@given(encodings())
def test_everybody_at_the_largest_number_does_not_wrap_around(encoding: Encoding) -> None:
    for sign in (1, -1):
        one = encoding.encode_integers(np.array([sign * encoding.largest], dtype=np.int64))
        # Ring arithmetic wraps, as it should on the way; holders times one is what sums give.
        total = one * encoding.dtype.type(encoding.holders)
        assert encoding.decode_integers(total)[0] == sign * encoding.largest * encoding.holders


@given(encodings(), st.integers(1, 2**62))
def test_one_holder_more_than_fits_is_refused(encoding: Encoding, beyond: int) -> None:
    holders = Encoding.most(encoding.width) // encoding.largest + beyond
    with pytest.raises(ConfigurationError, match="could overflow a ring of"):
        Encoding(encoding.width, encoding.step, encoding.largest, holders)


@given(encodings(), st.lists(st.floats(-1, 1), min_size=1, max_size=5))
def test_a_number_comes_back_within_half_a_step(encoding: Encoding, shares: list[float]) -> None:
    values = np.array(shares) * min(encoding.largest, 2**50) * encoding.step
    back = encoding.decode(encoding.encode(values))
    assert np.abs(back - values).max() <= encoding.step / 2


@pytest.mark.parametrize("value", [11.0, -11.0, np.inf, -np.inf, np.nan, 1e300])
def test_a_number_out_of_range_is_an_error_and_never_clipped(value: float) -> None:
    encoding = Encoding(32, 0.5, 20, 3)
    with pytest.raises(OutOfRange, match="beyond 20 steps"):
        encoding.encode(np.array([0.0, value]))
    assert encoding.decode(encoding.encode(np.array([10.0, -10.0]))).tolist() == [10.0, -10.0]


def test_a_number_that_rounds_to_one_beyond_the_range_is_out_of_range() -> None:
    # As a float64, the largest number of steps is 2**63, which would wrap around.
    encoding = Encoding(64, 1.0, 2**63 - 1, 1)
    with pytest.raises(OutOfRange):
        encoding.encode(np.array([2.0**63]))


@pytest.mark.parametrize("value", [21, -21, 2**63 - 1, -(2**63)])
def test_a_whole_number_out_of_range_is_an_error(value: int) -> None:
    with pytest.raises(OutOfRange):
        Encoding(64, 1.0, 20, 3).encode_integers(np.array([value], dtype=np.int64))


@pytest.mark.parametrize("step", [0.3, 3.0, 0.0, -1.0])
def test_a_step_is_a_power_of_two(step: float) -> None:
    with pytest.raises(ConfigurationError, match="power of two"):
        Encoding(32, step, 20, 3)
