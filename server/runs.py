"""A run's records: in memory, or on the coordinator's disk with all that a restart needs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Protocol
from uuid import uuid4

import numpy as np
import torch
from flwr.serverapp import Grid
from safetensors.torch import load_file

from common.durable import append_line, write_bytes, write_tensors
from common.errors import StateError
from common.flower import BaseGrid
from common.plan import TrainingPlan
from common.privacy.noise import OsRandomness, Randomness
from common.tasks.base import Task
from common.tasks.parameters import flat, initial_parameters, split_shared
from common.wire import Vector
from server.aggregation import build_strategy, is_buffered
from server.checkpoints import KEPT, Checkpoints, RunState
from server.journal import Journal, JournalGrid
from server.summaries import RoundSummary

__all__ = ["InMemory", "OnDisk", "Records", "RunFolder", "RunResult", "resume_or_begin"]

logger = logging.getLogger("sotto.coordinator")


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Args:
        run_id: names it.
        plan: what was run.
        parameters: of the released model, [D] float32.
        history: a summary of every round.
    """

    run_id: str
    plan: TrainingPlan
    parameters: Vector
    history: Sequence[RoundSummary]

    @property
    def final(self) -> RoundSummary:
        """The last round, with the last evaluation."""
        return self.history[-1]

    @property
    def round_median(self) -> float:
        """Median seconds of a round."""
        return float(np.median([summary.seconds for summary in self.history]))


@dataclass(frozen=True)
class RunFolder:
    """Everything durable about one run: plan, checkpoints, metrics, and at the end the model.

    Args:
        path: the folder; it is made if it is not there.
        kept: checkpoints that are kept, at least 1.
    """

    path: Path
    kept: int = KEPT

    @classmethod
    def begin(cls, path: Path, plan: TrainingPlan, kept: int = KEPT) -> RunFolder:
        """A new run's folder, with its plan in it; what an earlier run left there goes.

        Raises:
            ConfigurationError: the plan's strategy cannot work.
        """
        build_strategy(plan)
        path.mkdir(parents=True, exist_ok=True)
        Checkpoints(path).clear()
        Journal(path).clear()
        for name in ("metrics.jsonl", "model.safetensors", "report.html"):
            (path / name).unlink(missing_ok=True)
        write_bytes(path / "plan.toml", plan.to_toml().encode())
        return cls(path, kept)

    @classmethod
    def unfinished(cls, runs: Path, kept: int = KEPT) -> RunFolder | None:
        """The run under ``runs`` that began and is not over, if there is one.

        It is over when its model is there and its checkpoints are gone, which go last.
        """
        for path in sorted(runs.glob("*/plan.toml"), reverse=True):
            folder = cls(path.parent, kept)
            if folder.rounds_done or not (folder.path / "model.safetensors").exists():
                return folder
        return None

    @classmethod
    def last_finished(cls, runs: Path) -> str | None:
        """The name of the newest run under ``runs`` that is over, if there is one."""
        for path in sorted(runs.glob("*/model.safetensors"), reverse=True):
            if not cls(path.parent).rounds_done:
                return path.parent.name
        return None

    @property
    def run_id(self) -> str:
        """Names the run."""
        return self.path.name

    @property
    def plan(self) -> TrainingPlan:
        """The plan the run began with."""
        return TrainingPlan.from_toml((self.path / "plan.toml").read_text())

    @property
    def untouched(self) -> bool:
        """Whether no holder was asked for anything yet."""
        return {path.name for path in self.path.iterdir()} <= {"plan.toml"}

    @property
    def checkpoints(self) -> Checkpoints:
        """Of the run."""
        return Checkpoints(self.path, self.kept)

    @property
    def rounds_done(self) -> int:
        """Rounds that have a checkpoint, for people; whether it is whole shows when it is read."""
        return self.checkpoints.newest

    def history(self) -> list[RoundSummary]:
        """Summaries of all rounds, as they were noted; without lines that are cut or damaged."""
        return [summary for _, summary in self._noted()]

    def resumed_history(self, rounds_done: int) -> list[RoundSummary]:
        """Summaries of the rounds that the checkpoint holds; all other lines are cut off."""
        kept = [(line, summary) for line, summary in self._noted() if summary.round <= rounds_done]
        content = "".join(line + "\n" for line, _ in kept).encode()
        if self._metrics.exists() and self._metrics.read_bytes() != content:
            write_bytes(self._metrics, content)
        return [summary for _, summary in kept]

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def _noted(self) -> list[tuple[str, RoundSummary]]:
        """The lines of ``metrics.jsonl`` that say something, and what they say."""
        content = self._metrics.read_bytes() if self._metrics.exists() else b""
        found = []
        for line in content.decode("utf-8", "replace").split("\n")[:-1]:
            try:
                found.append((line, RoundSummary.from_json(line)))
            except ValueError:
                logger.warning("%s: a line is damaged or cut short; it is left out", self._metrics)
        return found

    def result(self, task: Task) -> RunResult:
        """The finished run, read back.

        Raises:
            StateError: it is not finished.
        """
        path = self.path / "model.safetensors"
        if not path.exists():
            raise StateError(f"run {self.run_id} is not finished: there is no {path}")
        plan = self.plan
        parameters = flat(task, load_file(path)).numpy()
        return RunResult(self.run_id, plan, parameters, self.history())

    def note(self, summary: RoundSummary) -> None:
        """Append a line to ``metrics.jsonl``."""
        line = summary.to_json(time=datetime.now(UTC).isoformat(timespec="milliseconds"))
        append_line(self._metrics, line, sync=True)

    def finish(self, plan: TrainingPlan, task: Task, parameters: Vector) -> None:
        """Write ``model.safetensors``: named tensors, and in its metadata what they are."""
        tensors = split_shared(task, torch.tensor(parameters))
        about = {"run_id": self.run_id, "plan_digest": plan.digest, "plan": plan.to_json()}
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        write_tensors(self.path / "model.safetensors", arrays, about)

    def close(self) -> None:
        """The run is over: what a restart would need goes, and a new one may begin."""
        Journal(self.path).clear()
        self.checkpoints.clear()


