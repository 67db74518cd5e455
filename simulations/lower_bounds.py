"""Lower bounds on ε from an attack that guessed which canaries were in the training data.

Pure functions. m canaries were included each by its own fair coin, the attacker scored them, and
what it got right contradicts every privacy claim under which so much would be unlikely. Each bound
holds with the confidence that is asked for, over the coins and the mechanism's noise, whatever the
attack; a better attack gives a larger bound. How many guesses to make and where to put a threshold
must be settled before the scores are seen: :func:`planned_guesses` decides from public figures.

============  ==============================================================================
method        what a bound ε₀ says at confidence 1 − α
============  ==============================================================================
one-run       the mechanism is not (ε, δ)-DP for any ε < ε₀. No assumption.
f-DP          it is not μ-GDP for any μ < μ₀; ε₀ is that of μ₀ at δ, so (ε, δ)-DP is contradicted
              where the mechanism's trade-off curve is Gaussian.
GDP           as f-DP, and the scores of different canaries must be independent of each other.
============  ==============================================================================

The curve of DP-SGD is Gaussian exactly at sampling rate q = 1, and by a central limit theorem for
many steps at small q (Dong, Roth & Su 2022, "Gaussian differential privacy", section 5). The last
two tell more: the one-run method takes the curve to be as bad as (ε, δ) allows everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import expit, ndtr, ndtri
from scipy.stats import beta, binom

__all__ = [
    "Bools",
    "Confusion",
    "Floats",
    "Guesses",
    "clopper_pearson",
    "confusion_of",
    "expected_guesses",
    "fdp_mu",
    "gdp_mu",
    "guesses_of",
    "one_run_epsilon",
    "one_run_p_value",
    "planned_guesses",
]

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares of the canaries among which :func:`planned_guesses` chooses."""

LARGEST = 100.0
"""Of ε and μ: bounds above are reported as this."""

_TOLERANCE = 1e-4
"""To which ε and μ are found; results are on the safe side of it."""


# -- what the attacker did ------------------------------------------------------------------------


@dataclass(frozen=True)
class Guesses:
    """An attacker's record.

    Args:
        canaries: m, each included by a fair coin of its own.
        made: r, guesses "included" or "not"; about the other canaries it said nothing.
        correct: v of them.
    """

    canaries: int
    made: int
    correct: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.made <= self.canaries:
            raise ValueError(
                f"correct ≤ made ≤ canaries must hold, got {self.correct}, {self.made}, "
                f"{self.canaries}"
            )


@dataclass(frozen=True)
class Confusion:
    """What a fixed threshold makes of the scores.

    Args:
        included: canaries that were.
        missed: of these, how many score below the threshold.
        excluded: canaries that were not.
        accused: of these, how many score above it.
    """

    included: int
    missed: int
    excluded: int
    accused: int


