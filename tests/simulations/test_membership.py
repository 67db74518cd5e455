"""Membership attacks find what there is to find, and their figures are what they are called."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit
from scipy.stats import norm

from common.privacy.gaussian import gaussian_mu
from common.settings import plan_for
from common.tasks import load
from common.tasks.base import HolderTables, Task
from simulations.membership import (
    RATES,
    allowed,
    allowed_auc,
    attack,
    auc,
    coins,
    likelihood_ratios,
    logits_of,
    membership_attacks,
    roc,
    tpr_at,
)
from tests.tiny import TinyTask

RNG = np.random.default_rng(0)


def tables_of(task: Task) -> tuple[str, HolderTables]:
    name, rows = next(iter(task.source.tables().items()))
    return name, task.split(rows, holder=name, seed=0)


# -- figures --------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_auc_is_the_share_of_pairs_in_order(units: list[tuple[int, bool]]) -> None:
    scores = np.array([float(score) for score, _ in units])
    member = np.array([inside for _, inside in units])
    inside, outside = scores[member], scores[~member]
    if not len(inside) or not len(outside):
        assert np.isnan(auc(scores, member))
        return
    gap = inside[:, None] - outside[None, :]
    assert auc(scores, member) == pytest.approx(((gap > 0) + 0.5 * (gap == 0)).mean())
    false, true = roc(scores, member)
    assert auc(scores, member) == pytest.approx(np.trapezoid(true, false))
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.001, 0.01, 0.5]))
def test_no_more_false_alarms_than_the_rate(seed: int, rate: float) -> None:
    rng = np.random.default_rng(seed)
    scores, member = rng.integers(0, 30, 200).astype(float), rng.random(200) < 0.5
    false, true = roc(scores, member)
    assert tpr_at(scores, member, rate) == pytest.approx(true[false <= rate + 1e-12].max())


def test_what_a_claim_allows() -> None:
    epsilon, delta = 2.0, 1e-3
    mu = gaussian_mu(epsilon, delta)
    x = np.linspace(0, 1, 20_001)
    any_curve, gaussian = allowed(x, epsilon, delta), allowed(x, epsilon, delta, mu)
    assert any_curve[0] == pytest.approx(delta)
    assert (gaussian <= any_curve + 1e-9).all()
    assert (np.diff(any_curve) >= 0).all()
    assert allowed_auc(epsilon, delta) == pytest.approx(np.trapezoid(any_curve, x), abs=1e-6)
    assert allowed_auc(epsilon, delta, mu) == pytest.approx(np.trapezoid(gaussian, x), abs=1e-4)
    # Randomised response attains the corner: TPR e^ε/(1 + e^ε) at FPR 1/(1 + e^ε).
    assert allowed(np.array([expit(-2.0)]), 2.0, 0.0)[0] == pytest.approx(expit(2.0))


def test_the_bootstrap_error_is_that_of_repeated_audits() -> None:
    def one(rng: np.random.Generator) -> tuple[float, float]:
        member = coins(16, 100, rng)
        found = attack("loss", rng.normal(size=member.shape) + member, member).auc
        return found.value, found.error

    found = np.array([one(np.random.default_rng(seed)) for seed in range(60)])
    assert found[:, 0].mean() == pytest.approx(norm.cdf(1 / np.sqrt(2)), abs=0.01)
    # 60 repetitions know an sd to 9 %; 16 models know each error to 18 %, their mean to 3 %.
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(ddof=1), rel=0.35)


# -- attacks --------------------------------------------------------------------------------------


def test_every_unit_is_a_member_of_half_of_the_models() -> None:
    member = coins(16, 500, RNG)
    assert (member.sum(axis=0) == 8).all()
    # The sizes of the halves vary: binomially, with sd √(500/4) = 11.
    assert 2 < member.sum(axis=1).std() < 25


def test_logits_are_those_of_the_right_answer() -> None:
    chance = np.array([0.01, 0.5, 0.999])
    assert logits_of(-np.log(chance)) == pytest.approx(logit(chance))
    assert np.isfinite(logits_of(np.array([0.0, 1e9]))).all()


def test_lira_finds_members_by_what_each_unit_is_like() -> None:
    rng = np.random.default_rng(1)
    member = coins(64, 300, rng)
    hard = rng.normal(0, 5, 300)  # units differ far more than membership moves them
    logits = hard + 2.0 * member + rng.normal(size=member.shape)
    by_loss = auc(logits.ravel(), member.ravel())
    by_ratio = auc(likelihood_ratios(logits, member).ravel(), member.ravel())
    assert by_loss < 0.65
    # Knowing each unit's two means, the best attack has Φ(2/√2) = 0.921.
    assert by_ratio == pytest.approx(0.921, abs=0.02)
    assert likelihood_ratios(np.ones((4, 5)), coins(4, 5, rng)) == pytest.approx(np.zeros((4, 5)))


def test_lira_finds_nothing_where_there_is_nothing() -> None:
    rng = np.random.default_rng(2)
    member = coins(16, 1000, rng)
    ratios = likelihood_ratios(rng.normal(size=member.shape), member)
    # The null sd of an AUC of 8000 and 8000 scores is √((n+1)/(12·(n/2)²)) = 0.005.
    assert auc(ratios.ravel(), member.ravel()) == pytest.approx(0.5, abs=0.02)


# -- models ---------------------------------------------------------------------------------------


def test_a_model_without_privacy_gives_members_away_and_noise_hides_them() -> None:
    task = load("recommendation")
    found = {}
    for epsilon in (None, 0.1):
        settings = {"no_dp": True} if epsilon is None else {"epsilon": epsilon}
        plan = plan_for(task, settings)
        _, lira = membership_attacks(task, *tables_of(task), plan)
        found[epsilon] = lira
    assert found[None].auc.value > 0.8
    assert found[None].tpr[0.01].value > 0.1
    # At ε=0.1 and δ=1e-3 no attack has an AUC above 0.56; chance adds up to four errors.
    most = allowed_auc(0.1, 1e-3, gaussian_mu(0.1, 1e-3))
    assert abs(found[0.1].auc.value - 0.5) < most - 0.5 + 4 * found[0.1].auc.error


def test_attacks_are_repeatable_and_cover_every_unit() -> None:
    task = TinyTask()
    plan = plan_for(task, {"epsilon": 8.0})
    name, tables = tables_of(task)
    rounds: list[None] = []
    first, again = (
        membership_attacks(task, name, tables, plan, on_round=lambda: rounds.append(None))
        for _ in range(2)
    )
    assert [one.name for one in first] == ["loss", "lira"]
    assert len(rounds) == 2 * plan.rounds
    for one, same in zip(first, again, strict=True):
        assert one.scores.shape == (16, len(tables.train))
        assert list(one.tpr) == list(RATES)
        np.testing.assert_array_equal(one.scores, same.scores)
