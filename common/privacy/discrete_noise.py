"""The discrete Gaussian, drawn exactly: noise for counts, and for sums in whole steps.

Canonne, Kamath & Steinke 2020, "The discrete Gaussian for differential privacy", algorithms 1 to 3.
A float σ is a rational number and is taken as exactly that one, and each integer comes with
precisely its probability. There are no low bits that could tell what a draw was added to (Mironov
2012), and no tail that is cut off. How long a call takes does depend on its draws, a side channel
(Jin et al. 2022, "Are we there yet? Timing and floating-point attacks on differential privacy
systems") that is not closed here.

Every decision of the algorithms is whether a uniform number, of which fair bits are known one after
another, is below an exponential. Nearly always its first 53 bits decide, and floats can see it;
where they are not sure, more bits and as many digits as it takes do (as Karney 2016, "Sampling
exactly from the normal distribution", decides with lazily drawn digits). So many draws are made at
once, and floats never change one.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.errors import ConfigurationError
from common.privacy.noise import Randomness

__all__ = ["discrete_gaussian", "integers"]

LARGEST_SIGMA = 2**40
"""Above it a draw could leave int64, though with a probability that nobody would see."""

_SPARE = 16
"""Candidates beyond twice what is missing, so that few draws seldom need a second look."""

_UNSURE = 1e-12
"""A float's exponential is less than a hundredth of this away from the true one, see
:func:`_accepted`."""

Integers = npt.NDArray[Any]
"""[n] whole numbers: int64, or Python's where they may not fit."""

Floats = npt.NDArray[np.float64]


def discrete_gaussian(n: int, sigma: float, randomness: Randomness) -> Tensor:
    """Independent draws from the discrete Gaussian N_Z(0, σ²): P(x) ∝ exp(−x²/(2σ²)).

    Added to a count that one unit moves by at most Δ, it is at least as private as continuous
    noise of this σ in zero-concentrated DP, ρ = Δ²/(2σ²) (theorem 4 of the paper, where algorithm
    3 is this function). Its variance is at most σ².

    Args:
        n: draws.
        sigma: σ, taken exactly as the rational number that the float is; 0 for no noise.
        randomness: of the draws.

    Returns:
        [n] int64 on the CPU.

    Raises:
        ConfigurationError: σ is negative, not finite, or above 2^40.
    """
    if not 0.0 <= sigma <= LARGEST_SIGMA:
        raise ConfigurationError(f"sigma must be at least 0 and at most 2^40, got {sigma!r}")
    if sigma == 0:
        return torch.zeros(n, dtype=torch.int64)
    scale = int(sigma) + 1

    def candidates(m: int) -> Integers:
        """Discrete Laplace draws of this scale, algorithm 2, that both rejections leave."""
        rest, whole = integers(m, scale, randomness), _geometric(m, randomness)
        kept = _accepted(whole, rest, scale, sigma, randomness)
        size = whole[kept] * scale + rest[kept]
        negative = integers(len(size), 2, randomness) == 1
        # Zero has one sign only, else it would come twice as often.
        return np.asarray(np.where(negative, -size, size)[~(negative & (size == 0))])

    return torch.from_numpy(_first(n, candidates))


def integers(n: int, bound: int, randomness: Randomness) -> Integers:
    """Independent and exactly uniform whole numbers from 0 to ``bound`` − 1.

    By rejection: as many fair bits as ``bound`` − 1 has, again until they make a number below it.

    Args:
        n: numbers.
        bound: ≥ 1, of any size.
        randomness: of the bits.

    Returns:
        [n] int64; Python integers (dtype object) where ``bound`` is above 2^63.
    """
    bits = (bound - 1).bit_length()

    def candidates(m: int) -> Integers:
        numbers = _of_bits(m, bits, randomness)
        kept: Integers = numbers[numbers < bound]
        return kept

    return _first(n, candidates)


