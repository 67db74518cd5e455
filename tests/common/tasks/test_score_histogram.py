"""Metrics from ten noised counts: where rows fall, how near the figures come, what bars cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.tasks.histograms import CONFIDENCE, Estimate, Values
from common.tasks.metrics import METRICS, classification_metrics
from common.tasks.score_histogram import (
    BINS,
    CELLS,
    EDGES,
    FROM_SCORES,
    score_cells,
    score_estimates,
)

SIGMA = 7.0
"""Of one holder's noise at about (0.5, 1e-5)."""

HOLDERS, DRAWS = 10, 150

LEAST = CONFIDENCE - 3.3 * math.sqrt(CONFIDENCE * (1 - CONFIDENCE) / DRAWS)
"""Fewer of so many bars hold by chance in one case of 2,000 (normal tail of a binomial share)."""


def scored(rows: int, *, sharpness: float = 1.0, seed: int = 0) -> tuple[Values, Values]:
    """Scores and labels: log-odds are normal, as a model's about are, and tell of the label.

    Args:
        rows: how many.
        sharpness: what the log-odds of the label are, over those that the score claims; 1 is
            calibrated, less is too sure of itself.
        seed: of the rows.
    """
    rng = np.random.default_rng(seed)
    claimed = rng.normal(-1.6, 1.4, size=rows)
    label = rng.random(rows) < 1 / (1 + np.exp(-sharpness * claimed))
    return 1 / (1 + np.exp(-claimed)), label.astype(np.float64)


def counted(scores: Values, labels: Values) -> Values:
    cells = score_cells(torch.from_numpy(scores), torch.from_numpy(labels))
    return torch.bincount(cells, minlength=CELLS).double().numpy()


# -- where rows fall ------------------------------------------------------------------------------


def test_cells_end_where_they_say_and_one_half_is_not_yet_found() -> None:
    ends = torch.tensor(EDGES, dtype=torch.float64)
    above = torch.nextafter(ends, torch.ones(len(EDGES), dtype=torch.float64))
    nobody = torch.zeros(len(EDGES))
    assert score_cells(ends, nobody).tolist() == list(range(BINS - 1))
    assert score_cells(above, nobody).tolist() == list(range(1, BINS))
    assert score_cells(above, nobody + 1).tolist() == list(range(BINS + 1, 2 * BINS))
    assert 0.5 in EDGES


SCORES = st.floats(allow_nan=True, allow_infinity=True, width=32)


@given(st.lists(st.tuples(SCORES, st.booleans()), min_size=1, max_size=30))
def test_one_more_row_is_one_more_in_one_cell(drawn: list[tuple[float, bool]]) -> None:
    """Neighbouring data sets, whatever the scores are: nothing is dropped, nothing counts twice."""
    scores, labels = (torch.tensor(values).double() for values in zip(*drawn, strict=True))
    whole = torch.bincount(score_cells(scores, labels), minlength=CELLS)
    less = torch.bincount(score_cells(scores[1:], labels[1:]), minlength=CELLS)
    assert sorted((whole - less).tolist()) == [0] * (CELLS - 1) + [1]


# -- how near the figures come --------------------------------------------------------------------


def test_every_exact_metric_has_one_from_cells() -> None:
    assert set(FROM_SCORES) == set(METRICS)


@pytest.mark.parametrize("sharpness", [1.0, 0.5])
def test_figures_at_the_cut_are_exact_and_the_others_near(sharpness: float) -> None:
    """Without noise; of 10^5 rows, so that chance among rows is no reason to differ."""
    scores, labels = scored(100_000, sharpness=sharpness)
    exact = classification_metrics(labels, scores)
    found = score_estimates(counted(scores, labels), 1e-12, FROM_SCORES)
    for name in ("accuracy", "recall", "f1"):
        assert found[name].value == pytest.approx(exact[name], abs=1e-6)
    for name, near in {"auc": 0.005, "ks": 0.01, "brier": 0.002, "calibration": 0.01}.items():
        assert abs(found[name].value - exact[name]) < near, name
        assert found[name].low <= exact[name] <= found[name].high