def resume_or_begin(state: Path, plan: TrainingPlan, kept: int = KEPT) -> RunFolder:
    """The unfinished run under ``state`` if it has this plan, else a new one.

    Args:
        state: folder of the coordinator.
        plan: calibrated.
        kept: checkpoints to keep.

    Raises:
        StateError: an unfinished run has another plan, and holders were asked in it.
    """
    runs = state / "runs"
    unfinished = RunFolder.unfinished(runs, kept)
    if unfinished is None:
        name = datetime.now(UTC).strftime("%Y%m%d-%H%M%S") + "-" + uuid4().hex[:6]
        return RunFolder.begin(runs / name, plan, kept)
    differences = unfinished.plan.differences(plan)
    if not differences:
        return unfinished
    if unfinished.untouched:  # nobody was asked: there is nothing to go on with
        return RunFolder.begin(unfinished.path, plan, kept)
    raise StateError(
        f"run {unfinished.run_id} under {state} is unfinished and has another plan "
        f"({'; '.join(differences)}); start with the settings in "
        f"{unfinished.path / 'plan.toml'} to go on, or move that folder away to begin a new run, "
        "which the holders are charged for again"
    )


# -- where a run's records go ---------------------------------------------------------------------


@dataclass(frozen=True)
class Restored:
    """Where a run stands when a process takes it up.

    Args:
        state: after the last round that is whole.
        unfinished: that round's summary, if it is not noted yet.
        behind: name → rounds up to that one which a holder has missed in a row.
        lost: rounds up to that one that gave nothing, in a row.
    """

    state: RunState
    unfinished: RoundSummary | None = None
    behind: Mapping[str, int] = field(default_factory=dict)
    lost: int = 0


def _lost_in_a_row(history: Sequence[RoundSummary]) -> int:
    """How many of the last rounds gave nothing."""
    return sum(1 for _ in takewhile(lambda summary: bool(summary.lost), reversed(history)))


class Records(Protocol):
    """What :func:`server.app.federate` reads from, and writes to."""

    def restore(self, plan: TrainingPlan, task: Task) -> Restored:
        """Where the run stands."""
        ...

    def around(self, grid: Grid) -> Grid:
        """The Grid that writes replies down as they come in, if any does."""
        ...

    def randomness(self, number: int) -> Randomness:
        """The coordinator's own in a round."""
        ...

    def save(self, state: RunState, plan: TrainingPlan, summary: RoundSummary) -> None:
        """Keep the state after a round, before anybody learns of it."""
        ...

    def note(self, summary: RoundSummary) -> None:
        """Keep what a round did, evaluation and all."""
        ...

    def failed(self, number: int) -> None:
        """A round came to nothing: it is asked for anew when the run goes on."""
        ...

    def finish(self, plan: TrainingPlan, task: Task, state: RunState) -> RunResult:
        """The finished run."""
        ...


