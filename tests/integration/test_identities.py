"""Every way in which an identity can be wrong: what each end is told, over real TLS."""

from __future__ import annotations

import logging
import shutil
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from client.node import Connected, Disconnected
from common.link import certificates as certs
from common.link import pem
from common.link.identity import node_id_of
from common.link.keys import CoordinatorKeys, HolderKeys
from common.link.signing import Identity, Trust, signing_fingerprint
from server.grid import LinkGrid
from tests.integration.federation import (
    CLINICS,
    Federation,
    end,
    ended,
    sotto,
    wait_for_words,
)
from tests.linking import PATIENCE, Exchange, RawHolder, Runner, ask, enrol, running, text_of

NAMELESS = "ended before TLS could say whose"


@pytest.fixture
def coordinator(tmp_path: Path) -> CoordinatorKeys:
    return CoordinatorKeys.create_or_load(tmp_path / "coordinator", ["hub.example.org"])


@pytest.fixture
def grid(coordinator: CoordinatorKeys, caplog: pytest.LogCaptureFixture) -> Iterator[LinkGrid]:
    with (
        caplog.at_level(logging.WARNING, "sotto.link"),
        LinkGrid("0.0.0.0:0", keys=coordinator) as grid,
    ):
        yield grid


@pytest.fixture
def north(tmp_path: Path, coordinator: CoordinatorKeys) -> HolderKeys:
    return enrol(tmp_path / "north", coordinator, "north")


def wait_for_log(caplog: pytest.LogCaptureFixture, *words: str) -> str:
    """The first line of the coordinator's log that has all the words."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for record in list(caplog.records):
            if all(word in record.getMessage() for word in words):
                return record.getMessage()
        time.sleep(0.02)
    raise AssertionError(f"the coordinator did not say {words}, but:\n{caplog.text}")


def error_of(runner: Runner) -> str:
    """The sentence that ended a node by itself."""
    runner.join()
    assert runner.error is not None
    return str(runner.error)


def was_disconnected(runner: Runner) -> bool:
    """Whether a node has lost its connection since its last event was taken."""
    events = [runner.events.get() for _ in range(runner.events.qsize())]
    return any(isinstance(event, Disconnected) for event in events)


def certify(coordinator: CoordinatorKeys, keys: HolderKeys, lasts: timedelta) -> None:
    """Give a holder, and the roster, a certificate that lasts as long as that."""
    request = pem.read_request(keys.folder / f"{keys.name}.request.pem")
    ca_key = certs.key_from_pem(pem.read(coordinator.folder / "ca.key"))
    made = certs.holder_certificate(coordinator.authority, ca_key, request, lasts=lasts)
    pem.write(keys.folder / "holder.pem", certs.to_pem(made))
    coordinator.roster.enter(made)


# -- refused by TLS, before any of our code --------------------------------------------------


def test_a_coordinator_of_another_federation(
    tmp_path: Path, grid: LinkGrid, caplog: pytest.LogCaptureFixture
) -> None:
    other = CoordinatorKeys.create_or_load(tmp_path / "other")
    stranger = enrol(tmp_path / "stranger", other, "stranger")

    with running(grid.port, keys=stranger) as runner:
        said = error_of(runner)

    assert "not that of this holder's federation" in said
    assert "install the bundle of the right federation" in said
    assert "hub.example.org" in wait_for_log(caplog, NAMELESS)


def test_a_certificate_of_another_federation(
    tmp_path: Path,
    coordinator: CoordinatorKeys,
    grid: LinkGrid,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The holder believes the coordinator, which does not believe it."""
    other = CoordinatorKeys.create_or_load(tmp_path / "other")
    stranger = enrol(tmp_path / "stranger", other, "stranger")
    pem.write(stranger.folder / "ca.pem", certs.to_pem(coordinator.authority))

    with running(grid.port, keys=stranger) as runner:
        event = runner.wait_for(Disconnected)

    assert isinstance(event, Disconnected)
    assert "does not accept this holder's certificate" in event.reason
    assert "`sotto keys list` on both sides" in event.reason
    assert "`sotto keys list` must show the same authority" in wait_for_log(caplog, NAMELESS)


def test_a_host_name_that_is_not_in_the_servers_certificate(
    north: HolderKeys, grid: LinkGrid, caplog: pytest.LogCaptureFixture
) -> None:
    with running(grid.port, keys=north, host="127.0.0.2") as runner:
        said = error_of(runner)

    assert "not for the host name 127.0.0.2" in said
    assert "--host-name" in said
    assert "127.0.0.1, ::1, hub.example.org, localhost" in wait_for_log(caplog, NAMELESS)


