"""The table of exit codes in docs/deploy.md is the code's own, and the units agree with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common import errors
from sotto import cli, keys_commands, policy_commands
from sotto.cli import EXIT_CODES, OWN_EXIT_CODES
from tests.commands import sotto

ROOT = Path(__file__).parents[2]
DEPLOY = (ROOT / "docs" / "deploy.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """Cells of the table below a heading."""
    part = DEPLOY.partition(f"\n{heading}\n")[2].partition("\n#")[0]
    found = re.findall(r"^\| (.*) \|$", part, re.MULTILINE)
    return [[cell.strip() for cell in row.split(" | ")] for row in found if "---" not in row][1:]


def test_the_table_is_the_codes_own() -> None:
    written = [("any", str(code), meaning) for code, meaning in EXIT_CODES.items()] + [
        (f"`sotto {command}`", str(code), meaning)
        for command, codes in OWN_EXIT_CODES.items()
        for code, meaning in codes.items()
    ]
    assert [tuple(row) for row in rows("## Exit codes")] == written


def test_the_code_uses_no_other_codes() -> None:
    used = {
        int(code)
        for path in (ROOT / "sotto").glob("*.py")
        for code in re.findall(r"(?:Exit|exit)\((\d+)\)", path.read_text())
    }
    constants = {
        value
        for module in (cli, keys_commands, policy_commands)
        for name, value in vars(module).items()
        if name.startswith("EXIT_") and isinstance(value, int)
    }
    documented = set(EXIT_CODES) | {code for own in OWN_EXIT_CODES.values() for code in own}
    assert used | constants | {0} == documented


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigurationError("…"), 2),
        (errors.DataError("…"), 2),
        (errors.LinkError("…"), 2),
        (errors.StateError("…"), 2),
        (errors.StorageError("…"), 3),
        (errors.RunError("…"), 3),
        (errors.BelowThreshold("here", have=1, need=2, of=3), 3),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_has_its_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(task: object) -> None:
        raise error

    monkeypatch.setattr("common.tasks.task_names", lambda: fail(None))
    assert sotto("tasks").code == code


def test_services_do_not_start_again_what_cannot_work() -> None:
    units = re.findall(r"```ini\n(.*?)```", DEPLOY, re.DOTALL)
    services = [unit for unit in units if "[Service]" in unit]
    assert len(services) == 2
    for unit in services:
        assert "Restart=on-failure\n" in unit
        assert "RestartPreventExitStatus=2\n" in unit
