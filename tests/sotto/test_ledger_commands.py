"""``sotto ledger``: what people read, what machines read, and what takes an explicit word."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from client.policy_file import PolicyFile
from common.link import certificates as certs
from common.link.keys import CoordinatorKeys, HolderKeys
from common.link.signing import Identity, signing_fingerprint
from common.privacy.accounting import epsilon
from common.privacy.events import Composition, DiscreteGaussian, SubsampledGaussian, Unprotected
from common.privacy.ledger import Budget, Kind, Ledger, Release
from common.settings import plan_for
from sotto.keys_report import keys_sentence
from tests.commands import Said, sotto
from tests.linking import enrol
from tests.tiny import TinyTask

DELTA = 1e-5
BUDGET = Budget(3.0, DELTA)
STEP = SubsampledGaussian(1.0, 10.0, 1)
SCORES = DiscreteGaussian(20.0, 1)
FINGERPRINT = ":".join(["ab"] * 32)
POLICY = """\
# The ethics board agreed to this on a Tuesday.
tasks = ["tiny"]

[data_sets.clinic]
budget = { epsilon = 3.0, delta = 1e-5 }  # per patient, for good
size_class = 40
"""


def release(run: str, number: int, kind: Kind = "update", data_set: str = "clinic") -> Release:
    event = STEP if kind == "update" else SCORES
    name = f"{run}/{kind}/{number}"
    return Release(name, data_set, "tiny", FINGERPRINT, run, "p" * 64, number, event, kind)


def spend(ledger: Ledger, item: Release, *, commit: bool = True) -> None:
    ledger.reserve(item, BUDGET, Composition.of(item.event))
    if commit:
        ledger.commit(item.request_id, "d" * 64)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Two runs, one of which died before its last answer, and a policy."""
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "policy.toml").write_text(POLICY)
    with Ledger.open(folder / "ledger.sqlite") as ledger:
        for number in (1, 2, 3, 5):
            spend(ledger, release("spring", number))
        spend(ledger, release("spring", 5, "evaluation"))
        spend(ledger, release("autumn", 1), commit=False)
    return folder


def ledger(*words: object, code: int = 0) -> Said:
    said = sotto("ledger", *words)
    assert said.code == code, said
    return said


def document(*words: object) -> dict[str, Any]:
    (found,) = json.loads(ledger("show", *words, "--json", "-").out)["data_sets"]
    assert isinstance(found, dict)
    return found


# -- show --------------------------------------------------------------------------------------


def test_show_tells_what_went_to_whom_and_what_is_left(state: Path) -> None:
    out = ledger("show", "--state", state).out
    spent = epsilon(Composition.of(STEP, SCORES) + Composition.of(STEP) * 4, DELTA)
    assert f"clinic: ε {spent:.3f} of 3 spent, {3 - spent:.3f} left (δ=1e-05)" in out
    lines = [tuple(line.split()[:5]) for line in out.splitlines()]
    run = lines.index(("spring", "update", "1–3,", "5", "4"))
    assert lines[run + 1 : run + 3] == [("tiny",), ("to", "ab:ab:ab:ab…")]
    assert any(line[:3] == ("evaluation", "5", "1") for line in lines)
    assert max(map(len, out.splitlines())) <= 80
    assert "Reserved and not resolved, counted as spent: autumn/update/1." in out


def test_show_for_machines_has_the_documented_fields(state: Path) -> None:
    found = document("--state", state)
    spent = epsilon(Composition.of(STEP, SCORES) + Composition.of(STEP) * 4, DELTA)
    assert found["epsilon_spent"] == spent
    assert found["epsilon_left"] == 3.0 - spent
    assert (found["epsilon_budget"], found["delta"]) == (3.0, DELTA)
    assert (found["unprotected"], found["restored"]) == (False, False)
    assert found["unresolved"] == ["autumn/update/1"]
    first, second, third = found["releases"]
    assert first["rounds"] == [1, 2, 3, 5]
    assert first["coordinator"] == FINGERPRINT
    assert (first["releases"], first["reserved"], third["reserved"]) == (4, 0, 1)
    assert second["kind"] == "evaluation"
    assert first["epsilon"] == epsilon(Composition.of(STEP) * 4, DELTA)
    documented = (Path(__file__).parents[2] / "docs" / "ledger.md").read_text()
    for name in [*found, *first]:
        assert f"`{name}`" in documented, name


