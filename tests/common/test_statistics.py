"""What the noisy sums say: right where there is no noise, and as often as the error bars claim."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from common.errors import RunError
from common.privacy.noise import SeededRandomness
from common.privacy.statistics import Layout, noised, sums
from common.statistics import (
    QUANTILES,
    CategoryStatistics,
    NumberStatistics,
    Statistics,
    document,
    scaling_of,
    statistics_of,
)
from common.statistics_plan import CategoryQuestion, NumberQuestion, StatisticsPlan

LOW, HIGH, BINS = 0.0, 100.0, 20
RUNS = 300


def plan(epsilon: float = 1.0, sigma: float | None = None) -> StatisticsPlan:
    made = StatisticsPlan(
        task="t",
        source="s",
        questions=(
            NumberQuestion(name="age", low=LOW, high=HIGH, bins=BINS),
            CategoryQuestion(name="sex", values=("f", "m")),
        ),
        epsilon=epsilon,
        delta=1e-5,
        unit="record",
    ).calibrated()
    return made if sigma is None else made.model_copy(update={"noise_multiplier": sigma})


def rows(count: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    age = np.clip(rng.gamma(6.0, 8.0, count), LOW, HIGH)
    age[rng.random(count) < 0.1] = np.nan
    sex = rng.choice(np.array(["f", "m", None], dtype=object), count, p=[0.3, 0.6, 0.1])
    return pd.DataFrame({"age": age, "sex": sex})


HOLDERS = [rows(500, seed) for seed in range(4)]
EVERYONE = pd.concat(HOLDERS, ignore_index=True)


def answered(plan: StatisticsPlan, seed: int) -> Statistics:
    """The sum of the holders' noised answers, and what it says."""
    layout = Layout.of(plan)
    answers = [
        noised(sums(layout, dict(table.items())), plan, SeededRandomness("run", seed, number))
        for number, table in enumerate(HOLDERS)
    ]
    return statistics_of(plan, np.sum(answers, axis=0), len(HOLDERS))


def number(statistics: Statistics) -> NumberStatistics:
    found = statistics["age"]
    assert isinstance(found, NumberStatistics)
    return found


def category(statistics: Statistics) -> CategoryStatistics:
    found = statistics["sex"]
    assert isinstance(found, CategoryStatistics)
    return found


# -- without noise --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact() -> Statistics:
    return answered(plan(sigma=1e-9), 0)


def test_without_noise_figures_are_the_rows_own(exact: Statistics) -> None:
    # Rounding to 2⁻²⁰ths of the half range, towards zero: 1e-4 is a hundred times that.
    age = number(exact)
    assert exact.units.value == pytest.approx(2000, abs=1e-4)
    assert age.mean.value == pytest.approx(EVERYONE["age"].mean(), abs=1e-2)
    assert age.deviation.value == pytest.approx(EVERYONE["age"].std(ddof=0), abs=1e-2)
    assert age.variance.value == pytest.approx(age.deviation.value**2)
    assert age.missing.value == pytest.approx(EVERYONE["age"].isna().sum(), abs=1e-2)
    counts, _ = np.histogram(EVERYONE["age"].dropna(), bins=BINS, range=(LOW, HIGH))
    assert [count.value for count in age.counts] == pytest.approx(counts.tolist(), abs=1e-2)


def test_without_noise_shares_are_the_rows_own(exact: Statistics) -> None:
    sex = category(exact)
    for value in ("f", "m"):
        count = int((EVERYONE["sex"] == value).sum())
        assert sex.counts[value].value == pytest.approx(count, abs=1e-2)
        assert sex.shares[value].value == pytest.approx(count / 2000, abs=1e-5)
    assert sex.missing.value == pytest.approx(EVERYONE["sex"].isna().sum(), abs=1e-2)


def test_without_noise_a_quantile_is_in_the_bin_that_is_said(exact: Statistics) -> None:
    width = (HIGH - LOW) / BINS
    for quantile in number(exact).quantiles:
        truth = EVERYONE["age"].quantile(quantile.probability)
        assert quantile.low <= truth <= quantile.high
        assert quantile.high - quantile.low == pytest.approx(width)
        assert abs(quantile.value - truth) <= width


# -- with noise -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many() -> list[Statistics]:
    return [answered(plan(), seed) for seed in range(RUNS)]


def least(level: float, failure: float = 1e-6) -> int:
    """Of RUNS covers with probability ``level``, so many or more come up, but for ``failure``."""
    return int(binom.ppf(failure, RUNS, level))


def most(level: float, failure: float = 1e-6) -> int:
    return int(binom.ppf(1 - failure, RUNS, level))


FIGURES = {
    "units": (lambda s: s.units, 2000.0),
    "mean": (lambda s: number(s).mean, EVERYONE["age"].mean()),
    "variance": (lambda s: number(s).variance, EVERYONE["age"].var(ddof=0)),
    "deviation": (lambda s: number(s).deviation, EVERYONE["age"].std(ddof=0)),
    "missing": (lambda s: number(s).missing, float(EVERYONE["age"].isna().sum())),
    "bin": (lambda s: number(s).counts[8], float(EVERYONE["age"].between(40, 45, "left").sum())),
    "count": (lambda s: category(s).counts["m"], float((EVERYONE["sex"] == "m").sum())),
    "share": (lambda s: category(s).shares["f"], float((EVERYONE["sex"] == "f").mean())),
}


