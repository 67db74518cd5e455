"""Kill -9 anywhere, again and again: the run ends as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.kills import disturbed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RUNS = 30  # `make faults` makes 500


@pytest.mark.parametrize("number", range(RUNS))
def test_a_run_killed_anywhere_leaves_what_an_undisturbed_one_leaves(
    number: int, tmp_path: Path
) -> None:
    disturbed(number, tmp_path)