def test_show_tells_what_a_plan_would_cost_and_whether_it_fits(state: Path) -> None:
    before = document("--state", state)["epsilon_spent"]
    plans = []
    for name, target in [("small", 0.5), ("large", 9.0)]:
        plan = plan_for(TinyTask(), {"epsilon": target, "delta": DELTA, "rounds": 2})
        path = state / f"{name}.toml"
        path.write_text(plan.to_toml())
        plans += ["--plan", path]
    small, large = document("--state", state, *plans)["plans"]
    assert (small["fits"], large["fits"]) == (True, False)
    plan = plan_for(TinyTask(), {"epsilon": 0.5, "delta": DELTA, "rounds": 2})
    with Ledger.open(state / "ledger.sqlite") as opened:
        after = epsilon(opened.composition("clinic") + plan.composition(), DELTA)
    assert small["epsilon"] == after - before
    # What a run costs beside others is less than what it costs alone.
    assert 0 < small["epsilon"] < 0.5
    out = ledger("show", "--state", state, *plans).out
    assert re.search(r"large\.toml would cost ε=\d\.\d+ more, which does not fit", out)


def test_show_takes_a_budget_from_flags_policy_and_chain_in_this_order(state: Path) -> None:
    assert document("--state", state, "--budget", 5)["epsilon_budget"] == 5.0
    assert document("--state", state)["epsilon_budget"] == 3.0
    (state / "policy.toml").unlink()
    assert document("--state", state)["epsilon_budget"] == 3.0


def test_show_without_any_delta_says_so(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "ledger.sqlite") as opened:
        opened.reserve(release("spring", 1), None, Composition.of(STEP))
    assert document("--state", tmp_path)["epsilon_spent"] is None
    assert "give --delta" in ledger("show", "--state", tmp_path).out
    assert document("--state", tmp_path, "--delta", DELTA)["epsilon_spent"] > 0


def test_show_has_no_number_for_infinite(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "ledger.sqlite") as opened:
        item = Release("r/1", "open", "tiny", "hub", "r", "p", 1, Unprotected())
        opened.reserve(item, None, Composition.of(Unprotected()))
    found = document("--state", tmp_path, "--delta", DELTA)
    assert (found["epsilon_spent"], found["unprotected"]) == (None, True)
    assert "ε ∞ spent" in ledger("show", "--state", tmp_path, "--delta", DELTA).out


def test_show_names_a_data_set_that_nothing_was_released_from(state: Path) -> None:
    (state / "policy.toml").write_text(POLICY.replace("data_sets.clinic", "data_sets.ward"))
    assert "ward: " in ledger("show", "--state", state).out
    assert document("--state", state, "--data-set", "clinic")["data_set"] == "clinic"


def test_a_folder_without_a_ledger_gets_none_from_being_looked_at(tmp_path: Path) -> None:
    for command in (["show"], ["verify"], ["export"], ["accept", "--yes"]):
        said = ledger(*command, "--state", tmp_path, code=2)
        assert "there is no ledger in" in said.err
    assert list(tmp_path.iterdir()) == []


# -- verify ------------------------------------------------------------------------------------


def test_verify_says_a_line_for_chain_head_and_data_set(state: Path) -> None:
    chain, head, account = ledger("verify", "--state", state).out.splitlines()
    assert chain.endswith("ledger.sqlite: 11 entries, each digest follows from the one before")
    assert head.endswith("ledger.head: knows of entry 11, as the ledger does")
    assert re.fullmatch(
        r"data set 'clinic': ε=0\.\d+ of 3 at δ=1e-05 from 6 releases, 1 of them not resolved",
        account,
    )


def test_verify_ends_with_2_and_the_reason_when_the_ledger_was_rolled_back(state: Path) -> None:
    shutil.copy(state / "ledger.sqlite", state / "backup")
    with Ledger.open(state / "ledger.sqlite") as opened:
        spend(opened, release("winter", 1))
    (state / "backup").rename(state / "ledger.sqlite")
    said = ledger("verify", "--state", state, code=2)
    assert "knows of entry 13 and the ledger ends at entry 11" in said.err


def test_verify_finds_a_release_that_its_budget_did_not_allow(state: Path) -> None:
    """As a holder with a broken accountant would have granted it."""
    loud = SubsampledGaussian(1.0, 0.5, 1)
    with Ledger.open(state / "ledger.sqlite") as opened:
        item = Release("loud/1", "clinic", "tiny", "hub", "loud", "p", 1, loud)
        with opened._writing():
            opened._append("reserved", "loud/1", release=item, budget=BUDGET)
    said = ledger("verify", "--state", state, code=2)
    assert re.search(r"'clinic': by entry 12 its ε was \d+\.\d+, and the budget .* 3 ", said.err)