@pytest.mark.parametrize("figure", FIGURES)
def test_error_bars_cover_as_often_as_they_say(figure: str, many: list[Statistics]) -> None:
    """95 of 100 times, within what 300 coin tosses of 0.95 leave but once in a million.

    The delta method's second-order part is below 2 % of a standard deviation at this noise, which
    moves coverage by a hundredth of a percent.
    """
    take, truth = FIGURES[figure]
    estimates = [take(one) for one in many]
    covered = sum(estimate.covers(truth) for estimate in estimates)
    assert least(0.95) <= covered <= most(0.95)
    # Negative control: bars of two thirds of the width cover 81 % and would be noticed.
    narrow = sum(abs(e.value - truth) <= 2 / 3 * e.error for e in estimates)
    assert narrow < least(0.95)


def test_quantiles_lie_between_the_edges_that_are_said(many: list[Statistics]) -> None:
    """Edges of bins make the interval wider than it need be, never narrower."""
    for place, probability in enumerate(QUANTILES):
        truth = EVERYONE["age"].quantile(probability)
        quantiles = [number(one).quantiles[place] for one in many]
        covered = sum(quantile.low <= truth <= quantile.high for quantile in quantiles)
        assert covered >= least(0.95), probability
        assert all(q.low <= q.value <= q.high for q in quantiles)


def test_the_median_is_right_within_a_bin_or_two(many: list[Statistics]) -> None:
    truth = EVERYONE["age"].median()
    errors = [abs(number(one).quantiles[2].value - truth) for one in many]
    assert np.median(errors) < (HIGH - LOW) / BINS


def test_counts_that_must_agree_do(many: list[Statistics]) -> None:
    for one in many[:20]:
        sex = category(one)
        total = sum(count.value for count in sex.counts.values()) + sex.missing.value
        assert total == pytest.approx(one.units.value)
        age = number(one)
        total = sum(count.value for count in age.counts) + age.missing.value
        assert total == pytest.approx(one.units.value)


def test_several_ways_to_count_units_are_better_than_one(many: list[Statistics]) -> None:
    layout = Layout.of(plan())
    alone = 1.96 * math.sqrt(len(HOLDERS)) * layout.noise(plan()) / 2**20
    assert many[0].units.error < 0.9 * alone


def test_a_count_that_noise_could_have_made_is_refused() -> None:
    with pytest.raises(RunError, match=r"noise is too large.*raise epsilon.*fewer columns"):
        answered(plan(epsilon=0.005), 0)


def test_a_variance_below_zero_is_zero_with_a_bar() -> None:
    """Everyone is the same; the noise alone makes some variances negative."""
    asked = plan()
    layout = Layout.of(asked)
    same = {"age": pd.Series([50.0] * 400), "sex": pd.Series(["f"] * 400)}
    found = [
        number(
            statistics_of(asked, noised(sums(layout, same), asked, SeededRandomness("z", seed)), 1)
        )
        for seed in range(40)
    ]
    assert any(one.variance.value == 0 for one in found)
    assert all(one.deviation.error > 0 for one in found)
    assert all(one.deviation.covers(0) == one.variance.covers(0) for one in found)


# -- forms ----------------------------------------------------------------------------------------


def test_the_document_has_every_figure(exact: Statistics) -> None:
    written = document(exact)
    assert set(written["columns"]) == {"age", "sex"}
    age, sex = written["columns"]["age"], written["columns"]["sex"]
    assert len(age["edges"]) == len(age["counts"]) + 1
    assert [entry["value"] for entry in sex["values"]] == ["f", "m"]
    assert set(age["mean"]) == {"value", "error"}


def test_a_scaling_is_never_finer_than_what_is_known() -> None:
    questions = tuple(
        NumberQuestion(name=f"x[{place}]", low=-2.0, high=2.0, bins=0) for place in range(2)
    )
    asked = StatisticsPlan(
        task="t", source="s", subject="inputs", questions=questions,
        epsilon=1.0, delta=1e-5, unit="record",
    ).calibrated().model_copy(update={"noise_multiplier": 1e-9})  # fmt: skip
    rng = np.random.default_rng(0)
    columns = {
        "x[0]": pd.Series(np.clip(rng.normal(0.5, 0.6, 1000), -2, 2)),
        "x[1]": pd.Series(np.full(1000, 9.0)),  # beyond its reach, and the same everywhere
    }
    exact = sums(Layout.of(asked), columns)
    (scaling,) = scaling_of(statistics_of(asked, exact, 1), {"x": 2.0})
    assert scaling.input == "x"
    assert scaling.shift == pytest.approx((0.5, 2.0), abs=0.06)
    assert scaling.scale == pytest.approx((0.6, 0.2), abs=0.06)
