"""A disk that lets a holder down costs it a round: never its place, its account or an answer."""

from __future__ import annotations

import errno
import logging
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from torch import Tensor, nn

import client.answers
from client.answers import DAMAGED, STORAGE
from client.app import build_app
from client.attempts import Attempts
from client.holder import Holder
from client.policy import Policy
from client.secure import Participant
from client.state import KEPT_PER_RUN, KEPT_RUNS, SPARE, Answer, FileAnswers, HolderState, Stored
from common.durable import PART
from common.errors import Refusal, StateError, StorageError
from common.flower import set_identity, stamp
from common.link.log import RationedLog
from common.plan import TrainingPlan
from common.privacy.accounting import epsilon
from common.privacy.ledger import Budget
from common.secagg.messages import Delivery
from common.settings import plan_for
from common.tasks.base import Examples, HolderData
from common.tasks.parameters import initial_parameters
from common.wire import RoundRequest, TrainReply, error_message
from server.checkpoints import KEPT
from tests.disks import BrokenLedger, Crash, Disk, filled, small_disk
from tests.masked import NAMES, Declined, Round, clinic, deliveries, masked_plan
from tests.tiny import FEATURES, CountedTask, table

UNITS = 40


class OwnModel(nn.Module):
    """A shared slope, and an offset of each unit's own."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.shared = nn.Linear(FEATURES, 1)
        self.own = nn.Embedding(units, 1)


class OwnTask(CountedTask):
    """The tiny task with private parameters, and a histogram."""

    private_parameters = frozenset({"own.weight"})
    private_learning_rate = 0.1
    scalable: ClassVar = {}

    def model(self, units: int) -> nn.Module:
        return OwnModel(units)

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        logits = self.predict(model, batch)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch["y"], reduction="none")

    def predict(self, model: Any, units: Examples) -> Tensor:
        return (model.shared(units["x"]) + model.own(units["unit"])).squeeze(-1)

    def examples(self, table: pd.DataFrame) -> Examples:
        units = torch.arange(len(table))
        return Examples({**super().examples(table).tensors, "unit": units})


TASK = OwnTask()


def plan(**settings: object) -> TrainingPlan:
    return plan_for(
        TASK, {"epsilon": 1.0, "rounds": 5, "min_holders": 2, "local_steps": 1, **settings}
    )


PLAN = plan()
START = initial_parameters(TASK, 0)


def request(number: int = 1, run: str = "run", asked: TrainingPlan = PLAN) -> RoundRequest:
    return RoundRequest(run, number, asked, START)


def holder(state: HolderState, **policy: object) -> Holder:
    data = HolderData(TASK.examples(table(UNITS)), TASK.examples(table(20, seed=1)))
    rules = {"data_set": "patients", "budget": Budget(5.0, 1e-4), "size_class": UNITS}
    allowed = Policy.model_validate({**rules, "evaluation": "histogram", **policy})
    return Holder("clinic", TASK, data, allowed, state, torch.device("cpu"))


def ask(holder: Holder, request: RoundRequest, kind: str = "train") -> Message:
    """As the coordinator asks, through the app."""
    set_identity(1)
    message = Message(request.records(), 2, kind)
    stamp(message)
    app = build_app(lambda _: Participant.unsigned(holder))
    return app(message, Context(1, 2, {}, RecordDict(), {}))


def update(reply: Message) -> np.ndarray:
    return TrainReply.of(reply.content, PLAN, len(START)).update


def price(rounds: int) -> float:
    return epsilon(PLAN.composition().of(PLAN.round_event()) * rounds, 1e-4)


def declined_for_storage(reply: Message) -> bool:
    return reply.has_error() and reply.error.reason == f"storage: {STORAGE}"


def halves(folder: Path) -> list[Path]:
    return list(folder.rglob("*" + PART))


def private_after(state: HolderState, number: int) -> np.ndarray | None:
    """The private parameters that the ledger's answer of a round has."""
    entry = state.ledger.find(f"run/{number:06d}")
    if entry is None or entry.state != "committed":
        return None
    stored = state.answers.get(f"run/{number:06d}", entry.reply_digest)
    assert stored is not None
    return Answer.of(stored).private["own.weight"].numpy()


