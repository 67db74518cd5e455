from __future__ import annotations

import socket
import stat
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from common.errors import RunError, StateError
from common.link.traffic import Traffic
from server.link.health import Health
from server.link.operations import ADDRESS, SOCKET, Operations, ask
from server.status import Watch
from tests.server.watching import Looked, summary, watch


@pytest.fixture
def seen() -> Watch:
    grid = Looked(traffic=Traffic(1, 2, 3, 4, 5, 6, 7))
    grid.join("north")
    grid.leave("south", 1234.5)
    seen = watch(grid)
    seen.note(summary(1, "north", south="no reply within 5 s"))
    return seen


def test_what_is_asked_for_arrives_whole(tmp_path: Path, seen: Watch) -> None:
    with Operations(tmp_path, seen.status, Health()):
        answer = ask(tmp_path)
        now = seen.status()

    assert answer.uptime_seconds <= now.uptime_seconds
    times = {"uptime_seconds": 0.0, "round_seconds": 0.0}
    assert replace(answer, **times) == replace(now, **times)


@pytest.mark.parametrize("name", ["with spaces", "100%", "%20", "a?b#c", "Müller & Söhne"])
def test_a_folder_may_have_any_name(tmp_path: Path, seen: Watch, name: str) -> None:
    state = tmp_path / name
    state.mkdir()
    with Operations(state, seen.status, Health()):
        assert ask(state).run == "run-1"


def test_only_its_owner_may_use_the_socket(tmp_path: Path, seen: Watch) -> None:
    with Operations(tmp_path, seen.status, Health()):
        assert stat.S_IMODE((tmp_path / SOCKET).stat().st_mode) == 0o600
    assert not (tmp_path / SOCKET).exists()


def test_a_long_path_has_its_socket_elsewhere(tmp_path: Path, seen: Watch) -> None:
    state = tmp_path / ("long" * 30)
    state.mkdir()
    with Operations(state, seen.status, Health()):
        path = Path((state / ADDRESS).read_text().strip())
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert ask(state).run == "run-1"
    assert not path.parent.exists()
    assert not (state / ADDRESS).exists()


@pytest.mark.parametrize("name", ["short", "long" * 30])
def test_what_a_killed_process_left_is_nobody_and_in_nobodys_way(
    tmp_path: Path, seen: Watch, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / name
    state.mkdir()
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind("stale")  # bound, and no longer listened on
    (state / ADDRESS).write_text(f"{tmp_path / 'stale'}\n")
    with pytest.raises(RunError, match="no coordinator runs with"):
        ask(state)

    with Operations(state, seen.status, Health()):
        assert ask(state).run == "run-1"


def test_a_folder_without_a_coordinator_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no coordinator runs with"):
        ask(tmp_path)
    with pytest.raises(StateError, match="there is no folder"):
        ask(tmp_path / "nowhere")


def test_a_coordinator_that_does_not_answer_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.link.operations._PATIENCE", 0.2)
    with socket.socket(socket.AF_UNIX) as frozen:
        frozen.bind(str(tmp_path / SOCKET))
        frozen.listen()
        with pytest.raises(RunError, match="does not answer within"):
            ask(tmp_path)


def test_a_folder_that_takes_no_socket_is_a_sentence(tmp_path: Path, seen: Watch) -> None:
    with (
        pytest.raises(StateError, match="no socket for"),
        Operations(tmp_path / "nowhere", seen.status, Health()),
    ):
        pass


def test_the_socket_answers_health_probes(tmp_path: Path, seen: Watch) -> None:
    health = Health()
    health.serve()
    with (
        Operations(tmp_path, seen.status, health),
        grpc.insecure_channel(f"unix:{tmp_path / SOCKET}") as channel,
    ):
        assert HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5).status == 1
