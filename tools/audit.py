"""The vulnerability check: what is locked and what is installed, against the published advisories.

    python -m tools.audit --auditor build/tools/bin/pip-audit requirements.lock

pip-audit asks the package index's advisory service. Where that cannot be reached nothing is known,
and the check says so and is skipped; ``--require`` makes that a failure, for releases.

pip-audit's own exit status cannot be taken for the answer. It is 1 both for a vulnerability and for
a network that is down; and it is 0, with "No known vulnerabilities found", behind a mirror that
knows no advisories, because every package was left out. So its report is read, and a package
counts as checked only if it is in there and was not left out.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from tools.lock import installed, pins

__all__ = ["ACCEPTED", "Answer", "Verdict", "ask", "judge"]

ACCEPTED: Mapping[str, str] = MappingProxyType({})
"""Id of an advisory → why it cannot reach us. Everything else that is found fails the check."""

PASSED, FAILED, BROKEN, REQUIRED = 0, 1, 2, 3
PATIENCE: Final = 600  # seconds for all packages together

_UNREACHABLE = re.compile(
    r"requests\.exceptions\.\w+"  # no name, no route, refused, time-out, a page that is no JSON
    r"|\b(?:ServiceError|ConnectionError)\b"
    r"|Could not connect to|not redirecting properly"
)


@dataclass(frozen=True)
class Answer:
    """What an auditor said.

    Args:
        status: its exit status; None if it took longer than :data:`PATIENCE`.
        report: its standard output.
        errors: its standard error.
    """

    status: int | None
    report: str = ""
    errors: str = ""


@dataclass(frozen=True)
class Verdict:
    """What came of a check.

    Args:
        status: exit status: 0 passed or skipped, 1 a vulnerability or a package that nobody could
            check, 2 the auditor itself failed, 3 skipped where it was required.
        text: says so.
    """

    status: int
    text: str


def judge(
    answer: Answer,
    packages: Mapping[str, str],
    *,
    accepted: Mapping[str, str] = ACCEPTED,
    require: bool = False,
) -> Verdict:
    """Tell what was found from what could not be looked up.

    Args:
        answer: of the auditor.
        packages: name → version of all that it was asked about.
        accepted: ids of advisories that are no failure.
        require: whether a database that cannot be reached is one.
    """
    skipped = REQUIRED if require else PASSED
    entries = _entries(answer.report)
    if entries is None:
        if answer.status is None or _UNREACHABLE.search(_last_line(answer.errors)):
            return Verdict(skipped, "skipped: the vulnerability database cannot be reached.")
        return Verdict(BROKEN, f"the auditor failed, and says: {answer.errors[-2000:].strip()}")
    if found := [line for entry in entries for line in _found(entry, accepted)]:
        return Verdict(FAILED, "\n".join(("known vulnerabilities:", *found)))
    checked = {(entry["name"], entry["version"]) for entry in entries if "vulns" in entry}
    unchecked = [package for package in packages.items() if package not in checked]
    if len(unchecked) == len(packages):
        sentence = "skipped: the vulnerability database that answers here knows no package at all."
        return Verdict(skipped, sentence)
    if unchecked:
        names = ", ".join(f"{name} {version}" for name, version in unchecked)
        return Verdict(FAILED, f"not in the vulnerability database, so not checked: {names}")
    return Verdict(PASSED, f"{len(packages)} packages, no known vulnerability.")


def _entries(report: str) -> list[dict[str, Any]] | None:
    """The report's packages, or None where there is no report."""
    try:
        entries: list[dict[str, Any]] = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return None
    return entries


def _found(entry: Mapping[str, Any], accepted: Mapping[str, str]) -> Iterator[str]:
    for advisory in entry.get("vulns", ()):
        ids = (advisory["id"], *advisory.get("aliases", ()))
        if not accepted.keys() & set(ids):
            fixed = ", ".join(advisory.get("fix_versions", ())) or "no version yet"
            yield f"  {entry['name']} {entry['version']}: {' '.join(ids)}; fixed in {fixed}"


def _last_line(errors: str) -> str:
    """Where Python and pip-audit say why they ended; lines above it may quote anything."""
    lines = [line for line in errors.splitlines() if line.strip()]
    return "\n".join(lines[-2:])  # pip-audit adds a tip to its reason


def ask(auditor: Sequence[str], packages: Mapping[str, str]) -> Answer:
    """Have an auditor look packages up.

    Args:
        auditor: command that takes pip-audit's arguments.
        packages: name → version.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "packages.txt")
        file.write_text("".join(f"{name}=={version}\n" for name, version in packages.items()))
        command = [
            *auditor, "--requirement", str(file), "--no-deps", "--disable-pip",
            "--format", "json", "--progress-spinner", "off",
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=PATIENCE, check=False
            )
        except subprocess.TimeoutExpired:
            return Answer(None)
        return Answer(done.returncode, done.stdout, done.stderr)


def main() -> int:
    """Check a lock file and the environment of this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("lock", type=Path, help="the lock file")
    parser.add_argument("--auditor", required=True, help="where pip-audit is")
    parser.add_argument(
        "--require", action="store_true", help="fail if the database cannot be reached"
    )
    flags = parser.parse_args()
    locked = pins(flags.lock.read_text())
    beside = dict(installed().items() - locked.items())
    status = PASSED
    for what, packages in {flags.lock.name: locked, "installed beside it": beside}.items():
        if packages:
            verdict = judge(ask([flags.auditor], packages), packages, require=flags.require)
            print(f"Vulnerability check, {what}: {verdict.text}")
            status = max(status, verdict.status)
    return status


if __name__ == "__main__":
    sys.exit(main())
