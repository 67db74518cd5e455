"""What a holder keeps: its ledger, the answers it has given, its private parameters.

An *answer* is everything that a request produced: what leaves, and the private parameters that
stay. It is one file, written before the ledger's commit, which records the file's digest; the
request asked again is answered from it, byte for byte, at no price.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from safetensors import safe_open
from torch import Tensor, from_numpy

from common.durable import sync_folder, write_tensors
from common.errors import StateError
from common.privacy.ledger import Ledger
from common.wire import TrainReply

__all__ = ["Answer", "AnswerStore", "FileAnswers", "HolderState", "MemoryAnswers", "Stored"]

_PRIVATE = "private."
KEPT_PER_RUN, KEPT_RUNS = 2, 16
"""Answers kept of one kind in one run; and of how many of these. Updates and evaluations are two
kinds."""


@dataclass(frozen=True)
class Stored:
    """A reply as it is kept, whatever was asked.

    Args:
        tensors: what leaves, and what stays, by name.
        about: the rest of it, as text.
    """

    tensors: Mapping[str, np.ndarray[Any, Any]]
    about: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What one training request produced.

    Args:
        reply: leaves the holder; None where it left masked, which happens once and is not repeated.
        private: the private parameters after it; they stay.
        units: digest of the training units that the private parameters belong to.
    """

    reply: TrainReply | None
    private: Mapping[str, Tensor]
    units: str = ""

    def stored(self) -> Stored:
        """The form in which it is kept."""
        private = {_PRIVATE + name: value.numpy() for name, value in self.private.items()}
        if self.reply is None:
            # So that two processes that gave two parts do not take them for the same.
            return Stored(private, {"units": self.units, "part": secrets.token_hex(16)})
        about = {
            "weight": json.dumps(self.reply.weight),
            "within": json.dumps(self.reply.within),
            "units": self.units,
        }
        return Stored({"update": self.reply.update, **private}, about)

    @classmethod
    def of(cls, stored: Stored) -> Answer:
        """Inverse of :meth:`stored`."""
        private = {
            name.removeprefix(_PRIVATE): from_numpy(np.array(value))
            for name, value in stored.tensors.items()
            if name.startswith(_PRIVATE)
        }
        units = stored.about["units"]
        if "update" not in stored.tensors:
            return cls(None, private, units)
        weight, within = (json.loads(stored.about[name]) for name in ("weight", "within"))
        reply = TrainReply(stored.tensors["update"], float(weight), within)
        return cls(reply, private, units)


class AnswerStore(ABC):
    """Where answers are kept."""

    @abstractmethod
    def put(self, request_id: str, answer: Stored) -> str:
        """Store an answer and return its digest."""

    @abstractmethod
    def get(self, request_id: str, digest: str) -> Stored | None:
        """The stored answer, or None if it is no longer there.

        Raises:
            StateError: it is there, and is not what the ledger says was released.
        """

    @abstractmethod
    def rounds(self, run_id: str) -> list[int]:
        """Rounds of a run whose answers are here, newest first."""


@dataclass
class MemoryAnswers(AnswerStore):
    """For simulations: the last answer of each run, in memory."""

    _last: dict[str, tuple[str, Stored]] = field(default_factory=dict)

    def put(self, request_id: str, answer: Stored) -> str:
        """Remember the answer in place of the run's previous one."""
        self._last[_run_of(request_id)] = (request_id, answer)
        return ""

    def get(self, request_id: str, digest: str) -> Stored | None:
        """The run's last answer, if it is this one."""
        del digest
        key, answer = self._last.get(_run_of(request_id), ("", None))
        return answer if key == request_id else None

    def rounds(self, run_id: str) -> list[int]:
        """The round of the run's last answer."""
        key, _ = self._last.get(run_id, ("", None))
        return [int(key.rpartition("/")[2])] if key else []


@dataclass(frozen=True)
class FileAnswers(AnswerStore):
    """One safetensors file for each of the last answers, of each kind, of each of the last runs."""

    folder: Path

    def put(self, request_id: str, answer: Stored) -> str:
        """Write the answer atomically and drop what is no longer asked for."""
        path = self._path(request_id)
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
            sync_folder(path.parent.parent)
        digest = write_tensors(path, dict(answer.tensors), dict(answer.about))
        _drop_oldest(path, "*.safetensors", KEPT_PER_RUN)
        _drop_oldest(path.parent, "*", KEPT_RUNS)
        return digest

    def get(self, request_id: str, digest: str) -> Stored | None:
        """Read the answer back and check it against the ledger's digest."""
        path = self._path(request_id)
        found = self.digest(request_id)
        if found is None:
            return None
        if found != digest:
            raise StateError(
                f"{path} is not the answer that the ledger recorded; it is damaged or was "
                "changed. Restore it from a backup, or delete it: the holder then misses that round"
            )
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Stored(tensors, file.metadata() or {})

    def digest(self, request_id: str) -> str | None:
        """Sha256 of a stored answer's file; None where there is none."""
        path = self._path(request_id)
        if not path.exists():
            return None
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def rounds(self, run_id: str) -> list[int]:
        """Rounds of a run whose answers are here, newest first."""
        found = (self.folder / run_id).glob("*.safetensors")
        return sorted((int(path.stem) for path in found), reverse=True)

    def _path(self, request_id: str) -> Path:
        return self.folder / f"{request_id}.safetensors"


def _drop_oldest(keep: Path, pattern: str, count: int) -> None:
    """Delete all but the ``count`` newest of ``keep``'s siblings, and never ``keep`` itself."""
    siblings = sorted(keep.parent.glob(pattern), key=lambda path: path.stat().st_mtime_ns)
    for old in siblings[:-count]:
        if old.is_dir() and old != keep:
            shutil.rmtree(old)
        elif old != keep:
            old.unlink()


def _run_of(request_id: str) -> str:
    return request_id.rpartition("/")[0]


@dataclass
class HolderState:
    """A holder's durable side.

    Args:
        ledger: of releases.
        answers: given so far.
        folder: where a holder's own metrics go; None in simulations.
    """

    ledger: Ledger
    answers: AnswerStore
    folder: Path | None = None

    @classmethod
    def at(cls, folder: Path, anchors: Sequence[Path] = ()) -> HolderState:
        """In a folder, made if need be; it survives restarts.

        Args:
            folder: of the holder.
            anchors: further files that know the ledger's last entry, best on another disk.
        """
        folder.mkdir(parents=True, exist_ok=True)
        ledger = Ledger.open(folder / "ledger.sqlite", anchors)
        answers = FileAnswers(folder / "answers")
        ledger.resolve(answers.digest)  # what a crash left stored, and not yet committed
        return cls(ledger, answers, folder)

    @classmethod
    def in_memory(cls) -> HolderState:
        """For a simulated holder."""
        return cls(Ledger.open(":memory:"), MemoryAnswers())

    def close(self) -> None:
        """Close the ledger."""
        self.ledger.close()

    def __enter__(self) -> HolderState:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
