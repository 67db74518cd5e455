"""Frozen processes and wrong clocks: neither moves a number."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.clocks import WrongClock
from tests.faults.holder import Joined, Signal, Trap
from tests.faults.kills import SETTINGS, Left, Schedule, play, reference, require_same
from tests.faults.world import COORDINATOR, World
from tests.integration.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

CLINICS = ("clinic-1", "clinic-2", "clinic-3")
LATE = CLINICS[-1]
DAY = 24 * 3600.0


@pytest.mark.parametrize("who", [COORDINATOR, "clinic-2"])
def test_a_process_frozen_for_less_than_the_deadline_loses_nothing(
    who: str, tmp_path: Path
) -> None:
    setting, alone = SETTINGS["fedavg"], reference("fedavg")
    with setting.world(tmp_path) as world:
        stop = Trap("train", 3, Signal(signal.SIGSTOP, to=world.pid_file(who)))
        world.serve(*setting.flags)
        for name in setting.names:
            world.join(name, taps=(stop,) if name == "clinic-2" else ())
        wait_until(lambda: world.is_frozen(who), f"{who} to be frozen")
        world.thaw(who)  # after a tenth of a second: wait_until looks no more often
        assert world.end_of(COORDINATOR) == 0
        world.leave()
        require_same(setting, alone.left, Left.by(world))


@pytest.mark.parametrize("answered", [False, True])
def test_a_late_reply_is_dropped_and_its_price_stays(answered: bool, tmp_path: Path) -> None:
    """A holder is frozen beyond the deadline, with a request or with the answer to it in hand."""
    policy = {"budget": {"epsilon": 3.0, "delta": 1e-4}}
    stop = Trap("train", 2, Signal(signal.SIGSTOP), answered=answered)
    with World(tmp_path, CLINICS, policy=policy) as world:
        world.serve(
            *("--rounds", 8, "--epsilon", 3, "--evaluate", "never", "--min-holders", 2),
            *("--round-deadline", 4, "--deadline-extensions", 0),
        )
        together = Trap("train", 1, Joined(tmp_path, len(CLINICS), 2.0))
        for name in CLINICS:
            world.join(name, taps=(together, stop) if name == LATE else (together,))
        world.wait_for_round(2)
        world.thaw(LATE)
        assert world.end_of(COORDINATOR) == 0
        world.leave()

        rounds = {line["round"]: line for line in world.rounds()}
        assert LATE not in rounds[2]["accepted"]
        assert "no reply within 4 s" in rounds[2]["missed"][LATE]
        others = set(CLINICS[:2])  # the first round began with two, whichever came first
        assert all(others <= set(line["accepted"]) for n, line in rounds.items() if n > 1)
        assert LATE in rounds[8]["accepted"], "it is back"
        account = world.federation.account(LATE)
        run_id = world.run.run_id
        assert set(account.releases.values()) == {1}
        paid = {name for name in account.releases if name != f"{run_id}/000001"}
        assert f"{run_id}/000002" in paid, "its price stays"
        counted = {f"{run_id}/{n:06d}" for n, line in rounds.items() if LATE in line["accepted"]}
        assert counted <= account.releases.keys(), "nothing counts that was not charged"
        assert account.epsilon <= 3.0


def test_wrong_clocks_change_nothing(tmp_path: Path) -> None:
    """Three days ahead, three days behind, and one that jumps back an hour in mid-run."""
    setting, alone = SETTINGS["fedavg"], reference("fedavg")
    clocks = {
        COORDINATOR: WrongClock(3 * DAY),
        "clinic-1": WrongClock(-3 * DAY),
        "clinic-2": WrongClock(0.0, jump=-3600.0, after=0.6),
    }
    with setting.world(tmp_path) as world:
        # Killed once, so that a start finds what another clock has written.
        play(world, setting, Schedule({COORDINATOR: [80], "clinic-2": [100]}), clocks)
        world.leave()
        require_same(setting, alone.left, Left.by(world))