def test_scores_alike_within_cells_would_be_further_off() -> None:
    """Negative control of following the scores: all ties half, and AUC is 0.01 too low at least."""
    scores, labels = scored(100_000)
    counts = counted(scores, labels)
    negatives, positives = counts[:BINS], counts[BINS:]
    below = np.cumsum(negatives) - negatives / 2
    tied = float(positives @ below / (positives.sum() * negatives.sum()))
    exact = classification_metrics(labels, scores, ["auc"])["auc"]
    assert tied < exact - 0.01


# -- what bars cover ------------------------------------------------------------------------------


def judged(sigma: float, told: float, *names: str) -> list[dict[str, tuple[float, Estimate]]]:
    """Many data sets of 6,000 rows, each with its own noise: exact figure and estimate by name.

    Where rows lie within a cell is chance that an error bar covers, so data sets are drawn too; the
    model is too sure of itself. ``told`` is what the estimator is told of σ.
    """
    rng = np.random.default_rng(1)
    found = []
    for seed in range(DRAWS):
        scores, labels = scored(6_000, sharpness=0.7, seed=seed)
        noise = np.rint(rng.normal(scale=sigma, size=CELLS))
        estimates = score_estimates(counted(scores, labels) + noise, told**2, names)
        exact = classification_metrics(labels, scores, names)
        found.append({name: (exact[name], estimates[name]) for name in names})
    return found


def covered(found: list[dict[str, tuple[float, Estimate]]], name: str) -> float:
    return float(np.mean([one[name][1].low <= one[name][0] <= one[name][1].high for one in found]))


@pytest.mark.parametrize("sigma", [SIGMA * math.sqrt(HOLDERS), SIGMA])
def test_error_bars_cover_the_exact_figures_as_often_as_they_say(sigma: float) -> None:
    """With ten holders' noise in the sum, and with one's."""
    found = judged(sigma, sigma, *FROM_SCORES)
    for name in FROM_SCORES:
        assert covered(found, name) >= LEAST, name


def test_bars_for_half_the_noise_would_be_noticed() -> None:
    """Negative control: figures whose only doubt is noise are covered by ±0.98σ, two in three."""
    sigma = SIGMA * math.sqrt(HOLDERS)
    found = judged(sigma, sigma / 2, "accuracy", "recall")
    assert covered(found, "accuracy") < 0.8
    assert covered(found, "recall") < 0.8


@pytest.mark.parametrize(("sigma", "within"), [(SIGMA * math.sqrt(HOLDERS), 0.03), (SIGMA, 0.01)])
def test_auc_is_as_near_as_it_must_be_at_the_size_of_the_credit_data(
    sigma: float, within: float
) -> None:
    """With ten holders' noise in the sum, and with one's: in 95 % of draws."""
    errors = [
        exact - one.value for exact, one in (each["auc"] for each in judged(sigma, sigma, "auc"))
    ]
    assert np.mean(np.abs(errors) <= within) >= 0.95


def test_what_is_lost_in_the_noise_is_not_reported() -> None:
    """Twenty positives under noise of 22 in each cell; the 6,000 others still tell something."""
    counts = np.array([2000.0, 2500, 1000, 400, 100, 5, 5, 4, 3, 3])
    found = score_estimates(counts, 22.0**2, FROM_SCORES)
    undefined = {name for name, one in found.items() if math.isnan(one.value)}
    assert undefined == {"auc", "ks", "recall", "f1"}
    nothing = score_estimates(np.zeros(CELLS), 49.0, FROM_SCORES)
    assert all(math.isnan(one.value) for one in nothing.values())


@given(st.lists(st.integers(-300, 3000), min_size=CELLS, max_size=CELLS))
def test_any_counts_give_figures_or_none(drawn: list[int]) -> None:
    """Negative counts and absurd ones: a number between 0 and 1 in its bar, or nothing."""
    for one in score_estimates(np.array(drawn, dtype=np.float64), 49.0, FROM_SCORES).values():
        ends = [one.low, one.value, one.high]
        assert all(map(math.isnan, ends)) or 0 <= ends[0] <= ends[1] <= ends[2] <= 1
