"""What noise in shares costs: as much as a continuous Gaussian with a thousandth less of it.

Let c be the integer vector that is summed, and X = c + Σ Z_i what is seen, with m shares Z_i whose
coordinates are independent draws of N_Z(0, σ_i²), σ_i ≥ 64; s² = Σ σ_i². Two draws take their
place. Let Y = c + N(0, (s² − r²)·I), a Gaussian mechanism, and R(y) the integer vector whose
coordinates are drawn from N_Z(y_j, r²), the discrete Gaussian about a real centre: x with
probability proportional to exp(−(x − y_j)²/2r²). R knows nothing of c, so R(Y) is a
post-processing of Y, and costs no more. What remains to show is that X and R(Y) are so alike that
nothing could tell them apart.

It rests on one fact, from Poisson's summation formula: for every real centre y,

    Σ_x exp(−(x − y)²/2r²) = r·√(2π) · (1 + θ),   |θ| ≤ κ(r) = 2·Σ_{k≥1} exp(−2π²r²k²)

(Canonne, Kamath & Steinke 2020, "The discrete Gaussian for differential privacy", section 2). With
f_v the density of N(0, v):

1. *X − c is a discrete Gaussian.* Shares of variances a and b add up to w with a probability of
   Σ_x exp(−x²/2a − (w − x)²/2b) over a constant. Completing the square leaves exp(−w²/2(a + b))
   times a sum as above, of variance ab/(a + b) ≥ 64²/2, whose centre depends on w. So the law is
   N_Z(0, a + b) up to a factor from (1 − κ(45))² to (1 − κ(45))^−2, and one more such factor for
   each further share (Kairouz, Liu & Steinke 2021, "The distributed discrete Gaussian mechanism for
   federated learning with secure aggregation", appendix A). And N_Z(0, s²) at x is
   f_{s²}(x)/(1 + θ), |θ| ≤ κ(s). κ(45) is below 10^−17,000.
2. *R(Y) − c is one too.* Its probability at x is ∫ f_{s²−r²}(y)·f_{r²}(x − y)/(1 + θ(y)) dy, with
   θ(y) of R's normalization. Without it the integral is f_{s²}(x), as variances add; with it, that
   up to a factor from 1/(1 + κ(r)) to 1/(1 − κ(r)) (the argument of Peikert 2010, "An efficient
   and parallel Gaussian sampler for lattices", theorem 3.1).

So the probabilities of X and R(Y) differ at every integer, whatever c is, by a factor of at most
e^η, with η ≤ 2·κ(r) ≤ 10^−76 for r = 3. There is no tail to add to δ. For D coordinates and T
releases, each chosen after those before, the factors multiply: if everything with R(Y) in the place
of X is (ε, δ)-private, then with X it is (ε + 2TDη, e^(TDη)·δ)-private. For T and D of up to 10^18
each that changes either by less than 10^−39, far less than what every bound allows for rounding.
"""

from __future__ import annotations

import math

from common.privacy.events import FINEST_SHARE, DistributedGaussian, SubsampledGaussian, gaussian

__all__ = ["as_gaussian"]

ROUNDING_DEVIATION = 3.0
"""r, in whole numbers: so small a part of the noise does the work of rounding."""

_KEPT = math.sqrt(1 - (ROUNDING_DEVIATION / FINEST_SHARE) ** 2)
"""√(1 − r²/s²), at least: what is left of σ for the continuous mechanism."""


def as_gaussian(event: DistributedGaussian) -> SubsampledGaussian:
    """A plain Gaussian mechanism that costs no less, proven in the text above.

    Args:
        event: sums with noise in shares of a standard deviation of at least 64.
    """
    # An event's noise has a range; at its end ε is infinite anyway.
    return gaussian(max(_KEPT * event.noise_multiplier, 1e-300), event.releases)
