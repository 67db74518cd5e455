"""The vulnerability check: found is a failure, unreachable is said, and silence is not safety."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.audit import Answer, ask, judge

PACKAGES = {"numpy": "2.4.6", "torch": "2.13.0"}
ADVISORY = {"id": "PYSEC-2026-1", "aliases": ["CVE-2026-2"], "fix_versions": ["2.13.1"]}
NO_NAME = """\
Traceback (most recent call last):
  File "adapters.py", line 729, in send
    raise ConnectionError(e, request=request)
requests.exceptions.ConnectionError: HTTPSConnectionPool(host='advisories.example', port=443): \
Max retries exceeded (Caused by NameResolutionError("Failed to resolve 'advisories.example'"))
"""
NO_ROUTE = """\
ERROR:pip_audit._cli:Could not connect to PyPI's vulnerability feed
ERROR:pip_audit._cli:Tip: your network may be blocking this service. Try another service
"""
OUT_OF_ORDER = "pip_audit._service.interface.ServiceError\n"


def checked(name: str, *advisories: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "version": PACKAGES[name], "vulns": list(advisories)}


def left_out(name: str) -> dict[str, Any]:
    return {"name": name, "skip_reason": f"Dependency not found on PyPI: {name}"}


def answer(*entries: dict[str, Any], status: int = 0) -> Answer:
    return Answer(status, json.dumps({"dependencies": entries, "fixes": []}))


def test_packages_without_advisories_pass() -> None:
    verdict = judge(answer(checked("numpy"), checked("torch")), PACKAGES, require=True)
    assert (verdict.status, verdict.text) == (0, "2 packages, no known vulnerability.")


@pytest.mark.parametrize("status", [0, 1])
def test_a_known_vulnerability_fails_and_is_named(status: int) -> None:
    verdict = judge(answer(checked("numpy"), checked("torch", ADVISORY), status=status), PACKAGES)
    assert verdict.status == 1
    assert "torch 2.13.0: PYSEC-2026-1 CVE-2026-2; fixed in 2.13.1" in verdict.text
    assert "numpy" not in verdict.text


def test_a_vulnerability_without_a_fix_fails_too() -> None:
    verdict = judge(answer(checked("numpy"), checked("torch", {"id": "X"})), PACKAGES)
    assert (verdict.status, verdict.text.endswith("X; fixed in no version yet")) == (1, True)


@pytest.mark.parametrize("name", ["PYSEC-2026-1", "CVE-2026-2"])
def test_only_the_advisory_that_was_accepted_passes(name: str) -> None:
    accepted = {name: "we never call it"}
    found = answer(checked("numpy"), checked("torch", ADVISORY), status=1)
    assert judge(found, PACKAGES, accepted=accepted).status == 0
    another = answer(checked("numpy", {"id": "GHSA-3"}), checked("torch", ADVISORY), status=1)
    verdict = judge(another, PACKAGES, accepted=accepted)
    assert (verdict.status, "GHSA-3" in verdict.text, name in verdict.text) == (1, True, False)


@pytest.mark.parametrize(
    "unreachable",
    [
        Answer(1, "", NO_NAME),
        Answer(1, "", NO_ROUTE),
        Answer(1, "", OUT_OF_ORDER),
        Answer(None),
        # A mirror without advisories: pip-audit says "No known vulnerabilities found", and exits 0.
        answer(left_out("numpy"), left_out("torch")),
        answer(),
    ],
    ids=["no name", "no route", "out of order", "too slow", "a mirror", "nothing"],
)
def test_a_database_that_is_not_there_is_said_and_fails_only_where_it_is_required(
    unreachable: Answer,
) -> None:
    verdict = judge(unreachable, PACKAGES)
    assert verdict.status == 0
    assert verdict.text.startswith("skipped: ")
    assert judge(unreachable, PACKAGES, require=True).status == 3


@pytest.mark.parametrize("missing", [left_out("torch"), {**checked("torch"), "version": "2.12.0"}])
def test_a_package_that_nobody_checked_does_not_pass_with_the_others(
    missing: dict[str, Any],
) -> None:
    verdict = judge(answer(checked("numpy"), missing), PACKAGES)
    assert verdict.status == 1
    assert verdict.text.endswith("not checked: torch 2.13.0")


@pytest.mark.parametrize(
    "broken",
    [
        Answer(2, "", "pip-audit: error: unrecognized arguments: --jsn"),
        Answer(1, "", f"{NO_NAME}\nDuring handling:\nKeyError: 'id'\nKeyError: 'name'\n"),
        Answer(0, "no JSON"),
        Answer(0, "[]"),
        Answer(-9),
    ],
)
def test_an_auditor_that_fails_is_no_database_that_is_away(broken: Answer) -> None:
    verdict = judge(broken, PACKAGES)
    assert verdict.status == 2
    assert verdict.text.startswith("the auditor failed")


# ------------------------------------------------------------------ with a program for pip-audit

AUDITOR = """\
import json, sys
words = sys.argv[1:]
lines = open(words[words.index("--requirement") + 1]).read().splitlines()
versions = dict(line.split("==") for line in lines)
assert {"--no-deps", "--disable-pip"} <= set(words), "it would ask an index and not the file"
vulns = {ADVISORIES!r}
print(json.dumps({"dependencies": [
    {"name": name, "version": version, "vulns": vulns.get(name, [])}
    for name, version in versions.items()
]}))
sys.exit(any(name in vulns for name in versions))
"""


def auditor(folder: Path, **advisories: list[dict[str, Any]]) -> Path:
    """A program in the place of pip-audit that knows these advisories."""
    program = folder / "auditor"
    text = AUDITOR.replace("{ADVISORIES!r}", repr(advisories))
    program.write_text(f"#!{sys.executable}\n{text}")
    program.chmod(0o755)
    return program


def test_an_auditor_is_asked_about_every_package(tmp_path: Path) -> None:
    program = auditor(tmp_path, torch=[ADVISORY])
    found = ask([str(program)], PACKAGES)
    assert [entry["name"] for entry in json.loads(found.report)["dependencies"]] == list(PACKAGES)
    assert judge(found, PACKAGES).status == 1


@pytest.mark.parametrize(
    ("advisories", "status", "words"),
    [
        ({}, 0, "1 packages, no known vulnerability"),
        ({"left": [ADVISORY]}, 1, "left 1.0: PYSEC-2026-1"),  # locked, and not installed here
        ({"pytest": [ADVISORY]}, 1, "installed beside it: known vulnerabilities"),
    ],
)
def test_what_is_locked_and_what_is_installed_is_checked(
    tmp_path: Path, advisories: dict[str, Any], status: int, words: str
) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("left==1.0\n")
    program = auditor(tmp_path, **advisories)
    done = subprocess.run(
        [sys.executable, "-m", "tools.audit", "--auditor", program, lock],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert words in done.stdout
    assert " sotto " not in done.stdout, "an index may have a package of that name"
