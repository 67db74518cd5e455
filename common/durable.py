"""Files that a crash leaves whole: the old one or the new one, never half of either.

A file is written beside its final name, synced, and renamed. What the operating system says against
any of it is a :class:`~common.errors.StorageError`; the half that was written is removed, or, where
not even that could be done, written over by the next attempt.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load

from common.errors import StateError, StorageError

__all__ = [
    "PART",
    "append_line",
    "locked",
    "read_tensors",
    "reserved",
    "storage_errors",
    "sync_folder",
    "write_all",
    "write_bytes",
    "write_tensors",
]

PART = ".part"
"""Ends the name of a file that is being written."""

LOCK = "lock"
"""The file in a state folder that a process locks while the folder is its own."""

_DTYPES: Mapping[str, str] = {
    "bool": "BOOL",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
}
"""numpy's names of types → safetensors'."""

_Parts = Iterable[bytes | memoryview]


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        StorageError: it could not be written, or not be made to last; what was there before is
            there still, or, if only the folder's sync failed, the new file.
    """
    with storage_errors(path):
        _replace(path, [content])


def write_tensors(
    path: Path,
    tensors: Mapping[str, npt.NDArray[Any]],
    metadata: Mapping[str, str],
    *,
    named: Callable[[str], str] | None = None,
    mode: int = 0o666,
) -> str:
    """The same for a safetensors file, straight from the arrays' memory.

    safetensors' own writer makes a temporary file of its own naming, which a killed process leaves
    behind.

    Args:
        path: of the file.
        tensors: by name.
        metadata: text that travels in the file's header.
        named: gives the file another name, from its digest.
        mode: who may read and write it, less what the process' umask takes.

    Returns:
        Sha256 of the file, in hex.

    Raises:
        StorageError: it could not be written, or not be made to last; what was there before is
            there still, or, if only the folder's sync failed, the new file.
    """
    with storage_errors(path):
        return _replace(path, _safetensors(tensors, metadata), named, mode)


def read_tensors(
    content: bytes,
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """What :func:`write_tensors` wrote: tensors and metadata.

    Args:
        content: of the file, so that what is read is what was checked before.

    Raises:
        ValueError: it is not a safetensors file.
    """
    try:
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")
        return tensors, dict(json.loads(content[8 : 8 + length]).get("__metadata__", {}))
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def append_line(path: Path, line: str, *, sync: bool = False) -> None:
    """Add a line to a file: all of it or nothing, unless the process dies in the midst.

    Half a line, of a process that did, is ended first.

    Args:
        path: of the file.
        line: without its end.
        sync: whether to return only when it is on the disk.

    Raises:
        StorageError: it could not be added.
    """
    with storage_errors(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            size = os.fstat(handle).st_size
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            try:
                os.lseek(handle, size, os.SEEK_SET)
                write_all(handle, [b"\n" * torn + line.encode() + b"\n"])
                if sync:
                    os.fsync(handle)
            except OSError:
                os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)


@contextmanager
def reserved(path: Path, size: int) -> Iterator[None]:
    """Keep room on the disk for a file that is to be written, until the block ends.

    The room is taken, not only looked for: the file beside the final name has it, and
    :func:`write_tensors` writes over that.

    Args:
        path: of the file; its folder must be there.
        size: bytes.

    Raises:
        StorageError: there is not so much room, or the folder cannot be written.
    """
    part = _beside(path)
    try:
        with storage_errors(path):
            handle = os.open(part, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                _take_room(handle, size)
            finally:
                os.close(handle)
        yield
    finally:
        _remove(part)


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Keep a state folder to this process, until the block ends or the process does.

    The lock is the kernel's (``flock(2)``) and not the file's being there, so that a process that
    was killed leaves none behind.

    Args:
        folder: made if need be.
        what: this process is, for whoever finds the folder locked: ``"sotto join"``.

    Raises:
        StateError: another process keeps it; names it by its process id.
        StorageError: the folder cannot be written or locked.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with storage_errors(folder):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _in_use(folder, os.pread(handle, 100, 0)) from None
        with suppress(OSError):  # a full disk; the lock holds without a name
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{what}, process {os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """What the operating system says against a file, or a folder, as our own error.

    Args:
        path: what is used in the block.

    Raises:
        StorageError: with the path and the reason; for the eyes of whose machine it is.
    """
    try:
        yield
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, type(error).__name__)
        raise StorageError(
            f"{path} cannot be used ({error.strerror or 'no reason given'}, {code}); check that "
            "its folder is there and writable, and that the disk is not full"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make a rename or a new entry in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_all(handle: int, parts: _Parts) -> None:
    """Write parts at a descriptor's position, however many calls that takes; raises OSError."""
    for part in parts:
        left = memoryview(part)
        while left:
            left = left[os.write(handle, left) :]


# -- inside --------------------------------------------------------------------------------------


def _replace(
    path: Path,
    parts: _Parts,
    named: Callable[[str], str] | None = None,
    mode: int = 0o666,
) -> str:
    """Write parts beside ``path``, sync, rename; returns sha256 of the whole, in hex."""
    part, digest = _beside(path), hashlib.sha256()
    try:
        # Without truncating: it may hold room that was reserved.
        handle = os.open(part, os.O_WRONLY | os.O_CREAT, mode)
        try:
            write_all(handle, _noted(digest, parts))
            os.ftruncate(handle, os.lseek(handle, 0, os.SEEK_CUR))
            os.fsync(handle)
        finally:
            os.close(handle)
        part.replace(path if named is None else path.with_name(named(digest.hexdigest())))
    except BaseException:
        _remove(part)
        raise
    sync_folder(path.parent)
    return digest.hexdigest()


def _take_room(handle: int, size: int) -> None:
    """Where system or disk cannot do that, a full one is found out when it is written to."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def _noted(digest: hashlib._Hash, parts: _Parts) -> _Parts:
    """The parts, each taken into a digest before it is handed on."""
    for part in parts:
        digest.update(part)
        yield part


def _safetensors(
    tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """A safetensors file in parts: length of the header, header, the arrays' own memory.

    The format is at https://huggingface.co/docs/safetensors/index#format. Arrays with the widest
    numbers go first, so that each begins at a multiple of its numbers' width.
    """
    # The memory of an array with strides has other numbers in between.
    dense = {
        name: np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
        for name, value in tensors.items()
    }
    order = sorted(dense, key=lambda name: (-dense[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    for name in order:
        array = dense[name]
        offsets = [begin, begin + array.nbytes]
        dtype = _DTYPES[array.dtype.name]
        header[name] = {"dtype": dtype, "shape": tensors[name].shape, "data_offsets": offsets}
        begin += array.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        if dense[name].size:
            yield dense[name].reshape(-1).view(np.uint8).data


def _in_use(folder: Path, note: bytes) -> StateError:
    known = re.fullmatch(rb"([a-z ]+), process ([0-9]+)\n", note)
    by = f"'{known[1].decode()}', process {known[2].decode()}" if known else "another process"
    return StateError(
        f"{folder} is in use by {by}, and one process at a time may answer or ask from it; stop "
        "that one, or give this one another folder with --state"
    )


def _remove(path: Path) -> None:
    """Delete a file that is no use any more, if there is one and it can be deleted."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    # Python 3.11 keeps each name that with_name() is given in a table that grows by megabytes.
    return path.with_suffix(path.suffix + PART)
