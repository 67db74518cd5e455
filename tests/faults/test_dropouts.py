"""Masked rounds that holders, or the coordinator, drop out of at each stage, as real processes.

What a sum must be is known from what the holders gave to it: they write it down here, unmasked.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from common.aggregation import Masked
from common.tasks import load
from common.tasks.parameters import initial_parameters
from server.secure import mean_update
from tests.faults.holder import Joined, Signal, Trap, part_path
from tests.faults.kills import (
    SETTINGS,
    Left,
    Schedule,
    Setting,
    play,
    reference,
    require_same,
)
from tests.faults.seeds import chance
from tests.faults.world import COORDINATOR, ENDED_BY_KILL, TASK, World
from tests.integration.federation import SOURCE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

CLINICS = ("clinic-1", "clinic-2", "clinic-3", "clinic-4")
ENOUGH, ROUNDS, STRUCK = 3, 3, 2  # holders of a sum; rounds; the round that is disturbed
STAGES = (
    "query.advertise_keys",
    "query.share_keys",
    "train",
    "query.consistency_check",
    "query.unmasking",
)
DEADLINE = 8  # seconds; an exchange may take a tenth, the one in which holders train eight tenths
PUBLIC: Mapping[str, Any] = {"unprotected": True, "aggregation": ("plain", "secure", "secure-sum")}
FLAGS = (
    *("--rounds", ROUNDS, "--strategy", "fedavg", "--average-from", 1, "--evaluate", "never"),
    *("--cohort", len(CLINICS), "--round-deadline", DEADLINE),
)
SECURE = ("--aggregation", "secure", "--no-dp")
SECURE_SUM = ("--aggregation", "secure-sum", "--epsilon", 3)


def begin(folder: Path, plan: Sequence[object], taps: Mapping[str, Trap]) -> World:
    """Four holders that keep what they give, some with a trap, and their coordinator."""
    policy = {**PUBLIC, "budget": {"epsilon": 10.0, "delta": 1e-4}}
    world = World(folder, CLINICS, policy=policy, parts=folder)
    world.serve(*FLAGS, *plan)
    # The first round begins with three; the second shall begin with all four.
    together = Trap("train", 1, Joined(folder, len(CLINICS), DEADLINE / 2))
    for name in CLINICS:
        own = [taps[name]] if name in taps else []
        world.join(name, taps=(together, *own))
    return world


def sums(world: World, accepted: Sequence[Sequence[str]]) -> npt.NDArray[np.float64]:
    """The model that follows from what the holders gave, by who counts in each round: [D]."""
    plan = world.run.plan
    assert isinstance(plan.aggregation, Masked)
    encoding = plan.aggregation.encoding(plan)
    model = initial_parameters(load(TASK, SOURCE), plan.seed).astype(np.float64)
    for number, names in enumerate(accepted, 1):
        if names:
            parts = [np.load(part_path(world.federation.folder, one, number)) for one in names]
            total = np.add.reduce(parts, dtype=encoding.dtype)  # wraps around, as the ring does
            weight = len(names) * plan.weight(load(TASK, SOURCE).source.nominal_size(None))
            model += mean_update(plan, encoding.decode_integers(total), weight)
    return model


def require_charged_once(world: World, name: str) -> None:
    assert set(world.federation.account(name).releases.values()) <= {1}


@pytest.mark.parametrize(
    ("plan", "stage"), [*((SECURE, stage) for stage in STAGES), (SECURE_SUM, "train")]
)
def test_the_sum_is_that_of_the_survivors_whenever_a_holder_dies(
    plan: Sequence[object], stage: str, tmp_path: Path
) -> None:
    last = CLINICS[-1]
    with begin(tmp_path, plan, {last: Trap(stage, STRUCK)}) as world:
        assert world.end_of(COORDINATOR) == 0
        assert world.end_of(last) == ENDED_BY_KILL
        del world.processes[last]
        world.leave()
        accepted = [set(line["accepted"]) for line in world.rounds()]
        # Before its part has arrived it is not in the sum; after that it is.
        inside = STAGES.index(stage) > STAGES.index("train")
        survivors = set(CLINICS[:-1])
        assert accepted[1:] == [set(CLINICS) if inside else survivors, survivors]
        assert not any(line["lost"] for line in world.rounds())
        expected = sums(world, [sorted(names) for names in accepted])
        assert np.abs(world.parameters() - expected).max() <= 1e-6  # float32 rounding only
        for name in CLINICS:
            require_charged_once(world, name)


@pytest.mark.parametrize("stage", ["query.share_keys", "train"])
def test_with_too_few_survivors_a_round_is_lost_and_the_model_stays(
    stage: str, tmp_path: Path
) -> None:
    """Frozen, and not dead: they are there for the next round."""
    frozen = CLINICS[2:]
    traps = {name: Trap(stage, STRUCK, Signal(signal.SIGSTOP)) for name in frozen}
    with begin(tmp_path, SECURE, traps) as world:
        world.wait_for_round(STRUCK)
        for name in frozen:
            world.thaw(name)
        assert world.end_of(COORDINATOR) == 0
        world.leave()
        lost = [line["lost"] for line in world.rounds()]
        assert [bool(why) for why in lost] == [False, True, False]
        assert f"fewer than {ENOUGH} holders remained" in lost[1]
        shown = {line["round"]: line["model"] for line in world.shown(CLINICS[0])}
        if stage == "train":
            assert shown[STRUCK] == shown[STRUCK + 1] != shown[STRUCK - 1]
        accepted = [line["accepted"] for line in world.rounds()]
        assert np.abs(world.parameters() - sums(world, accepted)).max() <= 1e-6
        for name in CLINICS:
            require_charged_once(world, name)


def test_three_lost_rounds_in_a_row_end_the_run_and_it_goes_on_when_started_again(
    tmp_path: Path,
) -> None:
    frozen = CLINICS[2:]
    stop = Signal(signal.SIGSTOP)
    traps = {name: Trap("query.share_keys", None, stop, again=True) for name in frozen}
    plan = (*SECURE, "--rounds", 5)
    with begin(tmp_path, plan, traps) as world:
        for lost in (1, 2, 3):
            world.wait_for_round(lost)
            assert all(line["lost"] for line in world.rounds())
            for name in frozen:
                world.thaw(name)
        assert world.end_of(COORDINATOR) == 3, "the exit code of a run that cannot go on"
        assert "start again with the same state folder to go on" in world.said(COORDINATOR)
        world.kill(*frozen)
        for name in frozen:
            world.join(name)
        world.serve(*FLAGS, *plan)
        assert world.end_of(COORDINATOR) == 0
        world.leave()
        accepted = [line["accepted"] for line in world.rounds()]
        assert [bool(names) for names in accepted] == [False] * 3 + [True] * 2
        assert np.abs(world.parameters() - sums(world, accepted)).max() <= 1e-6


def test_a_coordinator_killed_at_each_stage_goes_on_with_the_round_where_it_stopped(
    tmp_path: Path,
) -> None:
    """Once when a stage's request has arrived, and once when it is answered and not yet sent."""
    setting, alone = SETTINGS["secure"], reference("secure")
    with setting.world(tmp_path) as world:
        kill = Signal(to=world.pid_file(COORDINATOR))
        taps = [Trap(stage, 2, kill) for stage in STAGES]
        taps += [Trap(stage, 3, kill, answered=True) for stage in STAGES]
        world.serve(*setting.flags)
        first, *others = setting.names
        world.join(first, taps=tuple(taps))
        for name in others:
            world.join(name)
        for _ in taps:
            assert world.end_of(COORDINATOR) == ENDED_BY_KILL
            world.serve(*setting.flags)
        assert world.end_of(COORDINATOR) == 0
        world.leave()
        require_same(setting, alone.left, Left.by(world))


