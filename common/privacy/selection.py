"""The best of a random number of private runs: its price, and how to draw that number.

Trying hyperparameters on private data and keeping the best is a release of its own: the choice
depends on the data. If the *number* of runs is random, it costs far less than all runs together
(Liu & Talwar 2019; Papernot & Steinke 2022, "Hyperparameter tuning with Rényi differential
privacy"). :class:`common.privacy.events.Selection` says what is done and what the adversary sees.

The number K ≥ 1 of runs has the truncated negative binomial distribution of definition 1 there,
given here by its mean and η, which fix γ:

    P(K = k) ∝ (1 − γ)^k · Π_{l<k} (l + η)/(l + 1)        η = 1: geometric, η = 0: logarithmic

Of the paper's distributions this one needs nothing but Rényi divergences, so it composes with any
other event. The geometric is the default. For Gaussian runs of ε between 0.5 and 2.5 at δ = 10⁻⁵ it
is cheaper than Poisson's with an exact δ̂ (theorem 6 there) from some 16 expected runs on, by 9 to
17 % at 20 and by 25 to 32 % at 30, and dearer below 12. The logarithmic is a fifth cheaper still,
and in return often tries a single candidate (22 % of the time at a mean of 20, against 5 %).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.privacy.events import Selection

if TYPE_CHECKING:
    from common.privacy.noise import Randomness  # imports torch, which takes seconds

__all__ = ["draw_candidates", "draw_runs", "runs_distribution", "selected"]

_NEGLIGIBLE = 2.0**-60
"""A probability too small for a draw of 53 bits to tell from zero."""


def selected(
    orders: NDArray[np.float64], run: NDArray[np.float64], expected_runs: float, shape: float
) -> NDArray[np.float64]:
    """Rényi divergences of the winner, from those of one run.

    Papernot & Steinke 2022, theorem 2: if one run has the divergences ε(λ), the winner has

        ε′(λ) = ε(λ) + (1 + η)·(1 − 1/λ̂)·ε(λ̂) + (1 + η)·log(1/γ)/λ̂ + log(E[K])/(λ − 1)

    for any λ̂ ≥ 1. Divergences rise with their order, so an order's may be taken from above it.

    Args:
        orders: λ > 1, ascending: [A].
        run: of one run: [A], in nats.
        expected_runs: E[K] ≥ 1.
        shape: η ≥ 0.

    Returns:
        [A], in nats.
    """
    decay = _decay(expected_runs, shape)
    with np.errstate(over="ignore"):
        extra = float(np.min((1 - 1 / orders) * run + decay / orders))
        if np.isfinite(run).any():  # then ε(1) is finite too, and λ̂ = 1 a choice
            extra = min(extra, decay)
        winner = run + (1 + shape) * extra + math.log(expected_runs) / (orders - 1)
    return np.asarray(np.minimum.accumulate(winner[::-1])[::-1])


def draw_runs(selection: Selection, randomness: Randomness) -> int:
    """K, how many runs to compare: at least 1, without an upper limit.

    The guarantee is void if K is drawn again because it came out inconvenient, or is made known.

    Args:
        selection: of what mean and shape.
        randomness: of the draw.
    """
    left = float(randomness.uniform(1)[0])
    runs = 0
    for probability in runs_distribution(selection.expected_runs, selection.shape):
        runs += 1
        left -= probability
        if left < 0:
            break
    return runs


def draw_candidates(candidates: int, runs: int, randomness: Randomness) -> list[int]:
    """Which candidate each run executes: independent draws, all alike likely.

    Args:
        candidates: how many there are to choose from.
        runs: K, of :func:`draw_runs`.
        randomness: of the draws.
    """
    return [int(draw * candidates) for draw in randomness.uniform(runs)]


def runs_distribution(expected_runs: float, shape: float) -> Iterator[float]:
    """P(K = 1), P(K = 2) and so on, until they are negligible."""
    decay = _decay(expected_runs, shape)
    if decay == 0:
        yield 1.0
        return
    going_on = -math.expm1(-decay)  # 1 − γ
    # η/(γ^(−η) − 1), whose limit for η → 0 is 1/log(1/γ).
    probability = going_on * (shape / math.expm1(shape * decay) if shape else 1 / decay)
    runs, growth = 1, math.inf
    while probability > _NEGLIGIBLE or growth >= 1:
        yield probability
        growth = going_on * (runs + shape) / (runs + 1)
        probability *= growth
        runs += 1


def _decay(expected_runs: float, shape: float) -> float:
    """log(1/γ), rounded up: the price rises with it."""
    fails, works = 0.0, 1.0
    if expected_runs <= 1:
        return 0.0
    while _mean(works, shape) < expected_runs:
        fails, works = works, 2 * works
    while fails < (middle := (fails + works) / 2) < works:
        if _mean(middle, shape) < expected_runs:
            fails = middle
        else:
            works = middle
    return works * (1 + 1e-12)


def _mean(decay: float, shape: float) -> float:
    """E[K] as it follows from log(1/γ); Papernot & Steinke 2022, definition 1."""
    if decay > 700:  # e^decay is about to overflow, and any mean was reached
        return math.inf
    if shape == 0:
        return math.expm1(decay) / decay
    return shape * math.expm1(decay) / -math.expm1(-shape * decay)
