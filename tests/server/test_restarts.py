"""The coordinator is killed after any reply of a run, and goes on: one model a round, ever.

Holders are real and live on, as other machines do. A coordinator that is killed between two replies
leaves its folder as it is at that moment: everything it writes it writes before it goes on.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message

from common.errors import Refusal, RunError, StateError
from common.flower import BaseGrid
from common.plan import TrainingPlan
from common.settings import plan_for
from common.wire import ARRAYS, CONFIG, refusal_error, round_of
from server import journal, runs
from server.app import federate
from server.journal import JournalGrid
from server.runs import RunFolder, RunResult
from server.summaries import RoundSummary
from simulations.grid import InProcessGrid, in_process
from tests.fakes import FakeGrid, pulls_towards
from tests.masked import masked_plan
from tests.tiny import TinyTask

TASK = TinyTask()


class Killed(Exception):
    """Stands for a process that is gone."""


class Killable(BaseGrid):
    """A Grid whose coordinator is killed once so many replies have been handed out.

    Args:
        grid: of the holders, which live on.
        after: replies until then; None for never.
        models: round → digests of the models that holders were sent at its beginning, or to
            evaluate at the end of the one before.
    """

    def __init__(self, grid: InProcessGrid, after: int | None, models: dict[int, set[str]]) -> None:
        super().__init__(1)
        self._grid, self._after, self._models = grid, after, models
        self.handed_out = 0

    def get_node_ids(self) -> list[int]:
        return self._grid.get_node_ids()

    def holder_name(self, node_id: int) -> str:
        return self._grid.holder_name(node_id)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        return list(self.replies(messages, timeout=timeout))

    def replies(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,
        enough: int | None = None,
    ) -> Iterator[Message]:
        for message in list(messages)[:enough]:
            self._look_at(message)
            (reply,) = self._grid.send_and_receive([message])
            if self.handed_out == self._after:
                raise Killed
            self.handed_out += 1
            yield reply

    def _look_at(self, message: Message) -> None:
        kind = message.metadata.message_type
        if kind in ("train", "evaluate"):
            _, number = round_of(message.content[CONFIG])
            (array,) = message.content[ARRAYS].values()
            digest = hashlib.sha256(array.data).hexdigest()
            self._models[number + (kind == "evaluate")].add(digest)


@contextmanager
def federation(plan: TrainingPlan) -> Iterator[InProcessGrid]:
    with in_process(TASK, plan, TASK.holder_data(4), torch.device("cpu")) as grid:
        yield grid


Models = dict[int, set[str]]


def undisturbed(plan: TrainingPlan, folder: Path) -> tuple[RunResult, int]:
    """What comes of a run that is left alone, and how many replies it took."""
    with federation(plan) as grid:
        killable = Killable(grid, None, defaultdict(set))
        result = federate(killable, plan, TASK, RunFolder.begin(folder, plan))
    return result, killable.handed_out


def disturbed(plan: TrainingPlan, path: Path, *cuts: int) -> tuple[RunResult, Models]:
    """What comes of one whose coordinator is killed after so many replies, again and again."""
    models: Models = defaultdict(set)
    folder = RunFolder.begin(path, plan)
    with federation(plan) as grid:
        for cut in cuts:
            with pytest.raises(Killed):
                federate(Killable(grid, cut, models), plan, TASK, folder)
        result = federate(Killable(grid, None, models), plan, TASK, folder)
    return result, models


def require_one_model_a_round(models: Models, plan: TrainingPlan) -> None:
    assert models.keys() >= set(range(1, plan.rounds + 1))
    assert all(len(digests) == 1 for digests in models.values())


PLAIN = plan_for(
    TASK,
    {"epsilon": 2.0, "rounds": 3, "strategy": "fedadam", "evaluate": "every 2", "cohort": 3},
    holders=4,
)
FIRST = plan_for(
    TASK,
    {"epsilon": 2.0, "rounds": 3, "cohort": 2, "over_selection": 0.5, "evaluate": "never"},
    holders=4,
)
SECURE = masked_plan("secure", 4, rounds=2, evaluate="never")
SUM = masked_plan("secure-sum", 4, rounds=2, evaluate="final")
CENTRAL = plan_for(
    TASK, {"unit": "holder", "epsilon": 8.0, "clip_norm": 0.5, "rounds": 3, "cohort": 2}, holders=4
)
BANDED = plan_for(
    TASK,
    {
        "unit": "holder", "epsilon": 8.0, "clip_norm": 0.5, "rounds": 4,
        "mechanism": "banded", "bands": 2,
    },
    holders=4,
)  # fmt: skip


@pytest.mark.parametrize(
    "plan",
    [PLAIN, FIRST, SECURE, SUM],
    ids=["plain", "over-selected", "secure", "secure-sum"],
)
def test_a_coordinator_killed_after_any_reply_ends_with_the_same_model(
    plan: TrainingPlan, tmp_path: Path
) -> None:
    """Holders' randomness is that of a simulation, so that two runs can be compared."""
    whole, replies = undisturbed(plan, tmp_path / "whole")
    for cut in range(replies):
        result, models = disturbed(plan, tmp_path / f"cut-{cut}", cut)
        np.testing.assert_array_equal(result.parameters, whole.parameters, f"killed after {cut}")
        require_one_model_a_round(models, plan)
        assert [each.accepted for each in result.history] == [
            each.accepted for each in whole.history
        ]


