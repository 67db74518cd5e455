"""Privacy loss variables of single mechanisms, as the PRV bound needs them.

For a pair (P, Q) of output distributions the privacy loss is Y = log P(x)/Q(x) with x drawn from P.
If the pair dominates a mechanism (every hockey-stick divergence between neighbours is at most
the pair's), Y says everything about its privacy, and under adaptive composition the Y add up
(Zhu, Dong & Wang 2022, "Optimal accounting of differential privacy via characteristic function",
theorem 10). Adding and removing a unit have pairs of their own, (P, Q) and (Q, P). Under
composition neither need be the worse one (Lebeda, Regehr, Kamath & Steinke 2024, "Avoiding pitfalls
for privacy accounting of subsampled mechanisms under composition"), so both are computed.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

__all__ = ["DiscreteGaussianLoss", "Loss", "SampledGaussianLoss"]

Array = NDArray[np.float64]

TAIL = 39.0
"""Standard deviations past which a Gaussian's probability is no float64 any more."""

MOST_ATOMS = 2**18
"""Values of a discrete Gaussian that a table may have: σ up to 3,300."""

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


class Loss(Protocol):
    """A privacy loss variable Y, in nats."""

    def cdf(self, t: Array) -> Array:
        """P(Y ≤ t) at each of ``t``, ascending: [n]."""
        ...

    def mean(self, low: float, high: float) -> float:
        """E[Y | low < Y ≤ high]."""
        ...


class SampledGaussianLoss:
    """Of a Poisson-subsampled Gaussian step.

    With P = (1 − q)·N(0, σ²) + q·N(1, σ²) and Q = N(0, σ²) the loss at x is, up to its sign,

        y(x) = log(1 − q + q·e^((2x − 1)/2σ²)),

    which rises with x. Removing a unit is (P, Q): Y = y(x), x ~ P; adding one is (Q, P):
    Y = −y(x), x ~ Q. Zhu, Dong & Wang 2022, theorem 11, has both as dominating pairs; Gopi, Lee &
    Wutschitz 2021, propositions B.1 and B.4, the former's distribution.

    Args:
        sampling_rate: q, in (0, 1].
        noise_multiplier: σ.
        added: whether the unit is added.
    """

    def __init__(self, sampling_rate: float, noise_multiplier: float, *, added: bool) -> None:
        self._rate = sampling_rate
        self._sigma = noise_multiplier
        self._added = added

    def cdf(self, t: Array) -> Array:
        """P(Y ≤ t): [n]."""
        if not self._added:
            return self._below(self._outcome(t))
        return ndtr(-self._outcome(-t) / self._sigma)

    def mean(self, low: float, high: float) -> float:
        """E[Y | low < Y ≤ high], by Gauss–Legendre quadrature in x, where all is smooth."""
        if self._added:
            low, high = -high, -low
        first, last = self._outcome(np.array([low, high]))
        first = max(first, -TAIL * self._sigma)
        last = min(last, 1 + TAIL * self._sigma)
        # y has its singularities πσ² away from the real line, and the density a width of σ.
        panels = math.ceil((last - first) / min(self._sigma, self._sigma**2)) + 1
        edges = np.linspace(first, last, panels + 1)
        half = np.diff(edges)[:, None] / 2
        x = (edges[:-1, None] + half) + half * _NODES
        mass = half * _WEIGHTS * self._density(x)
        mean = float(np.sum(mass * self._loss(x)) / np.sum(mass))
        return -mean if self._added else mean

    def _loss(self, x: Array) -> Array:
        """y(x)."""
        z = (2 * x - 1) / (2 * self._sigma**2)
        # Near 0 the one form has digits, elsewhere the other.
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            near = np.log1p(self._rate * np.expm1(z))
            far = np.logaddexp(np.log1p(-self._rate), math.log(self._rate) + z)
        return np.where(np.abs(far) < 0.5, near, far)

    def _outcome(self, t: Array) -> Array:
        """The x at which the loss is t; −∞ where it is above t everywhere."""
        # Near 0 the one form has digits, elsewhere the other.
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            near = np.log1p(np.maximum(np.expm1(t) / self._rate, -1.0))
            rest = np.maximum(np.exp(t) - (1 - self._rate), 0.0)
            far = np.log(rest) - math.log(self._rate)
        return self._sigma**2 * np.where(np.abs(t) < 0.5, near, far) + 0.5

    def _below(self, x: Array) -> Array:
        """P(outcome ≤ x), of P."""
        sampled = ndtr((x - 1) / self._sigma)
        return (1 - self._rate) * ndtr(x / self._sigma) + self._rate * sampled

    def _density(self, x: Array) -> Array:
        """Up to a factor: of P, or of Q if the unit is added."""
        density = np.exp(-((x / self._sigma) ** 2) / 2)
        if self._added:
            return density
        return (1 - self._rate) * density + self._rate * np.exp(-(((x - 1) / self._sigma) ** 2) / 2)


class DiscreteGaussianLoss:
    """Of discrete Gaussian noise on an integer that one unit moves by one.

    For P = N_Z(0, σ²) and Q = N_Z(1, σ²) the loss at x is (1 − 2x)/2σ². N_Z is symmetric about its
    centre, so (Q, P) has the same loss. One unit moves one coordinate of the vector; the others'
    noise does not depend on it, so the pair dominates the vector's release, exactly.

    Args:
        noise_multiplier: σ, at most :data:`MOST_ATOMS` / 80.
    """

    def __init__(self, noise_multiplier: float) -> None:
        self._variance = noise_multiplier**2
        reach = math.ceil(TAIL * noise_multiplier) + 1
        if 2 * reach + 1 > MOST_ATOMS:
            raise ValueError(f"noise_multiplier={noise_multiplier:g} has too many outcomes")
        # The values of −x, so that the loss rises with them.
        self._outcomes = np.arange(-reach, reach + 1, dtype=np.float64)
        weights = np.exp(-(self._outcomes**2) / (2 * self._variance))
        self._mass = weights / math.fsum(weights)
        self._cumulative = np.concatenate([[0.0], np.cumsum(self._mass)])

    def cdf(self, t: Array) -> Array:
        """P(Y ≤ t): [n]."""
        return self._cumulative[self._count(t)]

    def mean(self, low: float, high: float) -> float:
        """E[Y | low < Y ≤ high], a sum."""
        first, last = self._count(np.array([low, high]))
        mass, outcomes = self._mass[first:last], self._outcomes[first:last]
        return float(np.sum(mass * (0.5 + outcomes)) / np.sum(mass) / self._variance)

    def _count(self, t: Array) -> NDArray[np.intp]:
        """How many of the table's outcomes have a loss of at most t."""
        last = np.floor(t * self._variance - 0.5) - self._outcomes[0]
        return np.asarray(np.clip(last + 1, 0, len(self._outcomes)), dtype=np.intp)
