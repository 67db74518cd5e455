"""Checkpoints: exactly the state of the round loop, one atomic file a round.

Tensors and JSON travel in one safetensors file (the JSON is its metadata), so that they cannot
disagree. A file is written beside its final name, synced, and renamed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from common.durable import write_tensors
from common.errors import StateError
from common.plan import TrainingPlan
from common.texts import read_json
from common.wire import Vector

__all__ = ["Checkpoints", "RunState"]

NDArray = npt.NDArray[np.floating]
KEPT = 2


@dataclass(frozen=True)
class RunState:
    """Everything the round loop knows between two rounds.

    Args:
        run_id: names the run.
        round: rounds completed.
        parameters: what the next round starts from, [D] float32.
        mean: of the round models since averaging began, [D] float64; None before.
        averaged: how many models are in ``mean``.
        strategy: the strategy's memory.
    """

    run_id: str
    round: int
    parameters: Vector
    mean: npt.NDArray[np.float64] | None = None
    averaged: int = 0
    strategy: dict[str, NDArray] = field(default_factory=dict)

    @property
    def released(self) -> Vector:
        """The model that this state stands for: the mean if averaging began, else the last."""
        return self.parameters if self.mean is None else self.mean.astype(np.float32)

    def advanced(
        self, parameters: Vector, strategy: dict[str, NDArray], *, average: bool
    ) -> RunState:
        """The state after a round.

        Args:
            parameters: the strategy's result.
            strategy: the strategy's memory.
            average: whether this round's model enters the mean.
        """
        mean, averaged = self.mean, self.averaged
        if average:
            old = np.zeros(len(parameters)) if mean is None else mean
            averaged += 1
            mean = old + (parameters - old) / averaged
        return replace(
            self,
            round=self.round + 1,
            parameters=parameters,
            mean=mean,
            averaged=averaged,
            strategy=strategy,
        )

    def skipped(self) -> RunState:
        """The state after a round that gave nothing."""
        return replace(self, round=self.round + 1)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: of the run.
    """

    folder: Path

    def save(self, state: RunState, plan: TrainingPlan) -> None:
        """Write ``state`` and drop all but the newest two."""
        tensors: dict[str, npt.NDArray[np.floating]] = {"parameters": state.parameters}
        if state.mean is not None:
            tensors["mean"] = state.mean
        tensors |= {f"strategy/{name}": value for name, value in state.strategy.items()}
        about = {
            "run_id": state.run_id,
            "round": state.round,
            "averaged": state.averaged,
            "plan_digest": plan.digest,
        }
        path = self.folder / f"checkpoint-{state.round:06d}.safetensors"
        write_tensors(path, tensors, {"sotto": json.dumps(about)})
        for old in list(self._files())[KEPT:]:
            old.unlink()

    def load(self, plan: TrainingPlan) -> RunState | None:
        """The newest checkpoint, or None if there is none.

        Raises:
            StateError: it cannot be read, or belongs to another plan.
        """
        newest = next(self._files(), None)
        if newest is None:
            return None
        try:
            digest, state = _read(newest)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StateError(
                f"{newest} cannot be read ({type(error).__name__}); delete it to go on from the "
                "checkpoint before it"
            ) from None
        if digest != plan.digest:
            raise StateError(f"{newest} belongs to another plan than {self.folder / 'plan.toml'}")
        return state

    def clear(self) -> None:
        """Delete all checkpoints: the run has ended and its model is kept."""
        for path in list(self._files()):
            path.unlink()

    def _files(self) -> Iterator[Path]:
        """Newest first."""
        named = re.compile(r"checkpoint-\d{6}\.safetensors")
        found = [path for path in self.folder.glob("checkpoint-*") if named.fullmatch(path.name)]
        yield from sorted(found, reverse=True)


def _read(path: Path) -> tuple[str, RunState]:
    """The digest of a checkpoint's plan, and its state."""
    with safe_open(path, framework="numpy") as file:
        about = read_json(file.metadata()["sotto"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = RunState(
        run_id=about["run_id"],
        round=about["round"],
        parameters=tensors["parameters"],
        mean=tensors.get("mean"),
        averaged=about["averaged"],
        strategy={
            name.removeprefix("strategy/"): value
            for name, value in tensors.items()
            if name.startswith("strategy/")
        },
    )
    return about["plan_digest"], state
