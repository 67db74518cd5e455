"""Banded noise: what the matrix is, what somebody's part moves, and what is gained by it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import toeplitz

from common.errors import ConfigurationError
from common.privacy.matrix import (
    banded_square_root,
    correlated,
    mean_square_error,
    participations,
)

Matrix = npt.NDArray[np.float64]


def sums(rounds: int) -> Matrix:
    """A: row t adds up what rounds 1 to t gave."""
    return np.tril(np.ones((rounds, rounds)))


def dense(rounds: int, bands: int) -> Matrix:
    """C, [T, T], from its definition."""
    column = np.zeros(rounds)
    own = banded_square_root(bands)[:rounds]
    column[: len(own)] = own
    return np.tril(toeplitz(column))


def shape() -> st.SearchStrategy[tuple[int, int]]:
    """T and b ≤ T."""
    return st.integers(1, 30).flatmap(
        lambda rounds: st.tuples(st.just(rounds), st.integers(1, rounds))
    )


@pytest.mark.parametrize("rounds", [1, 2, 5, 40])
def test_with_all_bands_c_times_c_is_the_sums(rounds: int) -> None:
    c = dense(rounds, rounds)
    np.testing.assert_allclose(c @ c / c[0, 0] ** 2, sums(rounds), atol=1e-12)


def test_the_coefficients_are_those_of_the_paper() -> None:
    """binom(2j, j)/4^j: 1, 1/2, 3/8, 5/16 (Kalinin & Lampert 2024, equation 4)."""
    column = banded_square_root(4)
    np.testing.assert_allclose(column / column[0], [1, 1 / 2, 3 / 8, 5 / 16])
    assert banded_square_root(1).tolist() == [1.0]


@pytest.mark.parametrize("bands", [0, -3])
def test_no_bands_are_refused(bands: int) -> None:
    with pytest.raises(ConfigurationError, match=f"bands must be at least 1, got {bands}"):
        banded_square_root(bands)


# -- sensitivity -----------------------------------------------------------------------------


@given(shape())
def test_no_column_is_longer_than_1_and_the_last_ones_are_shorter(shape: tuple[int, int]) -> None:
    rounds, bands = shape
    norms = np.linalg.norm(dense(rounds, bands), axis=0)
    assert norms.max() <= 1 + 1e-12
    assert norms[0] == pytest.approx(1.0)
    assert (np.diff(norms) <= 1e-12).all()


@given(shape(), st.integers(0, 29), st.integers(0, 2**32 - 1))
def test_somebodys_part_moves_cx_by_at_most_the_root_of_how_often(
    shape: tuple[int, int], turn: int, seed: int
) -> None:
    """Whoever gives vectors of norm at most 1, in rounds b apart, from any turn on."""
    rounds, bands = shape
    rng = np.random.default_rng(seed)
    x = np.zeros((rounds, 4))
    own = range(turn % bands, rounds, bands)
    assert len(own) <= participations(rounds, bands)
    for row in own:
        vector = rng.normal(size=4)
        x[row] = vector / np.linalg.norm(vector) * rng.choice([1.0, rng.uniform()])
    moved = np.linalg.norm(dense(rounds, bands) @ x)
    assert moved <= math.sqrt(participations(rounds, bands)) * (1 + 1e-12)


def test_the_bound_is_reached_and_a_part_too_often_passes_it() -> None:
    """Negative control of the property above."""
    c = dense(30, 5)
    every = np.zeros((30, 1))
    every[0:26:5] = 1.0
    assert np.linalg.norm(c @ every) == pytest.approx(math.sqrt(6))
    soon = np.zeros((30, 1))
    soon[0:24:4] = 1.0  # as often, but only four rounds apart
    assert np.linalg.norm(c @ soon) > 1.05 * math.sqrt(6)


# -- noise -----------------------------------------------------------------------------------


@given(shape(), st.integers(0, 2**32 - 1))
def test_rows_made_one_by_one_are_those_of_the_inverse(shape: tuple[int, int], seed: int) -> None:
    rounds, bands = shape
    z = np.random.default_rng(seed).normal(size=(rounds, 3))
    column, rows = banded_square_root(bands), list[npt.NDArray[np.float64]]()
    for fresh in z:
        rows.append(correlated(column, fresh, rows[::-1][: bands - 1]))
    np.testing.assert_allclose(rows, np.linalg.solve(dense(rounds, bands), z), atol=1e-9)


@given(shape())
def test_the_error_is_that_of_the_dense_matrices(shape: tuple[int, int]) -> None:
    rounds, bands = shape
    dense_error = np.linalg.norm(sums(rounds) @ np.linalg.inv(dense(rounds, bands))) ** 2 / rounds
    assert mean_square_error(rounds, bands) == pytest.approx(dense_error)


def test_errors_in_closed_form() -> None:
    """Independent noise: 1 + 2 + … + T over T. Two rounds, two bands: by hand, 45/32."""
    for rounds in (1, 7, 100):
        assert mean_square_error(rounds, 1) == pytest.approx((rounds + 1) / 2)
    assert mean_square_error(2, 2) == pytest.approx(45 / 32)


@given(st.integers(2, 60).flatmap(lambda t: st.tuples(st.just(t), st.integers(2, t))))
def test_at_one_price_sums_over_rounds_have_less_noise_than_with_independent_rows(
    shape: tuple[int, int],
) -> None:
    """Holders asked every b rounds move both kinds by at most √k, so Z has one size for both."""
    rounds, bands = shape
    assert mean_square_error(rounds, bands) < mean_square_error(rounds, 1)


def test_with_as_many_bands_as_rounds_the_error_grows_with_the_logarithm_only() -> None:
    """At most (1 + log(4T/5)/π)² for the square root (Henzinger, Upadhyay & Upadhyay 2023,
    "Almost tight error bounds on differentially private continual counting", theorem 1)."""
    for rounds in (16, 128, 1024):
        bound = 1 + math.log(4 * rounds / 5) / math.pi
        assert math.sqrt(mean_square_error(rounds, rounds)) <= bound