@pytest.mark.parametrize("number", range(3))
def test_whoever_is_killed_a_sum_is_right_or_its_round_is_lost(number: int, tmp_path: Path) -> None:
    """The coordinator and holders, at random; three lost rounds may end the run in between."""
    draws = chance("masked kills", number)
    plan = {"rounds": 5, "no_dp": True, "aggregation": "secure", "strategy": "fedavg"}
    setting = Setting(
        {**plan, "average_from": 1, "evaluate": "never", "round_deadline": 3},
        holders=len(CLINICS),
        gives_up=True,
    )
    moments = {COORDINATOR: [draws.randint(100, 500), draws.randint(1, 300)]}
    moments |= {name: [draws.randint(100, 400)] for name in CLINICS[2:]}
    with World(tmp_path, CLINICS, policy=dict(PUBLIC), parts=tmp_path) as world:
        play(world, setting, Schedule(moments))
        world.leave()
        accepted = [line["accepted"] for line in world.rounds()]
        assert all(bool(line["lost"]) != bool(line["accepted"]) for line in world.rounds())
        assert all(not names or len(names) >= ENOUGH for names in accepted)
        assert np.abs(world.parameters() - sums(world, accepted)).max() <= 1e-6
        for name in CLINICS:
            require_charged_once(world, name)
