"""Every test of this folder, and how to play it again."""

from __future__ import annotations

import pytest

from tests.faults import forked
from tests.faults.seeds import VARIABLE, seed


@pytest.fixture(autouse=True)
def _mutated_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are broken on purpose where this one is."""
    monkeypatch.setattr(forked, "MUTANT", request.config.getoption("--mutant"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the seed, whatever came out."""
    terminalreporter.write_line(f"faults: {VARIABLE}={seed()} plays these again")
