"""A run on the coordinator's disk: plan, checkpoints, figures and, at the end, the model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from safetensors.torch import load_file

from common.durable import write_bytes, write_tensors
from common.errors import StateError
from common.plan import TrainingPlan
from common.tasks.base import Task
from common.tasks.histograms import Estimate
from common.tasks.parameters import flat, initial_parameters, split_shared
from common.wire import Vector
from server.aggregation import build_strategy
from server.checkpoints import Checkpoints, RunState
from server.rounds import RoundSummary

__all__ = ["RunFolder", "RunResult", "resume_or_begin"]


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
    """

    path: Path

    @classmethod
    def begin(cls, path: Path, plan: TrainingPlan) -> RunFolder:
        """A new run's folder, with its plan in it; what an earlier run left there goes.

        Raises:
            ConfigurationError: the plan's strategy cannot work.
        """
        build_strategy(plan)
        path.mkdir(parents=True, exist_ok=True)
        Checkpoints(path).clear()
        for name in ("metrics.jsonl", "model.safetensors", "report.html"):
            (path / name).unlink(missing_ok=True)
        write_bytes(path / "plan.toml", plan.to_toml().encode())
        return cls(path)

    @classmethod
    def unfinished(cls, runs: Path) -> RunFolder | None:
        """The run under ``runs`` that began and has no model yet, if there is one."""
        for path in sorted(runs.glob("*/plan.toml"), reverse=True):
            if not (path.parent / "model.safetensors").exists():
                return cls(path.parent)
        return None

    @property
    def run_id(self) -> str:
        """Names the run."""
        return self.path.name

    @property
    def plan(self) -> TrainingPlan:
        """The plan the run began with."""
        return TrainingPlan.from_toml((self.path / "plan.toml").read_text())

    def state(self, plan: TrainingPlan, task: Task) -> RunState:
        """The newest checkpoint, or the initial parameters where there is none."""
        saved = Checkpoints(self.path).load(plan)
        return saved or RunState(self.run_id, 0, initial_parameters(task, plan.seed))

    def history(self, rounds_done: int) -> list[RoundSummary]:
        """Summaries of the rounds that the checkpoint holds; later lines are cut off."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        lines = path.read_text().splitlines()
        kept = [line for line in lines if _round_of(line) <= rounds_done]
        write_bytes(path, "".join(line + "\n" for line in kept).encode())
        return [_summary_of(line) for line in kept]

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
        return RunResult(self.run_id, plan, parameters, self.history(plan.rounds))

    def note(self, summary: RoundSummary) -> None:
        """Append a line to ``metrics.jsonl``."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **asdict(summary)}
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(_without_nan(line)) + "\n")

    def finish(self, plan: TrainingPlan, task: Task, parameters: Vector) -> None:
        """Write ``model.safetensors``: named tensors, and in its metadata what they are."""
        tensors = split_shared(task, torch.tensor(parameters))
        about = {"run_id": self.run_id, "plan_digest": plan.digest, "plan": plan.to_json()}
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        write_tensors(self.path / "model.safetensors", arrays, about)
        Checkpoints(self.path).clear()


def resume_or_begin(state: Path, plan: TrainingPlan) -> RunFolder:
    """The unfinished run under ``state`` if it has this plan, else a new one.

    Raises:
        StateError: an unfinished run has another plan.
    """
    runs = state / "runs"
    unfinished = RunFolder.unfinished(runs)
    if unfinished is None:
        name = datetime.now(UTC).strftime("%Y%m%d-%H%M%S") + "-" + uuid4().hex[:6]
        return RunFolder.begin(runs / name, plan)
    if not unfinished.plan.same_but_for_noise(plan):
        raise StateError(
            f"run {unfinished.run_id} under {state} is unfinished and has another plan; start "
            f"with the settings in {unfinished.path / 'plan.toml'} to go on, or move that folder "
            "away to begin anew"
        )
    return unfinished


# -- lines of metrics.jsonl -----------------------------------------------------------------------


def _without_nan(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _round_of(line: str) -> int:
    try:
        return int(json.loads(line)["round"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return 10**9  # a line that a crash cut short: after every checkpoint


def _summary_of(line: str) -> RoundSummary:
    values = json.loads(line)
    metrics = {name: _with_nan(figures) for name, figures in values["metrics"].items()}
    evaluation = {
        name: Estimate(**_with_nan(figures))
        for name, figures in values.get("evaluation", {}).items()
    }
    return RoundSummary(
        values["round"],
        tuple(values["accepted"]),
        values["missed"],
        values["seconds"],
        metrics,
        evaluation,
        values.get("lost", ""),
    )


def _with_nan(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {key: math.nan if value is None else value for key, value in figures.items()}