# -- each write of a round in turn ---------------------------------------------------------------


@dataclass
class Scene:
    """A holder that has answered a round, on a disk that can be broken."""

    folder: Path
    disk: Disk

    def on_sound_disk(self) -> HolderState:
        self.disk.works()
        return HolderState.at(self.folder)

    def breaking(self, state: HolderState) -> HolderState:
        return HolderState(BrokenLedger(state.ledger, self.disk), state.answers, state.folder)  # type: ignore[arg-type]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    folder = tmp_path / "clinic"
    with HolderState.at(folder) as state:
        holder(state).train(request(1))
    return Scene(folder, Disk(monkeypatch, folder))


def writes_of_a_round(scene: Scene) -> int:
    """How many there are, counted on a round that goes well."""
    copy = scene.folder.with_name("copy")
    shutil.copytree(scene.folder, copy)
    counting = Scene(copy, scene.disk)
    with HolderState.at(copy) as state:
        disk = scene.disk
        disk._folder = str(copy)
        disk.works()
        holder(counting.breaking(state)).train(request(2))
        disk._folder = str(scene.folder)
    shutil.rmtree(copy)
    return disk.writes


def fresh_copies(scene: Scene) -> Iterator[int]:
    """For every write of a round: the scene as it was before the round."""
    writes = writes_of_a_round(scene)
    assert writes > 12, "room, reservation and its head, answer, commit and its head"
    before = scene.folder.with_name("before")
    shutil.copytree(scene.folder, before)
    for number in range(1, writes + 1):
        scene.disk.works()
        shutil.rmtree(scene.folder)
        shutil.copytree(before, scene.folder)
        yield number


def test_whichever_write_of_a_round_fails_nothing_leaves_and_the_next_ask_is_answered(
    scene: Scene,
) -> None:
    outcomes = set()
    for number in fresh_copies(scene):
        with HolderState.at(scene.folder) as state:
            clinic = holder(scene.breaking(state))
            scene.disk.full_at(number, errno.EIO)
            reply = ask(clinic, request(2))
            assert halves(scene.folder) == []
            if not reply.has_error():
                outcomes.add("cleaning up failed, which costs nothing")
                continue
            assert declined_for_storage(reply), number
            scene.disk.works()
            spent = clinic.spent()
            assert spent in (price(1), price(2))
            outcomes.add(f"declined at {spent:.3f}")

            first = update(ask(clinic, request(2)))
            assert clinic.spent() == price(2), "once, however often it was asked"
            assert np.array_equal(update(ask(clinic, request(2))), first)
            after = private_after(state, 2)
        with scene.on_sound_disk() as state:
            again = holder(state)
            assert np.array_equal(update(ask(again, request(2))), first)
            assert np.array_equal(private_after(state, 2), after)
            assert again.spent() == price(2)
            assert not ask(again, request(3)).has_error()
            assert halves(scene.folder) == []
    assert outcomes >= {f"declined at {price(1):.3f}", f"declined at {price(2):.3f}"}