def test_a_certificate_that_expired_while_the_holder_was_away(
    coordinator: CoordinatorKeys,
    north: HolderKeys,
    grid: LinkGrid,
    caplog: pytest.LogCaptureFixture,
) -> None:
    certify(coordinator, north, timedelta(seconds=-1))

    with running(grid.port, keys=north) as runner:
        said = error_of(runner)  # not even tried
    assert "the certificate of 'north' expired on" in said
    assert "`sotto keys request`" in said

    with socket.create_connection(("127.0.0.1", grid.port)) as peer:  # one that tries all the same
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        context.load_cert_chain(north.folder / "holder.pem", north.folder / "holder.key")
        with context.wrap_socket(peer) as secure, suppress(ssl.SSLError):
            assert not secure.recv(1)
    assert f"expired on the roster: north on {certs.last_day(north.certificate)}" in wait_for_log(
        caplog, NAMELESS
    )


def test_a_coordinators_certificate_that_has_expired(
    coordinator: CoordinatorKeys, north: HolderKeys
) -> None:
    """It can be made new while the holder waits, so the holder goes on trying."""
    ca_key = certs.key_from_pem(pem.read(coordinator.folder / "ca.key"))
    key = certs.key_from_pem(pem.read(coordinator.folder / "server.key"))
    old = certs.server_certificate(
        coordinator.authority, ca_key, key.public_key(), ["localhost"], lasts=timedelta(seconds=-1)
    )
    pem.write(coordinator.folder / "server.pem", certs.to_pem(old))

    with (
        LinkGrid("localhost:0", keys=coordinator) as grid,
        running(grid.port, keys=north) as runner,
    ):
        event = runner.wait_for(Disconnected)
        assert isinstance(event, Disconnected)
        assert "has expired, or this machine's clock is wrong" in event.reason
        assert "`sotto keys rotate`" in event.reason

        coordinator.rotate()
        runner.wait_for(Connected)


# -- refused by the roster, at the door and later --------------------------------------------


