"""Checkpoints: exactly the state of the round loop, one atomic, checksummed file a round.

Tensors and JSON travel in one safetensors file (the JSON is its metadata), so that they cannot
disagree. A file is written beside its final name, synced, and renamed; the name holds the sha256 of
what is in it. So a file is the one that was written, to the last bit, or it is known to be another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.durable import read_tensors, storage_errors, write_tensors
from common.errors import StateError
from common.plan import TrainingPlan
from common.texts import read_json
from common.wire import Vector
from server.summaries import RoundSummary

__all__ = ["KEPT", "Checkpoint", "Checkpoints", "RunState", "file_name"]

NDArray = npt.NDArray[np.floating]
KEPT = 2
"""Checkpoints that are kept unless said otherwise: the newest, and one for when that is damaged."""

_SUM = 32
_NAMED = re.compile(rf"checkpoint-(\d{{6}})-([0-9a-f]{{{_SUM}}})\.safetensors")

logger = logging.getLogger("sotto.coordinator")


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
class Checkpoint:
    """What a file holds.

    Args:
        state: after a round.
        summary: of that round, with the holders whose contributions are in the state.
        plan_digest: of the plan that it belongs to.
    """

    state: RunState
    summary: RoundSummary
    plan_digest: str


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: of the run.
        kept: how many to keep, at least 1.
    """

    folder: Path
    kept: int = KEPT

    def save(self, state: RunState, plan: TrainingPlan, summary: RoundSummary) -> int:
        """Write a checkpoint, and drop all but the newest.

        Returns:
            The round of the oldest state that there is to go on from: 0, for the run's beginning,
            until as many are there as are kept.
        """
        tensors: dict[str, npt.NDArray[np.floating]] = {"parameters": state.parameters}
        if state.mean is not None:
            tensors["mean"] = state.mean
        tensors |= {f"strategy/{name}": value for name, value in state.strategy.items()}
        about = {
            "run_id": state.run_id,
            "round": state.round,
            "averaged": state.averaged,
            "plan_digest": plan.digest,
            "summary": summary.to_json(),
        }
        write_tensors(
            self.folder / "checkpoint",
            tensors,
            {"sotto": json.dumps(about)},
            named=lambda digest: file_name(state.round, digest),
            mode=0o600,  # rows of the coordinator's noise are as secret as the updates
        )
        files = list(self._files())
        for old in files[self.kept :]:
            old.unlink()
        return _round_of(files[self.kept - 1]) if len(files) >= self.kept else 0

    def load(self, plan: TrainingPlan) -> tuple[Checkpoint | None, int]:
        """The newest checkpoint that is as it was written.

        One that is not is put aside, with a warning, for the one before it; before the first there
        is the run's beginning.

        Returns:
            The checkpoint, or None for the beginning; and the last round that any file speaks of,
            whose model may have left the coordinator.

        Raises:
            StateError: none can be used, or it belongs to another plan.
        """
        last, damaged = self._put_aside_up_to(), list[Path]()
        for path in list(self._files()):
            last = max(last, _round_of(path))
            checkpoint = _read(path)
            if checkpoint is None:
                damaged.append(path)
                continue
            if checkpoint.plan_digest != plan.digest:
                raise StateError(f"{path} belongs to another plan than {self.folder / 'plan.toml'}")
            _put_aside(damaged, f"going on from round {checkpoint.state.round}")
            return checkpoint, last
        if damaged and _round_of(damaged[-1]) > 1:
            raise StateError(
                f"no checkpoint under {self.folder} is as it was written; restore the newest "
                f"({damaged[0].name}) from a backup, or move the folder away to begin a new run"
            )
        _put_aside(damaged, "beginning again with round 1")
        return None, last

    def _put_aside_up_to(self) -> int:
        """The last round whose checkpoint was found damaged before; 0 for none."""
        found = self.folder.glob("checkpoint-*.damaged")
        names = (path.with_suffix(".safetensors") for path in found)
        return max((_round_of(path) for path in names if _NAMED.fullmatch(path.name)), default=0)

    @property
    def newest(self) -> int:
        """The round of the newest file, whole or not; 0 if there is none."""
        newest = next(self._files(), None)
        return 0 if newest is None else _round_of(newest)

    def clear(self) -> None:
        """Delete all checkpoints: the run is over, and its model is kept.

        The newest goes last: with it alone a run that was cut here is over, too, and with an older
        one alone its last rounds would be asked for again.
        """
        aside = self.folder.glob("checkpoint-*.damaged")
        for path in [*aside, *reversed(list(self._files()))]:
            path.unlink()

    def _files(self) -> Iterator[Path]:
        """Newest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if _NAMED.fullmatch(path.name)]
        yield from sorted(found, reverse=True)


def file_name(number: int, digest: str) -> str:
    """The name of a checkpoint.

    Args:
        number: of the round.
        digest: sha256 of the file, in hex.
    """
    return f"checkpoint-{number:06d}-{digest[:_SUM]}.safetensors"


def _round_of(path: Path) -> int:
    match = _NAMED.fullmatch(path.name)
    assert match is not None  # listed by this very pattern
    return int(match[1])


def _put_aside(damaged: list[Path], then: str) -> None:
    for path in damaged:
        logger.warning("%s is not as it was written (its checksum differs); %s", path, then)
        path.rename(path.with_suffix(".damaged"))


def _read(path: Path) -> Checkpoint | None:
    """A checkpoint; None if it is not what its name says."""
    with storage_errors(path):
        content = path.read_bytes()
    if file_name(_round_of(path), hashlib.sha256(content).hexdigest()) != path.name:
        return None
    try:
        return _parsed(content)
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(
            f"{path} is whole and cannot be read ({type(error).__name__}): another version of "
            "sotto wrote it; go on with that version"
        ) from None


def _parsed(content: bytes) -> Checkpoint:
    tensors, metadata = read_tensors(content)
    about = read_json(metadata["sotto"])
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
    return Checkpoint(state, RoundSummary.from_json(about["summary"]), about["plan_digest"])
