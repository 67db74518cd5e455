"""Scores of a binary classifier in fixed cells, and its metrics from their noised counts.

For each label the probabilities from 0 to 1 are cut at log-odds of −3, −1.5, 0 and 1.5: ten cells,
whatever the data. Few cells are little noise, since the noise of each enters every metric; they are
of equal width in log-odds because there a model's scores, and what they say, vary most evenly, and
there is one more of them below one half because label 1 is the rarer one where it matters most.
docs/evaluation.md has the measurements that this choice rests on.

Within a cell the rows are taken to be spread as they are from one cell to the next. Rows of both
labels together: with a density that is linear between the neighbours. One label against the other:
from each cell to the one above it the odds of label 1 rise by a factor ψ, so they do across a cell
as well. ψ is Mantel & Haenszel's (1959) estimate of the odds ratio that several 2×2 tables have in
common, here those of neighbouring cells: a ratio of sums of products of independent counts, whose
noise does not bias the sums. Were all scores in a cell alike instead, AUC would come out 0.02 to
0.03 too low.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from common.tasks.histograms import Estimate, Values, estimated, known

__all__ = ["BINS", "CELLS", "EDGES", "FROM_SCORES", "score_cells", "score_estimates"]

LOG_ODDS = (-3.0, -1.5, 0.0, 1.5)
"""Where cells end."""

WIDTH = 1.5
"""Of an inner cell, in log-odds."""

END = 1.75
"""Width of the first and the last cell, which have no outer edge, in widths of the others."""

EDGES = tuple(float(1 / (1 + np.exp(-at))) for at in LOG_ODDS)
"""Where cells end, as probabilities. One half is among them: above it, 1 is predicted."""

BINS = len(EDGES) + 1
"""Cells of each label."""

CELLS = 2 * BINS
"""Those of label 0 by ascending score, then those of label 1."""

PARTS = 8
"""Into how many parts of equal width a cell is divided to follow the scores in it."""

DOUBT = 0.2
"""Standard uncertainty of what following the scores within cells changes, as a share of it."""

SHIFT = 1 / 10
"""Standard uncertainty of the mean log-odds of a label's rows in a cell, as a share of the cell."""


def score_cells(probabilities: Tensor, labels: Tensor) -> Tensor:
    """The cell of each row: [B] int64 from 0 to :data:`CELLS` − 1.

    Args:
        probabilities: [B] of label 1; one that is not a number counts as 0, as no row is left out.
        labels: [B] of 0 and 1.
    """
    edges = torch.tensor(EDGES, dtype=torch.float64, device=probabilities.device)
    scores = probabilities.double().nan_to_num(nan=0.0)
    return torch.bucketize(scores, edges) + BINS * (labels > 0.5).long()


def score_estimates(
    histogram: Values, variance: float, names: Iterable[str]
) -> dict[str, Estimate]:
    """Metrics of the rows that were counted, with error bars.

    Args:
        histogram: [:data:`CELLS`] noised counts.
        variance: of the noise in each.
        names: which of :data:`FROM_SCORES`.
    """
    return {name: _estimate(histogram, variance, FROM_SCORES[name]) for name in names}


@dataclass(frozen=True)
class _Scores:
    """R histograms, each cell divided into parts.

    Args:
        negatives: [R, BINS, parts] rows of label 0, by ascending score.
        positives: [R, BINS, parts] rows of label 1.
        score: [BINS, parts] of the rows of each part.
        variance: of the noise in each *cell*.
    """

    negatives: Values
    positives: Values
    score: Values
    variance: float

    @staticmethod
    def of(histograms: Values, variance: float, parts: int = PARTS) -> _Scores:
        """Divide the cells of [R, CELLS] noised counts; with one part, scores in one are alike."""
        negatives, positives = histograms[:, :BINS], histograms[:, BINS:]
        place = (np.arange(parts) + 0.5) / parts - 0.5  # of a part in its cell, from the middle
        density = 1 + 2 * _slope(negatives + positives, variance)[:, :, None] * place
        rise = _log_odds_ratio(negatives, positives, variance)[:, None, None]
        tilt = np.exp(rise * _WIDTHS[:, None] / WIDTH * place / 2)
        score = 1 / (1 + np.exp(-(_CENTRES[:, None] + _WIDTHS[:, None] * place)))
        return _Scores(
            _shared_out(negatives, density / tilt),
            _shared_out(positives, density * tilt),
            score,
            variance,
        )

    @cached_property
    def all_negatives(self) -> Values:
        """Rows of label 0, NaN where they are lost in the noise: [R]."""
        return known(self.negatives.sum((1, 2)), BINS * self.variance)

    @cached_property
    def all_positives(self) -> Values:
        """Rows of label 1, NaN where they are lost in the noise: [R]."""
        return known(self.positives.sum((1, 2)), BINS * self.variance)

    @cached_property
    def all(self) -> Values:
        """Rows, NaN where they are lost in the noise: [R]."""
        return known((self.negatives + self.positives).sum((1, 2)), CELLS * self.variance)

    def found(self, rows: Values) -> Values:
        """How many of [R, BINS, parts] rows have a score above one half: [R]."""
        return np.asarray(rows[:, LOG_ODDS.index(0.0) + 1 :].sum((1, 2)))


