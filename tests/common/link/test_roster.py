from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from common.errors import LinkError
from common.link import certificates as certs
from common.link import pem
from common.link.keys import CoordinatorKeys, HolderKeys
from common.link.roster import Roster
from tests.linking import enrol


@pytest.fixture
def coordinator(tmp_path: Path) -> CoordinatorKeys:
    return CoordinatorKeys.create_or_load(tmp_path / "coordinator")


@pytest.fixture
def roster(coordinator: CoordinatorKeys) -> Roster:
    return coordinator.roster


def rotated(
    state: Path, coordinator: CoordinatorKeys, *, replace: bool = False, **which: bool
) -> HolderKeys:
    """Take a holder through rotate, approve and install."""
    bundle = coordinator.approve(HolderKeys.rotate(state, **which), replace=replace)
    return HolderKeys.install(state, bundle)


@pytest.mark.parametrize("which", [{}, {"key": False, "signing_key": True}], ids=["tls", "signing"])
def test_the_key_that_stays_vouches_for_the_new_one(
    tmp_path: Path, coordinator: CoordinatorKeys, roster: Roster, which: dict[str, bool]
) -> None:
    before = enrol(tmp_path / "north", coordinator, "north").certificate

    after = rotated(tmp_path / "north", coordinator, **which).certificate

    assert roster.approved() == [after]
    assert roster.retiring() == [before]
    assert roster.name_of(before) == roster.name_of(after) == "north"


def test_keys_that_nothing_vouches_for_need_replace(
    tmp_path: Path, coordinator: CoordinatorKeys, roster: Roster
) -> None:
    before = enrol(tmp_path / "north", coordinator, "north").certificate
    both = {"key": True, "signing_key": True}

    with pytest.raises(LinkError, match=r"did not sign this request; .*--replace"):
        rotated(tmp_path / "north", coordinator, **both)
    assert roster.approved() == [before]

    after = rotated(tmp_path / "north", coordinator, replace=True, **both).certificate
    assert roster.name_of(after) == "north"
    assert roster.revoked() == [before]
    with pytest.raises(LinkError, match="was revoked"):
        roster.name_of(before)


def test_somebody_elses_signing_key_vouches_for_nothing(
    tmp_path: Path, coordinator: CoordinatorKeys
) -> None:
    """Everybody in a secure round knows north's public signing key, and may have its request."""
    victim = enrol(tmp_path / "north", coordinator, "north")
    seen = pem.read_request(victim.folder / "north.request.pem").extensions[0]
    forged = tmp_path / "forged.pem"
    thief = x509.CertificateSigningRequestBuilder(victim.certificate.subject)
    forged.write_bytes(
        certs.to_pem(
            thief.add_extension(seen.value, seen.critical).sign(certs.new_key(), hashes.SHA256())
        )
    )

    with pytest.raises(LinkError, match="names a signing key that did not sign it"):
        coordinator.approve(forged)
    assert coordinator.roster.approved() == [victim.certificate]


def test_somebody_elses_certificate_key_vouches_for_nothing(
    tmp_path: Path, coordinator: CoordinatorKeys
) -> None:
    """A request with north's public key, but without a signature by it."""
    victim = enrol(tmp_path / "north", coordinator, "north")
    request = pem.read_request(victim.folder / "north.request.pem")
    der = request.public_bytes(Encoding.DER)
    forged = tmp_path / "forged.pem"
    unsigned = der[:-1] + bytes((der[-1] ^ 1,))  # the signature comes last
    forged.write_bytes(certs.to_pem(x509.load_der_x509_csr(unsigned)))

    with pytest.raises(LinkError, match="be signed by it"):
        coordinator.approve(forged)


def test_several_new_certificates_before_one_is_shown(
    tmp_path: Path, coordinator: CoordinatorKeys, roster: Roster
) -> None:
    """Whichever the holder has installed, it is not locked out."""
    first = enrol(tmp_path / "north", coordinator, "north").certificate
    second = rotated(tmp_path / "north", coordinator).certificate
    third = rotated(tmp_path / "north", coordinator).certificate

    assert [roster.name_of(c) for c in (first, second, third)] == ["north"] * 3
    roster.settle(second)
    assert roster.name_of(first) == "north"
    roster.settle(third)
    assert roster.retiring() == []


def test_revoking_bars_every_certificate_of_a_name_and_nobody_else(
    tmp_path: Path, coordinator: CoordinatorKeys, roster: Roster
) -> None:
    first = enrol(tmp_path / "north", coordinator, "north").certificate
    second = rotated(tmp_path / "north", coordinator).certificate
    others = [enrol(tmp_path / n, coordinator, n).certificate for n in ("north-2", "south")]
    watched = [roster.files_about(c) for c in (first, second, *others)]
    before = [pem.stamps(files) for files in watched]

    assert set(coordinator.revoke("north")) == {first, second}

    for certificate in (first, second):
        with pytest.raises(LinkError, match=r"'north' was revoked .*`sotto keys rotate --all`"):
            roster.name_of(certificate)
    assert [roster.name_of(c) for c in others] == ["north-2", "south"]
    changed = [pem.stamps(f) != s for f, s in zip(watched, before, strict=True)]
    assert changed == [True, True, False, False]


def test_a_revoked_holder_comes_back_with_new_keys_only(
    tmp_path: Path, coordinator: CoordinatorKeys, roster: Roster
) -> None:
    state = tmp_path / "north"
    enrol(state, coordinator, "north")
    coordinator.revoke("north")

    for request in (HolderKeys.request(state, "north"), HolderKeys.rotate(state)):
        with pytest.raises(LinkError, match="a key of this request was revoked"):
            coordinator.approve(request, replace=True)
    for request in (HolderKeys.request(state, "other"), HolderKeys.rotate(state)):
        with pytest.raises(LinkError, match="revoked, as one of 'north'"):
            coordinator.approve(request)
    fresh = HolderKeys.rotate(state, key=True, signing_key=True)
    with pytest.raises(LinkError, match="'north' was revoked before"):
        coordinator.approve(fresh)

    keys = HolderKeys.install(state, coordinator.approve(fresh, replace=True))
    assert roster.name_of(keys.certificate) == "north"


def test_revoking_somebody_who_is_not_there(tmp_path: Path, coordinator: CoordinatorKeys) -> None:
    enrol(tmp_path / "north", coordinator, "north")

    with pytest.raises(LinkError, match="nobody called 'south' is on the roster; on it: north"):
        coordinator.revoke("south")
    with pytest.raises(LinkError, match="cannot name a holder"):
        coordinator.revoke("../north")


def test_an_expired_certificate_lets_nobody_in(
    tmp_path: Path, coordinator: CoordinatorKeys, roster: Roster
) -> None:
    keys = enrol(tmp_path / "north", coordinator, "north")
    request = pem.read_request(keys.folder / "north.request.pem")
    ca_key = certs.key_from_pem(pem.read(coordinator.folder / "ca.key"))
    old = certs.holder_certificate(
        coordinator.authority, ca_key, request, lasts=timedelta(seconds=-1)
    )
    roster.enter(old)

    with pytest.raises(LinkError, match=r"expired on .*`sotto keys request`"):
        roster.name_of(old)