# -- whose it is -------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> HolderKeys:
    coordinator = CoordinatorKeys.create_or_load(tmp_path / "coordinator")
    return enrol(tmp_path / "north", coordinator, "north")


def test_the_ledger_names_the_holder_and_the_keys_that_it_shows(
    state: Path, keys: HolderKeys
) -> None:
    assert json.loads(ledger("show", "--state", state, "--json", "-").out)["holder"] == []
    assert "holder" not in ledger("show", "--state", state).out
    with Ledger.open(state / "ledger.sqlite") as opened:
        opened.note_holder("north", keys_sentence(None))
        opened.note_holder("north", keys_sentence(keys))

    certificate = f"sha256:{certs.fingerprint(keys.certificate)}"
    signing_key = signing_fingerprint(Identity.of(keys).credential)
    shown = ledger("show", "--state", state).out.replace("\n", " ")
    assert f"holder 'north': certificate {certificate}, signing key {signing_key}; " in shown
    assert "since entry 13, 20" in shown
    assert "plain text" not in shown, "only what holds now"

    first, second = json.loads(ledger("show", "--state", state, "--json", "-").out)["holder"]
    assert (first["number"], first["name"]) == (12, "north")
    assert first["sentence"] == "no certificate, plain text"
    assert second["sentence"] == f"certificate {certificate}, signing key {signing_key}"
    documented = (Path(__file__).parents[2] / "docs" / "ledger.md").read_text()
    for name in ["holder", *second]:
        assert f"`{name}`" in documented, name

    verified = ledger("verify", "--state", state).out
    assert verified.count("holder 'north': ") == 2, "who it was before, too"
    row = list(csv.DictReader(io.StringIO(ledger("export", "--state", state).out)))[-1]
    assert (row["state"], row["by"], row["data_set"]) == ("holder", "north", "")
    assert row["sentence"] == second["sentence"]


# -- export ------------------------------------------------------------------------------------


def recipe() -> str:
    """The auditor's program, as the documentation has it."""
    documented = (Path(__file__).parents[2] / "docs" / "ledger.md").read_text()
    (found,) = re.findall(r"```python\n(.*?)```", documented, flags=re.DOTALL)
    assert isinstance(found, str)
    assert len(found.splitlines()) <= 12
    return found


def recompute(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(path.read_text()))
    names: dict[str, Any] = {}
    exec(recipe(), names)
    return str(names["digest"])


def test_somebody_else_can_recompute_the_chain_with_the_documented_recipe(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger("export", "--state", state, "--format", "jsonl", "--out", state / "out.jsonl")
    head = (state / "ledger.head").read_text().splitlines()[-1].split()[1]
    assert recompute(state / "out.jsonl", monkeypatch) == head

    text = (state / "out.jsonl").read_text()
    (state / "out.jsonl").write_text(text.replace("spring", "sprung", 1))
    with pytest.raises(SystemExit, match="entry 1 "):
        recompute(state / "out.jsonl", monkeypatch)


def test_the_table_has_the_same_chain_and_readable_cells(state: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(ledger("export", "--state", state).out)))
    digest = hashlib.sha256(b"sotto ledger 2").hexdigest()
    for row in rows:
        digest = hashlib.sha256(f"{digest}\n{row['body']}".encode()).hexdigest()
        assert row["digest"] == digest
    assert [row["state"] for row in rows[:3]] == ["reserved", "committed", "reserved"]
    assert (rows[0]["data_set"], rows[0]["kind"], rows[0]["round"]) == ("clinic", "update", "1")
    assert json.loads(rows[0]["event"]) == STEP.to_dict()
    assert json.loads(rows[0]["budget"]) == {"epsilon": 3.0, "delta": DELTA}


def test_no_cell_of_the_table_begins_as_a_formula_does(state: Path) -> None:
    with Ledger.open(state / "ledger.sqlite") as opened:
        spend(opened, release("=cmd|' /C calc'!A0", 1))
    rows = list(csv.DictReader(io.StringIO(ledger("export", "--state", state).out)))
    assert rows[-2]["run_id"].startswith("'=cmd")
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row.values())


# -- budget set --------------------------------------------------------------------------------


