"""A state folder has one process; one that cannot be written is said to be that."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from common.durable import locked
from tests.commands import Said, sotto
from tests.disks import small_disk

JOIN = ["join", "--server", "127.0.0.1:1", "--insecure", "--name", "north", "--budget", "1"]
DATA = ["--task", "medical-diagnosis", "--source", "breast-cancer", "--part", "clinic-1"]
SERVE = ["serve", "medical-diagnosis", "--source", "breast-cancer", "--insecure", "--epsilon", "1"]


def join(state: Path) -> Said:
    return sotto(*JOIN, *DATA, "--state", state)


@pytest.mark.parametrize("words", [[*JOIN, *DATA], [*SERVE, "--listen", "127.0.0.1:0"]])
def test_a_second_process_on_the_same_folder_ends_with_a_sentence(
    words: list[str], tmp_path: Path
) -> None:
    with locked(tmp_path, "sotto join"):
        said = sotto(*words, "--state", tmp_path)
    assert said.code == 2
    assert f"{tmp_path} is in use by 'sotto join', process {os.getpid()}" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["lock"], "and it has touched nothing"


def test_the_ledger_is_read_beside_a_running_holder(tmp_path: Path) -> None:
    from client.state import HolderState

    with locked(tmp_path, "sotto join"), HolderState.at(tmp_path):
        for command in ("show", "verify", "export"):
            assert sotto("ledger", command, "--state", tmp_path).code == 0


def test_a_read_only_folder_is_no_traceback(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for state in (disk, disk / "new"):
            said = join(state)
            assert said.code == 3, "once it can be written, the same command works"
            assert "cannot be used (Read-only file system, EROFS)" in said.err


def test_a_state_folder_that_is_a_file_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = join(tmp_path / "file")
    assert said.code in (2, 3)
    assert "cannot be used" in said.err
