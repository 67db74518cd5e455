"""Each way to get privacy wrong is noticed by the tests that are named for it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants import MUTANTS

ROOT = Path(__file__).parent.parent


class _Outcomes:
    """A pytest plugin that counts how tests, parametrised ones as one, came out."""

    def __init__(self) -> None:
        self.by_test: dict[str, Counter[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            name = report.nodeid.partition("[")[0]
            self.by_test.setdefault(name, Counter())[report.outcome] += 1


def outcomes(*arguments: str) -> dict[str, Counter[str]]:
    """Run tests in this process and tell how each came out."""
    seen = _Outcomes()
    pytest.main(["-q", "-p", "no:cacheprovider", "--no-summary", *arguments], plugins=[seen])
    return seen.by_test


@pytest.mark.parametrize("name", MUTANTS)
def test_each_mutant_fails_every_test_that_is_named_for_it(name: str) -> None:
    tests = MUTANTS[name].caught_by
    found = outcomes("--mutant", name, *(str(ROOT / test) for test in tests))
    assert {test for test, counted in found.items() if counted["failed"]} == set(tests)


def test_without_a_mutant_all_of_them_pass() -> None:
    tests = sorted({test for mutant in MUTANTS.values() for test in mutant.caught_by})
    found = outcomes(*(str(ROOT / test) for test in tests))
    assert set(found) == set(tests)
    assert not any(counted["failed"] for counted in found.values())


def test_the_documentation_names_every_mutant_and_who_catches_it() -> None:
    text = (ROOT / "docs" / "privacy.md").read_text()
    for name, mutant in MUTANTS.items():
        (row,) = re.findall(rf"^\| `{name}` .*$", text, re.MULTILINE) or [""]
        assert all(f"`{test}`" in row for test in mutant.caught_by), name
