"""What a holder allows: every kind of request that goes too far is refused before any work."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from client.app import build_app
from client.holder import Holder
from client.policy import RULES, Policy, same_fingerprint
from client.requests import Request, Terms
from client.secure import Participant
from client.state import HolderState
from common.errors import ConfigurationError, Refusal
from common.flower import set_identity, stamp
from common.guarantees import CentralPrivacy, HistogramEvaluation
from common.plan import TrainingPlan
from common.privacy.accounting import epsilon
from common.privacy.ledger import Budget
from common.privacy.noise import SeededRandomness
from common.secagg.wire import StepRequest, message_type_of
from common.settings import plan_for
from common.statistics_plan import StatisticsPlan, statistics_plan_for
from common.tasks.base import HolderData
from common.tasks.parameters import initial_parameters
from common.wire import REFUSED, RoundRequest, StatisticsRequest
from tests.tiny import TinyTask, table

TASK = TinyTask()
AUTHORITY = ":".join(["ab"] * 32)
STRANGER = "sha256:" + "cd" * 32

USUAL_KIND = {
    RoundRequest: "train",
    StatisticsRequest: "query",
    StepRequest: message_type_of("advertise_keys"),
}
Asked = RoundRequest | StatisticsRequest | StepRequest


def plan(**settings: object) -> TrainingPlan:
    return plan_for(TASK, {"epsilon": 1.0, "rounds": 5, "min_holders": 2, **settings})


def train(number: int = 1, run: str = "run", **settings: object) -> RoundRequest:
    return RoundRequest(run, number, plan(**settings), initial_parameters(TASK, 0))


def changed(**fields: object) -> RoundRequest:
    """A request whose plan was not made by `plan_for`: a coordinator may send anything."""
    return RoundRequest("run", 1, plan().model_copy(update=fields), initial_parameters(TASK, 0))


def masked(level: str = "secure", **settings: object) -> TrainingPlan:
    """A plan whose updates are masked: three holders, of whom none may be lost."""
    return plan(**{"aggregation": level, "cohort": 3, "min_holders": 3, **settings})


def ask_masked(level: str = "secure", **settings: object) -> StepRequest:
    """The first step of a masked round, where the plan is told."""
    return StepRequest("advertise_keys", "run", 1, plan=masked(level, **settings))


def with_histogram(price: float, **settings: object) -> TrainingPlan:
    """A plan that pays for its evaluations; this task has no histogram, and rules come first."""
    usual = plan(**settings)
    evaluation = HistogramEvaluation(epsilon=price, delta=1e-4).calibrated(usual.evaluations)
    return usual.model_copy(update={"evaluation": evaluation})


def with_noise(sigma: float | None) -> RoundRequest:
    privacy = plan().privacy.model_copy(update={"noise_multiplier": sigma})
    return changed(privacy=privacy)


def priced(price: float) -> RoundRequest:
    return changed(evaluation=with_histogram(price).evaluation)


def statistics(**changes: object) -> StatisticsRequest:
    asked = statistics_plan_for(TASK, 1.0, min_holders=2)
    return StatisticsRequest("stats", asked.model_copy(update=changes))


def policy(**rules: object) -> Policy:
    """Allows what :func:`plan` asks."""
    usual = {"data_set": "patients", "budget": Budget(5.0, 1e-4), "size_class": 40}
    return Policy.model_validate({**usual, **rules})


@dataclass
class Watched:
    """Stands for a trainer, and notes what it is asked to compute.

    Everything that is computed to be sent draws noise first, statistics included.
    """

    dimension: int = 4
    units_digest: str = ""
    calls: list[str] = field(default_factory=list)

    def train(self, *_: object, **__: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.calls.append("train")
        return torch.zeros(self.dimension), {}

    def evaluate(self, *_: object, **__: object) -> dict[str, float]:
        self.calls.append("evaluate")
        return {"accuracy": 1.0}

    def gradient_sum(self, *_: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.calls.append("gradient sum")
        return torch.zeros(self.dimension), {}

    def randomness(self, _: Request) -> SeededRandomness:
        self.calls.append("noise")
        return SeededRandomness("test", 0)


@dataclass
class Clinic:
    """A holder whose work is watched."""

    holder: Holder
    work: Watched

    @classmethod
    def of(cls, state: HolderState, rules: Policy) -> Clinic:
        data = HolderData(TASK.examples(table(40)), TASK.examples(table(20, seed=1)))
        cpu = torch.device("cpu")
        work = Watched()
        holder = Holder(
            "clinic",
            TASK,
            data,
            rules,
            state,
            cpu,
            coordinator=AUTHORITY,
            randomness=work.randomness,
            rows=table(40),
        )
        holder.trainer = work  # type: ignore[assignment]
        return cls(holder, work)

    def ask(self, asked: Asked, kind: str = "") -> Message:
        set_identity(1)
        message = Message(asked.records(), 2, kind or USUAL_KIND[type(asked)])
        stamp(message)
        app = build_app(lambda _: Participant.unsigned(self.holder))
        return app(message, Context(1, 2, {}, RecordDict(), {}))

    def entries(self) -> int:
        return len(self.holder.state.ledger.entries())


@dataclass(frozen=True)
class TooMuch:
    """A kind of request that goes too far.

    Args:
        rule: that refuses it.
        asked: the request.
        rules: of the holder, where they are not the usual ones.
        before: what was asked and answered earlier.
        kind: of the message.
    """

    rule: str
    asked: Callable[[], Asked]
    rules: dict[str, object] = field(default_factory=dict)
    before: tuple[Callable[[], Asked], ...] = ()
    kind: str = ""


PRICE = 1.0  # of one run of `plan`
CENTRAL = CentralPrivacy(
    epsilon=1.0, delta=1e-4, clip_norm=1.0, population=100, noise_multiplier=1.0
)
"""Noise is added by the coordinator: what leaves the holder is exact."""

KINDS = {
    "another task": TooMuch("task", lambda: changed(task="credit-risk")),
    "another schema": TooMuch("task", lambda: changed(source="elsewhere")),
    "another preparation": TooMuch("task", lambda: changed(preprocessing="flamby")),
    "a task that is not on the list": TooMuch("task", train, {"tasks": ["credit-risk"]}),
    "a coordinator of another authority": TooMuch(
        "coordinator", train, {"coordinators": [STRANGER]}
    ),
    "no privacy": TooMuch("unprotected", lambda: train(no_dp=True, epsilon=None)),
    "trust in the coordinator": TooMuch("unprotected", lambda: changed(privacy=CENTRAL)),
    "no budget": TooMuch("budget", train, {"budget": None}),
    "more than the budget": TooMuch("budget", train, {"budget": Budget(0.5 * PRICE, 1e-4)}),
    "more than is left of it": TooMuch(
        "budget",
        lambda: train(run="third"),
        {"budget": Budget(1.3 * PRICE, 1e-4)},
        tuple(lambda n=n: train(n, run="first") for n in range(1, 6)),
    ),
    "more than a run may cost": TooMuch("run", train, {"epsilon_per_run": 0.9 * PRICE}),
    "a larger δ": TooMuch("delta", lambda: train(delta=1e-3)),
    "another unit": TooMuch(
        "unit", lambda: changed(privacy=plan().privacy.model_copy(update={"unit": "user"}))
    ),
    "less noise": TooMuch("noise", lambda: with_noise(0.4)),
    "less noise than this holder wants": TooMuch("noise", train, {"min_noise_multiplier": 50.0}),
    "a plan that was not calibrated": TooMuch("noise", lambda: with_noise(None)),
    "a larger clip norm": TooMuch("clip_norm", lambda: train(clip_norm=11.0)),
    "too many rounds a day": TooMuch(
        "rounds",
        lambda: train(3),
        {"max_rounds_per_day": 2},
        (lambda: train(1), lambda: train(2)),
    ),
    "too many runs a day": TooMuch(
        "rounds", lambda: train(1, run="next"), {"max_rounds_per_day": 1}, (train,)
    ),
    "too few holders": TooMuch("cohort", lambda: train(min_holders=1)),
    "fewer holders than this one wants": TooMuch("cohort", train, {"min_cohort": 3}),
    "a histogram of its evaluation": TooMuch("evaluation", lambda: priced(0.5)),
    "an evaluation by histogram": TooMuch("evaluation", lambda: priced(0.5), kind="evaluate"),
    "evaluations past the budget": TooMuch(
        "budget",
        lambda: priced(0.5),
        {"evaluation": "histogram", "budget": Budget(1.01 * PRICE, 1e-4)},
    ),
    "statistics": TooMuch("statistics", statistics),
    "statistics with little noise": TooMuch(
        "noise", lambda: statistics(noise_multiplier=0.1), {"statistics": True}
    ),
    "statistics for one holder": TooMuch(
        "cohort", lambda: statistics(min_holders=1), {"statistics": True}
    ),
    "statistics at a larger δ": TooMuch(
        "delta", lambda: statistics(delta=1e-3), {"statistics": True}
    ),
    "statistics past the budget": TooMuch(
        "budget", statistics, {"statistics": True, "budget": Budget(0.5, 1e-4)}
    ),
    "sums of more holders than are pinned": TooMuch("holders", ask_masked, {"holders": [STRANGER]}),
    "its update in the clear": TooMuch(
        "aggregation", train, {"aggregation": ["secure", "secure-sum"]}
    ),
    "its update in a sum": TooMuch("aggregation", ask_masked, {"aggregation": ["plain"]}),
    "a share of the noise only": TooMuch("aggregation", lambda: ask_masked("secure-sum")),
    "sums of fewer than this one wants": TooMuch("cohort", ask_masked, {"min_cohort": 4}),
    "trust in all other holders": TooMuch(
        "coalition",
        lambda: ask_masked("secure-sum", coalition=1),
        {"aggregation": ["secure-sum"], "coalition": 2},
    ),
    "a sum with little noise": TooMuch(
        "noise",
        lambda: ask_masked("secure-sum"),
        {"aggregation": ["secure-sum"], "min_noise_multiplier": 50.0},
    ),
    "to be counted as a small holder": TooMuch("holder_size", lambda: train(holder_size=3)),
    "another model": TooMuch(
        "model", lambda: RoundRequest("run", 1, plan(), np.zeros(3, dtype=np.float32))
    ),
    "an answered round on other terms": TooMuch(
        "request", lambda: train(learning_rate=0.25), before=(train,)
    ),
    "anything, on a dry run": TooMuch("dry-run", train, {"dry_run": True}),
    "an evaluation, on a dry run": TooMuch("dry-run", train, {"dry_run": True}, kind="evaluate"),
    "statistics, on a dry run": TooMuch(
        "dry-run", statistics, {"dry_run": True, "statistics": True}
    ),
    "more than the budget, on a dry run": TooMuch(
        "budget", train, {"dry_run": True, "budget": Budget(0.5, 1e-4)}
    ),
}
"""Must show 7 of the ledger issue: at least 15 kinds of request that a holder refuses."""


def test_there_are_at_least_fifteen_kinds_and_every_rule_is_among_them() -> None:
    assert len(KINDS) >= 15
    rules = {rule.__name__.removeprefix("_") for rule in RULES} - {"no_budget"}
    account = {"budget", "run", "rounds", "request", "model", "dry-run"}
    assert {kind.rule for kind in KINDS.values()} == rules | account


@pytest.mark.parametrize("name", KINDS)
def test_what_goes_too_far_is_refused_with_nothing_computed_sent_or_charged(
    name: str, tmp_path: Path
) -> None:
    much = KINDS[name]
    with HolderState.at(tmp_path) as state:
        clinic = Clinic.of(state, policy(**much.rules))
        for earlier in much.before:
            assert clinic.ask(earlier()).has_content(), "what comes before must be allowed"
        entries, spent = clinic.entries(), clinic.holder.spent()
        clinic.work.calls.clear()

        reply = clinic.ask(much.asked(), much.kind)

        assert reply.has_error()
        assert not reply.has_content()
        assert reply.error.code == REFUSED
        assert str(reply.error.reason).startswith(f"{much.rule}: ")
        assert clinic.work.calls == []
        assert clinic.entries() == entries
        assert clinic.holder.spent() == spent
        assert not (tmp_path / "metrics.jsonl").exists()


def test_the_same_request_is_answered_where_the_rules_allow_it(tmp_path: Path) -> None:
    """The control of the test above: it is the rules that refuse, and not the request."""
    with HolderState.at(tmp_path) as state:
        rules = policy(coordinators=[f"sha256:{AUTHORITY}"], tasks=["tiny"], statistics=True)
        clinic = Clinic.of(state, rules)
        assert clinic.ask(train()).has_content()
        assert clinic.ask(train(), "evaluate").has_content()
        assert clinic.ask(statistics()).has_content()
        assert clinic.work.calls == ["noise", "train", "evaluate", "noise"]
        assert clinic.entries() == 4  # reserved and committed: an update, and statistics


@pytest.mark.parametrize("level", ["secure", "secure-sum"])
@pytest.mark.parametrize(
    ("rule", "rules"),
    [
        ("budget", {"budget": Budget(0.5 * PRICE, 1e-4)}),
        ("run", {"epsilon_per_run": 0.9 * PRICE}),
        ("dry-run", {"dry_run": True}),
    ],
)
def test_a_part_of_a_sum_is_held_to_the_account_as_an_update_is(
    level: str, rule: str, rules: dict[str, object], tmp_path: Path
) -> None:
    asked = RoundRequest("run", 1, masked(level), initial_parameters(TASK, 0))
    with HolderState.at(tmp_path) as state:
        clinic = Clinic.of(state, policy(aggregation=[level], **rules))
        with pytest.raises(Refusal) as refused:
            clinic.holder.contribution(asked)
        assert refused.value.code == rule
        assert (clinic.work.calls, clinic.entries(), clinic.holder.spent()) == ([], 0, 0.0)


@pytest.mark.parametrize("level", ["secure", "secure-sum"])
def test_a_part_of_a_sum_is_charged_where_the_rules_allow_it(level: str, tmp_path: Path) -> None:
    """The control of the test above, and of the first steps among the kinds of request."""
    with HolderState.at(tmp_path) as state:
        clinic = Clinic.of(state, policy(aggregation=[level]))
        assert clinic.ask(ask_masked(level)).has_content()
        assert (clinic.work.calls, clinic.entries()) == ([], 0), "keys are not about the data"
        clinic.holder.contribution(
            RoundRequest("run", 1, masked(level), initial_parameters(TASK, 0))
        )
        assert clinic.work.calls != []
        assert clinic.entries() == 2  # reserved and committed


def test_each_level_is_allowed_where_it_is_listed() -> None:
    """The control of the rows about aggregation above."""
    by_default = policy()
    by_default.check(plan(), TASK)
    by_default.check(masked(), TASK)
    policy(aggregation=["plain"]).check(plan(), TASK)
    policy(aggregation=["secure"]).check(masked(), TASK)
    policy(aggregation=["secure-sum"]).check(masked("secure-sum"), TASK)
    policy(aggregation=["secure-sum"], coalition=2).check(masked("secure-sum", coalition=2), TASK)
    policy(coalition=2).check(masked(), TASK)  # noise of this holder's own leans on nobody


def test_a_level_that_is_not_allowed_is_told_with_those_that_are() -> None:
    with pytest.raises(Refusal) as refused:
        policy().check(masked("secure-sum"), TASK)
    said = refused.value.sentence
    assert "'secure-sum', only the sum carries the full noise" in said
    assert "the holder's policy allows 'plain' and 'secure'" in said


def test_noise_in_the_sum_counts_as_noise_of_the_holders_own_does() -> None:
    asked = masked("secure-sum", coalition=1, clip_norm=0.5)
    terms = Terms.of_plan(asked)
    assert asked.privacy.kind == "distributed"
    assert (terms.private, terms.unit, terms.delta) == (True, "record", asked.privacy.delta)
    assert terms.noise_multiplier == asked.privacy.noise_multiplier
    assert (terms.clip_norm, terms.aggregation, terms.coalition) == (0.5, "secure-sum", 1)


def test_a_share_of_the_noise_counts_as_none_where_the_coordinator_sees_it_alone() -> None:
    """No plan can be built like this; one that was, by mistake or malice, is not private."""
    for seen in (plan(), masked()):
        alone = masked("secure-sum").model_copy(update={"aggregation": seen.aggregation})
        assert not Terms.of_plan(alone).private
        with pytest.raises(Refusal) as refused:
            Policy.of_experiment("patients", Budget(5.0, 1e-4), 40).model_copy(
                update={"unprotected": False}
            ).check(alone, TASK)
        assert refused.value.code == "unprotected"


@pytest.mark.parametrize("level", ["plain", "secure", "secure-sum"])
def test_an_experiment_allows_every_level(level: str) -> None:
    asked = plan() if level == "plain" else masked(level)
    Policy.of_experiment("patients", Budget(5.0, 1e-4), 40).check(asked, TASK)


def test_statistics_have_a_key_of_their_own_whatever_the_level_of_updates() -> None:
    sums_only = policy(aggregation=["secure-sum"], statistics=True)
    sums_only.check_statistics(Terms.of_statistics(_statistics_plan()), TASK)


def test_a_kind_of_privacy_that_is_not_known_here_counts_as_none() -> None:
    """Only kinds that are known protect what leaves the holder, whatever there may be one day."""
    central = plan().model_copy(update={"privacy": SimpleNamespace(kind="another")})
    with pytest.raises(Refusal) as refused:
        policy().check(central, TASK)
    assert refused.value.code == "unprotected"
    policy(unprotected=True).check(central, TASK)


# -- rules that look at the account ---------------------------------------------------------------


def test_rounds_of_a_day_are_counted_over_restarts_and_a_round_counts_once(
    tmp_path: Path,
) -> None:
    rules = policy(max_rounds_per_day=2)
    for number in (1, 1, 2, 2):
        with HolderState.at(tmp_path) as state:
            assert Clinic.of(state, rules).ask(train(number)).has_content()
    with HolderState.at(tmp_path) as state:
        clinic = Clinic.of(state, rules)
        refused = clinic.ask(train(3))
        assert "answers 2 rounds a day (max_rounds_per_day)" in str(refused.error.reason)
        assert clinic.ask(train(1)).has_content(), "an answered round is answered again"


def test_a_run_that_departs_from_its_plan_is_held_to_what_a_run_may_cost(tmp_path: Path) -> None:
    """The plan says one round each time; the coordinator calls them all one run."""
    once = plan(rounds=1)
    two = epsilon(once.composition() * 2, 1e-4)
    with HolderState.at(tmp_path) as state:
        clinic = Clinic.of(state, policy(epsilon_per_run=1.01 * two))
        answers = []
        for number in range(1, 5):
            asked = RoundRequest("run", number, once, initial_parameters(TASK, 0))
            try:
                clinic.holder.train(asked)
                answers.append("ok")
            except Refusal as refusal:
                answers.append(refusal.code)
        assert answers == ["ok", "ok", "run", "run"]
        assert clinic.ask(train(1, run="another", rounds=1)).has_content()


def test_a_budget_still_holds_where_exact_figures_are_allowed(tmp_path: Path) -> None:
    with HolderState.at(tmp_path) as state:
        clinic = Clinic.of(state, policy(unprotected=True, budget=Budget(0.5, 1e-4)))
        assert str(clinic.ask(train()).error.reason).startswith("budget: ")


def test_a_dry_run_says_what_it_would_have_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "sotto.holder")
    with HolderState.at(tmp_path) as state:
        Clinic.of(state, policy(dry_run=True)).ask(train(3))
    assert "dry run: would have sent the update of round 3 of run run" in caplog.text


def test_a_dry_run_sends_not_even_what_was_answered_before(tmp_path: Path) -> None:
    with HolderState.at(tmp_path) as state:
        assert Clinic.of(state, policy()).ask(train()).has_content()
    with HolderState.at(tmp_path) as state:
        reply = Clinic.of(state, policy(dry_run=True)).ask(train())
    assert str(reply.error.reason).startswith("dry-run: ")
    assert not reply.has_content()


# -- rules that do not ----------------------------------------------------------------------------

LEVELS = ("plain", "secure", "secure-sum")
PLANS = {
    "no privacy": plan(no_dp=True, epsilon=None),
    "plain": plan(),
    "secure": masked(),
    "secure-sum": masked("secure-sum", coalition=1),
}


@given(rules=st.fixed_dictionaries(
    {},
    optional={
        "min_noise_multiplier": st.floats(0, 20),
        "max_clip_norm": st.floats(0.1, 20),
        "min_cohort": st.integers(1, 4),
        "evaluation": st.sampled_from(["never", "histogram"]),
        "unprotected": st.booleans(),
        "aggregation": st.lists(st.sampled_from(LEVELS), min_size=1, max_size=3),
        "coalition": st.integers(0, 3),
        "holders": st.sampled_from([[], [STRANGER]]),
        "size_class": st.integers(1, 1000),
        "tasks": st.sampled_from([None, ["tiny"], ["other"]]),
        "coordinators": st.sampled_from([[], [AUTHORITY], [STRANGER]]),
    },
), which=st.sampled_from(["no privacy", *LEVELS]))  # fmt: skip
def test_check_refuses_exactly_when_a_finding_does(rules: dict[str, object], which: str) -> None:
    """What `sotto policy check` shows is what the holder does."""
    asked, holder = PLANS[which], policy(**rules)
    findings = list(holder.findings(Terms.of_plan(asked), TASK, AUTHORITY))
    broken = [finding for finding in findings if finding.refusal]
    if not broken:
        holder.check(asked, TASK, AUTHORITY)
        return
    with pytest.raises(Refusal) as refused:
        holder.check(asked, TASK, AUTHORITY)
    assert (refused.value.code, refused.value.sentence) == (broken[0].rule, broken[0].refusal)


def test_every_broken_rule_is_found_and_not_only_the_first() -> None:
    strict = policy(min_noise_multiplier=50.0, min_cohort=9, max_clip_norm=0.1)
    findings = strict.findings(Terms.of_plan(plan()), TASK, AUTHORITY)
    assert [each.rule for each in findings if each.refusal] == ["noise", "clip_norm", "cohort"]


def test_a_default_policy_lets_nothing_leave() -> None:
    safe = Policy(data_set="patients")
    asked: list[TrainingPlan] = [
        *PLANS.values(), plan(epsilon=1e-3), with_histogram(0.1),
    ]  # fmt: skip
    for each in asked:
        with pytest.raises(Refusal):
            safe.check(each, TASK, AUTHORITY)
    with pytest.raises(Refusal):
        safe.check_statistics(Terms.of_statistics(_statistics_plan()), TASK, AUTHORITY)
    assert not safe.share_metrics


def _statistics_plan() -> StatisticsPlan:
    return statistics_plan_for(TASK, 1.0, min_holders=2)


def test_a_histogram_is_held_to_the_least_noise_and_the_largest_delta_as_updates_are() -> None:
    asked = with_histogram(40.0)
    assert asked.evaluation.kind == "histogram"
    assert asked.privacy.kind == "dp"
    sigma = asked.evaluation.noise_multiplier
    assert sigma is not None
    assert sigma < (asked.privacy.noise_multiplier or 0.0)
    rules = policy(evaluation="histogram", budget=Budget(60.0, 1e-4), min_noise_multiplier=sigma)
    rules.check(asked, TASK)
    stricter = rules.model_copy(update={"min_noise_multiplier": 1.001 * sigma})
    with pytest.raises(Refusal, match="noise multiplier"):
        stricter.check(asked, TASK)
    wide = asked.evaluation.model_copy(update={"delta": 1e-3})
    with pytest.raises(Refusal, match=r"δ=0\.001 is above"):
        rules.check(asked.model_copy(update={"evaluation": wide}), TASK)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"evaluation": "exact"}, "needs unprotected = true"),
        ({"budget": None, "epsilon_per_run": 1.0}, "epsilon_per_run needs a budget"),
        ({"min_noise_multiplier": -1.0}, "greater than or equal to 0"),
        ({"coordinators": ["coordinator.example.org"]}, "is no fingerprint"),
        ({"holders": ["clinic-north"]}, "is no fingerprint.*'sotto keys list' shows it"),
        ({"aggregation": []}, "without a level no plan could be answered"),
        ({"aggregation": ["masked"]}, "'plain', 'secure' or 'secure-sum'"),
        ({"coalition": -1}, "greater than or equal to 0"),
        ({"min_cohort": True}, "valid integer"),
        ({"budget": {"epsilon": 1.0, "delta": 2.0}}, "delta must be above 0 and below 1"),
    ],
)
def test_a_policy_that_cannot_work_is_refused_where_it_is_made(
    rules: dict[str, object], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        policy(**rules)


def test_a_fingerprint_may_be_written_in_every_usual_way() -> None:
    plain = "ab" * 32
    for other in (AUTHORITY, AUTHORITY.upper(), f"sha256:{plain}", f"SHA256:{AUTHORITY}"):
        assert same_fingerprint(plain, other)
    assert not same_fingerprint(plain, "cd" * 32)
    assert not same_fingerprint("127.0.0.1:7443", "127.0.0.1:7443"), "an address is no fingerprint"


def test_statistics_are_judged_as_statistics_only() -> None:
    with pytest.raises(ConfigurationError, match="statistics=True"):
        policy(statistics=True).check_statistics(Terms.of_plan(plan()), TASK)
