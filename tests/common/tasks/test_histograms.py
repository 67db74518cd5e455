"""Error bars hold as often as they say, and a bar for too little noise does not."""

from __future__ import annotations

import math

import numpy as np

from common.tasks.histograms import CONFIDENCE, DEFINED, Estimate, Values, estimated, known

COUNTS = np.array([400.0, 100.0, 0.0])
DRAWS = 400

LEAST = CONFIDENCE - 3.3 * math.sqrt(CONFIDENCE * (1 - CONFIDENCE) / DRAWS)
"""Fewer of so many bars hold by chance in one case of 2,000 (normal tail of a binomial share)."""


def share_of_first(histograms: Values) -> Values:
    return np.asarray(histograms[:, 0] / histograms.sum(1))


def largest_share(histograms: Values) -> Values:
    """Not smooth, and noise only ever makes it larger where shares are alike."""
    return np.asarray(histograms.max(1) / histograms.sum(1))


def estimates(
    counts: Values, sigma: float, metric: object = share_of_first, told: float | None = None
) -> list[Estimate]:
    """Of many draws of noise; ``told`` is what the estimator is told of σ."""
    rng = np.random.default_rng(0)
    noisy = counts + np.rint(rng.normal(scale=sigma, size=(DRAWS, len(counts))))
    variance = (told or sigma) ** 2
    return [estimated(each, variance, metric) for each in noisy]  # type: ignore[arg-type]


def covered(found: list[Estimate], truth: float) -> float:
    return float(np.mean([one.low <= truth <= one.high for one in found]))


def test_error_bars_cover_the_truth_as_often_as_they_say() -> None:
    found = estimates(COUNTS, 10.0)
    assert covered(found, 0.8) >= LEAST
    values = np.array([one.value for one in found])
    # The mean of DRAWS values is within 4 standard errors of the truth: no bias to speak of.
    assert abs(values.mean() - 0.8) < 4 * values.std() / math.sqrt(DRAWS)


def test_bars_for_half_the_noise_would_be_noticed() -> None:
    """Negative control: of a normal error, ±0.98σ covers two thirds."""
    assert covered(estimates(COUNTS, 10.0, told=5.0), 0.8) < 0.75


def test_bars_hold_where_noise_biases() -> None:
    alike = np.array([200.0, 200.0, 200.0])
    assert covered(estimates(alike, 10.0, largest_share), 1 / 3) >= LEAST


def test_without_noise_the_bar_is_what_the_cells_leave() -> None:
    doubt = 0.05
    found = estimated(COUNTS, 0.0, share_of_first, cells=lambda _: np.array([doubt]))
    assert math.isclose(found.value, 0.8)
    assert math.isclose(found.high - found.value, 1.959964 * doubt, rel_tol=1e-6)
    assert math.isclose(found.value - found.low, 1.959964 * doubt, rel_tol=1e-6)


def test_the_same_histogram_has_the_same_bars() -> None:
    assert estimated(COUNTS, 9.0, share_of_first) == estimated(COUNTS, 9.0, share_of_first)


def test_values_and_bars_stay_within_0_and_1() -> None:
    edge = np.array([500.0, 0.0, 0.0])
    for one in estimates(edge, 20.0):
        assert 0 <= one.low <= one.value <= one.high <= 1


def test_a_denominator_that_is_lost_in_the_noise_gives_no_ratio() -> None:
    sums = np.array([-1.0, 0.0, 2 * DEFINED - 0.1, 2 * DEFINED + 0.1])
    assert np.isnan(known(sums, 4.0)).tolist() == [True, True, True, False]
    lost = estimated(COUNTS, 4.0, lambda h: np.asarray(1 / known(0 * h.sum(1), 4.0)))
    assert all(map(math.isnan, (lost.value, lost.low, lost.high)))
