"""What a holder keeps: its ledger, the answers it has given, its private parameters.

An *answer* is everything that a request produced: what leaves, and the private parameters that
stay. It is one file, written before the ledger's commit, which records the file's digest; the
request asked again is answered from it, byte for byte, at no price.

What the disk does not let us do is a :class:`~common.errors.StorageError`: the holder declines the
request, and what it leaves on the disk is as if the process had been killed there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor, from_numpy

from common.durable import (
    PART,
    read_tensors,
    reserved,
    storage_errors,
    sync_folder,
    write_tensors,
)
from common.errors import StateError
from common.privacy.ledger import Ledger
from common.wire import TrainReply

__all__ = ["Answer", "AnswerStore", "FileAnswers", "HolderState", "MemoryAnswers", "Stored"]

logger = logging.getLogger("sotto.holder")

_PRIVATE, _PART = "private.", "part"
KEPT_PER_RUN, KEPT_RUNS = 4, 16
"""Answers kept of one kind in one run; and of how many of these. Updates and evaluations are two
kinds.

A coordinator that keeps K checkpoints (two, unless told otherwise) may find all but the oldest of
them damaged. It then asks once more for the last K rounds, the one in progress included, and not
for more: so K answers of each kind must be here. With fewer the holder declines the oldest of those
rounds, as it computes nothing twice. The private parameters that the oldest of them began with are
not needed again."""

SPARE = 2**18
"""Bytes on the disk that must be free beside an answer: for its header, and for the ledger."""


@dataclass(frozen=True)
class Stored:
    """A reply as it is kept, whatever was asked.

    Args:
        tensors: what leaves, and what stays, by name.
        about: the rest of it, as text.
    """

    tensors: Mapping[str, np.ndarray[Any, Any]]
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def can_be_given(self) -> bool:
        """Whether what leaves is in it; the part of a masked sum is not, which leaves once."""
        return _PART not in self.about


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
            return Stored(private, {"units": self.units, _PART: secrets.token_hex(16)})
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
    def room(self, request_id: str, size: int) -> AbstractContextManager[None]:
        """Keep room for an answer, from before it is computed until it is stored.

        Args:
            request_id: of the request.
            size: of the answer in bytes, roughly; :data:`SPARE` comes on top.

        Raises:
            StorageError: there is none.
        """

    @abstractmethod
    def put(self, request_id: str, answer: Stored) -> str:
        """Store an answer and return its digest.

        Raises:
            StorageError: it could not be stored, or it is not known whether it was.
        """

    @abstractmethod
    def digest(self, request_id: str) -> str | None:
        """Digest of a stored answer; None where there is none."""

    @abstractmethod
    def get(self, request_id: str, digest: str) -> Stored | None:
        """The stored answer, or None if it is no longer there.

        Raises:
            StorageError: it cannot be read.
            StateError: it is there, and is not what the ledger says was released.
        """

    @abstractmethod
    def rounds(self, run_id: str) -> list[int]:
        """Rounds of a run whose answers are here, newest first."""


@dataclass
class MemoryAnswers(AnswerStore):
    """For simulations: the last answer of each run, in memory."""

    _last: dict[str, tuple[str, Stored]] = field(default_factory=dict)

    def room(self, request_id: str, size: int) -> AbstractContextManager[None]:
        """There always is."""
        del request_id, size
        return nullcontext()

    def put(self, request_id: str, answer: Stored) -> str:
        """Remember the answer in place of the run's previous one."""
        self._last[_run_of(request_id)] = (request_id, answer)
        return ""

    def digest(self, request_id: str) -> str | None:
        """Empty, as in :meth:`put`."""
        return None if self.get(request_id, "") is None else ""

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
    """One safetensors file for each of the last answers, of each kind, of each of the last runs.

    Args:
        folder: of the answers. It is not made here: one that has gone is a disk that has gone, and
            another in its place would be of another disk.
    """

    folder: Path

    @contextmanager
    def room(self, request_id: str, size: int) -> Iterator[None]:
        """Take the room on the disk; what a crash left half-written goes."""
        path = self._path(request_id)
        with storage_errors(path):
            self._make(path.parent)
            for left in path.parent.glob("*" + PART):
                left.unlink(missing_ok=True)
        try:
            with reserved(path, size + SPARE):
                yield
        finally:
            with suppress(OSError):  # there is an answer in it
                path.parent.rmdir()

    def put(self, request_id: str, answer: Stored) -> str:
        """Write the answer atomically and drop what is no longer asked for."""
        path = self._path(request_id)
        with storage_errors(path):
            self._make(path.parent)
            digest = write_tensors(path, answer.tensors, answer.about)
        try:
            _stamp(path.parent)
            _drop_rounds(path)
            _drop_runs(path.parent)
        except OSError as error:  # the answer is there, and the next one tries again
            logger.warning("old answers stay under %s: %s", self.folder, error)
        return digest

    def get(self, request_id: str, digest: str) -> Stored | None:
        """Read the answer back and check it against the ledger's digest."""
        path = self._path(request_id)
        with storage_errors(path):
            content = path.read_bytes() if self._there(path) else None
        if content is None:
            return None
        try:
            if hashlib.sha256(content).hexdigest() == digest:
                return Stored(*read_tensors(content))
        except ValueError:
            pass  # stored whole, damaged before its commit, and committed as it was
        raise StateError(
            f"{path} is not the answer that the ledger recorded; it is damaged or was "
            "changed. Restore it from a backup, or delete it: the holder then misses that round"
        )

    def digest(self, request_id: str) -> str | None:
        """Sha256 of a stored answer's file; None where there is none."""
        path = self._path(request_id)
        with storage_errors(path):
            if not self._there(path):
                return None
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

    def rounds(self, run_id: str) -> list[int]:
        """Rounds of a run whose answers are here, newest first."""
        with storage_errors(self.folder):
            self.folder.stat()
            return sorted(map(_round_of, _answers_in(self.folder / run_id)), reverse=True)

    def _path(self, request_id: str) -> Path:
        return self.folder / f"{request_id}.safetensors"

    def _there(self, path: Path) -> bool:
        """Whether there is a file, in a folder that is there: else nothing is known of it."""
        self.folder.stat()
        return path.exists()

    def _make(self, run: Path) -> None:
        """Make a run's folder, if it is not there."""
        if not run.exists():
            run.mkdir()
            sync_folder(self.folder)


