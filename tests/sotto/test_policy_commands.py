"""`sotto policy`, and how the flags of `sotto join` become the first policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from client.policy import Policy
from client.policy_file import PolicyFile, add_policy, policy_path
from common.errors import ConfigurationError
from common.link.keys import CoordinatorKeys
from common.plan import TrainingPlan
from common.privacy.accounting import epsilon
from common.privacy.ledger import Budget, Ledger, Release
from common.settings import plan_for
from common.tasks import load
from sotto.policy_flags import Wanted, require_fitting
from tests.commands import Said, sotto
from tests.linking import enrol

TASK, SOURCE, DELTA = "medical-diagnosis", "heart-disease", 1e-4
NORTH, SOUTH = "sha256:" + "cd" * 32, "sha256:" + "ef" * 32


def plan(**settings: object) -> TrainingPlan:
    chosen = {"epsilon": 2.0, "rounds": 20, "min_holders": 2, **settings}
    return plan_for(load(TASK, SOURCE), chosen)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "holder"


def check(state: Path, asked: TrainingPlan, *words: object) -> Said:
    file = state.parent / "plan.toml"
    file.write_text(asked.to_toml())
    return sotto("policy", "check", file, "--state", state, *words)


def rules(state: Path, **changes: object) -> None:
    usual = {"data_set": "default", "budget": Budget(6.0, DELTA)}
    add_policy(policy_path(state), Policy.model_validate({**usual, **changes}))


# -- init and show --------------------------------------------------------------------------------


def test_a_first_policy_is_careful_and_takes_delta_from_the_source(state: Path) -> None:
    said = sotto(
        "policy", "init", "--state", state, "--budget", 6, "--task", TASK, "--source", SOURCE
    )
    assert said.code == 0, said.err
    (found,) = PolicyFile.load(policy_path(state)).policies.values()
    assert found.budget == Budget(6.0, DELTA)
    assert found.tasks == (TASK,)
    assert (found.evaluation, found.statistics, found.unprotected) == ("never", False, False)


def test_every_rule_can_be_given(state: Path) -> None:
    said = sotto(
        "policy", "init", "--state", state, "--data-set", "heart 2026", "--budget", 6,
        "--delta", 1e-5, "--epsilon-per-run", 2, "--min-noise-multiplier", 1,
        "--max-clip-norm", 5, "--max-rounds-per-day", 50, "--min-cohort", 3, "--size-class", 200,
        "--evaluation", "histogram", "--statistics", "--aggregation", "secure",
        "--aggregation", "secure-sum", "--coalition", 1,
        "--coordinator", "sha256:" + "ab" * 32, "--holder", NORTH, "--holder", SOUTH,
    )  # fmt: skip
    assert said.code == 0, said.err
    (found,) = PolicyFile.load(policy_path(state)).policies.values()
    assert found == Policy(
        data_set="heart 2026",
        budget=Budget(6.0, 1e-5),
        epsilon_per_run=2.0,
        min_noise_multiplier=1.0,
        max_clip_norm=5.0,
        max_rounds_per_day=50,
        min_cohort=3,
        size_class=200,
        evaluation="histogram",
        statistics=True,
        aggregation=("secure", "secure-sum"),
        coalition=1,
        coordinators=("sha256:" + "ab" * 32,),
        holders=(NORTH, SOUTH),
    )
    assert "no holders are pinned" not in said.out


def test_noise_of_others_is_not_relied_on_without_a_word_about_who_they_are(state: Path) -> None:
    init = ("policy", "init", "--state", state)
    assert "no holders are pinned" in sotto(*init, "--aggregation", "secure-sum").out
    (found,) = PolicyFile.load(policy_path(state)).policies.values()
    assert (found.aggregation, found.holders) == (("secure-sum",), ())
    assert "no holders are pinned" not in sotto(*init, "--data-set", "more").out


def test_the_authority_whose_keys_are_installed_is_written_down(state: Path) -> None:
    keys = enrol(state, CoordinatorKeys.create_or_load(state.parent / "hub"), "north")
    assert sotto("policy", "init", "--state", state).code == 0
    (found,) = PolicyFile.load(policy_path(state)).policies.values()
    from common.link.certificates import fingerprint

    assert found.coordinators == (f"sha256:{fingerprint(keys.authority)}",)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--budget", 6], "a budget has a δ, below 1/n"),
        (["--budget", -6, "--delta", 1e-5], "must be positive and finite, got -6.0"),
        (["--evaluation", "exact"], "needs unprotected = true"),
        (["--evaluation", "sometimes"], "'never', 'histogram' or 'exact'"),
        (["--min-cohort", 0], "min_cohort: input should be greater than or equal to 1, got 0"),
        (["--coordinator", "hub.example.org"], "is no fingerprint"),
        (["--holder", "north"], "'north' is no fingerprint"),
        (["--aggregation", "masked"], "'plain', 'secure' or 'secure-sum', got 'masked'"),
        (["--coalition", -1], "coalition: input should be greater than or equal to 0, got -1"),
    ],
)
def test_a_policy_that_cannot_work_is_not_written(
    words: list[object], says: str, state: Path
) -> None:
    said = sotto("policy", "init", "--state", state, *words)
    assert said.code == 2
    assert says in said.err
    assert not state.exists()


def test_rules_for_all_data_sets_are_not_changed_by_adding_one(state: Path) -> None:
    assert sotto("policy", "init", "--state", state, "--task", TASK).code == 0
    before = policy_path(state).read_text()
    more = ("policy", "init", "--state", state, "--data-set", "more")
    said = "has tasks, coordinators and holders for all its data sets"
    assert said in sotto(*more, "--task", TASK).err
    assert said in sotto(*more, "--holder", NORTH).err
    assert sotto(*more).code == 0
    assert policy_path(state).read_text().startswith(before.rstrip("\n"))
    assert "has rules for data set 'more'" in sotto(*more).err


def test_show_tells_what_is_written_what_is_default_and_what_is_spent(state: Path) -> None:
    policy_path(state).parent.mkdir(parents=True)
    policy_path(state).write_text(
        "[data_sets.default]\nbudget = { epsilon = 6, delta = 1e-4 }\nmin_cohort = 3\n"
    )
    spend(state, plan(rounds=1))
    said = sotto("policy", "show", "--state", state)
    assert said.code == 0, said.err
    lines = [line.split() for line in said.out.splitlines()]
    assert ["min_cohort", "3"] in lines
    assert ["evaluation", "never", "default"] in lines
    assert ["aggregation", "plain,", "secure", "default"] in lines
    assert "whoever the authority signed" in said.out
    assert f"Spent: ε {price(plan(rounds=1)):.3f} of 6 (δ=0.0001)." in said.out

    said = sotto("policy", "show", "--state", state, "--json", "-")
    assert json.loads(said.out)["default"]["budget"] == {"epsilon": 6.0, "delta": 1e-4}


# -- check ----------------------------------------------------------------------------------------


def price(asked: TrainingPlan, delta: float = DELTA) -> float:
    return epsilon(asked.composition(), delta)


def spend(state: Path, asked: TrainingPlan, run: str = "earlier") -> None:
    with Ledger.open(state / "ledger.sqlite") as ledger:
        for number in range(1, asked.rounds + 1):
            release = Release(
                f"{run}/{number}", "default", TASK, "hub", run, asked.digest, number,
                asked.round_event(),
            )  # fmt: skip
            ledger.reserve(release, Budget(6.0, DELTA), asked.composition())


def test_a_plan_that_fits_is_allowed_and_its_price_is_told(state: Path) -> None:
    rules(state)
    said = check(state, plan())
    assert said.code == 0, said.out + said.err
    assert "Allowed." in said.out
    cost = price(plan())
    assert f"The whole plan costs ε {cost:.3f} (δ=0.0001) by itself." in said.out
    assert f"0.000 of 6, 6.000 left; with this plan: {cost:.3f}." in said.out
    assert not (state / "ledger.sqlite").exists(), "checking makes no account"


def test_everything_that_is_wrong_is_told_at_once(state: Path) -> None:
    rules(
        state,
        budget=Budget(1.5, 1e-5),
        min_noise_multiplier=50.0,
        epsilon_per_run=1.0,
        max_rounds_per_day=10,
        min_cohort=3,
        aggregation=["secure"],
        dry_run=True,
    )
    said = check(state, plan(), "--json", "-")
    assert said.code == 3
    document = json.loads(said.out)
    refused = {each["rule"] for each in document["rules"] if each["refusal"]}
    assert refused == {
        "delta", "noise", "cohort", "aggregation", "budget", "run", "rounds", "dry-run",
    }  # fmt: skip
    assert document["allowed"] is False
    assert document["epsilon"] == {
        "plan": pytest.approx(price(plan(), 1e-5)),
        "spent": 0.0,
        "after": pytest.approx(price(plan(), 1e-5)),
        "budget": 1.5,
        "delta": 1e-5,
    }
    # And people read the same.
    assert check(state, plan()).out.count("REFUSED") == len(refused)


def test_a_plan_with_noise_in_the_sum_has_a_price_and_a_row_about_coalitions(state: Path) -> None:
    asked = plan(aggregation="secure-sum", min_holders=None, rounds=None, coalition=1)
    rules(state, aggregation=["secure-sum"], coalition=2, budget=Budget(1.5, DELTA))
    said = check(state, asked, "--json", "-")
    document = json.loads(said.out)
    refused = {each["rule"] for each in document["rules"] if each["refusal"]}
    assert (said.code, refused) == (3, {"coalition", "budget"})
    assert document["epsilon"]["plan"] == pytest.approx(price(asked))
    assert price(asked) == pytest.approx(2.0, rel=0.01)
    (row,) = [each for each in document["rules"] if each["rule"] == "coalition"]
    assert (row["asked"], row["allowed"]) == ("1", "at least 2")


def test_what_is_spent_already_counts(state: Path) -> None:
    rules(state, budget=Budget(3.5, DELTA), max_rounds_per_day=30)
    spend(state, plan())
    said = check(state, plan(), "--json", "-")
    document = json.loads(said.out)
    assert said.code == 3
    twice = epsilon(plan().composition() * 2, DELTA)
    assert document["epsilon"]["after"] == pytest.approx(twice)
    # ε composes: two runs of 2 fit into 3.5. What does not fit is 20 rounds more today.
    (refused,) = [each for each in document["rules"] if each["refusal"]]
    assert (refused["rule"], refused["allowed"]) == ("rounds", "30 a day, 10 left today")
    assert "of the plan's 20 rounds the holder answers 10 today" in refused["refusal"]


def test_the_sentence_is_the_one_that_the_coordinator_would_get(state: Path) -> None:
    rules(state, budget=Budget(2.5, DELTA))
    spend(state, plan())
    said = check(state, plan())
    assert said.code == 3
    words = " ".join(said.out.split())
    assert "data set 'default': this run needs ε=" in words
    assert "of 2.50 is left" in words


def test_a_plan_without_privacy_has_no_price_that_a_budget_could_hold(state: Path) -> None:
    rules(state)
    said = check(state, plan_for(load(TASK, SOURCE), {"no_dp": True, "min_holders": 2}))
    assert said.code == 3
    assert "unprotected: this plan lets exact updates leave the holder" in said.out
    assert "ε ∞" in said.out


def test_another_task_or_data_set_may_be_named(state: Path) -> None:
    rules(state)
    rules(state, data_set="public", budget=None, unprotected=True)
    said = check(state, plan(), "--data-set", "public", "--task", "credit-risk")
    assert said.code == 3
    assert "this holder serves credit-risk" in " ".join(said.out.split())
    assert "no [data_sets.other]" in check(state, plan(), "--data-set", "other").err


def test_a_plan_or_policy_that_cannot_be_read_is_a_sentence(state: Path) -> None:
    assert "there is no" in check(state, plan()).err
    rules(state)
    (state.parent / "plan.toml").write_text("rounds = 3")
    said = sotto("policy", "check", state.parent / "plan.toml", "--state", state)
    assert said.code == 2
    assert "plan.toml is not the plan.toml of a run: task: field required" in said.err


# -- flags of join --------------------------------------------------------------------------------


def first(**flags: object) -> Policy:
    wanted = Wanted(**flags)  # type: ignore[arg-type]
    wanted.require_enough()
    return wanted.policy(DELTA, 120, "ab" * 32)


def test_flags_make_the_first_policy() -> None:
    assert first(budget=6.0) == Policy(
        data_set="default",
        budget=Budget(6.0, DELTA),
        size_class=120,
        coordinators=("sha256:" + "ab" * 32,),
        unprotected=False,
        evaluation="never",
    )
    public = first(allow_no_dp=True, share_metrics=True, size_class=7, data_set="d")
    assert (public.data_set, public.budget, public.size_class) == ("d", None, 7)
    assert (public.unprotected, public.evaluation) == (True, "exact")
    assert first(budget=6.0).aggregation == ("plain", "secure")
    sums = first(budget=6.0, aggregation=("secure", "secure-sum"))
    assert sums.aggregation == ("secure", "secure-sum")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({}, "set --budget EPS"),
        ({"delta": 1e-5}, "set --budget EPS"),
        ({"budget": 6.0, "share_metrics": True}, "which no budget covers.*--allow-no-dp"),
        ({"budget": 0.0}, "positive and finite"),
        ({"budget": 6.0, "delta": 0.0}, "above 0 and below 1"),
        ({"budget": 6.0, "size_class": 0}, "size_class: .*equal to 1, got 0"),
        ({"budget": 6.0, "aggregation": ("sum",)}, "'plain', 'secure' or 'secure-sum', got 'sum'"),
    ],
)
def test_flags_that_make_no_policy_are_refused(flags: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        first(**flags)


def test_flags_that_say_the_same_as_the_file_are_welcome(tmp_path: Path) -> None:
    path = policy_path(tmp_path)
    made = first(budget=6.0, size_class=99, data_set="heart")
    add_policy(path, made)
    for flags in (
        {}, {"budget": 6.0}, {"delta": DELTA, "size_class": 99}, {"data_set": "heart"},
        {"aggregation": ("secure", "plain", "secure")},
    ):  # fmt: skip
        assert Wanted(**flags).agreed(path, 120) == made  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"budget": 8.0}, "--budget 8 contradicts .* ε = 6 .*'sotto ledger budget set'"),
        ({"budget": 4.0}, "--budget 4 contradicts"),
        ({"delta": 1e-6}, "--delta 1e-06 contradicts .* δ = 0.0001"),
        ({"size_class": 7}, "--size-class 7 contradicts .* size_class = 99 .*edit the file"),
        ({"allow_no_dp": True}, "--allow-no-dp contradicts .* unprotected = false"),
        ({"share_metrics": True}, "--share-metrics contradicts .* evaluation = 'never'"),
        (
            {"aggregation": ("secure-sum", "secure")},
            "--aggregation secure --aggregation secure-sum contradicts .* aggregation = "
            r"\['plain', 'secure'\] .*edit the file",
        ),
        ({"data_set": "other"}, r"no \[data_sets\.other\]"),
    ],
)
def test_flags_that_contradict_the_file_are_refused_with_both_values(
    flags: dict[str, object], says: str, tmp_path: Path
) -> None:
    path = policy_path(tmp_path)
    add_policy(path, first(budget=6.0, size_class=99))
    before = path.read_text()
    with pytest.raises(ConfigurationError, match=says):
        Wanted(**flags).agreed(path, 120)  # type: ignore[arg-type]
    assert path.read_text() == before


def test_a_holder_does_not_join_where_everything_would_be_refused(tmp_path: Path) -> None:
    path = policy_path(tmp_path)
    allowed = first(budget=6.0).model_copy(update={"tasks": (TASK,)})
    require_fitting(path, allowed, TASK, "AB" * 32)
    with pytest.raises(ConfigurationError, match=f"allows the tasks {TASK}, not 'credit-risk'"):
        require_fitting(path, allowed, "credit-risk", "ab" * 32)
    for stranger in ("cd" * 32, "127.0.0.1:7443"):
        with pytest.raises(ConfigurationError, match="does not allow this federation's authority"):
            require_fitting(path, allowed, TASK, stranger)


def test_join_takes_its_rules_from_the_file(state: Path) -> None:
    """Before any connection: nobody listens at this address."""
    join = (
        "join", "--server", "127.0.0.1:1", "--state", state, "--task", TASK, "--part", "clinic-1",
        "--insecure", "--name", "clinic-1",
    )  # fmt: skip
    rules(state)
    said = sotto(*join, "--budget", 8)
    assert said.code == 2
    assert "--budget 8 contradicts" in said.err
    policy_path(state).write_text("[data_sets.default]\nbudgt = 1\n")
    assert "Did you mean 'budget'?" in sotto(*join).err
    assert "there is no" in sotto(*join, "--policy", state / "elsewhere.toml").err
