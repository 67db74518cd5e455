"""The discrete Gaussian, drawn exactly: noise for counts, without floating point.

Canonne, Kamath & Steinke 2020, "The discrete Gaussian for differential privacy", algorithms 1 to 3.
A float is a rational number and is taken as exactly that one; from there on everything is whole
numbers and fair bits, so that each integer comes with precisely its probability. There are no low
bits that could tell what a draw was added to (Mironov 2012), and no tail that is cut off. How long
a call takes does depend on its draws, a side channel (Jin et al. 2022, "Are we there yet? Timing
and floating-point attacks on differential privacy systems") that is not closed here.

The algorithms are written for one draw and a loop; here each step is taken for many draws at once.
"""

from __future__ import annotations

from collections.abc import Callable
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

Integers = npt.NDArray[Any]
"""[n] whole numbers: int64, or Python's where they may not fit."""


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
    variance = Fraction(sigma) ** 2
    scale = int(sigma) + 1

    def candidates(m: int) -> Integers:
        drawn = _discrete_laplace(m, scale, randomness)
        numerators, denominator = _excess(np.abs(drawn), scale, variance)
        return drawn[_bernoulli_exp(numerators, denominator, randomness)]

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


def _bernoulli_exp(numerators: Integers, denominator: int, randomness: Randomness) -> Integers:
    """Each is true with probability exp(−γ), γ = numerator/denominator ≥ 0: [n] bool.

    Algorithm 1. A γ above 1 is its whole part, a coin of exp(−1) for each, and the rest.
    """
    whole, rest = numerators // denominator, numerators % denominator
    heads, coins = np.ones(len(numerators), dtype=bool), 0
    while (more := np.flatnonzero(heads & (whole > coins))).size:
        heads[more] = _bernoulli_exp_unit(np.ones_like(more), 1, randomness)
        coins += 1
    heads[heads] = _bernoulli_exp_unit(rest[heads], denominator, randomness)
    return heads


def _bernoulli_exp_unit(numerators: Integers, denominator: int, randomness: Randomness) -> Integers:
    """As :func:`_bernoulli_exp` for γ in [0, 1]: toss coins of γ/1, γ/2, ... up to a first tail.

    That is after an odd number of tosses with probability 1 − γ + γ²/2! − … = exp(−γ).
    """
    heads = np.zeros(len(numerators), dtype=bool)
    tossing, tosses = np.arange(len(numerators)), 1
    while tossing.size:
        fair = integers(len(tossing), denominator * tosses, randomness)
        tail = (fair >= numerators[tossing]).astype(bool)
        heads[tossing[tail]] = tosses % 2 == 1
        tossing, tosses = tossing[~tail], tosses + 1
    return heads


def _discrete_laplace(tries: int, scale: int, randomness: Randomness) -> Integers:
    """What ``tries`` leave of draws with P(x) ∝ exp(−|x|/t), t a whole ``scale``: int64.

    Algorithm 2 with s = 1.
    """
    below = integers(tries, scale, randomness)
    below = below[_bernoulli_exp(below, scale, randomness)]
    size = below + scale * _geometric(len(below), randomness)
    negative = integers(len(size), 2, randomness) == 1
    # Zero has one sign only, else it would come twice as often.
    return np.asarray(np.where(negative, -size, size)[~(negative & (size == 0))])


def _geometric(n: int, randomness: Randomness) -> Integers:
    """How many coins of exp(−1) come up heads before the first tail: [n] int64."""
    heads = np.zeros(n, dtype=np.int64)
    tossing = np.arange(n)
    while tossing.size:
        tossing = tossing[_bernoulli_exp_unit(np.ones_like(tossing), 1, randomness)]
        heads[tossing] += 1
    return heads


def _excess(sizes: Integers, scale: int, variance: Fraction) -> tuple[Integers, int]:
    """γ = (|y| − σ²/t)² / (2σ²), to accept a discrete Laplace draw with probability exp(−γ).

    Args:
        sizes: |y|, [n] int64.
        scale: t.
        variance: σ² = a/b.

    Returns:
        The numerators (|y|·t·b − a)², Python's integers, and the denominator 2·a·b·t² of all.
    """
    a, b = variance.numerator, variance.denominator
    return (sizes.astype(object) * (scale * b) - a) ** 2, 2 * a * b * scale**2
