"""Noise that later rounds take back: the banded matrix mechanism.

A model of round t is a sum of what t rounds added, so what counts is the noise in sums over
rounds. If A is the matrix of these sums (ones on and below its diagonal) and C is lower triangular,
then AX + (AC⁻¹)Z = A(X + C⁻¹Z) has the privacy of CX + Z, a Gaussian mechanism, and a smaller error
than independent noise: the rows of C⁻¹Z are correlated so that much of them cancels (Denisov et
al. 2022, "Improved differential privacy for SGD via optimal private linear operators on adaptive
streams"; that it also holds for adaptively chosen X is theorem 2.1 there).

C is here the square root of A, cut to b bands and scaled so that no column is longer than 1
(Kalinin & Lampert 2024, "Banded square root matrix factorization for differentially private model
training"). It is Toeplitz, so that b numbers describe it and a round needs the last b − 1 rows of
noise.

*Sensitivity.* Someone who takes part in rounds that are at least b apart, k of them, and adds a
vector of norm at most 1 in each, moves CX by the sum of k columns of C times these vectors. Columns
b apart have no row in common, as each has at most b entries: so their squares add up, and the norm
is at most √k (Choquette-Choo et al. 2023, "(Amplified) banded matrix factorization", section 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from common.errors import ConfigurationError

__all__ = ["banded_square_root", "correlated", "mean_square_error", "participations"]

Values = npt.NDArray[np.float64]


def banded_square_root(bands: int) -> Values:
    """The first column of C, from the diagonal down: [b] float64, of norm 1.

    The square root of A has the coefficients of (1 − x)^(−1/2): c_j = binom(2j, j)/4^j (Kalinin &
    Lampert 2024, equation 4).

    >>> banded_square_root(1)
    array([1.])

    Args:
        bands: b ≥ 1; 1 is independent noise.
    """
    if bands < 1:
        raise ConfigurationError(f"bands must be at least 1, got {bands!r}")
    steps = np.arange(1, bands)
    column = np.concatenate([[1.0], np.cumprod((2 * steps - 1) / (2 * steps))])
    return np.asarray(column / np.linalg.norm(column))


def correlated(column: Values, fresh: Values, last: Sequence[Values]) -> Values:
    """The next row of C⁻¹Z, by forward substitution.

    Args:
        column: of C, [b].
        fresh: the next row of Z, [D].
        last: the rows before it, the newest first; at most b − 1, fewer at the beginning.

    Returns:
        [D] float64.
    """
    row = np.array(fresh, dtype=np.float64)
    for weight, before in zip(column[1:], last, strict=False):
        row -= weight * before
    return np.asarray(row / column[0])


def participations(rounds: int, bands: int) -> int:
    """k, how often somebody takes part who is asked every ``bands`` rounds."""
    return math.ceil(rounds / bands)


def mean_square_error(rounds: int, bands: int) -> float:
    """Mean over rounds of the variance in that round's sum, for Z of variance 1.

    ‖AC⁻¹‖²/T, with the Frobenius norm. To compare numbers of bands at one price, multiply with
    :func:`participations`, the variance that the sensitivity asks of Z.

    Args:
        rounds: T.
        bands: b.
    """
    column = banded_square_root(bands)
    inverse = np.zeros(rounds)  # the first column of C⁻¹, which is Toeplitz too
    for place in range(rounds):
        before = inverse[max(0, place - bands + 1) : place][::-1]
        one = 1.0 if place == 0 else 0.0
        inverse[place] = (one - column[1 : len(before) + 1] @ before) / column[0]
    sums = np.cumsum(inverse) ** 2
    return float(np.sum(sums * np.arange(rounds, 0, -1)) / rounds)
