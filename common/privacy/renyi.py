"""Rényi divergences of events, and the ε that follows from them.

Rényi differential privacy (Mironov 2017, "Rényi differential privacy") is the currency that every
event here has a price in. Prices add up under adaptive composition (proposition 1 there), whatever
kinds are mixed; so this is the bound that always exists. Each price is at least

    max{ D_α(M(D) ‖ M(D′)), D_α(M(D′) ‖ M(D)) }

over neighbouring data sets D and D′, that is, it holds for adding and for removing a unit.

| event | D_α | source |
| --- | --- | --- |
| Gaussian, q = 1 | α/(2σ²) | Mironov 2017, corollary 3 |
| subsampled Gaussian | log A_α / (α − 1) | Mironov, Talwar & Zhang 2019, "Rényi differential \
privacy of the sampled Gaussian mechanism", section 3.3; theorem 5 there for both directions |
| discrete Gaussian | α/(2σ²) | Canonne, Kamath & Steinke 2020, "The discrete Gaussian for \
differential privacy", proposition 5 |
| distributed Gaussian | α/(2σ²) | Kairouz, Liu & Steinke 2021, theorem 1, see below |
| selection | see :mod:`common.privacy.selection` | Papernot & Steinke 2022, theorem 2 |

A sum of discrete Gaussians is not quite one. Theorem 1 has α/2·(1/σ + τ√D)² for n shares of
standard deviation s ≥ 64 and D coordinates, τ = 10·Σ_{k<n} exp(−2π²s²·k/(k+1)) < n·10^−17,000. That
is α/(2σ²) but for a factor of 1 + 2στ√D, far inside :data:`RELATIVE_ROUNDING`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigurationError
from common.privacy.events import (
    Composition,
    DiscreteGaussian,
    DistributedGaussian,
    Event,
    Selection,
    SubsampledGaussian,
    Unprotected,
)
from common.privacy.selection import selected

__all__ = ["ORDERS", "check_known", "divergences", "renyi_epsilon", "renyi_tail"]

MOST_TERMS = 512
"""Largest order at which a subsampled step is taken as such: log A_α has α terms."""

ORDERS: NDArray[np.float64] = np.array(
    [*range(2, 65), 80, 96, 128, 192, 256, MOST_TERMS, *(2.0**i for i in range(10, 31))]
)
"""Orders α, [A]. Whole numbers only: there log A_α is a sum of positive terms, so it cannot
cancel; fewer orders make the bound looser, never wrong. An ε takes orders of log(1/δ)/ε."""

MOST_RUNS = 10**18
"""A mechanism that runs more often has no bound: its count may not even be a float."""

ROUNDING = 1e-13
"""Added to the divergence of each subsampled step (nats) against rounding, which matters for
large σ."""

RELATIVE_ROUNDING = 1 + 1e-12
"""Factor on the divergences of other events, against rounding."""

REMEMBERED = 1024
"""Subsampled steps and selections whose divergences are kept; they take milliseconds."""

Divergences = NDArray[np.float64]
"""Rényi divergences at each of :data:`ORDERS`: [A], in nats."""


def divergences(composition: Composition) -> Divergences:
    """The Rényi divergences of everything in ``composition`` together: [A], in nats.

    Raises:
        ConfigurationError: an event of a kind that has no price.
    """
    total = np.zeros(len(ORDERS))
    for event in composition:
        total += _of(event.times(1)) * float(event.count) if event.count <= MOST_RUNS else math.inf
    return total


def check_known(event: Event) -> None:
    """Refuse an event of a kind that has no price.

    Raises:
        ConfigurationError: it is one.
    """
    if type(event) not in _PRICES:
        raise ConfigurationError(
            f"no accountant knows the event {event!r}; a release of another kind needs its own "
            "price in common.privacy.renyi, and is Unprotected until then"
        )


def renyi_epsilon(divergence: Divergences, delta: float) -> float:
    """ε at δ, the least over :data:`ORDERS`: infinite where none of them bounds it.

    Balle et al. 2020, "Hypothesis testing interpretations and Rényi differential privacy",
    theorem 21.
    """
    slack = np.log1p(-1 / ORDERS) - (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1)
    return max(0.0, _least(divergence + slack))


def renyi_tail(divergence: Divergences, probability: float) -> float:
    """What |privacy loss| exceeds with at most ``probability``, on either side, in nats.

    Markov's inequality. For the loss Y = log P/Q under P, E[e^((α−1)·Y)] = e^((α−1)·D_α(P‖Q)) and
    E[e^(−α·Y)] = e^((α−1)·D_α(Q‖P)), so that the lower tail is the thinner one (Mironov 2017, proof
    of proposition 3, for the upper).
    """
    return max(0.0, _least(divergence - math.log(probability) / (ORDERS - 1)))


def _least(candidates: Divergences) -> float:
    # An order that could not be computed is infinite, and NaN where infinities met.
    return float(np.min(np.where(np.isnan(candidates), np.inf, candidates)))


def _of(event: Event) -> Divergences:
    """Of one run of an event's mechanism; it may be shared, so it is not to be written to."""
    check_known(event)
    return _PRICES[type(event)](event)


def _gaussian_step(event: SubsampledGaussian) -> Divergences:
    # Not remembered: it takes microseconds, and steps that were merged have a new σ every round.
    is_plain = event.sampling_rate == 1.0
    return _gaussian(event.noise_multiplier) if is_plain else _subsampled(event)


@lru_cache(maxsize=REMEMBERED)
def _subsampled(event: SubsampledGaussian) -> Divergences:
    from opacus.accountants.analysis.rdp import compute_rdp  # seconds to import

    def at(order: float) -> float:
        try:
            value = float(
                compute_rdp(
                    q=event.sampling_rate,
                    noise_multiplier=event.noise_multiplier,
                    steps=1,
                    orders=order,
                )
            )
        except ArithmeticError:  # an overflow: this order bounds nothing
            return math.inf
        return math.inf if math.isnan(value) else max(value, 0.0) + ROUNDING

    few = [at(float(order)) for order in ORDERS if order <= MOST_TERMS]
    # Beyond, the sampling is ignored: it can only help.
    found = np.concatenate([few, _gaussian(event.noise_multiplier)[len(few) :]])
    found.setflags(write=False)
    return found


def _gaussian(noise_multiplier: float) -> Divergences:
    """Of Gaussian noise on what one unit moves by 1: continuous, discrete, or in shares."""
    with np.errstate(over="ignore"):
        return ORDERS / 2 / noise_multiplier / noise_multiplier * RELATIVE_ROUNDING


@lru_cache(maxsize=REMEMBERED)
def _selection(event: Selection) -> Divergences:
    # A run's output is a mixture over candidates, and names the one that was drawn; the worst
    # of them bounds it.
    run = np.max([divergences(candidate) for candidate in event.candidates], axis=0)
    found = selected(ORDERS, run, event.expected_runs, event.shape) * RELATIVE_ROUNDING
    found.setflags(write=False)
    return found


_PRICES: Mapping[type, Callable[[Any], Divergences]] = {
    DiscreteGaussian: lambda event: _gaussian(event.noise_multiplier),
    DistributedGaussian: lambda event: _gaussian(event.noise_multiplier),
    Selection: _selection,
    SubsampledGaussian: _gaussian_step,
    Unprotected: lambda _: np.full_like(ORDERS, math.inf),
}