def _answers_in(run: Path) -> list[Path]:
    if not run.exists():
        return []
    return [path for path in run.iterdir() if path.suffix == ".safetensors"]


def _round_of(path: Path) -> int:
    return int(path.stem)


def _drop_rounds(keep: Path) -> None:
    """Delete all but the newest answers beside ``keep``, and never ``keep`` itself."""
    others = sorted((path for path in _answers_in(keep.parent) if path != keep), key=_round_of)
    for old in others[: 1 - KEPT_PER_RUN]:
        old.unlink()


def _drop_runs(keep: Path) -> None:
    """Delete all but the newest runs beside ``keep``, and never ``keep`` itself."""
    others = sorted((run for run in _runs_beside(keep) if run != keep), key=_changed)
    for old in others[: 1 - KEPT_RUNS]:
        shutil.rmtree(old)


def _stamp(run: Path) -> None:
    """Note that a run was changed after all others, also where the clock was set back since."""
    last = max((_changed(other) for other in _runs_beside(run) if other != run), default=0)
    now = max(time.time_ns(), last + 1)
    os.utime(run, ns=(now, now))


def _runs_beside(run: Path) -> Iterator[Path]:
    return (path for path in run.parent.iterdir() if path.is_dir())


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns


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

        Raises:
            StorageError: the folder cannot be used, as it is.
            StateError: the ledger is damaged or older than it should be.
        """
        answers = FileAnswers(folder / "answers")
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            answers.folder.mkdir(exist_ok=True)
        ledger = Ledger.open(folder / "ledger.sqlite", anchors)
        try:
            ledger.resolve(answers.digest)  # what a crash left stored, and not yet committed
        except BaseException:
            ledger.close()
            raise
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
