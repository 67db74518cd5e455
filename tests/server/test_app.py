"""A run on disk: whatever instant a crash comes at, the run goes on from the last whole round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.errors import StateError
from common.plan import TrainingPlan
from common.settings import plan_for
from server.app import federate
from server.checkpoints import Checkpoints
from server.runs import OnDisk, RunFolder, RunResult, resume_or_begin
from server.summaries import RoundSummary
from tests.fakes import FakeGrid, pulls_towards
from tests.tiny import TinyTask

TASK = TinyTask()


def plan(**settings: object) -> TrainingPlan:
    return plan_for(TASK, {"no_dp": True, "rounds": 5, "min_holders": 2, **settings})


def crowd() -> FakeGrid:
    return FakeGrid({f"h{i}": pulls_towards(float(i)) for i in range(3)})


class Crash(Exception):
    """Stands for a process that is gone."""


def run(folder: RunFolder, crash_in: int | None = None) -> RunResult:
    def on_round(summary: RoundSummary) -> None:
        if summary.round == crash_in:
            raise Crash

    return federate(crowd(), folder.plan, TASK, folder, on_round)


def test_a_run_that_was_cut_goes_on_to_the_same_model(tmp_path: Path) -> None:
    whole = run(RunFolder.begin(tmp_path / "whole", plan()))
    folder = RunFolder.begin(tmp_path / "cut", plan())
    with pytest.raises(Crash):
        run(folder, crash_in=3)
    result = run(folder)
    assert np.array_equal(result.parameters, whole.parameters)
    assert [summary.round for summary in result.history] == [1, 2, 3, 4, 5]
    assert (folder.path / "model.safetensors").exists()
    assert np.array_equal(folder.result(TASK).parameters, whole.parameters)


def test_a_crash_during_evaluation_loses_no_round(tmp_path: Path) -> None:
    """The updates of a round are paid for; they must be durable before anything else happens."""

    class Dying(FakeGrid):
        def send_and_receive(self, messages, *, timeout=None):  # type: ignore[no-untyped-def]
            asked = list(messages)
            if asked[0].metadata.message_type == "evaluate":
                raise Crash
            return super().send_and_receive(asked, timeout=timeout)

    folder = RunFolder.begin(tmp_path, plan())
    grid = Dying({f"h{i}": pulls_towards(float(i)) for i in range(3)})
    with pytest.raises(Crash):
        federate(grid, folder.plan, TASK, folder)
    assert Checkpoints(tmp_path).newest == 1

    again = crowd()
    result = federate(again, folder.plan, TASK, folder)
    trained = [number for _, kind, number in again.asked if kind == "train"]
    assert min(trained) == 2, "round 1 is not asked again"
    assert ("h0", "evaluate", 1) in again.asked, "its evaluation is made up for"
    assert result.final.round == 5


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path) -> None:
    folder = RunFolder.begin(tmp_path, plan())
    with pytest.raises(Crash):
        run(folder, crash_in=2)
    lines = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(lines + '{"round": 3, "acc')
    assert [summary.round for summary in run(folder).history] == [1, 2, 3, 4, 5]


def test_a_flip_of_any_byte_of_the_lines_leaves_the_run_to_go_on(tmp_path: Path) -> None:
    """They are for people; what the run needs is in its checkpoints. One byte in 5."""
    folder = RunFolder.begin(tmp_path, plan())
    with pytest.raises(Crash):
        run(folder, crash_in=2)
    path = tmp_path / "metrics.jsonl"
    honest = path.read_bytes()
    for place in range(0, len(honest), 5):
        flipped = bytearray(honest)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        assert OnDisk(folder).restore(folder.plan, TASK).state.round == 2, place
    path.write_bytes(honest)
    assert [summary.round for summary in run(folder).history] == [1, 2, 3, 4, 5]


def test_a_run_whose_rounds_are_done_needs_nobody_to_write_its_model(tmp_path: Path) -> None:
    """Holders have gone home when the coordinator is started again."""
    folder = RunFolder.begin(tmp_path, plan(round_deadline=0.1))
    with pytest.raises(Crash):
        run(folder, crash_in=5)
    assert not (tmp_path / "model.safetensors").exists()
    result = federate(FakeGrid({}), folder.plan, TASK, folder)
    assert result.final.round == 5
    assert np.array_equal(folder.result(TASK).parameters, result.parameters)


def test_a_finished_run_is_followed_by_a_new_one(tmp_path: Path) -> None:
    first = resume_or_begin(tmp_path, plan())
    run(first)
    first.close()
    assert resume_or_begin(tmp_path, plan()).path != first.path


def test_an_unfinished_run_is_gone_on_with_or_said_to_be_in_the_way(tmp_path: Path) -> None:
    first = resume_or_begin(tmp_path, plan())
    with pytest.raises(Crash):
        run(first, crash_in=2)
    assert resume_or_begin(tmp_path, plan()).path == first.path
    with pytest.raises(
        StateError, match=r"another plan \(rounds is 5 there and 6 here\).*plan\.toml"
    ):
        resume_or_begin(tmp_path, plan(rounds=6))


def test_a_run_in_which_nobody_was_asked_is_in_nobodys_way(tmp_path: Path) -> None:
    """A quorum that did not come, and then fewer holders are asked for."""
    first = resume_or_begin(tmp_path, plan(min_holders=9))
    again = resume_or_begin(tmp_path, plan())
    assert again.path == first.path
    assert again.plan == plan()
