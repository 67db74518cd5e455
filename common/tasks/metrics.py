"""Metrics of binary classifiers, each NaN where the held-out rows leave it undefined.

They are computed on a holder's own held-out rows. They are functions of data: what of them may
leave the holder, and at what price, is the policy's and the ledger's matter.

A simulator judges thousands of holders at once, so every metric is computed for all of them
together; a single holder is the case S = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from common.tasks.score_histogram import BINS, EDGES

__all__ = ["METRICS", "classification_metrics", "classification_metrics_by_holder"]

Booleans = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Thresholds:
    """Every distinct score of every holder, in ascending order within a holder: [C] each.

    Args:
        holder: whose score it is.
        positives: how many of the holder's positive rows score at most this.
        negatives: how many of its negative rows do.
        tied_positives: how many of its positive rows score exactly this.
        tied_negatives: how many of its negative rows do.
    """

    holder: Counts
    positives: Counts
    negatives: Counts
    tied_positives: Counts
    tied_negatives: Counts


@dataclass(frozen=True)
class _Rows:
    """The rows of S holders, holder by holder and by ascending score within each.

    Args:
        sizes: [S] rows of each holder.
        holder: [N] from 0, ascending.
        positive: [N] whether the label is 1.
        scores: [N] finite.
    """

    sizes: Counts
    holder: Counts
    positive: Booleans
    scores: Values

    @staticmethod
    def of(sizes: Counts, holder: Counts, positive: Booleans, scores: Values) -> _Rows:
        """Sort rows that come holder by holder."""
        order = np.lexsort((scores, holder))
        return _Rows(sizes, holder, positive[order], scores[order])

    @property
    def found(self) -> Booleans:
        """Which rows have a probability above one half: [N]."""
        return self.scores > 0.5

    @cached_property
    def positives(self) -> Values:
        """Positive rows of each holder: [S]."""
        return self.total(self.positive)

    @property
    def negatives(self) -> Values:
        """Negative rows of each holder: [S]."""
        return self.sizes - self.positives

    @cached_property
    def thresholds(self) -> _Thresholds:
        """What comparing the two classes needs."""
        last = np.ones(len(self.scores), dtype=np.bool_)
        last[:-1] = (np.diff(self.holder) > 0) | (np.diff(self.scores) > 0)
        holder = self.holder[last]
        counts = []
        for counted in (self.positive, ~self.positive):
            seen = np.cumsum(counted)[last]
            own = self.total(counted).astype(np.int64)
            earlier = np.cumsum(own) - own  # rows of the holders before
            counts.append((seen - earlier[holder], np.diff(seen, prepend=0)))
        (positives, tied_positives), (negatives, tied_negatives) = counts
        return _Thresholds(holder, positives, negatives, tied_positives, tied_negatives)

    def total(self, values: Booleans | Values) -> Values:
        """Sum over each holder's rows: [N] → [S]."""
        return _sums(self.holder, values, len(self.sizes))


# Where a metric is undefined it is 0 divided by 0, so NaN needs no case of its own.


def accuracy(rows: _Rows) -> Values:
    """Share of rows on the right side of probability one half."""
    return rows.total(rows.found == rows.positive) / rows.sizes


def auc(rows: _Rows) -> Values:
    """Probability that a positive row scores above a negative one; ties count half."""
    at = rows.thresholds
    won = at.tied_positives * (at.negatives - at.tied_negatives / 2)
    return _sums(at.holder, won, len(rows.sizes)) / (rows.positives * rows.negatives)


def ks(rows: _Rows) -> Values:
    """Kolmogorov–Smirnov distance between the scores of positive and of negative rows."""
    at = rows.thresholds
    below = at.positives / rows.positives[at.holder]
    gap = np.abs(below - at.negatives / rows.negatives[at.holder])
    largest = np.zeros(len(rows.sizes))
    np.maximum.at(largest, at.holder, gap)
    return largest


def brier(rows: _Rows) -> Values:
    """Mean squared difference between probability and outcome."""
    return rows.total((rows.scores - rows.positive) ** 2) / rows.sizes


def recall(rows: _Rows) -> Values:
    """Share of positive rows that are found at probability one half."""
    return rows.total(rows.found & rows.positive) / rows.positives


def f1(rows: _Rows) -> Values:
    """Harmonic mean of precision and recall at probability one half."""
    return 2 * rows.total(rows.found & rows.positive) / (rows.total(rows.found) + rows.positives)


def calibration(rows: _Rows) -> Values:
    """Expected calibration error: how far outcomes are from the mean score, in each bin.

    Naeini et al. 2015, "Obtaining well calibrated probabilities using Bayesian binning", section 3,
    with the bins of :mod:`common.tasks.score_histogram`.
    """
    bins = np.searchsorted(EDGES, rows.scores)
    excess = np.bincount(
        rows.holder * BINS + bins, rows.positive - rows.scores, minlength=len(rows.sizes) * BINS
    )
    return np.asarray(np.abs(excess.reshape(-1, BINS)).sum(1) / rows.sizes)


METRICS: Mapping[str, Callable[[_Rows], Values]] = MappingProxyType(
    {
        "accuracy": accuracy,
        "auc": auc,
        "ks": ks,
        "brier": brier,
        "recall": recall,
        "f1": f1,
        "calibration": calibration,
    }
)


def classification_metrics_by_holder(
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    sizes: npt.ArrayLike,
    names: Iterable[str] = tuple(METRICS),
) -> dict[str, Values]:
    """The named metrics of each of S holders.

    >>> found = classification_metrics_by_holder([0, 1, 1, 0], [0.1, 0.6, 0.4, 0.9], [2, 2])
    >>> found["auc"].tolist()
    [1.0, 0.0]

    Args:
        labels: [N] of 0 and 1, holder by holder.
        probabilities: [N] predicted probability of 1.
        sizes: [S] rows of each holder, N in sum; 0 is allowed.
        names: which of :data:`METRICS`.

    Returns:
        Name → [S] float64; all NaN for a holder that has no rows or a probability that is not
        finite (a model that diverged has no metrics).
    """
    lengths = np.asarray(sizes, dtype=np.int64)
    scores = np.asarray(probabilities, dtype=np.float64)
    finite = np.isfinite(scores)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    rows = _Rows.of(lengths, owner, np.asarray(labels) > 0.5, np.where(finite, scores, 0.0))
    diverged = _sums(owner, ~finite, len(lengths)) > 0
    undefined = diverged | (lengths == 0)
    with np.errstate(invalid="ignore"):
        return {name: np.where(undefined, math.nan, METRICS[name](rows)) for name in names}


def classification_metrics(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, names: Iterable[str] = tuple(METRICS)
) -> dict[str, float]:
    """The named metrics of one holder: see :func:`classification_metrics_by_holder`.

    >>> classification_metrics([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9], ["auc", "accuracy"])
    {'auc': 0.75, 'accuracy': 0.5}

    Args:
        labels: [N] of 0 and 1.
        probabilities: [N] predicted probability of 1.
        names: which of :data:`METRICS`.
    """
    sizes = [len(np.asarray(labels))]
    values = classification_metrics_by_holder(labels, probabilities, sizes, names)
    return {name: float(value[0]) for name, value in values.items()}


def _sums(holder: Counts, values: Booleans | Values, holders: int) -> Values:
    """Sum of each holder's values: [N], [N] → [S]."""
    return np.asarray(np.bincount(holder, values, minlength=holders), dtype=np.float64)
