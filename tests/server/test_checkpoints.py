"""Checkpoints hold exactly the state, atomically, and say when they cannot be trusted."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import StateError
from common.settings import plan_for
from server.checkpoints import Checkpoint, Checkpoints, RunState
from server.summaries import RoundSummary
from tests.tiny import TinyTask

PLAN = plan_for(TinyTask(), {"no_dp": True, "rounds": 3})


def state(number: int) -> RunState:
    return RunState(
        "run",
        number,
        np.arange(4, dtype=np.float32) + number,
        mean=np.ones(4) * np.pi,
        averaged=number,
        strategy={"momentum_vector/0": np.full(4, 0.1, np.float32)},
    )


def summary(number: int) -> RoundSummary:
    return RoundSummary(number, ("north", "south"), {"west": "no reply within 2 s"}, 0.5)


def saved(folder: Path, *numbers: int, kept: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, kept)
    for number in numbers:
        checkpoints.save(state(number), PLAN, summary(number))
    return checkpoints


def loaded(checkpoints: Checkpoints) -> Checkpoint:
    checkpoint, _ = checkpoints.load(PLAN)
    assert checkpoint is not None
    return checkpoint


def same(got: Checkpoint, number: int) -> bool:
    """Whether a checkpoint is that of a round, bit for bit."""
    wanted = state(number)
    assert wanted.mean is not None
    return (
        (got.state.run_id, got.state.round, got.state.averaged) == ("run", number, number)
        and np.array_equal(got.state.parameters, wanted.parameters)
        and got.state.mean is not None
        and np.array_equal(got.state.mean, wanted.mean)
        and list(got.state.strategy) == list(wanted.strategy)
        and all(np.array_equal(got.state.strategy[k], wanted.strategy[k]) for k in wanted.strategy)
        and got.summary == summary(number)
    )


def test_the_newest_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    assert same(loaded(saved(tmp_path, 1, 2, 3)), 3)
    assert not same(loaded(saved(tmp_path, 1, 2, 3)), 2), "the comparison can fail"


@pytest.mark.parametrize("kept", [1, 2, 5])
def test_as_many_checkpoints_are_kept_as_are_asked_for(tmp_path: Path, kept: int) -> None:
    checkpoints = saved(tmp_path, 1, 2, 3, kept=kept)
    assert len(list(tmp_path.iterdir())) == min(3, kept)
    oldest = checkpoints.save(state(4), PLAN, summary(4))
    assert oldest == max(0, 5 - kept), "0 while there is the run's beginning to go on from"
    assert checkpoints.newest == 4


def test_only_their_owner_may_read_them(tmp_path: Path) -> None:
    """Rows of the coordinator's noise are among the strategy's memory."""
    saved(tmp_path, 1, 2)
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o600] * 2


def test_nothing_saved_is_nothing_loaded(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path).load(PLAN) == (None, 0)
    assert Checkpoints(tmp_path).newest == 0


def test_a_half_written_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    (tmp_path / "checkpoint.part").write_bytes(b"half")
    assert same(loaded(checkpoints), 1)


def newest(folder: Path) -> Path:
    return max(folder.glob("checkpoint-*.safetensors"))


def test_a_damaged_checkpoint_is_put_aside_for_the_one_before_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = saved(tmp_path, 1, 2, 3)
    damaged = newest(tmp_path)
    damaged.write_bytes(damaged.read_bytes()[:-5])
    checkpoint, last = checkpoints.load(PLAN)
    assert checkpoint is not None
    assert same(checkpoint, 2)
    assert last == 3, "the model of round 3 may have left"
    assert "is not as it was written" in caplog.text
    assert "going on from round 2" in caplog.text
    assert damaged.with_suffix(".damaged").exists()
    again, last = checkpoints.load(PLAN)
    assert again is not None
    assert (again.state.round, last) == (2, 3), "also when it is out of the way"


EVERY = os.environ.get("SOTTO_CORRUPTION") == "all"


def test_a_flip_of_any_byte_is_found(tmp_path: Path) -> None:
    """Each byte in turn, by any of the 255 others; in the suite one byte in 7.

    ``make corruption`` takes every one. A flipped file is never used, and the one before it is.
    """
    checkpoints = saved(tmp_path, 1, 2)
    path = newest(tmp_path)
    honest = path.read_bytes()
    draws = random.Random(6)
    for place in range(0, len(honest), 1 if EVERY else 7):
        flipped = bytearray(honest)
        flipped[place] ^= draws.randrange(1, 256)
        path.write_bytes(flipped)
        assert same(loaded(checkpoints), 1), place
        path.with_suffix(".damaged").unlink()
    path.write_bytes(honest)
    assert same(loaded(checkpoints), 2), "and the whole one would have been used"


def test_of_all_that_are_cleared_the_newest_goes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process killed in the midst of it would otherwise ask for the last rounds again."""
    checkpoints = saved(tmp_path, 1, 2, 3, 4, kept=4)
    left = []
    unlink = Path.unlink

    def watched(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        left.append(checkpoints.newest)

    monkeypatch.setattr(Path, "unlink", watched)
    checkpoints.clear()
    assert left == [4, 4, 4, 0]


def test_before_the_first_checkpoint_there_is_the_beginning(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    newest(tmp_path).write_bytes(b"")
    assert checkpoints.load(PLAN) == (None, 1)


def test_where_no_checkpoint_is_whole_nothing_is_made_up(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2, 3)
    for path in tmp_path.glob("checkpoint-*"):
        path.write_bytes(b"")
    with pytest.raises(StateError, match=r"no checkpoint .* as it was written; restore the newest"):
        checkpoints.load(PLAN)


def test_another_plans_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    other = plan_for(TinyTask(), {"no_dp": True, "rounds": 9})
    with pytest.raises(StateError, match="another plan"):
        checkpoints.load(other)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20))
def test_the_running_mean_is_the_mean(values: list[float]) -> None:
    run = RunState("run", 0, np.zeros(1, np.float32))
    for value in values:
        run = run.advanced(np.array([value], np.float32), {}, average=True)
    assert np.isclose(run.released[0], np.mean(values), atol=1e-3, rtol=1e-5)
    assert run.round == len(values)