def test_whichever_write_of_a_round_is_the_last_the_same_request_has_one_answer_and_one_price(
    scene: Scene,
) -> None:
    """The process dies at each write in turn; ledger, answer and private parameters agree."""
    seen = set()
    for number in fresh_copies(scene):
        with HolderState.at(scene.folder) as state:
            clinic = holder(scene.breaking(state))
            before = private_after(state, 1)
            scene.disk.crash_at(number)
            with pytest.raises(Crash):
                ask(clinic, request(2))
            assert len(halves(scene.folder)) <= 1
            scene.disk.works()  # for closing, which a dead process does not do
        with scene.on_sound_disk() as state:
            entry = state.ledger.find("run/000002")
            seen.add(None if entry is None else entry.state)
            assert np.array_equal(private_after(state, 1), before)
            stored = private_after(state, 2)
            again = holder(state)
            assert again.spent() == price(1 if entry is None else 2)
            first = update(ask(again, request(2)))
            assert again.spent() == price(2)
            if stored is not None:
                assert np.array_equal(private_after(state, 2), stored), "computed once more"
            assert np.array_equal(update(ask(again, request(2))), first)
            assert not ask(again, request(3)).has_error()
            assert halves(scene.folder) == []
    assert seen == {None, "reserved", "committed"}


def test_an_answer_whose_commit_failed_is_given_and_not_made_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HolderState.at(scene.folder) as state:
        clinic = holder(state)

        def locked(*_: object) -> None:
            raise StorageError("the ledger cannot be used (database is locked)")

        with monkeypatch.context() as broken:
            broken.setattr(state.ledger, "commit", locked)
            assert declined_for_storage(ask(clinic, request(2)))
            assert declined_for_storage(ask(clinic, request(2)))
        stored = state.answers.digest("run/000002")
        assert stored is not None
        monkeypatch.setattr(clinic.trainer, "train", lambda *_, **__: pytest.fail("computed twice"))
        assert not ask(clinic, request(2)).has_error()
        entry = state.ledger.find("run/000002")
        assert entry is not None
        assert (entry.state, entry.reply_digest) == ("committed", stored)
        assert clinic.spent() == price(2)


# -- disks as they are -----------------------------------------------------------------------------