_WIDTHS = np.array([END * WIDTH, *np.diff(LOG_ODDS), END * WIDTH])
_CENTRES = np.array([LOG_ODDS[0] - END * WIDTH, *LOG_ODDS]) + _WIDTHS / 2


def _log_odds_ratio(negatives: Values, positives: Values, variance: float) -> Values:
    """By how much the log-odds of label 1 rise from a cell to the next, ln ψ: [R]."""
    risen = (positives[:, 1:] * negatives[:, :-1]).sum(1)
    fallen = (positives[:, :-1] * negatives[:, 1:]).sum(1)
    noise = BINS * variance + 1.0  # products of mere noise are about as large; they are no rise
    return np.asarray(np.log((np.maximum(risen, 0) + noise) / (np.maximum(fallen, 0) + noise)))


def _slope(counts: Values, variance: float) -> Values:
    """How much denser rows are at the upper end of their cell than in its middle: [R, BINS].

    Between −1 and 1, as a share; as if the density between the neighbours were linear.
    """
    padded = np.pad(counts, ((0, 0), (1, 1)))
    least = 4 * np.sqrt(2 * variance) + 1.0  # of mere noise there is no slope
    slope = (padded[:, 2:] - padded[:, :-2]) / (4 * np.maximum(counts, least))
    return np.asarray(np.clip(slope, -1, 1))


def _shared_out(counts: Values, weights: Values) -> Values:
    """Counts [R, BINS] over the parts of their cells, in proportion to weights [R, BINS, parts]."""
    return np.asarray(counts[:, :, None] * weights / weights.sum(2, keepdims=True))


# -- the metrics: [R], NaN where what they divide by is lost in the noise ------------------------


def auc(at: _Scores) -> Values:
    """Probability that a positive row scores above a negative one; ties, within a part, half."""
    positives, negatives = (rows.reshape(len(rows), -1) for rows in (at.positives, at.negatives))
    below = np.cumsum(negatives, axis=1) - negatives / 2
    return np.asarray((positives * below).sum(1) / (at.all_positives * at.all_negatives))


def _gap(at: _Scores) -> Values:
    """By how much the share of negative rows exceeds that of positive ones: [R, BINS, parts]."""
    negatives = at.negatives / at.all_negatives[:, None, None]
    return np.asarray(negatives - at.positives / at.all_positives[:, None, None])


def ks(at: _Scores) -> Values:
    """Largest distance between the shares of negative and of positive rows below a score."""
    gap = _gap(at).reshape(len(at.positives), -1)
    return np.asarray(np.abs(np.cumsum(gap, axis=1)).max(axis=1))


def accuracy(at: _Scores) -> Values:
    """Share of rows on the right side of probability one half."""
    right = at.found(at.positives) + at.negatives.sum((1, 2)) - at.found(at.negatives)
    return np.asarray(right / at.all)


def recall(at: _Scores) -> Values:
    """Share of positive rows that are found at probability one half."""
    return np.asarray(at.found(at.positives) / at.all_positives)


def f1(at: _Scores) -> Values:
    """Harmonic mean of precision and recall at probability one half."""
    found = at.found(at.positives + at.negatives)
    return np.asarray(2 * at.found(at.positives) / (found + at.all_positives))


