"""`policy.toml`: what is written is what holds, and what cannot be meant is refused."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.policy import Policy
from client.policy_file import (
    DATA_SET_KEYS,
    HOLDER_KEYS,
    MEANINGS,
    PolicyFile,
    add_policy,
    policy_of_node,
    policy_path,
)
from common.errors import ConfigurationError
from common.privacy.ledger import Budget

FILE = Path("policy.toml")
AUTHORITY = "sha256:" + "ab" * 32
NEIGHBOUR = "sha256:" + "cd" * 32

WHOLE = f"""
coordinators = ["{AUTHORITY}"]
holders = ["{NEIGHBOUR}"]
tasks = ["medical-diagnosis"]
dry_run = false

[data_sets.default]
budget = {{ epsilon = 8, delta = 1e-5 }}
epsilon_per_run = 4.0
min_noise_multiplier = 0.5
max_clip_norm = 10.0
max_rounds_per_day = 500
min_cohort = 2
size_class = 160
evaluation = "histogram"
statistics = true
unprotected = false
aggregation = ["secure", "secure-sum"]
coalition = 1

[data_sets."heart 2026"]
"""


def parse(text: str) -> PolicyFile:
    return PolicyFile.parse(text, FILE)


def test_every_key_means_what_it_says() -> None:
    policy = parse(WHOLE).policy("default", size_class=1)
    assert policy == Policy(
        data_set="default",
        budget=Budget(8.0, 1e-5),
        epsilon_per_run=4.0,
        min_noise_multiplier=0.5,
        max_clip_norm=10.0,
        max_rounds_per_day=500,
        min_cohort=2,
        size_class=160,
        evaluation="histogram",
        statistics=True,
        aggregation=("secure", "secure-sum"),
        coalition=1,
        coordinators=(AUTHORITY,),
        holders=(NEIGHBOUR,),
        tasks=("medical-diagnosis",),
    )
    assert set(MEANINGS) == {*HOLDER_KEYS, *DATA_SET_KEYS}


def test_what_is_left_out_is_not_allowed() -> None:
    found = parse(WHOLE)
    bare = found.policy("heart 2026", size_class=160)
    assert bare.budget is None
    assert (bare.evaluation, bare.statistics, bare.unprotected) == ("never", False, False)
    assert "secure-sum" not in bare.aggregation, "its noise is not this holder's alone"
    assert bare.min_noise_multiplier > 0
    assert bare.min_cohort >= 2
    assert bare.max_clip_norm is not None
    assert bare.max_rounds_per_day is not None
    assert bare.size_class == 160, "the source's own, where the file does not say"
    assert bare.coordinators == (AUTHORITY,), "rules for all data sets hold for each"
    assert bare.holders == (NEIGHBOUR,)
    assert found.budgets() == {"default": Budget(8.0, 1e-5), "heart 2026": None}


def rule(text: str) -> str:
    return f"[data_sets.default]\n{text}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("taks = []", r"no key 'taks' here\. Did you mean 'tasks'\? There are: coordinators"),
        (rule("min_cohor = 2"), r"\[data_sets\.default\].*Did you mean 'min_cohort'\?"),
        ("statistics = true", r"'statistics' here\. It belongs in a \[data_sets\.NAME\]"),
        (rule("dry_run = true"), r"'dry_run' here\. It belongs at the top of the file"),
        ("tasks = 'all'", r"policy\.toml: tasks: input should be a list of strings, got 'all'"),
        ("tasks = [1]", r"tasks: input should be a list of strings, got \[1\]"),
        ("dry_run = 'no'", r"dry_run: input should be a valid boolean, got 'no'"),
        ("coordinators = ['hub.example.org']", r"'hub\.example\.org' is no fingerprint"),
        ("holders = ['north']", r"holders: 'north' is no fingerprint.*'sotto keys list' shows it"),
        (rule("holders = []"), r"'holders' here\. It belongs at the top of the file"),
        (rule("aggregation = 'secure'"), r"aggregation: .*list of strings, got 'secure'"),
        (rule("aggregation = []"), r"aggregation: without a level no plan could be answered"),
        (rule("aggregation = ['sum']"), r"'plain', 'secure' or 'secure-sum', got 'sum'"),
        (rule("coalition = -1"), r"coalition: .*equal to 0, got -1"),
        (rule("secure_aggregation = true"), r"no key 'secure_aggregation' here.*'aggregation'"),
        (rule("budget = 8"), r"budget: a budget is \{ epsilon = EPS, delta = DELTA \}, got 8"),
        (rule("budget = { epsilon = 8 }"), r"budget is \{ epsilon = EPS, delta = DELTA \}, got"),
        (rule("budget = { epsilon = '8', delta = 1e-5 }"), r"budget: epsilon must be a number"),
        (rule("budget = { epsilon = -8, delta = 1e-5 }"), r"positive and finite, got -8\.0"),
        (rule("budget = { epsilon = inf, delta = 1e-5 }"), r"positive and finite, got inf"),
        (rule("budget = { epsilon = 8, delta = 1 }"), r"above 0 and below 1, got 1\.0"),
        (rule("epsilon_per_run = 4.0"), r"epsilon_per_run needs a budget"),
        (rule("min_noise_multiplier = -1"), r"min_noise_multiplier: .* equal to 0, got -1"),
        (rule("min_noise_multiplier = nan"), r"finite number, got nan"),
        (rule("max_clip_norm = '10'"), r"max_clip_norm: .*valid number, got '10'"),
        (rule("max_clip_norm = true"), r"max_clip_norm: .*valid number, got True"),
        (rule("max_rounds_per_day = 2.5"), r"max_rounds_per_day: .*valid integer, got 2\.5"),
        (rule("max_rounds_per_day = 0"), r"max_rounds_per_day: .*equal to 1, got 0"),
        (rule("min_cohort = 0"), r"min_cohort: .*equal to 1, got 0"),
        (rule("size_class = -1"), r"size_class: .*equal to 1, got -1"),
        (rule("evaluation = 'sometimes'"), r"'never', 'histogram' or 'exact', got 'sometimes'"),
        (rule("evaluation = 'exact'"), r"needs unprotected = true, which says that the data are"),
        (rule("statistics = 1"), r"statistics: .*valid boolean, got 1"),
        ("data_sets = 3", r"data_sets must be tables \[data_sets\.NAME\], got 3"),
        ("data_sets.default = 3", r"\[data_sets\.default\] must be a table, got 3"),
        ("[data_sets.default", r"is not TOML"),
    ],
)
def test_a_mistake_names_the_key_what_was_found_and_what_is_allowed(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as refused:
        parse(text)
    assert str(refused.value).startswith("policy.toml")


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse(rule("min_cohort = 0\nstatistics = 1\nmax_clip_norm = -1"))
    assert all(key in str(refused.value) for key in ("min_cohort", "statistics", "max_clip_norm"))


def test_a_file_that_is_not_there_or_not_text_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'sotto policy init --state DIR"):
        PolicyFile.load(policy_path(tmp_path))
    policy_path(tmp_path).write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        PolicyFile.load(policy_path(tmp_path))


def test_a_data_set_without_rules_is_not_served() -> None:
    with pytest.raises(ConfigurationError, match=r"no \[data_sets\.other\].*it has default, heart"):
        parse(WHOLE).policy("other", size_class=1)


positive = st.floats(1e-6, 1e6)
budgets = st.builds(Budget, positive, st.floats(1e-12, 0.5))
levels = st.sampled_from(["plain", "secure", "secure-sum"])
texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=20)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    budget = draw(st.none() | budgets)
    unprotected = draw(st.booleans())
    return Policy(
        data_set=draw(texts),
        budget=budget,
        epsilon_per_run=None if budget is None else draw(st.none() | positive),
        min_noise_multiplier=draw(st.floats(0, 1e6)),
        max_clip_norm=draw(positive),
        max_rounds_per_day=draw(st.integers(1, 10**6)),
        min_cohort=draw(st.integers(1, 1000)),
        size_class=draw(st.integers(1, 10**9)),
        evaluation=draw(st.sampled_from(["never", "histogram", *["exact"] * unprotected])),
        statistics=draw(st.booleans()),
        unprotected=unprotected,
        aggregation=tuple(draw(st.sets(levels, min_size=1))),
        coalition=draw(st.integers(0, 1000)),
        holders=draw(st.sampled_from([(), (NEIGHBOUR,), (NEIGHBOUR, AUTHORITY)])),
        coordinators=draw(st.sampled_from([(), (AUTHORITY,)])),
        tasks=draw(st.none() | st.lists(texts, max_size=3).map(tuple)),
        dry_run=draw(st.booleans()),
    )


@given(policies())
def test_every_policy_reads_back_as_it_was_written(policy: Policy) -> None:
    with TemporaryDirectory() as folder:
        path = policy_path(Path(folder))
        add_policy(path, policy)
        assert PolicyFile.load(path).policy(policy.data_set, size_class=1) == policy


def test_a_written_file_explains_every_key(tmp_path: Path) -> None:
    path = policy_path(tmp_path)
    add_policy(path, Policy(data_set="default", budget=Budget(8.0, 1e-5)))
    text = " ".join(path.read_text().replace("\n#", "").split())
    for key, meaning in MEANINGS.items():
        assert f"{key} = " in text, "a key that is not set stands there as a comment"
        assert meaning[1:] in text
    assert "# size_class = 160" in path.read_text()


def test_a_second_data_set_is_added_and_the_rest_is_left_alone(tmp_path: Path) -> None:
    path = policy_path(tmp_path)
    add_policy(path, Policy(data_set="a", budget=Budget(8.0, 1e-5), coordinators=(AUTHORITY,)))
    noted = path.read_text().replace("[data_sets.a]", "[data_sets.a]  # signed off, M. Curie")
    path.write_text(noted)
    add_policy(path, Policy(data_set="b", budget=Budget(1.0, 1e-6)))
    assert path.read_text().startswith(noted)
    found = PolicyFile.load(path)
    assert found.budgets() == {"a": Budget(8.0, 1e-5), "b": Budget(1.0, 1e-6)}
    assert found.policies["b"].coordinators == (AUTHORITY,)


def test_rules_that_are_there_are_not_written_over(tmp_path: Path) -> None:
    path = policy_path(tmp_path)
    add_policy(path, Policy(data_set="a"))
    before = path.read_text()
    with pytest.raises(ConfigurationError, match="has rules for data set 'a'"):
        add_policy(path, Policy(data_set="a", budget=Budget(100.0, 1e-5)))
    assert path.read_text() == before


def test_no_limit_cannot_be_written_by_mistake(tmp_path: Path) -> None:
    """It would read back as the default."""
    with pytest.raises(ConfigurationError, match="max_clip_norm"):
        add_policy(policy_path(tmp_path), Policy.of_experiment("a", None, 40))


def test_a_node_of_flowers_own_keeps_to_the_file_in_its_folder(tmp_path: Path) -> None:
    budget = Budget(3.0, 1e-4)
    default = policy_of_node(tmp_path, "clinic-1", budget, 160)
    assert default == Policy(data_set="clinic-1", budget=budget, size_class=160)

    add_policy(policy_path(tmp_path), Policy(data_set="clinic-1", budget=budget, min_cohort=7))
    assert policy_of_node(tmp_path, "clinic-1", budget, 160).min_cohort == 7
    assert policy_of_node(tmp_path, "clinic-1", None, 160).budget == budget
    with pytest.raises(ConfigurationError, match="node config has a budget"):
        policy_of_node(tmp_path, "clinic-1", Budget(math.pi, 1e-4), 160)