def test_on_a_full_disk_a_round_is_declined_before_it_is_charged_or_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Injected; the same on a real one below."""
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        disk = Disk(monkeypatch, tmp_path)
        monkeypatch.setattr(clinic.trainer, "train", lambda *_, **__: pytest.fail("computed"))
        for number in (1, 2):
            disk._from(lambda _: OSError(errno.ENOSPC, "No space left on device"))
            assert declined_for_storage(ask(clinic, request(number)))
        assert clinic.spent() == 0
        assert not list((tmp_path / "answers").iterdir())
        monkeypatch.undo()
        assert not ask(clinic, request(3)).has_error()


def test_a_real_disk_fills_up_and_is_emptied(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    unrationed = RationedLog(logging.getLogger("sotto.holder"))  # other tests have had theirs
    monkeypatch.setattr(client.answers, "log", unrationed)
    with small_disk(tmp_path / "disk", 2048) as disk, HolderState.at(disk) as state:
        clinic = holder(state)
        first = update(ask(clinic, request(1)))
        filler = filled(disk)
        for number in (2, 3, 2):
            assert declined_for_storage(ask(clinic, request(number)))
        assert clinic.spent() == price(1)
        assert "No space left on device, ENOSPC" in caplog.text
        assert str(disk) in caplog.text, "our own log says where"
        assert np.array_equal(update(ask(clinic, request(1))), first), "which needs no room"
        filler.unlink()
        assert not ask(clinic, request(3)).has_error()
        assert clinic.spent() == price(2)
        assert not halves(disk)


def test_a_disk_that_fills_up_while_a_holder_trains_costs_nothing(tmp_path: Path) -> None:
    """The room was taken before."""
    with small_disk(tmp_path / "disk", 2048) as disk, HolderState.at(disk) as state:
        clinic = holder(state)
        clinic.train(request(1))

        clinic.trainer.on_step = lambda: filled(disk) and None
        assert not ask(clinic, request(2)).has_error()
        clinic.trainer.on_step = lambda: None
        assert declined_for_storage(ask(clinic, request(3)))
        assert clinic.spent() == price(2)


def test_a_folder_on_a_read_only_disk_is_said_to_be_that(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2048) as disk:
        with HolderState.at(disk) as state:
            first = update(ask(holder(state), request(1)))
        remount(disk, "ro")
        with pytest.raises(StorageError, match="cannot be used"):
            HolderState.at(disk)
        with pytest.raises(StorageError, match=r"Read-only file system, EROFS"):
            HolderState.at(disk / "new")
        remount(disk, "rw")
        with HolderState.at(disk) as state:
            assert np.array_equal(update(ask(holder(state), request(1))), first)


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def test_a_ledger_that_another_process_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        clinic.train(request(1))
        state.ledger._store._connection.execute("PRAGMA busy_timeout = 10")
        other = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        reply = ask(clinic, request(2))
        assert declined_for_storage(reply)
        assert not halves(tmp_path)
        other.execute("ROLLBACK")
        other.close()
        assert not ask(clinic, request(2)).has_error()
        assert clinic.spent() == price(2)


def test_a_folder_of_answers_that_is_gone_is_not_begun_anew(tmp_path: Path) -> None:
    """It may be on a disk that is not mounted; private parameters are in it."""
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        first = update(ask(clinic, request(1)))
        elsewhere = (tmp_path / "answers").rename(tmp_path / "elsewhere")
        for number in (1, 2):
            assert declined_for_storage(ask(clinic, request(number)))
        assert not (tmp_path / "answers").exists()
        assert clinic.spent() == price(1)
        elsewhere.rename(tmp_path / "answers")
        assert np.array_equal(update(ask(clinic, request(1))), first)
        assert not ask(clinic, request(2)).has_error()


def test_what_leaves_says_nothing_of_paths_or_of_the_system(tmp_path: Path) -> None:
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        shutil.rmtree(tmp_path / "answers")
        reply = ask(clinic, request())
    assert error_message(reply.error) == f"declined: storage: {STORAGE}"
    assert len(f"declined: storage: {STORAGE}") <= 300, "the coordinator shows it all"
    assert str(tmp_path) not in reply.error.reason


def test_a_masked_round_is_declined_before_it_begins(tmp_path: Path) -> None:
    """In its middle the others would pay for it."""
    with HolderState.at(tmp_path) as state:
        one = Round({**everybody(), "a": clinic("a", state)}, masked_plan())
        shutil.rmtree(tmp_path / "answers")
        with pytest.raises(Declined, match="declined: storage"):
            one.step("a", "advertise_keys")
        assert one.holders["a"].holder.spent() == 0


def test_a_masked_part_that_could_not_be_committed_does_not_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its round is lost, as each step is taken once; it is charged, and the next round works."""
    with HolderState.at(tmp_path) as state:
        holders = {**everybody(), "a": clinic("a", state)}
        one = Round(holders, masked_plan())
        sent = Delivery(deliveries(one.share(one.advertise()))["a"]).to_bytes()
        with monkeypatch.context() as broken:
            broken.setattr(state.ledger, "commit", _raising(StorageError("locked")))
            with pytest.raises(Declined, match="declined: storage"):
                one.masked("a", sent)
        assert holders["a"].holder.spent() > 0
        with pytest.raises(Declined, match="a second time"):
            one.masked("a", sent)
        two = Round(holders, masked_plan(), number=2)
        two.masked("a", Delivery(deliveries(two.share(two.advertise()))["a"]).to_bytes())


def test_a_part_whose_commit_failed_may_be_made_again_as_nothing_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HolderState.at(tmp_path) as state:
        one = Round({**everybody(), "a": clinic("a", state)}, masked_plan())
        holder = one.holders["a"].holder
        with monkeypatch.context() as broken:
            broken.setattr(state.ledger, "commit", _raising(StorageError("locked")))
            with pytest.raises(StorageError):
                holder.contribution(one.request)
        spent = holder.spent()
        assert len(holder.contribution(one.request).vector) > 0
        assert holder.spent() == spent
        with pytest.raises(Refusal, match="has left already"):
            holder.contribution(one.request)


