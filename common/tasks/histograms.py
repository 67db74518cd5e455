"""Metrics from a noised histogram of held-out units, with error bars.

Of an evaluation nothing leaves a holder but a histogram of fixed cells: each held-out unit falls
into one of them by what the model says of it, and every count gets noise. Added or removed, a unit
moves one count by one, which is all that the price of a release rests on. What is here works on
the sum over holders. It is post-processing, and costs no privacy.

Two things separate such a metric from the exact one, and an error bar covers both: the noise, whose
variance everybody knows, and the cells, which do not tell where in them a score lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

__all__ = ["CONFIDENCE", "Estimate", "Values", "estimated", "known", "undefined"]

Values = npt.NDArray[np.float64]

CONFIDENCE = 0.95
"""With which an error bar covers what the exact figure is."""

REPLICATES = 1000
"""Histograms that are drawn to see how the noise moves a metric."""

DEFINED = 8.0
"""No ratio is given whose denominator is below so many deviations of its noise.

Much less, and the figures that do come out are those where the noise was upward."""

_NORMAL = 1.959963984540054  # the normal distribution's 97.5 % point
_SEED = 20251122


@dataclass(frozen=True)
class Estimate:
    """A metric and its error bar.

    Args:
        value: NaN where undefined, or lost in the noise.
        low: end of the error bar; NaN with the value.
        high: the other end.
    """

    value: float
    low: float
    high: float


def undefined() -> Estimate:
    """Of a metric that the histogram does not show."""
    return Estimate(math.nan, math.nan, math.nan)


def known(sums: Values, variance: float) -> Values:
    """Noised sums to divide by, NaN where they are within the noise.

    Args:
        sums: [R].
        variance: of the noise in them.
    """
    return np.where(sums > DEFINED * math.sqrt(variance), sums, math.nan)


def estimated(
    histogram: Values,
    variance: float,
    metric: Callable[[Values], Values],
    *,
    cells: Callable[[Values], Values] = lambda histogram: np.zeros(histogram.shape[:-1]),
) -> Estimate:
    """A metric between 0 and 1 from a noised histogram.

    Its bar is the basic bootstrap's (Davison & Hinkley 1997, section 5.2): how far the metric of
    the histogram with fresh noise is from that of the histogram is about how far the latter is
    from the truth. So the value is corrected for the bias that noise gives to what is not linear
    in it, such as a largest distance. Whether the noise is continuous or discrete makes no
    difference at this point. The uncertainty that the cells leave is added in quadrature.

    Args:
        histogram: [cells] noised counts; they may be negative, and are not clipped, since that
            would shift all that is computed from them.
        variance: of the noise in each.
        metric: [R, cells] histograms → [R] values, NaN where undefined.
        cells: the same → [R] standard uncertainties because of the cells' width.

    Returns:
        The estimate; value and bar are cut to [0, 1].
    """
    found = float(metric(histogram[None])[0])
    replicates = metric(histogram + math.sqrt(variance) * _standard_noise(len(histogram)))
    replicates = replicates[np.isfinite(replicates)]
    if not math.isfinite(found) or len(replicates) < REPLICATES // 2:
        return undefined()
    value = 2 * found - float(replicates.mean())
    noise = _NORMAL * float(replicates.std())
    width = _NORMAL * float(cells(histogram[None])[0])
    below = math.hypot(value - min(value, found) + noise, width)
    above = math.hypot(max(value, found) - value + noise, width)
    return Estimate(*np.clip([value, value - below, value + above], 0.0, 1.0).tolist())


@cache
def _standard_noise(cells: int) -> Values:
    """Draws with mean 0 and covariance 1, both exactly: [REPLICATES, cells].

    So what is linear in the noise gets exactly the deviation that it has. They are always the
    same, and so are the error bars of a histogram.
    """
    half = np.random.default_rng(_SEED).normal(size=(REPLICATES // 2, cells))
    whitened = half @ np.linalg.inv(np.linalg.cholesky(half.T @ half / len(half))).T
    return np.concatenate([whitened, -whitened])
