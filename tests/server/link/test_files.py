from __future__ import annotations

import subprocess
import sys

import pytest

from server.link.files import room_for_files

PROGRAM = """
import resource
from server.link.files import room_for_files
resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard}))
print(room_for_files(1000), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def test_there_is_room_already() -> None:
    assert room_for_files(1) > 1


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
@pytest.mark.parametrize(("hard", "room"), [(4096, 2024), (512, 512)])
def test_the_limit_is_raised_as_far_as_need_be_and_may_be(hard: int, room: int) -> None:
    """In a process of its own: a limit that was lowered cannot be raised again."""
    program = PROGRAM.format(hard=hard)
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert done.stdout.split() == [str(room).encode()] * 2