def everybody() -> dict[str, Participant]:
    return {name: clinic(name) for name in NAMES}


# -- what may not be told by it ------------------------------------------------------------------


def test_after_a_full_disk_another_model_is_no_second_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the disk was full *after* computing tells that computing went well."""
    other = RoundRequest("run", 1, PLAN, START + 1)

    def full(*_: object) -> str:
        raise StorageError("no room")

    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        with monkeypatch.context() as broken:
            broken.setattr(FileAnswers, "put", full)
            assert declined_for_storage(ask(clinic, request()))
        assert "other parameters" in str(ask(clinic, other).error.reason)
        assert not ask(clinic, request()).has_error()


def test_room_is_asked_for_by_the_declared_size_and_not_by_the_units(tmp_path: Path) -> None:
    """Whether a disk is found full must not say how many units there are."""
    asked: list[int] = []

    class Measured(FileAnswers):
        def room(self, request_id: str, size: int):  # type: ignore[no-untyped-def]
            asked.append(size)
            return super().room(request_id, size)

    for units in (11, UNITS, 4 * UNITS):
        with HolderState.at(tmp_path / str(units)) as state:
            measured = HolderState(state.ledger, Measured(tmp_path / str(units) / "answers"))
            data = HolderData(TASK.examples(table(units)), TASK.examples(table(5, seed=1)))
            clinic = holder(measured)
            clinic = Holder("clinic", TASK, data, clinic.policy, measured, torch.device("cpu"))
            clinic.train(request())
            written = next((tmp_path / str(units)).rglob("*.safetensors")).stat().st_size
        assert written <= asked[-1] + SPARE
    assert len(set(asked)) == 1


@pytest.mark.parametrize("most", [1, 3])
def test_what_failed_is_remembered_within_bounds_and_forgotten_on_the_safe_side(most: int) -> None:
    with HolderState.in_memory() as state:
        clinic = holder(state)
        releases = [
            clinic._release(asked, asked.request_id, "update", PLAN.round_event())
            for asked in map(request, range(1, most + 3))
        ]
    attempts = Attempts(most)
    attempts.begin(releases[0], b"before a crash", again=True)  # nothing was told before it
    attempts.end(releases[0].request_id)
    for release in releases:
        attempts.begin(release, b"model", again=False)
    assert len(attempts) == most
    attempts.begin(releases[-1], b"model", again=True)
    with pytest.raises(Refusal, match="other parameters"):
        attempts.begin(releases[-1], b"another", again=True)
    with pytest.raises(Refusal, match="may have failed"):
        attempts.begin(releases[0], b"another", again=True)
    attempts.end(releases[-1].request_id)
    assert len(attempts) == most - 1


# -- the holder's own figures --------------------------------------------------------------------


def test_a_line_of_figures_that_cannot_be_written_costs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = plan(evaluation_epsilon=0.2, evaluate="every 1")
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        (tmp_path / "metrics.jsonl").mkdir()
        reply = ask(clinic, request(1, asked=asked), "evaluate")
        assert not reply.has_error()
        assert not ask(clinic, request(1), "evaluate").has_error()
        spent = clinic.spent()
        again = ask(clinic, request(1, asked=asked), "evaluate")
        assert clinic.spent() == spent
    histograms = [one.content["arrays"]["histogram"].numpy() for one in (reply, again)]
    assert np.array_equal(*histograms)
    assert "has no line in metrics.jsonl" in caplog.text
    assert "EISDIR" in caplog.text


# -- answers on the disk ---------------------------------------------------------------------------


def test_an_answer_of_which_any_byte_was_changed_is_not_given(tmp_path: Path) -> None:
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        clinic.train(request())
        (path,) = (tmp_path / "answers").rglob("*.safetensors")
        whole = path.read_bytes()
        entry = state.ledger.find("run/000001")
        assert entry is not None
        for place in range(len(whole)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(StateError, match="damaged or was changed"):
                state.answers.get("run/000001", entry.reply_digest)
        for cut in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:cut])
            with pytest.raises(StateError, match="damaged or was changed"):
                state.answers.get("run/000001", entry.reply_digest)
        reply = ask(clinic, request())
        assert error_message(reply.error) == f"declined: state: {DAMAGED}"
        assert len(f"declined: state: {DAMAGED}") <= 300
        assert ask(clinic, request(2)).error.reason == f"state: {DAMAGED}", "nor its private part"
        path.write_bytes(whole)
        assert not ask(clinic, request(2)).has_error()


def answers_of(folder: Path, *numbers: int, run: str = "run") -> FileAnswers:
    folder.mkdir(exist_ok=True)
    answers = FileAnswers(folder)
    for number in numbers:
        answers.put(f"{run}/{number:06d}", Stored({"a": np.zeros(1)}))
    return answers


def test_as_many_answers_are_kept_as_a_coordinator_may_ask_for_again(tmp_path: Path) -> None:
    """It goes back to the oldest of its checkpoints, and has begun the round after the newest."""
    assert KEPT_PER_RUN >= KEPT
    answers = answers_of(tmp_path, *range(1, 8))
    assert answers.rounds("run") == [7, 6, 5, 4]


def test_a_coordinator_that_went_back_to_an_older_checkpoint_gets_the_same_bytes(
    tmp_path: Path,
) -> None:
    """The newest was damaged after a round had begun: two rounds are asked for again."""
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        given = {number: update(ask(clinic, request(number))) for number in range(1, 6)}
        private, spent = private_after(state, 5), clinic.spent()
        for number in range(6 - KEPT, 6):
            assert np.array_equal(update(ask(clinic, request(number))), given[number])
        assert np.array_equal(private_after(state, 5), private)
        assert clinic.spent() == spent


def test_a_clock_that_was_set_back_drops_no_newer_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from client import state as module

    for number in range(KEPT_RUNS):
        answers_of(tmp_path, 1, run=f"old{number:02d}")
    monkeypatch.setattr(module.time, "time_ns", lambda: 10**18)  # 2001
    answers = answers_of(tmp_path, *range(1, 7))
    answers_of(tmp_path, 5, 6, run="run.evaluation")
    answers_of(tmp_path, 7)
    assert answers.rounds("run") == [7, 6, 5, 4]
    assert answers.rounds("run.evaluation") == [6, 5]
    assert len(list(tmp_path.iterdir())) == KEPT_RUNS
    assert not (tmp_path / "old00").exists()
    assert not (tmp_path / "old01").exists()


@pytest.mark.parametrize("ahead", [-(10**9), 10**9])
def test_a_request_from_a_clock_that_is_years_off_is_answered(ahead: float, tmp_path: Path) -> None:
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        set_identity(1)
        message = Message(request().records(), 2, "train")
        message.metadata.__dict__["_created_at"] = message.metadata.created_at + ahead
        stamp(message)
        app = build_app(lambda _: Participant.unsigned(clinic))
        assert app(message, Context(1, 2, {}, RecordDict(), {})).has_content()


# -- telling -------------------------------------------------------------------------------------


def test_phases_are_told_in_their_order_also_where_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        told: list[tuple[str, float]] = []
        clinic.on_phase = lambda phase, seconds: told.append((phase, seconds))
        clinic.train(request())
        assert [phase for phase, _ in told] == ["admit", "compute", "store", "commit"]
        assert all(seconds >= 0 for _, seconds in told)
        told.clear()
        clinic.train(request())
        assert told == [], "an answer that is given again is no work"
        monkeypatch.setattr(FileAnswers, "put", _raising(StorageError("no room")))
        ask(clinic, request(2))
        assert [phase for phase, _ in told] == ["admit", "compute", "store"]


def _raising(error: Exception) -> Callable[..., None]:
    def act(*_: object) -> None:
        raise error

    return act