def _of_bits(n: int, bits: int, randomness: Randomness) -> Integers:
    """[n] uniform integers below 2^bits; each has the upper bits of as many words as it needs."""
    words = max(1, -(-bits // 64))
    drawn = randomness.words(words * n).numpy().view(np.uint64).reshape(words, n)
    if bits < 64:
        # A shift by all 64 bits is not defined, hence two for the case of no bits.
        return np.asarray(drawn[0] >> np.uint64(63 - bits) >> np.uint64(1)).astype(np.int64)
    numbers: Integers = drawn[0].astype(object)
    for word in drawn[1:]:
        numbers = (numbers << 64) | word.astype(object)
    numbers >>= 64 * words - bits
    return numbers


def _first(n: int, candidates: Callable[[int], Integers]) -> Integers:
    """The first ``n`` of what rejection leaves: ``candidates(m)`` are the survivors of m tries."""
    kept = candidates(2 * n + _SPARE)
    while len(kept) < n:
        kept = np.concatenate([kept, candidates(2 * (n - len(kept)) + _SPARE)])
    return kept[:n]


def _geometric(n: int, randomness: Randomness) -> Integers:
    """Numbers V with P(V ≥ k) = exp(−k): [n] int64. V is −log of a uniform number, rounded down."""
    words = _words(n, randomness)
    uniform = _upper_bits(words)
    whole = np.floor(-np.log(uniform + 2.0**-54))
    near = np.minimum(abs(uniform - np.exp(-whole)), abs(uniform - np.exp(-whole - 1)))
    found = whole.astype(np.int64)
    for place in np.flatnonzero(near <= _UNSURE):
        exact, count = _Uniform(int(words[place]), randomness), 0
        while exact.below_exp(Fraction(count + 1)):
            count += 1
        found[place] = count
    return found


def _accepted(
    whole: Integers, rest: Integers, scale: int, sigma: float, randomness: Randomness
) -> npt.NDArray[np.bool_]:
    """Which candidates stay: each with probability exp(−γ), [n] bool.

    γ = r/t + (y − σ²/t)²/(2σ²) for the candidate y = k·t + r. The first term is algorithm 2's
    rejection, and the second algorithm 3's; a coin of both is as good as two coins.

    In floats γ is right to 10^−15·(4 + 4γ), and its exponential, of which e^−γ·γ ≤ 1, to 10^−14.

    Args:
        whole: k, [n] int64.
        rest: r, [n] int64, from 0 to t − 1.
        scale: t = ⌊σ⌋ + 1.
        sigma: σ.
        randomness: of the coins.
    """
    words = _words(len(rest), randomness)
    uniform = _upper_bits(words)
    with np.errstate(over="ignore"):
        away = (whole * scale + rest) / sigma - sigma / scale
        chance = np.exp(-(rest / scale + away * away / 2))
    kept = uniform < chance
    for place in np.flatnonzero(abs(uniform - chance) <= _UNSURE):
        gamma = _exponent(int(whole[place]), int(rest[place]), scale, sigma)
        kept[place] = _Uniform(int(words[place]), randomness).below_exp(gamma)
    return np.asarray(kept)


def _exponent(whole: int, rest: int, scale: int, sigma: float) -> Fraction:
    """γ of :func:`_accepted`, exactly."""
    variance = Fraction(sigma) ** 2
    away = whole * scale + rest - variance / scale
    return Fraction(rest, scale) + away**2 / (2 * variance)


class _Uniform:
    """A number uniform in [0, 1), of which some bits are known; more are drawn as they are needed.

    Args:
        word: 64 fair bits, of which the upper 53 are the number's first.
        randomness: of the further ones.
    """

    def __init__(self, word: int, randomness: Randomness) -> None:
        self._number, self._bits = word >> 11, 53
        self._randomness = randomness

    def below_exp(self, gamma: Fraction) -> bool:
        """Whether it is below exp(−γ), γ ≥ 0."""
        while True:
            with localcontext() as context:
                # Two digits more than the bits; the rest is for three roundings and for γ·e^−γ.
                context.prec = digits = self._bits // 3 + 8
                bound = (-Decimal(gamma.numerator) / Decimal(gamma.denominator)).exp()
                slack = Decimal(10) ** (4 - digits)
                unit = Decimal(2) ** self._bits
                if self._number + 1 <= (bound - slack) * unit:
                    return True
                if self._number >= (bound + slack) * unit:
                    return False
            self._number = (self._number << 64) | int(_words(1, self._randomness)[0])
            self._bits += 64


def _upper_bits(words: Integers) -> Floats:
    """The first 53 bits of uniform numbers: [n] float64, exact."""
    return np.asarray((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _words(n: int, randomness: Randomness) -> Integers:
    """[n] uint64 of fair bits."""
    return np.asarray(randomness.words(n).numpy().view(np.uint64))
