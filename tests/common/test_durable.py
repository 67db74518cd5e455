"""Durable files are whole, and hold exactly what was written; a folder has one process."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors import safe_open
from safetensors.numpy import load_file

from common.durable import (
    PART,
    append_line,
    locked,
    read_tensors,
    reserved,
    write_bytes,
    write_tensors,
)
from common.errors import StateError, StorageError
from tests.disks import Crash, Disk, small_disk


def test_a_write_replaces_whole_files_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old and longer")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_come_back_strided_ones_too(tmp_path: Path) -> None:
    """A strided array's memory is not what is in the array."""
    path = tmp_path / "t.safetensors"
    grid = np.arange(24, dtype=np.float32).reshape(4, 6)
    tensors = {
        "dense": grid,
        "columns": grid[:, ::2],
        "turned": grid.T,
        "none": grid[:0],
        "one": np.float64(3.0).reshape(()),
        "turned round": grid.astype(">f4"),
    }
    digest = write_tensors(path, tensors, {"about": "x"})
    for name, value in load_file(path).items():
        assert np.array_equal(value, tensors[name]), name
        assert value.shape == tensors[name].shape
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


NUMBERS = st.sampled_from([np.bool_, np.int8, np.uint16, np.int64, np.float16, np.float32, "f8"])
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    NUMBERS.flatmap(lambda kind: arrays.arrays(kind, arrays.array_shapes(min_dims=0, min_side=0))),
    max_size=5,
)
TEXTS = st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=3)


@given(TENSORS, TEXTS)
def test_what_is_written_is_a_safetensors_file(
    tensors: dict[str, np.ndarray], about: dict[str, str]
) -> None:
    """safetensors itself reads it back, mapped into memory, and so does our own reader."""
    scratch = Path(tempfile.gettempdir()) / f"sotto-durable-{os.getpid()}"
    write_tensors(scratch, tensors, about)
    try:
        with safe_open(scratch, framework="numpy") as file:
            theirs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            assert (file.metadata() or {}) == about
        ours, metadata = read_tensors(scratch.read_bytes())
    finally:
        scratch.unlink()
    assert metadata == about
    for found in (theirs, ours):
        assert found.keys() == tensors.keys()
        for name, value in tensors.items():
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
            assert found[name].tobytes() == value.tobytes()


def test_what_is_no_safetensors_file_is_a_value_error() -> None:
    for content in (b"", b"\xff" * 40, b"\x02" + 7 * b"\x00" + b"{]"):
        with pytest.raises(ValueError, match=r"."):
            read_tensors(content)


def test_the_file_may_be_named_after_what_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "x"
    digest = write_tensors(path, {"a": np.ones(3)}, {}, named=lambda digest: digest[:8])
    assert [path.name for path in tmp_path.iterdir()] == [digest[:8]]


# -- trouble with the disk ------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_whichever_write_fails_the_old_file_stays_and_no_half_of_the_new(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    disk = Disk(monkeypatch, tmp_path)
    for number, write in enumerate(("open", "write", "ftruncate", "fsync", "replace"), start=1):
        disk.full_at(number, code)
        with pytest.raises(StorageError, match=f"file cannot .*{errno.errorcode[code]}"):
            write_bytes(path, b"new")
        assert path.read_bytes() == b"old", write
        assert list(tmp_path.iterdir()) == [path]
    disk.full_at(6, code)  # the folder's fsync: it is there, and a power cut might take it
    with pytest.raises(StorageError):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    disk.works()
    write_bytes(path, b"newer")
    assert disk.writes == 6


def test_a_process_that_dies_in_a_write_leaves_one_half_that_the_next_write_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    disk = Disk(monkeypatch, tmp_path)
    for number in range(1, 6):
        disk.crash_at(number)
        with pytest.raises(Crash):
            write_bytes(path, b"much longer than what comes next")
        assert path.read_bytes() == b"old"
        assert {item.name for item in tmp_path.iterdir()} <= {"file", "file" + PART}
    disk.works()
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_found_out_before_anything_is_written(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        path = disk / "file"
        with pytest.raises(StorageError, match="ENOSPC"), reserved(path, 2**20):
            pass
        with reserved(path, 40_000), pytest.raises(StorageError, match="ENOSPC"):
            write_bytes(disk / "other", b"x" * 40_000)
        assert not list(disk.iterdir())


def test_room_that_was_reserved_is_written_into(tmp_path: Path) -> None:
    """Somebody else fills the disk between reserving and writing."""
    with small_disk(tmp_path / "disk", 64) as disk:
        path = disk / "file"
        with reserved(path, 40_000):
            with pytest.raises(OSError, match="No space"):
                (disk / "other").write_bytes(b"x" * 60_000)
            write_bytes(path, b"y" * 40_000)
        assert path.read_bytes() == b"y" * 40_000


def test_a_line_is_added_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines"
    append_line(path, "one")
    disk = Disk(monkeypatch, tmp_path)
    real = os.write

    def half(handle: int, data: bytes) -> int:
        """A disk with room for two more bytes."""
        if path.stat().st_size >= 6:
            raise OSError(errno.ENOSPC, "full")
        return real(handle, data[:2])

    with monkeypatch.context() as full:
        full.setattr(os, "write", half)
        with pytest.raises(StorageError, match="ENOSPC"):
            append_line(path, "two")
    disk.works()
    assert path.read_text() == "one\n"
    append_line(path, "two")
    assert path.read_text() == "one\ntwo\n"


def test_half_a_line_that_a_crash_left_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("one\ntw")
    append_line(path, "three")
    assert path.read_text() == "one\ntw\nthree\n"


# -- one process ----------------------------------------------------------------------------------

KEEPER = """
import sys, time
from pathlib import Path
from common.durable import locked
with locked(Path(sys.argv[1]), "sotto join"):
    print("locked", flush=True)
    time.sleep(600)
"""


def keeper(folder: Path) -> subprocess.Popen[str]:
    """Another process that keeps a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", KEEPER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_second_process_is_told_who_has_the_folder_until_that_one_is_killed(
    tmp_path: Path,
) -> None:
    with keeper(tmp_path / "state") as other:
        try:
            with (
                pytest.raises(StateError, match=f"'sotto join', process {other.pid}.*--state"),
                locked(tmp_path / "state", "sotto join"),
            ):
                pytest.fail("two processes have it")
        finally:
            other.send_signal(signal.SIGKILL)
            other.wait()
    with locked(tmp_path / "state", "sotto serve"):  # a killed process keeps nothing
        note = (tmp_path / "state" / "lock").read_text()
    assert note == f"sotto serve, process {os.getpid()}\n"


def test_a_lock_is_let_go_when_its_block_ends(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path, "sotto join"), pytest.raises(StateError, match="in use"):
            locked(tmp_path, "sotto join").__enter__()


def test_a_file_that_somebody_left_locks_nobody_out(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("sotto join, process 1\n")
    with locked(tmp_path, "sotto join"):
        pass


def test_a_lock_needs_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, tmp_path)
    disk.full_at(3)  # the line that says who
    with locked(tmp_path, "sotto join"):
        assert (tmp_path / "lock").read_bytes() == b""
        with pytest.raises(StateError, match="in use by another process"):
            locked(tmp_path, "sotto join").__enter__()


def test_a_folder_that_cannot_be_written_is_said_to_be_that(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StorageError, match=r"file.* cannot be used .*E(EXIST|NOTDIR)"),
        locked(tmp_path / "file", "sotto join"),
    ):
        pass