def brier(at: _Scores) -> Values:
    """Mean squared difference between probability and outcome."""
    squares = at.positives * (1 - at.score) ** 2 + at.negatives * at.score**2
    return np.asarray(squares.sum((1, 2)) / at.all)


def calibration(at: _Scores) -> Values:
    """Expected calibration error: in each bin, how far outcomes are from the mean score."""
    excess = at.positives * (1 - at.score) - at.negatives * at.score
    return np.asarray(np.abs(excess.sum(2)).sum(1) / at.all)


# -- what cells do not show: standard uncertainties, [R] ------------------------------------------


def _nothing(at: _Scores, alike: _Scores) -> Values:
    """Probability one half is an edge."""
    del alike
    return np.zeros(len(at.positives))


def _of_auc(at: _Scores, alike: _Scores) -> Values:
    """Of what following the scores adds, and of pairs within a cell, which are finitely many.

    Of n and p rows that are spread alike, the pairs that are won have variance n·p·(n + p + 1)/12
    (Mann & Whitney 1947).
    """
    negatives, positives = (np.maximum(rows.sum(2), 0) for rows in (at.negatives, at.positives))
    pairs = (negatives * positives * (negatives + positives + 1) / 12).sum(1)
    wander = np.sqrt(pairs) / (at.all_positives * at.all_negatives)
    return np.asarray(np.hypot(DOUBT * (auc(at) - auc(alike)), wander))


def _of_ks(at: _Scores, alike: _Scores) -> Values:
    """Of how the distance bends within a cell, and of rows, which are finitely many.

    The shares of n rows of which a cell has the share s wander, in its middle by √(s/n)/2, a
    Brownian bridge's deviation, and it is the wandering ones whose distance counts.
    """
    del alike
    gap = _gap(at)
    bend = np.abs(np.cumsum(gap - gap.mean(axis=2, keepdims=True), axis=2)).max(axis=(1, 2))
    wander = np.zeros((len(at.positives), BINS))
    for rows, all_ in ((at.positives, at.all_positives), (at.negatives, at.all_negatives)):
        wander += np.maximum(rows.sum(2), 0) / (2 * all_[:, None]) ** 2
    return np.asarray(np.hypot(np.sqrt(wander.max(1)), DOUBT / 2 * bend))


def _of_mean_scores(weight: Callable[[Values, Values], Values]) -> _Doubt:
    """Of a sum over rows, where each label's mean log-odds in each cell is uncertain by itself.

    Args:
        weight: how a row's term changes with its probability, from [BINS, parts] score and 0 or 1.
    """

    def doubt(at: _Scores, alike: _Scores) -> Values:
        del alike
        change = at.score * (1 - at.score) * _WIDTHS[:, None]  # of p, with its log-odds
        variance = np.zeros(len(at.positives))
        for label, rows in ((0.0, at.negatives), (1.0, at.positives)):
            shifted = SHIFT * (rows * weight(at.score, np.array(label)) * change).sum(2)
            each = np.maximum(rows, 0) * (weight(at.score, np.array(label)) * change) ** 2 / 12
            variance += (shifted**2 + each.sum(2)).sum(1)
        return np.asarray(np.sqrt(variance) / at.all)

    return doubt


_Metric = Callable[[_Scores], Values]
_Doubt = Callable[[_Scores, _Scores], Values]

FROM_SCORES: Mapping[str, tuple[_Metric, _Doubt]] = MappingProxyType(
    {
        "auc": (auc, _of_auc),
        "ks": (ks, _of_ks),
        "brier": (brier, _of_mean_scores(lambda score, label: 2 * (score - label))),
        "accuracy": (accuracy, _nothing),
        "recall": (recall, _nothing),
        "f1": (f1, _nothing),
        "calibration": (
            calibration,
            _of_mean_scores(lambda score, _: np.ones_like(score)),
        ),
    }
)
"""What a score histogram shows, by name; :mod:`common.tasks.metrics` has the exact figures."""


def _estimate(histogram: Values, variance: float, measured: tuple[_Metric, _Doubt]) -> Estimate:
    metric, doubt = measured
    return estimated(
        histogram,
        variance,
        lambda histograms: metric(_Scores.of(histograms, variance)),
        cells=lambda histograms: doubt(
            _Scores.of(histograms, variance), _Scores.of(histograms, variance, parts=1)
        ),
    )
