from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1.health_pb2_grpc import HealthStub

from common.link.channels import channel_options
from common.link.keys import CoordinatorKeys, HolderKeys
from common.link.tls import channel_credentials
from server.grid import LinkGrid
from server.link.health import SERVICES, Health, HealthPage
from tests.linking import PATIENCE, enrol

SERVING, NOT_SERVING, UNKNOWN = 1, 2, 3


@contextmanager
def probe(address: str, keys: HolderKeys | None = None) -> Iterator[HealthStub]:
    if keys is None:
        channel = grpc.insecure_channel(address, options=channel_options())
    else:
        channel = grpc.secure_channel(address, channel_credentials(keys), options=channel_options())
    with channel:
        yield HealthStub(channel)


def check(stub: HealthStub, service: str = "") -> int:
    return stub.Check(pb.HealthCheckRequest(service=service), timeout=PATIENCE).status


def watched(stub: HealthStub, service: str = "") -> grpc.Future:
    return stub.Watch(pb.HealthCheckRequest(service=service), timeout=PATIENCE)


def code_of(stub: HealthStub, service: str = "") -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as refused:
        check(stub, service)
    return refused.value.code()


@pytest.fixture
def health() -> Health:
    return Health()


@pytest.fixture
def address(health: Health) -> Iterator[str]:
    page = HealthPage("127.0.0.1:0", health)
    try:
        yield page.start()
    finally:
        page.stop()


def test_a_probe_sees_the_run_begin_and_drain(health: Health, address: str) -> None:
    with probe(address) as stub:
        assert check(stub) == NOT_SERVING
        health.serve()
        assert [check(stub, service) for service in SERVICES] == [SERVING, SERVING]
        health.drain()
        assert check(stub) == NOT_SERVING


def test_an_unknown_service_is_not_found_and_not_kept(health: Health, address: str) -> None:
    with probe(address) as stub:
        assert code_of(stub, "x" * 1000) is grpc.StatusCode.NOT_FOUND
        assert [response.status for response in watched(stub, "no such")] == [UNKNOWN]


def test_a_watcher_is_told_of_changes_only(health: Health, address: str) -> None:
    health.serve()
    with probe(address) as stub:
        answers = watched(stub)
        assert next(answers).status == SERVING
        health.drain()
        assert next(answers).status == NOT_SERVING


def test_watchers_are_few_and_leave_room_for_checks(health: Health, address: str) -> None:
    health.serve()
    with probe(address) as one, probe(address) as two, probe(address) as three:
        held = [watched(stub) for stub in (one, two, three) for _ in range(4)]
        codes = []
        for answers in held:
            try:
                next(answers)
            except grpc.RpcError as error:
                codes.append(error.code())
        assert codes == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 4
        with probe(address) as other:
            assert check(other) == SERVING


def test_a_request_that_is_too_long_is_refused(health: Health, address: str) -> None:
    with probe(address) as stub:
        assert code_of(stub, "x" * 5000) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_coordinators_own_port_answers_too() -> None:
    with LinkGrid("localhost:0", keys=None) as grid, probe(f"localhost:{grid.port}") as stub:
        assert check(stub) == SERVING
        assert next(watched(stub)).status == SERVING
        grid.health.drain()
        assert check(stub) == NOT_SERVING
        assert code_of(stub, "no such") is grpc.StatusCode.NOT_FOUND


def test_a_grid_that_stops_is_not_serving() -> None:
    grid = LinkGrid("localhost:0", keys=None)
    with grid:
        assert grid.health.of("") == pb.HealthCheckResponse(status=SERVING)
    assert grid.health.of("") == pb.HealthCheckResponse(status=NOT_SERVING)


def test_with_certificates_only_the_roster_may_ask(tmp_path: Path) -> None:
    keys = CoordinatorKeys.create_or_load(tmp_path / "coordinator")
    north, south = (enrol(tmp_path / name, keys, name) for name in ("north", "south"))
    keys.roster.revoke("south")
    with LinkGrid("localhost:0", keys=keys) as grid:
        address = f"localhost:{grid.port}"
        with probe(address, north) as stub:
            assert check(stub) == SERVING
        with probe(address, south) as stub:
            assert code_of(stub) is grpc.StatusCode.PERMISSION_DENIED
        with probe(address) as stub:
            assert code_of(stub) is grpc.StatusCode.UNAVAILABLE


def test_one_holder_may_watch_twice(tmp_path: Path) -> None:
    keys = CoordinatorKeys.create_or_load(tmp_path / "coordinator")
    north = enrol(tmp_path / "north", keys, "north")
    with LinkGrid("localhost:0", keys=keys) as grid:
        address = f"localhost:{grid.port}"
        with probe(address, north) as one, probe(address, north) as two:
            held = [watched(one), watched(two)]
            assert [next(answers).status for answers in held] == [SERVING, SERVING]
            with probe(address, north) as third:
                with pytest.raises(grpc.RpcError) as refused:
                    next(watched(third))
                assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert check(third) == SERVING
