from __future__ import annotations

import logging

import pytest

from common.link.log import RationedLog


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock, caplog: pytest.LogCaptureFixture) -> RationedLog:
    caplog.set_level(logging.INFO)
    return RationedLog(logging.getLogger("sotto.test"), burst=2, period=60.0, clock=clock)


def test_a_few_lines_of_a_kind_are_written_and_the_rest_counted(
    log: RationedLog, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(100):
        log.warning("a", "%s did it again, %d", "a", number)
    assert caplog.messages == ["a did it again, 0", "a did it again, 1"]

    clock.now = 60.0
    log.warning("a", "%s did it again, %d", "a", 100)
    assert caplog.messages[2:] == [
        "98 more lines like the next were left out",
        "a did it again, 100",
    ]


def test_other_kinds_and_other_peers_have_rations_of_their_own(
    log: RationedLog, caplog: pytest.LogCaptureFixture
) -> None:
    for peer in "ab":
        for _ in range(3):
            log.warning(peer, "%s knocked", peer)
            log.info(peer, "%s left", peer)
    assert len(caplog.messages) == 8


def test_a_line_is_one_printable_line(log: RationedLog, caplog: pytest.LogCaptureFixture) -> None:
    log.warning("", "refused %s", "a\n\x1b[2Jb" * 1000)
    (line,) = caplog.messages
    assert line.isprintable()
    assert len(line) < 320


def test_a_traceback_is_written_as_often_as_a_line(
    log: RationedLog, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(10):
        try:
            raise RuntimeError("broken")
        except RuntimeError:
            log.exception("coordinator", "a %s request failed", "train")
    assert [record.exc_info is not None for record in caplog.records] == [True, True]


def test_the_rations_themselves_do_not_grow_without_bound(log: RationedLog) -> None:
    for number in range(25_000):
        log.debug(f"peer {number}", "%s left", "somebody")
    assert len(log._rations) <= 10_000
