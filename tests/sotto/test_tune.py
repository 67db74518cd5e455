"""`sotto tune`: the ledger pays before anything is tried, and only the winner is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from client.policy import Policy
from client.policy_file import add_policy, policy_path
from common.privacy.ledger import Budget, Ledger
from common.tasks import load
from tests.commands import Said, sotto

TASK = "credit-risk"
GRID = ("--learning-rate", "0.1,0.5", "--rounds", 4, "--expected-runs", 3, "--quiet")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bank's rows, as its own file."""
    path = tmp_path_factory.mktemp("bank") / "rows.csv"
    load(TASK).source.tables()["bank-1"].to_csv(path, index=False)
    return path


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A holder that allows ε=4 in all."""
    add_policy(
        policy_path(tmp_path / "holder"), Policy(data_set="default", budget=Budget(4.0, 1e-5))
    )
    return tmp_path / "holder"


def tune(*words: object) -> Said:
    return sotto("tune", TASK, *GRID, *words)


def test_a_choice_on_own_data_is_one_entry_of_the_ledger(
    file: Path, state: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said = tune("--data", file, "--state", state, "--epsilon", 3, "--out", out, "--json", "-")
    assert said.code == 0, said.err
    written = json.loads(said.out)
    assert written["privacy"]["charged"] is True
    assert set(written["settings"]) == {"learning_rate"}
    with Ledger.open(state / "ledger.sqlite") as ledger:
        (reserved, committed) = ledger.entries("default")
        assert reserved.release is not None
        assert (reserved.release.kind, reserved.state) == ("selection", "reserved")
        assert committed.state == "committed"
        assert ledger.epsilon("default", 1e-5) == pytest.approx(written["privacy"]["epsilon"])
    # How many runs there were would tell something that nobody paid for.
    kept = (out / "tuning.json").read_text() + said.out + said.err
    assert "trials" not in kept
    assert written["privacy"]["expected_runs"] == 3.0
    assert (out / "model.safetensors").exists()

    again = tune("--data", file, "--state", state, "--epsilon", 3, "--out", tmp_path / "again")
    assert again.code == 2
    assert "budget" in again.err or "left" in again.err
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"budget": None}, "no budget is set"),
        ({"dry_run": True}, "dry run"),
        ({"budget": Budget(4.0, 0.02)}, "must be below 1/n"),
    ],
)
def test_a_holder_whose_rules_let_nothing_leave_lets_no_choice_leave(
    file: Path, tmp_path: Path, rules: dict[str, object], says: str
) -> None:
    state = tmp_path / "holder"
    values = {"data_set": "default", "budget": Budget(4.0, 1e-5), **rules}
    policy = Policy.model_validate(values)
    add_policy(policy_path(state), policy)
    said = tune("--data", file, "--state", state, "--epsilon", 3, "--out", tmp_path / "out")
    assert said.code == 2
    assert says in said.err
    assert not (tmp_path / "out").exists()
    assert not (state / "ledger.sqlite").exists()


def test_data_that_no_run_would_take_are_refused_before_they_are_charged(
    file: Path, state: Path, tmp_path: Path
) -> None:
    """Each run would refuse, when the whole search had been paid for."""
    words = ("--holder-size", 100, "--data", file, "--state", state, "--epsilon", 3)
    said = tune(*words, "--out", tmp_path / "out")
    assert said.code == 2
    assert "--holder-size a public number nearer" in said.err
    assert not (state / "ledger.sqlite").exists()


def test_a_public_source_costs_nothing(tmp_path: Path) -> None:
    said = tune("--part", "bank-1", "--epsilon", 3, "--out", tmp_path / "out")
    assert said.code == 0, said.err
    assert "nothing was charged" in said.out + said.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--data", "FILE"), "--state"),
        (("--part", "bank-1", "--state", "DIR"), "costs nothing"),
        ((), "--data FILE or --part"),
        (("--part", "bank-1", "--epsilon", "1,2"), "one value"),
        (("--part", "bank-1", "--seeds", 2), "--seeds"),
    ],
)
def test_wrong_words_are_refused(words: tuple[object, ...], says: str) -> None:
    said = tune(*words)
    assert said.code == 2
    assert says in said.err


def test_a_sweep_on_data_that_are_not_public_is_refused(file: Path) -> None:
    said = sotto("sweep", TASK, "--data", file, "--epsilon", "1,2")
    assert said.code == 2
    assert "sotto tune" in said.err
