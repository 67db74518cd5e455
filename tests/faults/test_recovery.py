"""Kills at the instants that hurt most, each with a program error that it would bring to light.

:mod:`tests.mutants` has these errors; ``pytest --mutant no-journal`` breaks the processes, too.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.holder import Signal, Trap
from tests.faults.kills import SETTINGS, Left, Schedule, play, reference, require_same
from tests.faults.moments import KilledIn
from tests.faults.world import COORDINATOR, ENDED_BY_KILL, World
from tests.integration.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_coordinator_that_comes_back_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    """One of two replies has come when it dies."""
    setting, alone = SETTINGS["fedavgm, averaged"], reference("fedavgm, averaged")
    quick, slow = setting.names
    with setting.world(tmp_path) as world:
        world.serve(*setting.flags)
        world.join(quick)
        world.join(slow, taps=(Trap("train", 2, Signal(signal.SIGSTOP)),))
        wait_until(lambda: replies_of(world, 2) == 1, "the first reply of round 2")
        world.kill(COORDINATOR)
        world.serve(*setting.flags)
        world.thaw(slow)
        assert world.end_of(COORDINATOR) == 0
        world.leave()
        asked = [line["round"] for line in world.shown(quick)]
        assert asked.count(2) == 1, "it had answered"
        require_same(setting, alone.left, Left.by(world))


def replies_of(world: World, number: int) -> int:
    """Replies in a round's journal."""
    found = world.federation.coordinator.glob(f"runs/*/journal-{number:06d}.bin")
    return sum(path.read_bytes().count(b'"record": "reply"') for path in found)


def test_a_model_that_has_left_is_made_again_to_the_last_bit(tmp_path: Path) -> None:
    """The coordinator's own noise: fresh noise on the same updates would be a second release."""
    setting = SETTINGS["central"]
    with setting.world(tmp_path) as world:
        kill = Trap("train", 4, Signal(to=world.pid_file(COORDINATOR)))
        world.serve(*setting.flags)
        for name in setting.names:
            world.join(name, taps=(kill,) if name == setting.names[0] else ())
        assert world.end_of(COORDINATOR) == ENDED_BY_KILL
        damage(newest_checkpoint(world))
        world.serve(*setting.flags)
        assert world.end_of(COORDINATOR) == 0
        assert "is not as it was written" in world.said(COORDINATOR)
        world.leave()
        require_same(setting, reference("central").left, Left.by(world))


def newest_checkpoint(world: World) -> Path:
    return max(world.run.path.glob("checkpoint-*.safetensors"))


def damage(path: Path) -> None:
    """Turn one bit over."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_holder_killed_after_reserving_pays_once(tmp_path: Path) -> None:
    setting, alone = SETTINGS["fedavgm, averaged"], reference("fedavgm, averaged")
    in_training = KilledIn("client.trainer:Trainer", "train", 3)
    with setting.world(tmp_path) as world:
        victim = setting.names[0]
        tally = play(world, setting, Schedule(), {victim: in_training})
        assert tally.kills > 0
        world.leave()
        require_same(setting, alone.left, Left.by(world))
