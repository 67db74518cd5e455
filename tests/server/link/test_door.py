from __future__ import annotations

from contextlib import ExitStack

import pytest

from server.link.door import Crowded, Door


def test_an_identity_has_as_many_streams_as_it_may_and_others_have_theirs() -> None:
    door = Door(2)
    with ExitStack() as streams:
        streams.enter_context(door.entered("a"))
        streams.enter_context(door.entered("a"))
        with pytest.raises(Crowded), door.entered("a"):
            pass
        with door.entered("b"):
            pass
    with door.entered("a"):
        pass


def test_a_stream_that_fails_makes_room() -> None:
    door = Door(1)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="broken"), door.entered("a"):
            raise RuntimeError("broken")


def test_who_has_gone_leaves_nothing_behind() -> None:
    door = Door(1)
    for number in range(100):
        with door.entered(f"peer {number}"):
            pass
    assert not door._open
