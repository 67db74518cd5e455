"""Disks that fill up, or become read-only, in the midst of a run.

A holder misses rounds, and stays; a coordinator ends with a sentence, and goes on when it is
started again.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from client.answers import STORAGE
from tests.disks import filled, small_disk
from tests.faults.holder import Signal, Trap
from tests.faults.kills import SETTINGS, Left, reference, require_same
from tests.faults.world import COORDINATOR, World, sotto_main
from tests.integration.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

ROUNDS = 60


def test_a_holder_whose_disk_is_full_declines_rounds_stays_joined_and_comes_back(
    tmp_path: Path,
) -> None:
    """Real processes; the coordinator stands still while the disk is filled and emptied."""
    names = (north := "clinic-1", "clinic-2", "clinic-3")
    world = World(tmp_path / "world", names, policy={"budget": {"epsilon": 8.0, "delta": 1e-4}})
    state = world.federation.holder(north)
    keys = shutil.move(state, tmp_path / "keys")
    with small_disk(state, 8192) as disk, world:
        shutil.copytree(keys, disk, dirs_exist_ok=True)
        world.serve(
            *("--rounds", ROUNDS, "--epsilon", 3, "--min-holders", 2),
            *("--evaluate", "never", "--round-deadline", 60),
        )
        holders = [world.join(name) for name in names]
        world.wait_for_round(5)

        world.freeze(COORDINATOR)
        filler, before = filled(disk), len(world.rounds())
        world.thaw(COORDINATOR)
        world.wait_for_round(before + 10)
        world.freeze(COORDINATOR)
        filler.unlink()
        world.thaw(COORDINATOR)

        assert world.end_of(COORDINATOR) == 0
        for holder in holders:
            holder.require_alive()
        world.leave()
        rounds = world.rounds()
        missed = [line["round"] for line in rounds if north in line["missed"]]
        account = world.federation.account(north)
    why = Counter(line["missed"].get(north) for line in rounds)
    assert why[f"declined: storage: {STORAGE}"] >= 5, why
    assert north in rounds[-1]["accepted"], "and it took part again"
    run = world.run.run_id
    answered = {f"{run}/{line['round']:06d}" for line in rounds if north in line["accepted"]}
    assert account.releases == Counter(answered), "charged for what it answered, and once"
    assert len(answered) + len(missed) == ROUNDS


def test_a_coordinator_whose_disk_is_full_ends_with_a_sentence_and_goes_on_with_room(
    tmp_path: Path,
) -> None:
    setting, alone = SETTINGS["fedavg"], reference("fedavg")
    folder = tmp_path / "world"
    folder.mkdir()
    with small_disk(folder / COORDINATOR, 2048) as disk, setting.world(folder) as world:
        stop = Trap("train", 3, Signal(signal.SIGSTOP, to=world.pid_file(COORDINATOR)))
        world.serve(*setting.flags)
        first, *others = setting.names
        world.join(first, taps=(stop,))
        for name in others:
            world.join(name)
        wait_until(lambda: world.is_frozen(COORDINATOR), "the coordinator to be frozen")
        filler = filled(disk)
        world.thaw(COORDINATOR)
        assert world.end_of(COORDINATOR) == 3
        said = world.said(COORDINATOR)
        assert "No space left on device" in said
        assert "Traceback" not in said

        filler.unlink()
        world.serve(*setting.flags)
        assert world.end_of(COORDINATOR) == 0
        world.leave()
        require_same(setting, alone.left, Left.by(world))


def test_on_a_read_only_disk_neither_side_starts_and_both_go_on_when_it_is_mended(
    tmp_path: Path,
) -> None:
    setting, alone = SETTINGS["fedavg"], reference("fedavg")
    folder = tmp_path / "world"
    folder.mkdir()
    victims = (COORDINATOR, last := setting.names[-1])
    with (
        small_disk(folder / COORDINATOR, 4096) as one,
        small_disk(folder / last, 4096) as other,
        setting.world(folder) as world,
    ):
        stop = Trap("train", 3, Signal(signal.SIGSTOP, to=world.pid_file(COORDINATOR)))
        world.serve(*setting.flags)
        for name in setting.names:
            world.join(name, taps=(stop,) if name == last else ())
        wait_until(lambda: world.is_frozen(COORDINATOR), "the coordinator to be frozen")
        world.kill(*victims)

        for disk in (one, other):
            remount(disk, "ro")
        world.serve(*setting.flags)
        seat = world.seat(last)
        words = ("--server", seat.server, "--state", seat.state, "--budget", 3, "--part", last)
        task = ("--task", seat.task, "--source", seat.source)
        world.start(last, sotto_main, ["join", *map(str, (*words, *task))])
        for name in victims:
            assert world.end_of(name) == 3
            said = world.processes[name].output
            assert "Read-only file system" in said
            assert "Traceback" not in said

        for disk in (one, other):
            remount(disk, "rw")
        world.serve(*setting.flags)
        world.join(last)
        assert world.end_of(COORDINATOR) == 0
        world.leave()
        require_same(setting, alone.left, Left.by(world))


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)