def guesses_of(scores: Floats, included: Bools, made: int) -> Guesses:
    """Guess "included" for the highest scores and "not" for the lowest, half each.

    Args:
        scores: [m]; higher for what looks included.
        included: [m], the coins.
        made: r, settled before the scores were seen.
    """
    order = np.argsort(scores, kind="stable")
    low, high = order[: made // 2], order[len(order) - (made - made // 2) :]
    return Guesses(len(scores), made, int((~included[low]).sum() + included[high].sum()))


def confusion_of(scores: Floats, included: Bools, threshold: float) -> Confusion:
    """Guess "included" for every score above ``threshold``, which was settled before."""
    above = scores > threshold
    return Confusion(
        int(included.sum()),
        int((included & ~above).sum()),
        int((~included).sum()),
        int((~included & above).sum()),
    )


def expected_guesses(mu: float, canaries: int, made: int) -> Guesses:
    """What :func:`guesses_of` gets on average where the mechanism is Gaussian with ``mu``.

    Scores are N(0, 1) without and N(μ, 1) with the canary. The threshold t below which the lowest
    r/2 lie satisfies Φ(t) + Φ(t − μ) = r/m, and a guess "not" is right with probability Φ(t)
    over that sum; the highest are their mirror image.
    """
    share = made / canaries

    def excess(t: float) -> float:
        return float(ndtr(t) + ndtr(t - mu)) - share

    t = mu / 2 if share >= 1 else float(brentq(excess, -40.0, mu / 2))
    return Guesses(canaries, made, math.floor(made * float(ndtr(t)) / share))


def planned_guesses(bound: Callable[[Guesses], float], mu: float, canaries: int) -> int:
    """How many guesses to make: as many as tell most where the claim is true and tight.

    It looks at public figures only (the claim and m), so the choice costs no confidence.

    Args:
        bound: the lower bound as a function of what the attacker did.
        mu: of the Gaussian mechanism that just meets the claim.
        canaries: m.

    Returns:
        r, one of :data:`SHARES` of m.
    """
    choices = sorted({max(1, round(share * canaries)) for share in SHARES})
    return max(choices, key=lambda made: bound(expected_guesses(mu, canaries, made)))


# -- (ε, δ) in one run ----------------------------------------------------------------------------


def one_run_p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """Bound on the chance of so many correct guesses against any (ε, δ)-private mechanism.

    Steinke, Nasr & Jagielski 2023, "Privacy auditing with one (1) training run", the main theorem
    as the program in the paper's appendix evaluates it. At δ = 0 the number of correct guesses is
    stochastically dominated by W ~ Binomial(r, e^ε/(1 + e^ε)); with δ,

        p = P[W ≥ v] + 2mδ · max over 1 ≤ i ≤ v of P[v > W ≥ v − i] / i.
    """
    v, r = guesses.correct, guesses.made
    chance = float(expit(epsilon))
    tail = float(binom.sf(v - 1, r, chance))
    if delta == 0 or v == 0:
        return tail
    steps = np.arange(1, v + 1)
    near = binom.sf(v - steps - 1, r, chance) - tail
    return min(1.0, tail + 2 * guesses.canaries * delta * float(np.max(near / steps)))


def one_run_epsilon(guesses: Guesses, delta: float, confidence: float) -> float:
    """The ε below which (ε, δ)-DP is contradicted: the one-run lower bound, in nats.

    With r guesses it cannot exceed about ln(r/α), so large claims need many canaries.

    Args:
        guesses: r settled beforehand.
        delta: of the claim.
        confidence: 1 − α.
    """
    return _largest(lambda epsilon: one_run_p_value(guesses, epsilon, delta) < 1 - confidence)


# -- f-DP in one run ------------------------------------------------------------------------------


def fdp_mu(guesses: Guesses, confidence: float) -> float:
    """The μ below which μ-GDP is contradicted: the one-run bound for Gaussian trade-off curves.

    Mahloujifar, Melis & Chaudhuri 2025, "Auditing f-differential privacy in one run", algorithm 3
    and theorem 3.2 with two options for each canary (k = 2).

    Args:
        guesses: r settled beforehand.
        confidence: 1 − α.
    """
    return _largest(lambda mu: _too_good(guesses, mu, 1 - confidence))


def _too_good(guesses: Guesses, mu: float, alpha: float) -> bool:
    """Whether v correct guesses or more have a chance of less than α under μ-GDP.

    Let p_i be the chance of exactly i correct guesses, r_i = Σ_{l ≥ i} (l/m) p_l that of i or more
    with a random canary among them guessed right, h_i = Σ_{l ≥ i} ((r − l)/m) p_l that with it
    guessed wrong. Turning one coin makes a right guess a wrong one, so f-DP ties them: h_i ≥
    Φ(Φ⁻¹(r_{i+1}) − μ) (theorem 3.1). Were the tail from v on as heavy as α, all p_i together
    would exceed 1 if r_0 + h_0 exceeds r/m.
    """
    v, made, m = guesses.correct, guesses.made, guesses.canaries
    right, wrong = alpha * v / m, alpha * (made - v) / m
    for i in range(v - 1, -1, -1):
        least = max(wrong, float(ndtr(ndtri(right) - mu)))
        if least == wrong and i < v - 1:
            break  # nothing moves any more
        right += i / (made - i) * (least - wrong)
        wrong = least
        if right + wrong > made / m:
            return True
    return right + wrong > made / m


# -- Gaussian DP from error rates -----------------------------------------------------------------


def gdp_mu(confusion: Confusion, confidence: float) -> float:
    """The μ below which μ-GDP is contradicted, from the two error rates of a threshold.

    μ-GDP means that no test has FNR < Φ(Φ⁻¹(1 − FPR) − μ), so μ ≥ Φ⁻¹(1 − FPR) − Φ⁻¹(FNR), at the
    upper confidence bounds of both (Nasr et al. 2023, "Tight auditing of differentially private
    machine learning"; trade-off curve: Dong, Roth & Su 2022, definition 2.6).

    Args:
        confusion: its threshold settled beforehand.
        confidence: 1 − α; each rate's bound holds at 1 − α/2.
    """
    half = 1 - (1 - confidence) / 2
    false_positive = clopper_pearson(confusion.accused, confusion.excluded, half)
    false_negative = clopper_pearson(confusion.missed, confusion.included, half)
    if false_positive >= 1 or false_negative >= 1:
        return 0.0
    return max(0.0, -float(ndtri(false_positive)) - float(ndtri(false_negative)))


def clopper_pearson(successes: int, trials: int, confidence: float) -> float:
    """Upper confidence bound of a probability (Clopper & Pearson 1934).

    Args:
        successes: out of ``trials``.
        trials: independent; 0 tells nothing.
        confidence: one-sided.
    """
    if successes >= trials:
        return 1.0
    return float(beta.ppf(confidence, successes + 1, trials - successes))


def _largest(contradicted: Callable[[float], bool]) -> float:
    """The largest value up to which a claim is contradicted; 0 if none is."""
    if not contradicted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while contradicted(high):
        low, high = high, 2 * high
        if low >= LARGEST:
            return LARGEST
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        if contradicted(middle):
            low = middle
        else:
            high = middle
    return low