def test_a_certificate_that_is_not_on_the_roster(
    coordinator: CoordinatorKeys,
    north: HolderKeys,
    grid: LinkGrid,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (coordinator.folder / "holders" / "north.pem").unlink()

    with running(grid.port, keys=north) as runner:
        said = error_of(runner)

    for sentence in (said, wait_for_log(caplog, "refused a connection from ip")):
        assert "the certificate shown for 'north' is not in the coordinator's roster" in sentence
        assert "`sotto keys approve`" in sentence


def test_revoking_ends_a_live_connection_and_the_round_goes_on(
    tmp_path: Path,
    coordinator: CoordinatorKeys,
    north: HolderKeys,
    grid: LinkGrid,
    caplog: pytest.LogCaptureFixture,
) -> None:
    south = enrol(tmp_path / "south", coordinator, "south")
    with (
        RawHolder(grid.port, keys=north) as silent,  # takes its request and never answers
        running(grid.port, keys=south) as other,
    ):
        silent.receive("welcome")
        other.wait_for(Connected)
        exchange = Exchange(grid, ask("north"), ask("south"))
        silent.receive_request()
        coordinator.revoke("north")
        failed, answered = exchange.replies()  # long before the exchange's own deadline

        assert failed.has_error()
        assert text_of(answered) == ""
        assert "was revoked" in (silent.failure().details() or "")
        logged = wait_for_log(caplog, "closed the connection of north", "was revoked")
        assert "`sotto keys rotate --all`" in logged
        assert grid.get_node_ids() == [node_id_of("south")]

        with running(grid.port, keys=north) as again:
            assert "was revoked on the coordinator" in error_of(again)
        assert not was_disconnected(other)


def test_a_certificate_that_expires_on_a_live_connection(
    coordinator: CoordinatorKeys,
    north: HolderKeys,
    grid: LinkGrid,
    caplog: pytest.LogCaptureFixture,
) -> None:
    certify(coordinator, north, timedelta(seconds=3))

    with running(grid.port, keys=north) as runner:
        runner.wait_for(Connected)
        said = error_of(runner)

    assert "the certificate of 'north' expired on" in said
    assert "expires in 0 days" in wait_for_log(caplog, "the certificate of north expires")
    wait_for_log(caplog, "closed the connection of north", "expired on")


def test_a_second_process_with_the_same_identity(
    north: HolderKeys, grid: LinkGrid, caplog: pytest.LogCaptureFixture
) -> None:
    with running(grid.port, keys=north) as first:
        first.wait_for(Connected)
        with running(grid.port, keys=north) as second:
            second.wait_for(Connected)
            said = error_of(first)
            assert grid.get_node_ids() == [node_id_of("north")]

    assert "another process has joined as 'north', from ip" in said
    assert "`sotto keys revoke`" in said
    assert "sotto keys revoke" in wait_for_log(caplog, "north joined again, from ip")


# -- new keys ---------------------------------------------------------------------------------


def test_a_holder_rotates_and_nobody_else_notices(
    tmp_path: Path, coordinator: CoordinatorKeys, north: HolderKeys, grid: LinkGrid
) -> None:
    south = enrol(tmp_path / "south", coordinator, "south")
    before = tmp_path / "before"
    shutil.copytree(tmp_path / "north", before)
    pin = signing_fingerprint(Identity.of(north).credential)
    with (
        running(grid.port, keys=south) as other,
        running(grid.port, keys=north) as runner,
    ):
        for either in (other, runner):
            either.wait_for(Connected)
        bundle = coordinator.approve(HolderKeys.rotate(tmp_path / "north"))
        HolderKeys.install(tmp_path / "north", bundle)
        (reply,) = grid.send_and_receive([ask("north", "still here")], timeout=PATIENCE)
        assert text_of(reply) == "still here"
        assert not was_disconnected(other)
    with running(grid.port, keys=north) as runner:  # it connects again, for whatever reason
        runner.wait_for(Connected)
    with running(grid.port, keys=HolderKeys(before / "keys")) as thief:
        assert "was replaced" in error_of(thief)

    credential = Identity.of(north).credential
    assert Trust(south.authority, frozenset({pin})).check(credential).name == "north"


def test_the_coordinator_rotates_and_no_holder_notices(
    coordinator: CoordinatorKeys, north: HolderKeys, grid: LinkGrid
) -> None:
    def shown() -> x509.Certificate:
        found = ssl.get_server_certificate(("127.0.0.1", grid.port))
        return x509.load_pem_x509_certificate(found.encode())

    with running(grid.port, keys=north) as runner:
        runner.wait_for(Connected)
        before = shown()
        after = coordinator.rotate()
        assert shown() == after
        assert after.public_key() != before.public_key()
        (reply,) = grid.send_and_receive([ask("north", "still here")], timeout=PATIENCE)
        assert text_of(reply) == "still here"
        assert not was_disconnected(runner)
    with running(grid.port, keys=north) as runner:
        runner.wait_for(Connected)


# -- the commands -------------------------------------------------------------------------------


def test_a_holder_is_revoked_by_command_while_it_is_joined(tmp_path: Path) -> None:
    """`sotto serve` and two `sotto join`; one is revoked, the other stays."""
    federation = Federation(tmp_path)
    federation.enrol(*CLINICS)
    first, second = CLINICS
    keys = HolderKeys(federation.holder(second) / "keys")
    certify(CoordinatorKeys(federation.coordinator / "keys"), keys, timedelta(days=12, minutes=30))
    with (
        federation.serve("--rounds", 1, "--min-holders", 3) as coordinator,
        federation.join(first, "--budget", 1) as revoked,
        federation.join(second, "--budget", 1) as stays,
    ):
        wait_for_words(revoked, "joined sotto", coordinator)
        wait_for_words(stays, "joined sotto", coordinator)
        sotto("keys", "revoke", first, "--state", federation.coordinator)
        assert ended(revoked, coordinator, stays) == 2, revoked.last_words()
        wait_for_words(coordinator, f"closed the connection of {first}", stays)
        assert end(stays) == 0
    assert f"the certificate of '{first}' was revoked" in " ".join(revoked.output.split())
    for name in CLINICS:  # its ledger says whose it is, and what it showed
        shown = HolderKeys.open(federation.holder(name)).certificate
        (line,) = [
            line
            for line in sotto("ledger", "verify", "--state", federation.holder(name)).splitlines()
            if line.startswith(f"holder '{name}': ")
        ]
        assert f"certificate sha256:{certs.fingerprint(shown)}, signing key sha256:" in line
    for warned in (coordinator, stays):  # thirty days ahead, at start
        assert f"The certificate of '{second}' expires in 12 days" in warned.output
    assert "Traceback" not in coordinator.output + revoked.output
