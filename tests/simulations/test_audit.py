"""An audit passes an honest run and catches a broken one."""

from __future__ import annotations

import json

import pytest

from common.errors import ConfigurationError
from common.settings import plan_for
from common.tasks import load
from common.tasks.base import Task
from simulations.audit import METHODS, Audit, AuditResult, audit_document, audited
from simulations.canaries import MakeHolder
from tests.simulations.test_canaries import holder_with
from tests.tiny import TinyTask


def audit(
    task: Task | None = None, make_holder: MakeHolder | None = None, **options: object
) -> AuditResult:
    """An audit at ε=8 with seeded noise, of the canaries only."""
    task = task or TinyTask()
    plan = plan_for(task, {"epsilon": 8.0})
    chosen: dict[str, object] = {"membership": False, **options}
    return audited(Audit(task, plan, make_holder=make_holder or holder_with(), **chosen))  # type: ignore[arg-type]


def shown(result: AuditResult) -> dict[str, float]:
    return {bound.method: bound.epsilon for bound in result.bounds}


@pytest.mark.parametrize("name", ["medical-diagnosis", "credit-risk", "recommendation"])
def test_an_honest_run_shows_much_of_its_epsilon_and_no_more(name: str) -> None:
    """Must show 4: at ε=8 with 1,000 canaries the lower bound is between 1.5 and 8."""
    result = audit(load(name))
    assert 1.5 < result.best.epsilon < 8
    assert not result.contradicted
    assert all(epsilon > 1 for epsilon in shown(result).values())


@pytest.mark.parametrize(
    ("name", "broken", "least"),
    [
        ("medical-diagnosis", holder_with(noise=0.5), 10.0),
        ("credit-risk", holder_with(noise=0.5), 10.0),
        ("medical-diagnosis", holder_with(noise=0.0), 20.0),
        ("medical-diagnosis", holder_with(clips=False), 10.0),
    ],
    ids=["half the noise", "half the noise, credit", "no noise", "no clipping"],
)
def test_a_broken_run_is_caught(name: str, broken: MakeHolder, least: float) -> None:
    result = audit(load(name), broken)
    assert result.contradicted
    assert result.best.method == "gdp"
    assert result.best.epsilon > least


def test_at_a_small_claim_every_method_catches_missing_noise() -> None:
    """At ε=8 a thousand canaries cannot: the two one-run methods end at 3.6 and 5.5 there."""
    task = TinyTask()
    plan = plan_for(task, {"epsilon": 1.0})
    found = audited(Audit(task, plan, membership=False, make_holder=holder_with(noise=0.0)))
    assert all(epsilon > 1.0 for epsilon in shown(found).values())
    at_eight = shown(audit(make_holder=holder_with(noise=0.0)))
    assert at_eight["one-run"] < at_eight["f-dp"] < 8 < at_eight["gdp"]


def test_runs_count_together() -> None:
    one, three = audit(canaries=400), audit(canaries=400, runs=3)
    assert len(three.scores) == 3 * len(one.scores)
    assert not three.contradicted
    assert three.best.epsilon > one.best.epsilon
    assert list(three.audit.seeds) == [0, 1, 2]


def test_less_confidence_shows_more() -> None:
    assert shown(audit(confidence=0.6))["gdp"] > shown(audit(confidence=0.99))["gdp"]


def test_another_holder_may_be_audited() -> None:
    assert audit(holder="h2").holder == "h2"
    with pytest.raises(ConfigurationError, match="there is no holder 'h9'; there are h0, h1, h2"):
        audit(holder="h9")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"canaries": 1}, "canaries must be at least 2, got 1"),
        ({"runs": 0}, "seeds must be at least 1, got 0"),
        ({"confidence": 1.0}, "confidence must be at least 0.5 and below 1, got 1"),
    ],
)
def test_a_number_out_of_range_is_named(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        audit(**options)


def test_a_plan_without_privacy_cannot_be_audited() -> None:
    with pytest.raises(ConfigurationError, match="give an epsilon"):
        Audit(TinyTask(), plan_for(TinyTask(), {"no_dp": True}))


def test_the_document_is_json_and_says_it_all() -> None:
    task = TinyTask()
    result = audit(task, membership=True, canaries=300)
    written = json.loads(json.dumps(audit_document(result), allow_nan=False))
    assert written["claim"]["epsilon"] == 8.0
    assert [bound["method"] for bound in written["bounds"]] == list(METHODS)
    assert written["lower_bound"] == max(bound["epsilon"] for bound in written["bounds"])
    assert written["contradicted"] is False
    assert [one["attack"] for one in written["membership"]] == ["loss", "lira"]
    assert [found["fpr"] for found in written["membership"][0]["tpr"]] == [0.01, 0.001]
    assert written["claim"]["allows"]["gaussian"]["auc"] < written["claim"]["allows"]["any"]["auc"]
    assert written["canaries"]["planted"] == 300
