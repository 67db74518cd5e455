"""Over-selected rounds, and updates as they come: who is frozen holds up nobody."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.world import COORDINATOR, World
from tests.integration.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NAMES = FIRST, SECOND, FROZEN = ("clinic-1", "clinic-2", "clinic-3")
POLICY = {"budget": {"epsilon": 3.1, "delta": 1e-4}}
ROUNDS, DEADLINE = 300, 4
PLAN = (
    *("--strategy", "fedbuff", "--buffer", 2, "--rounds", ROUNDS, "--epsilon", 3),
    *("--evaluate", "never", "--round-deadline", DEADLINE),
)


def test_a_run_goes_on_and_ends_without_a_holder_that_is_frozen(tmp_path: Path) -> None:
    with World(tmp_path, NAMES, policy=POLICY) as world:
        world.serve(*PLAN)
        for name in NAMES:
            world.join(name)
        world.wait_for_round(3)
        world.freeze(FROZEN)
        wait_until(
            lambda: any(FROZEN in each["missed"] for each in world.rounds()),
            f"{FROZEN} to be missing",
        )
        missing = len(world.rounds())
        world.kill(COORDINATOR)
        world.serve(*PLAN)
        assert world.end_of(COORDINATOR) == 0
        world.thaw(FROZEN)
        world.leave()
        rounds, run = world.rounds(), world.run
        accounts = {name: world.federation.account(name) for name in NAMES}

    assert [each["round"] for each in rounds] == list(range(1, ROUNDS + 1))
    assert all(len(each["accepted"]) == len(each["staleness"]) == 2 for each in rounds)
    # It held up nobody: no model took a deadline to make, and the last have no update of it.
    assert max(each["seconds"] for each in rounds) < DEADLINE
    assert all({*each["accepted"]} == {FIRST, SECOND} for each in rounds[missing + 5 :])
    # Who had answered before the coordinator was killed answered again, at no price.
    for name, account in accounts.items():
        assert max(account.releases.values()) == 1
        assert account.epsilon <= run.plan.privacy.epsilon
        counted = sum(name in each["accepted"] for each in rounds)
        assert counted <= account.releases.total() <= ROUNDS


def test_an_over_selected_round_does_not_wait_for_a_holder_that_is_frozen(tmp_path: Path) -> None:
    with World(tmp_path, NAMES, policy=POLICY) as world:
        world.serve(
            *("--cohort", 2, "--over-selection", 0.5, "--rounds", 40, "--epsilon", 3),
            *("--evaluate", "never", "--round-deadline", 300),
        )
        for name in NAMES:
            world.join(name)
        world.wait_for_round(2)
        world.freeze(FROZEN)
        assert world.end_of(COORDINATOR) == 0
        world.thaw(FROZEN)
        world.leave()
        rounds = world.rounds()
    assert all(len(each["accepted"]) == 2 for each in rounds)
    assert max(each["seconds"] for each in rounds) < 100
    # Three were asked from when they had all joined, and the one that is not counted is named.
    assert rounds[-1]["missed"] == {FROZEN: "not among the first 2"}
    assert rounds[-1]["missed_in_a_row"][FROZEN] > 20
