"""Fixtures shared by every test folder."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# No test asserts on wall time: a busy machine must not fail a property.
settings.register_profile("sotto", deadline=None)
settings.load_profile("sotto")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--mutant NAME`` breaks the code on purpose: see tests/mutants.py."""
    parser.addoption("--mutant", help="break the code on purpose; see tests/mutants.py")


@pytest.fixture(autouse=True)
def _mutated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant that was asked for, if any."""
    name = request.config.getoption("--mutant")
    if name is not None:
        from tests.mutants import MUTANTS

        MUTANTS[name].apply(monkeypatch)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of upstream data files, or a skip that says how to supply it."""
    folder = os.environ.get("SOTTO_DATA")
    if not folder:
        pytest.skip("needs the upstream data files: set SOTTO_DATA to a folder that holds them")
    if not Path(folder).is_dir():
        pytest.fail(f"SOTTO_DATA is {folder!r}, which is not a folder")
    return Path(folder)