class InMemory:
    """Keeps summaries and nothing else: simulations."""

    def __init__(self) -> None:
        self._history: list[RoundSummary] = []

    def restore(self, plan: TrainingPlan, task: Task) -> Restored:
        """The beginning of a new run."""
        return Restored(RunState(uuid4().hex[:12], 0, initial_parameters(task, plan.seed)))

    def around(self, grid: Grid) -> Grid:
        """The Grid itself."""
        return grid

    def randomness(self, number: int) -> Randomness:
        """Unpredictable."""
        del number
        return OsRandomness()

    def save(self, state: RunState, plan: TrainingPlan, summary: RoundSummary) -> None:
        """Keep nothing."""

    def note(self, summary: RoundSummary) -> None:
        """Keep the summary."""
        self._history.append(summary)

    def failed(self, number: int) -> None:
        """Nothing is asked for anew."""

    def finish(self, plan: TrainingPlan, task: Task, state: RunState) -> RunResult:  # noqa: ARG002
        """The finished run."""
        return RunResult(state.run_id, plan, state.released, self._history)


class OnDisk:
    """Keeps everything in a run's folder, and little in memory however many rounds there are.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._journal = Journal(folder.path)
        self._known: set[str] = set()
        self._keeps_journal = False

    def restore(self, plan: TrainingPlan, task: Task) -> Restored:
        """The newest checkpoint that is whole, or the run's beginning.

        Raises:
            StateError: no checkpoint can be used; or the one before a damaged one would have to be
                gone on from, and what came in since, with the coordinator's noise, is gone too.
        """
        checkpoint, last_file = self._folder.checkpoints.load(plan)
        done = 0 if checkpoint is None else checkpoint.state.round
        # Who was asked for a round may know the model of the round before.
        noted = [summary.round for summary in self._folder.history()]
        released = max(last_file, *noted, self._journal.newest - 1, 0)
        self._require_unreleased(plan, range(done + 1, released + 1))
        history = self._folder.resumed_history(done)
        self._known = {name for each in history for name in (*each.accepted, *each.missed)}
        if checkpoint is None:
            restored = Restored(
                RunState(self._folder.run_id, 0, initial_parameters(task, plan.seed))
            )
        else:
            last = history[-1] if history else None
            unfinished = checkpoint.summary if last is None or last.round < done else None
            behind = {} if last is None else last.missed_in_a_row
            restored = Restored(checkpoint.state, unfinished, behind, _lost_in_a_row(history))
        if is_buffered(plan.strategy.name) and done < released:
            return self._without(restored, min(released + 1, plan.rounds))
        return restored

    def around(self, grid: Grid) -> Grid:
        """A Grid that keeps a journal; the Grid itself where nothing can be interrupted."""
        if isinstance(grid, BaseGrid) and grid.complete:
            return grid
        self._keeps_journal = True
        return JournalGrid(grid, self._journal, self._known)

    def randomness(self, number: int) -> Randomness:
        """From the journal's key of the round."""
        return self._journal.randomness(number)

    def save(self, state: RunState, plan: TrainingPlan, summary: RoundSummary) -> None:
        """Write a checkpoint; journals that none of those left could need go."""
        if self._keeps_journal and not is_buffered(plan.strategy.name):
            self._journal.complete(state.round)
        oldest = self._folder.checkpoints.save(state, plan, summary)
        self._journal.drop(up_to=oldest)

    def note(self, summary: RoundSummary) -> None:
        """Append to ``metrics.jsonl``."""
        self._folder.note(summary)

    def failed(self, number: int) -> None:
        """Drop what came in for a round."""
        self._journal.discard(number)

    def finish(self, plan: TrainingPlan, task: Task, state: RunState) -> RunResult:
        """Write the model, and read the rounds back."""
        self._journal.close()
        self._folder.finish(plan, task, state.released)
        return RunResult(state.run_id, plan, state.released, self._folder.history())

    def _without(self, restored: Restored, number: int) -> Restored:
        """Leave out the rounds of asynchronous training whose checkpoints are gone.

        Replies to them are in no journal. Done again they would give other models, and holders
        send for the next one what they computed on those that there were.

        Args:
            restored: what there is.
            number: the last round that anybody may have been asked for.
        """
        state = restored.state
        while state.round < number:
            state = state.skipped()
            self.note(RoundSummary(state.round, (), {}, 0.0, lost="its checkpoint is damaged"))
        return replace(restored, state=state)

    def _require_unreleased(self, plan: TrainingPlan, again: Sequence[int]) -> None:
        """Refuse to do a round again whose model has left, unless it would be the same model.

        Where holders are the unit the coordinator adds the noise: with other noise, or to other
        updates, the round would be released twice and paid for once. In other plans holders send
        what they sent before, or decline.
        """
        if plan.privacy.kind != "central":
            return
        for number in again:
            if not self._journal.has_trained(number):
                raise StateError(
                    f"round {number} of run {self._folder.run_id} has been released, and neither a "
                    "whole checkpoint nor its journal is left to go on from; doing it again would "
                    "release it twice. Restore the newest checkpoint from a backup, or begin a new "
                    "run, which has a price of its own"
                )