@pytest.mark.parametrize("plan", [CENTRAL, BANDED], ids=["gaussian", "banded"])
def test_where_the_coordinator_adds_the_noise_it_adds_it_once(
    plan: TrainingPlan, tmp_path: Path
) -> None:
    """Its noise is unpredictable: two runs differ, and one that is killed agrees with itself.

    Each kill damages the last checkpoint, so that a round whose model is known is done again.
    """
    for every in (1, 2, 3):
        models = disturbed_and_damaged(plan, tmp_path / f"every-{every}", every)
        # Coins may leave a round without holders, to whom its model would be shown.
        assert all(len(digests) == 1 for digests in models.values())


def test_kills_during_recovery_change_nothing_either(tmp_path: Path) -> None:
    whole, _ = undisturbed(PLAIN, tmp_path / "whole")
    result, models = disturbed(PLAIN, tmp_path / "cut", 5, 0, 1, 0, 3)
    np.testing.assert_array_equal(result.parameters, whole.parameters)
    require_one_model_a_round(models, PLAIN)


# -- a damaged checkpoint -------------------------------------------------------------------------


def flip_the_newest(folder: Path) -> None:
    path = max(folder.glob("checkpoint-*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def disturbed_and_damaged(plan: TrainingPlan, path: Path, every: int) -> Models:
    """What is shown of a run that never gets more than so many replies from one process."""
    models: Models = defaultdict(set)
    folder = RunFolder.begin(path, plan)
    with federation(plan) as grid:
        while True:
            try:
                federate(Killable(grid, every, models), plan, TASK, folder)
            except Killed:
                if folder.rounds_done:
                    flip_the_newest(path)
            else:
                return models


Damage = Callable[[Path], None]


def after_damage(plan: TrainingPlan, path: Path, damage: Damage) -> tuple[RunResult, Models]:
    """A coordinator dies in the last round; its disk is damaged; it is started again."""
    models: Models = defaultdict(set)
    folder = RunFolder.begin(path, plan)
    with federation(plan) as grid:

        def in_the_last_round(summary: object) -> None:
            if folder.rounds_done == plan.rounds - 1:
                raise Killed

        with pytest.raises(Killed):
            federate(Killable(grid, None, models), plan, TASK, folder, in_the_last_round)
        damage(path)
        return federate(Killable(grid, None, models), plan, TASK, folder), models


def test_the_round_of_a_damaged_checkpoint_comes_out_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, _ = undisturbed(PLAIN, tmp_path / "whole")
    result, models = after_damage(PLAIN, tmp_path / "damaged", flip_the_newest)
    np.testing.assert_array_equal(result.parameters, whole.parameters)
    require_one_model_a_round(models, PLAIN)
    assert "going on from round 1" in caplog.text


@pytest.mark.parametrize("plan", [CENTRAL, BANDED], ids=["gaussian", "banded"])
def test_also_where_the_coordinator_adds_the_noise(plan: TrainingPlan, tmp_path: Path) -> None:
    _, models = after_damage(plan, tmp_path, flip_the_newest)
    assert all(len(digests) == 1 for digests in models.values())


def test_a_round_is_not_released_twice_with_other_noise(tmp_path: Path) -> None:
    def damage(folder: Path) -> None:
        flip_the_newest(folder)
        for path in folder.glob("journal-*"):
            path.unlink()

    with pytest.raises(StateError, match=r"has been released, .*would release it twice"):
        after_damage(CENTRAL, tmp_path, damage)
    # In other plans holders send what they sent before.
    whole, _ = undisturbed(PLAIN, tmp_path / "whole")
    result, _ = after_damage(PLAIN, tmp_path / "damaged", damage)
    np.testing.assert_array_equal(result.parameters, whole.parameters)


def test_what_was_refused_once_is_refused_again(tmp_path: Path) -> None:
    """Whoever starts a service again after each failure is not one who knows better."""
    chosen = {"unit": "holder", "epsilon": 8.0, "clip_norm": 0.5, "rounds": 2, "cohort": 4}
    plan = plan_for(TASK, {**chosen, "evaluate": "every 1"}, holders=4)
    models: Models = defaultdict(set)
    folder = RunFolder.begin(tmp_path, plan)
    with federation(plan) as grid:
        with pytest.raises(Killed):  # while the first model is evaluated, and has no line yet
            federate(Killable(grid, 4, models), plan, TASK, folder)
        assert folder.rounds_done == 1
        flip_the_newest(tmp_path)
        for path in tmp_path.glob("journal-*"):
            path.unlink()
        for _ in range(3):
            with pytest.raises(StateError, match="has been released"):
                federate(Killable(grid, None, models), plan, TASK, folder)
    assert {number: len(digests) for number, digests in models.items()} == {1: 1, 2: 1}


@pytest.mark.parametrize("plan", [CENTRAL, BANDED], ids=["gaussian", "banded"])
def test_no_other_key_is_drawn_for_one_that_is_damaged(plan: TrainingPlan, tmp_path: Path) -> None:
    """The round's updates are all there; other noise on them would be a second release."""

    def damage(folder: Path) -> None:
        flip_the_newest(folder)
        path = folder / f"journal-{plan.rounds - 1:06d}.bin"
        content = bytearray(path.read_bytes())
        content[content.index(b'"key": "') + 10] ^= 1
        path.write_bytes(content)

    with pytest.raises(StateError, match="has been released"):
        after_damage(plan, tmp_path, damage)


def test_a_round_that_coins_left_without_holders_comes_out_the_same(tmp_path: Path) -> None:
    """One holder of four on average: of 30 rounds all have somebody with probability 2e-5."""
    chosen = {"unit": "holder", "epsilon": 8.0, "clip_norm": 0.5, "rounds": 30, "cohort": 1}
    plan = plan_for(TASK, {**chosen, "evaluate": "never"}, holders=4)
    models: Models = defaultdict(set)
    folder = RunFolder.begin(tmp_path, plan)
    empty = 0

    def after_nobody(summary: RoundSummary) -> None:
        nonlocal empty
        if not summary.accepted:
            empty = summary.round
            raise Killed

    with federation(plan) as grid:
        with pytest.raises(Killed):
            federate(Killable(grid, None, models), plan, TASK, folder, after_nobody)
        flip_the_newest(tmp_path)
        result = federate(Killable(grid, None, models), plan, TASK, folder)
    assert all(len(digests) == 1 for digests in models.values())
    assert result.history[empty - 1].accepted == ()


def test_a_run_without_any_whole_checkpoint_is_not_begun_again(tmp_path: Path) -> None:
    def damage(folder: Path) -> None:
        for path in folder.glob("checkpoint-*"):
            path.write_bytes(b"")

    with pytest.raises(StateError, match="restore the newest"):
        after_damage(plan_for(TASK, {"epsilon": 2.0, "rounds": 4}), tmp_path, damage)


# -- what would be wrong --------------------------------------------------------------------------


def test_without_a_journal_the_noise_would_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the tests about noise."""
    monkeypatch.setattr(journal.os, "urandom", _Counter())
    _, models = disturbed(CENTRAL, tmp_path / "with", 1)
    assert all(len(digests) == 1 for digests in models.values())
    monkeypatch.setattr(runs.Journal, "has_trained", lambda self, number: True)

    def damage(folder: Path) -> None:
        flip_the_newest(folder)
        for path in folder.glob("journal-*"):
            path.unlink()

    _, models = after_damage(CENTRAL, tmp_path / "without", damage)
    assert max(map(len, models.values())) == 2


class _Counter:
    """Other keys each time, and the same ones in each test run."""

    def __init__(self) -> None:
        self._calls = 0

    def __call__(self, count: int) -> bytes:
        self._calls += 1
        return hashlib.sha256(bytes([self._calls])).digest()[:count]


# -- rounds that fail, and holders that stay away -------------------------------------------------


def test_a_round_that_failed_is_asked_for_anew(tmp_path: Path) -> None:
    """Or whoever declined once would have declined for ever."""
    plan = plan_for(TASK, {"no_dp": True, "rounds": 2, "min_holders": 2})
    folder = RunFolder.begin(tmp_path, plan)
    refusal = refusal_error(Refusal("budget", "nothing is left"))
    with pytest.raises(RunError, match="nothing is left"):
        federate(FakeGrid({"a": pulls_towards(1.0), "b": lambda _: refusal}), plan, TASK, folder)
    willing = FakeGrid({"a": pulls_towards(1.0), "b": pulls_towards(2.0)})
    result = federate(willing, plan, TASK, folder)
    assert [each.accepted for each in result.history] == [("a", "b")] * 2


class Visible(FakeGrid):
    """Some of its holders are there, others are not."""

    def __init__(self, *present: str) -> None:
        super().__init__({name: pulls_towards(1.0) for name in ("a", "b", "c")})
        self.present = present

    def get_node_ids(self) -> list[int]:
        return [node for node in super().get_node_ids() if self.holder_name(node) in self.present]


def test_a_holder_that_misses_rounds_is_in_every_summary_also_after_a_restart(
    tmp_path: Path,
) -> None:
    plan = plan_for(TASK, {"no_dp": True, "rounds": 6, "min_holders": 1, "evaluate": "never"})
    folder = RunFolder.begin(tmp_path, plan)

    def leave(summary: object) -> None:
        if folder.rounds_done == 2:
            raise Killed

    with pytest.raises(Killed):
        federate(Visible("a", "b"), plan, TASK, folder, leave)
    grid = Visible("a")

    def come_back(summary: object) -> None:
        grid.present = ("a", "b") if folder.rounds_done == 5 else ("a",)

    history = federate(grid, plan, TASK, folder, come_back).history
    assert [dict(each.missed_in_a_row) for each in history] == [
        {}, {}, {"b": 1}, {"b": 2}, {"b": 3}, {},
    ]  # fmt: skip
    assert history[3].missed == {"b": "away when the round began"}


class AfterOneReply(Visible):
    """Its coordinator is killed once somebody has replied."""

    def replies(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,
        enough: int | None = None,
    ) -> Iterator[Message]:
        yield next(iter(super().replies(messages, timeout=timeout, enough=enough)))
        raise Killed


def test_who_has_replied_and_gone_is_not_waited_for_in_the_evaluation(tmp_path: Path) -> None:
    plan = plan_for(TASK, {"no_dp": True, "rounds": 1, "min_holders": 1, "evaluate": "final"})
    folder = RunFolder.begin(tmp_path, plan)
    with pytest.raises(Killed):
        federate(AfterOneReply("a", "b"), plan, TASK, folder)
    grid = Visible("b")
    result = federate(grid, plan, TASK, folder)
    assert result.final.accepted == ("a", "b")
    assert [(name, kind) for name, kind, _ in grid.asked] == [("b", "train"), ("b", "evaluate")]


def test_a_summary_says_where_the_time_went(tmp_path: Path) -> None:
    result, _ = undisturbed(PLAIN, tmp_path)
    for each in result.history:
        phases = {"wait", "exchange", "aggregate", "checkpoint"}
        evaluated = {"evaluate"} if PLAIN.evaluates(each.round) else set()
        assert set(each.phases) == phases | evaluated
        assert all(seconds >= 0 for seconds in each.phases.values())


def test_simulations_keep_no_journal(tmp_path: Path) -> None:
    records = runs.OnDisk(RunFolder.begin(tmp_path, PLAIN))
    with federation(PLAIN) as grid:
        assert records.around(grid) is grid
        assert isinstance(records.around(Killable(grid, None, {})), JournalGrid)


# -- the end --------------------------------------------------------------------------------------


def test_a_coordinator_killed_at_the_very_end_ends_that_run_and_begins_no_other(
    tmp_path: Path,
) -> None:
    """A new run would be charged to the holders. Nobody is asked for what is there already."""
    state = tmp_path / "state"
    with federation(PLAIN) as grid:
        folder = runs.resume_or_begin(state, PLAIN)
        before = federate(Killable(grid, None, defaultdict(set)), PLAIN, TASK, folder)

        again = runs.resume_or_begin(state, PLAIN)
        assert again.path == folder.path, "it was not closed"
        nobody = Killable(grid, 0, defaultdict(set))  # it would be killed by the first reply
        result = federate(nobody, PLAIN, TASK, again)
        np.testing.assert_array_equal(result.parameters, before.parameters)
        assert result.history == before.history
        again.close()
        assert runs.resume_or_begin(state, PLAIN).path != folder.path
