"""Classification metrics against scikit-learn's and against their definitions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    brier_score_loss,
    f1_score,
    recall_score,
    roc_auc_score,
    roc_curve,
)

from common.tasks.metrics import (
    METRICS,
    classification_metrics,
    classification_metrics_by_holder,
)
from common.tasks.score_histogram import EDGES

rows = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.3, 0.49, 0.51, 0.7, 1.0])),
    min_size=2,
    max_size=60,
).filter(lambda drawn: {label for label, _ in drawn} == {0, 1})


@given(rows)
def test_every_metric_equals_scikit_learns(drawn: list[tuple[int, float]]) -> None:
    labels, scores = (np.array(values) for values in zip(*drawn, strict=True))
    found = scores > 0.5
    wrong, right, _ = roc_curve(labels, scores, drop_intermediate=False)
    expected = {
        "accuracy": accuracy_score(labels, found),
        "auc": roc_auc_score(labels, scores),
        "ks": np.abs(right - wrong).max(),
        "brier": brier_score_loss(labels, scores),
        "recall": recall_score(labels, found),
        "f1": f1_score(labels, found),
        "calibration": _calibration_error(labels, scores),
    }
    assert classification_metrics(labels, scores) == pytest.approx(expected)


def _calibration_error(labels: np.ndarray, scores: np.ndarray) -> float:
    """By its definition: each bin's share of rows times how far its means are apart."""
    edges = [-math.inf, *EDGES, math.inf]
    bins = [(scores > low) & (scores <= high) for low, high in itertools.pairwise(edges)]
    return sum(
        own.mean() * abs(labels[own].mean() - scores[own].mean()) for own in bins if own.any()
    )


def test_a_single_class_leaves_what_compares_classes_undefined() -> None:
    only_zeros = classification_metrics([0, 0], [0.2, 0.4])
    assert {name for name, value in only_zeros.items() if math.isnan(value)} == {
        "auc",
        "ks",
        "recall",
        "f1",
    }
    only_ones = classification_metrics([1, 1], [0.2, 0.6])
    assert {name for name, value in only_ones.items() if math.isnan(value)} == {"auc", "ks"}
    assert only_ones["recall"] == 0.5


@pytest.mark.parametrize("probabilities", [[math.nan, 0.5], [math.inf, 0.5], []])
def test_a_diverged_model_or_an_empty_split_has_no_metrics(probabilities: list[float]) -> None:
    values = classification_metrics([0, 1][: len(probabilities)], probabilities)
    assert all(math.isnan(value) for value in values.values())


def test_the_names_asked_for_come_in_that_order() -> None:
    assert list(classification_metrics([0, 1], [0, 1], ["ks", "auc"])) == ["ks", "auc"]
    assert list(classification_metrics([0, 1], [0, 1])) == list(METRICS)


# ------------------------------------------------------------------------- many holders at once

Row = tuple[int, float]

holders = st.lists(
    st.lists(
        st.tuples(
            st.integers(0, 1),
            st.sampled_from([0.0, -0.0, 0.1, 0.3, 0.5, 0.51, 0.7, 1.0])
            | st.floats(0, 1)
            | st.sampled_from([math.nan, math.inf, -math.inf]),
        ),
        max_size=12,
    ),
    max_size=8,
)


def by_definition(rows: list[Row]) -> dict[str, float]:
    """Each metric of one holder, as it is written in a textbook."""
    if not rows or not all(math.isfinite(score) for _, score in rows):
        return dict.fromkeys(METRICS, math.nan)
    labels, scores = (np.array(values) for values in zip(*rows, strict=True))
    found, ones, zeros = scores > 0.5, scores[labels == 1], scores[labels == 0]
    both = len(ones) > 0 and len(zeros) > 0
    hits = (found & (labels == 1)).sum()
    return {
        "accuracy": np.mean(found == labels),
        "auc": roc_auc_score(labels, scores) if both else math.nan,
        "ks": max(abs((ones <= t).mean() - (zeros <= t).mean()) for t in scores)
        if both
        else math.nan,
        "brier": np.mean((scores - labels) ** 2),
        "recall": hits / len(ones) if len(ones) else math.nan,
        "f1": 2 * hits / (found.sum() + len(ones)) if found.sum() + len(ones) else math.nan,
        "calibration": _calibration_error(labels, scores),
    }


@given(holders)
def test_all_holders_at_once_are_each_by_definition(drawn: list[list[Row]]) -> None:
    rows = [row for own in drawn for row in own]
    found = classification_metrics_by_holder(
        [label for label, _ in rows], [score for _, score in rows], [len(own) for own in drawn]
    )
    expected = [by_definition(own) for own in drawn]
    for name in METRICS:
        assert found[name].tolist() == pytest.approx([of[name] for of in expected], nan_ok=True)


@given(holders)
def test_a_holder_in_company_has_the_figures_it_has_alone(drawn: list[list[Row]]) -> None:
    rows = [row for own in drawn for row in own]
    found = classification_metrics_by_holder(
        [label for label, _ in rows], [score for _, score in rows], [len(own) for own in drawn]
    )
    for number, own in enumerate(drawn):
        alone = classification_metrics([label for label, _ in own], [score for _, score in own])
        for name, value in alone.items():
            np.testing.assert_equal(found[name][number], value)


def test_a_diverged_holder_spoils_nobody_elses_figures() -> None:
    found = classification_metrics_by_holder([0, 1, 0, 1], [0.2, 0.7, 0.2, math.nan], [2, 2])
    for values in found.values():
        assert np.isnan(values).tolist() == [False, True]
