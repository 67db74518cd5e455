from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from common.errors import LinkError
from common.link import certificates as certs
from common.link.keys import CoordinatorKeys, HolderKeys
from server.link.admission import Admission, Nameless
from tests.linking import PATIENCE, enrol


@pytest.fixture
def coordinator(tmp_path: Path) -> CoordinatorKeys:
    return CoordinatorKeys.create_or_load(tmp_path / "coordinator", ["hub.example.org"])


@pytest.fixture
def north(tmp_path: Path, coordinator: CoordinatorKeys) -> HolderKeys:
    return enrol(tmp_path / "north", coordinator, "north")


def shown(keys: HolderKeys) -> dict[str, list[bytes]]:
    """What gRPC says of a connection over which a holder showed its certificate."""
    return {"x509_pem_cert": [certs.to_pem(keys.certificate)]}


def test_without_tls_nobody_has_a_name_and_nobody_is_barred() -> None:
    admission = Admission(None)
    admitted = admission.admit({})
    assert admitted.name == admitted.expiry_note == ""

    async def watch() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(admission.barred(admitted), 0.05)

    asyncio.run(watch())


def test_a_certificate_without_name_in_the_roster(coordinator: CoordinatorKeys) -> None:
    admission = Admission(coordinator)
    with pytest.raises(LinkError, match="shows no certificate"):
        admission.admit({})
    with pytest.raises(LinkError, match="not readable"):
        admission.admit({"x509_pem_cert": [b"nonsense"]})
    with pytest.raises(LinkError, match="cannot name a holder"):
        admission.admit({"x509_pem_cert": [certs.to_pem(certs.authority(certs.new_key(), "A/b"))]})


def test_a_holder_is_barred_by_what_concerns_it_and_nothing_else(
    tmp_path: Path, coordinator: CoordinatorKeys, north: HolderKeys
) -> None:
    admission = Admission(coordinator)
    admitted = admission.admit(shown(north))

    async def watch() -> str:
        barred = asyncio.create_task(admission.barred(admitted))
        enrol(tmp_path / "south", coordinator, "south")
        coordinator.revoke("south")
        enrol(tmp_path / "north", coordinator, "north")  # a newer certificate, not shown yet
        await asyncio.sleep(1.2)  # twice as long as between two looks
        assert not barred.done()
        coordinator.revoke("north")
        return await asyncio.wait_for(barred, PATIENCE)

    assert "'north' was revoked" in asyncio.run(watch())


def test_who_is_revoked_between_handshake_and_hello_is_noticed(
    coordinator: CoordinatorKeys, north: HolderKeys
) -> None:
    admission = Admission(coordinator)
    admitted = admission.admit(shown(north))
    coordinator.revoke("north")

    assert "was revoked" in asyncio.run(admission.barred(admitted))


def test_whoever_got_through_tls_is_not_without_a_name(
    coordinator: CoordinatorKeys, north: HolderKeys, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even one that the roster refuses, with a sentence of its own."""
    admission = Admission(coordinator)
    admission.nameless = Nameless(coordinator, patience=0.02)

    async def report() -> None:
        task = asyncio.create_task(admission.nameless.report())
        admission.nameless.begin()
        admission.admit(shown(north))
        coordinator.revoke("north")
        admission.nameless.begin()
        with pytest.raises(LinkError):
            admission.admit(shown(north))
        await asyncio.sleep(0.2)
        task.cancel()

    with caplog.at_level(logging.WARNING, "sotto.link"):
        asyncio.run(report())

    assert not caplog.records


def test_connections_without_a_name_are_said_once_and_counted(
    coordinator: CoordinatorKeys, caplog: pytest.LogCaptureFixture
) -> None:
    nameless = Nameless(coordinator, patience=0.05, quiet=60)

    async def report() -> None:
        task = asyncio.create_task(nameless.report())
        for _ in range(5):
            nameless.begin()
        nameless.name()
        nameless.name()
        await asyncio.sleep(0.3)
        nameless.begin()  # in the quiet time
        await asyncio.sleep(0.3)
        task.cancel()

    with caplog.at_level(logging.WARNING, "sotto.link"):
        asyncio.run(report())

    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("3 connections ended before TLS could say whose")
    assert "127.0.0.1, ::1, hub.example.org, localhost" in said
    assert "expired on the roster: nobody's" in said


def test_connections_that_all_have_names_are_not_worth_a_word(
    coordinator: CoordinatorKeys, caplog: pytest.LogCaptureFixture
) -> None:
    nameless = Nameless(coordinator, patience=0.02)

    async def report() -> None:
        task = asyncio.create_task(nameless.report())
        nameless.name()  # two streams on one connection
        for _ in range(3):
            nameless.begin()
            nameless.name()
        await asyncio.sleep(0.2)
        task.cancel()

    with caplog.at_level(logging.WARNING, "sotto.link"):
        asyncio.run(report())

    assert not caplog.records
