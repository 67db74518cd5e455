"""`sotto audit`: bounds beside the claim, a page, and an exit code to rely on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simulations import audit as audits
from simulations.canaries import MakeHolder
from sotto.audit_report import attack_rows, bound_rows, verdict
from tests.commands import sotto
from tests.simulations.test_audit import audit
from tests.simulations.test_canaries import holder_with
from tests.sotto.test_report import well_formed
from tests.tiny import TinyTask

TASK = "medical-diagnosis"


def with_holder(monkeypatch: pytest.MonkeyPatch, make: MakeHolder) -> None:
    """Audits of the command are of this holder: there is no flag for a broken one."""
    plain = audits.Audit

    def asked(*parts: object, **options: object) -> audits.Audit:
        return plain(*parts, **options, make_holder=make)  # type: ignore[arg-type]

    monkeypatch.setattr(audits, "Audit", asked)


def test_an_honest_run_passes_and_leaves_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_holder(monkeypatch, holder_with())
    out, file = tmp_path / "audit", tmp_path / "audit.json"
    said = sotto("audit", TASK, "--epsilon", 8, "--out", out, "--json", file)
    assert said.code == 0, said.err
    written = json.loads(file.read_text())
    assert written == json.loads((out / "audit.json").read_text())
    assert 1.5 < written["lower_bound"] < 8
    assert "Nothing contradicts the claim" in said.out
    assert "That does not prove the claim" in said.out
    page = (out / "report.html").read_text()
    well_formed(page)
    assert "<svg" in page
    for words in ("Lower bounds on ε", "Membership inference", "What is claimed", "clinic-1"):
        assert words in page


def test_a_lower_bound_above_the_claim_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_holder(monkeypatch, holder_with(noise=0.5))
    said = sotto("audit", TASK, "--epsilon", 8, "--no-membership", "--out", tmp_path)
    assert said.code == 3
    assert "the claim is contradicted: ε = 8 is claimed and the run gives away at least" in said.err
    assert "The claim is contradicted" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "audit.json").read_text())["contradicted"] is True


def test_json_has_standard_output_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_holder(monkeypatch, holder_with())
    words = ("--rounds", 2, "--canaries", 50, "--no-membership", "--out", tmp_path, "--json", "-")
    said = sotto("audit", TASK, "--epsilon", 2, "--holder", "clinic-2", *words)
    assert said.code == 0, said.err
    written = json.loads(said.out)
    assert written["holder"] == "clinic-2"
    assert written["membership"] == []
    assert "Membership" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--no-dp"], "units that an audit could contradict; give an epsilon"),
        (["--canaries", "1"], "canaries must be at least 2, got 1"),
        (["--canaries", "many"], "not a valid integer"),
        (["--confidence", "1.5"], "confidence must be at least 0.5 and below 1, got 1.5"),
        (["--holder", "nobody"], "there is no holder 'nobody'; there are clinic-1, "),
        (["--baselines"], "an audit compares with the claim; leave it out"),
        (["--seeds", "0"], "seeds must be at least 1"),
        (["--canaries", "20000"], "must be below 1/n"),
    ],
)
def test_a_mistake_is_a_sentence_and_leaves_nothing_behind(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = sotto("audit", TASK, *words)
    assert said.code == 2
    assert says in said.err
    assert not list(tmp_path.iterdir())


def test_tables_give_every_figure_beside_what_is_claimed() -> None:
    result = audit(TinyTask(), membership=True, canaries=200)
    written = audits.audit_document(result)
    columns, rows = bound_rows(written)
    assert [len(row) for row in rows] == [len(columns)] * 4
    assert rows[0][:2] == ["claimed", "8.00"]
    columns, rows = attack_rows(written)
    assert columns[1:] == ["AUC", "TPR at 0.01 FPR", "TPR at 0.001 FPR"]
    assert [len(row) for row in rows] == [len(columns)] * 4
    assert "at confidence 0.95 and δ = 0.0001" in verdict(written)