def test_raising_a_budget_takes_a_word_and_is_in_the_chain(state: Path) -> None:
    refused = ledger("budget", "set", "clinic", 8, "--state", state, code=2)
    assert "cannot be called back" in refused.err
    assert "add --yes" in refused.err
    assert (state / "policy.toml").read_text() == POLICY

    out = ledger("budget", "set", "clinic", 8, "--state", state, "--yes").out
    assert "budget from ε=3 (δ=1e-05) to ε=8 (δ=1e-05)" in out
    text = (state / "policy.toml").read_text()
    changed = "budget = {epsilon = 8.0, delta = 1e-05}"
    assert text == POLICY.replace("budget = { epsilon = 3.0, delta = 1e-5 }", changed)
    assert PolicyFile.load(state / "policy.toml").budgets() == {"clinic": Budget(8.0, DELTA)}
    (remark,) = document("--state", state)["remarks"]
    assert (remark["what"], remark["number"]) == ("budget", 12)
    assert remark["sentence"] == "budget set from ε=3 (δ=1e-05) to ε=8 (δ=1e-05)"
    assert remark["budget"] == {"epsilon": 8.0, "delta": DELTA}
    assert remark["by"]


def test_a_larger_delta_is_a_raise_too(state: Path) -> None:
    said = ledger("budget", "set", "clinic", 3, "--delta", 1e-3, "--state", state, code=2)
    assert "This raises the budget" in said.err


def test_lowering_below_what_is_spent_is_allowed_and_says_what_that_means(state: Path) -> None:
    out = ledger("budget", "set", "clinic", 0.1, "--state", state).out
    assert "Nothing more will be released about it." in out
    assert document("--state", state)["epsilon_left"] == 0.0
    ledger("verify", "--state", state)  # what was granted before was granted under more


def test_a_budget_of_a_data_set_without_rules_is_not_made_up(state: Path) -> None:
    said = ledger("budget", "set", "clinnic", 1, "--state", state, code=2)
    assert "has no rules for data set 'clinnic', only for 'clinic'" in said.err
    (state / "policy.toml").unlink()
    assert "sotto policy init" in ledger("budget", "set", "clinic", 1, "--state", state, code=2).err


def test_a_first_budget_needs_a_delta(state: Path) -> None:
    (state / "policy.toml").write_text("[data_sets.clinic]\n# not yet\n")
    assert "give --delta" in ledger("budget", "set", "clinic", 1, "--state", state, code=2).err
    ledger("budget", "set", "clinic", 1, "--delta", 1e-6, "--state", state, "--yes")
    assert PolicyFile.load(state / "policy.toml").budgets() == {"clinic": Budget(1.0, 1e-6)}
    assert "# not yet" in (state / "policy.toml").read_text()


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_budget_out_of_range_changes_nothing(state: Path, value: str) -> None:
    ledger("budget", "set", "--state", state, "--yes", "--", "clinic", value, code=2)
    assert (state / "policy.toml").read_text() == POLICY
    assert len(Ledger.open(state / "ledger.sqlite").entries()) == 11


# -- accept, anchor ----------------------------------------------------------------------------


def test_accepting_a_loss_takes_a_word_and_spends_every_budget(state: Path) -> None:
    (state / "ledger.head").unlink()
    assert "add --yes" in ledger("accept", "--state", state, code=2).err
    assert "is missing or damaged" in ledger("show", "--state", state, code=2).err
    out = ledger("accept", "--state", state, "--yes").out
    assert out == "Entry 12 says so. No budget holds any more for: clinic.\n"
    found = document("--state", state)
    assert (found["unprotected"], found["restored"], found["epsilon_left"]) == (True, True, 0.0)
    assert "counted as spent for ever" in ledger("show", "--state", state).out
    assert "nothing is lost" in ledger("accept", "--state", state, "--yes", code=2).err


def test_an_anchor_elsewhere_sees_that_the_whole_folder_went_back(
    state: Path, tmp_path: Path
) -> None:
    usb = tmp_path / "usb.head"
    ledger("anchor", usb, "--state", state)
    shutil.copytree(state, tmp_path / "backup")
    with Ledger.open(state / "ledger.sqlite", anchors=[usb]) as opened:
        spend(opened, release("winter", 1))
    ledger("verify", "--state", tmp_path / "backup")
    said = ledger("verify", "--state", tmp_path / "backup", "--anchor", usb, code=2)
    assert "usb.head knows of entry 13" in said.err
