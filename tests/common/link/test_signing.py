from __future__ import annotations

import dataclasses
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigurationError, Refusal, WireError
from common.link import certificates as certs
from common.link import pem
from common.link.keys import CoordinatorKeys, HolderKeys
from common.link.signing import (
    Credential,
    Identity,
    Trust,
    _binding_message,
    signing_fingerprint,
)
from tests.linking import enrol


@pytest.fixture
def coordinator(tmp_path: Path) -> CoordinatorKeys:
    return CoordinatorKeys.create_or_load(tmp_path / "coordinator")


@pytest.fixture
def north(tmp_path: Path, coordinator: CoordinatorKeys) -> HolderKeys:
    return enrol(tmp_path / "north", coordinator, "north")


def refusal(trust: Trust, credential: Credential) -> Refusal:
    with pytest.raises(Refusal) as caught:
        trust.check(credential)
    return caught.value


def test_a_signature_is_verified_with_the_credential_that_travelled(north: HolderKeys) -> None:
    identity = Identity.of(north)
    travelled = Credential.from_bytes(identity.credential.to_bytes())

    signer = Trust(north.authority).check(travelled)

    assert signer.name == "north"
    signer.verify(identity.sign(b"round 1"), b"round 1")
    with pytest.raises(InvalidSignature):
        signer.verify(identity.sign(b"round 1"), b"round 2")


def test_a_credential_looked_up_again_is_the_same(north: HolderKeys) -> None:
    # Else everybody would verify it anew in every round.
    assert Identity.of(north).credential == Identity.of(north).credential


def test_a_new_certificate_keeps_the_signing_key_and_every_pin(
    tmp_path: Path, coordinator: CoordinatorKeys, north: HolderKeys
) -> None:
    before = Identity.of(north).credential
    trust = Trust(north.authority, frozenset({signing_fingerprint(before)}))

    after = Identity.of(enrol(tmp_path / "north", coordinator, "north")).credential

    assert after.certificate != before.certificate
    assert trust.check(after).name == "north"


def test_a_credential_of_another_federation(tmp_path: Path, north: HolderKeys) -> None:
    other = CoordinatorKeys.create_or_load(tmp_path / "other")
    stranger = Identity.of(enrol(tmp_path / "stranger", other, "north"))

    refused = refusal(Trust(north.authority), stranger.credential)

    assert refused.code == "identity"
    assert "another authority" in refused.sentence
    assert "sotto keys" in refused.sentence


def _bound(keys: HolderKeys, certificate: bytes, name: str = "north") -> Credential:
    """A credential whose certificate has been exchanged for another of the same key."""
    pem.write(keys.folder / "holder.pem", certificate)
    return dataclasses.replace(Identity.of(keys).credential, name=name)


def test_an_expired_certificate_is_noticed_though_its_signatures_were_verified_before(
    coordinator: CoordinatorKeys, north: HolderKeys
) -> None:
    request = pem.read_request(north.folder / "north.request.pem")
    ca_key = certs.key_from_pem((coordinator.folder / "ca.key").read_bytes())
    old = certs.holder_certificate(
        coordinator.authority, ca_key, request, lasts=timedelta(seconds=-1)
    )
    credential = _bound(north, certs.to_pem(old))

    for _ in range(2):  # the second time out of the cache
        refused = refusal(Trust(north.authority), credential)
        assert refused.code == "identity"
        assert "not valid now" in refused.sentence


def test_the_servers_certificate_makes_no_holder(
    coordinator: CoordinatorKeys, north: HolderKeys
) -> None:
    key, certificate = coordinator.server_identity()
    pem.write_private(north.folder / "holder.key", key)
    credential = _bound(north, certificate, name="sotto-coordinator")

    assert refusal(Trust(north.authority), credential).code == "identity"


def test_a_signing_key_cannot_be_moved_to_another_certificate_or_name(
    tmp_path: Path, coordinator: CoordinatorKeys, north: HolderKeys
) -> None:
    trust = Trust(north.authority)
    good = Identity.of(north).credential
    south = Identity.of(enrol(tmp_path / "south", coordinator, "south")).credential
    forged = [
        dataclasses.replace(good, signing_key=south.signing_key),
        dataclasses.replace(good, binding=south.binding),
        dataclasses.replace(good, binding=b""),
        dataclasses.replace(good, certificate=south.certificate),
        dataclasses.replace(good, certificate=south.certificate, name="south"),
        dataclasses.replace(good, name="south"),
        dataclasses.replace(good, certificate=b"", binding=b""),
        dataclasses.replace(good, certificate=b"nonsense"),
    ]

    assert trust.check(good).name == "north"
    assert {refusal(trust, credential).code for credential in forged} == {"identity"}


def test_a_holder_does_not_speak_for_another(
    tmp_path: Path, coordinator: CoordinatorKeys, north: HolderKeys
) -> None:
    """South has a good certificate and signs with its key whatever it likes."""
    south = enrol(tmp_path / "south", coordinator, "south")
    own = Identity.of(south).credential
    binding = certs.key_from_pem(south.identity()[0]).sign(
        _binding_message("north", own.signing_key), ec.ECDSA(hashes.SHA256())
    )

    posing = Credential("north", own.signing_key, own.certificate, binding)

    assert "a certificate for another name" in refusal(Trust(north.authority), posing).sentence


def test_a_stolen_certificate_key_does_not_bring_a_signing_key_of_the_thiefs(
    north: HolderKeys,
) -> None:
    """The certificate names its signing key, so the binding alone is not enough."""
    key = certs.key_from_pem(north.identity()[0])
    thief = certs.new_signing_key().public_key().public_bytes_raw()
    binding = key.sign(_binding_message("north", thief), ec.ECDSA(hashes.SHA256()))

    refused = refusal(
        Trust(north.authority),
        dataclasses.replace(Identity.of(north).credential, signing_key=thief, binding=binding),
    )

    assert "not its certificate's" in refused.sentence


def test_an_authority_that_signs_for_a_key_of_another_kind(
    coordinator: CoordinatorKeys, north: HolderKeys
) -> None:
    """The coordinator has the authority's key and may be dishonest: a refusal, never a crash."""
    key, own = ed25519.Ed25519PrivateKey.generate(), north.certificate
    builder = x509.CertificateBuilder(
        own.issuer,
        own.subject,
        key.public_key(),
        own.serial_number,
        own.not_valid_before_utc,
        own.not_valid_after_utc,
        list(own.extensions),
    )
    ca_key = certs.key_from_pem((coordinator.folder / "ca.key").read_bytes())
    certificate = certs.to_pem(builder.sign(ca_key, hashes.SHA256()))

    credential = dataclasses.replace(Identity.of(north).credential, certificate=certificate)
    assert refusal(Trust(north.authority), credential).code == "identity"


def test_only_pinned_signing_keys_take_part(
    tmp_path: Path, coordinator: CoordinatorKeys, north: HolderKeys
) -> None:
    """What the coordinator cannot do by making up a holder: its authority signs, no pin fits."""
    credential = Identity.of(north).credential
    made_up = Identity.of(enrol(tmp_path / "made-up", coordinator, "south")).credential
    pin = signing_fingerprint(credential)

    for way in (pin, pin.removeprefix("sha256:"), pin.replace(":", "").removeprefix("sha256")):
        trust = Trust(north.authority, frozenset({way.upper()}))
        assert trust.check(credential).name == "north"
        refused = refusal(trust, made_up)
        assert refused.code == "roster"
        assert signing_fingerprint(made_up) in refused.sentence
    assert Trust(north.authority).check(made_up).name == "south", "without pins, the authority's"


def test_a_pin_that_is_no_fingerprint() -> None:
    with pytest.raises(ConfigurationError, match="'north' is no fingerprint of a signing key"):
        Trust(None, frozenset({"north"}))


def test_without_tls_names_are_believed_and_certificates_are_not(north: HolderKeys) -> None:
    identity = Identity.unsigned("bank-1")
    signer = Trust().check(identity.credential)

    signer.verify(identity.sign(b"x"), b"x")
    assert refusal(Trust(north.authority), identity.credential).code == "identity"
    assert refusal(Trust(), Identity.of(north).credential).code == "identity"


def test_the_private_key_is_in_no_text(north: HolderKeys) -> None:
    identity = Identity.of(north)

    assert "Private" not in repr(identity)
    assert identity.key.private_bytes_raw() not in identity.credential.to_bytes()


_credentials = st.builds(
    Credential,
    st.text(min_size=1, max_size=63).filter(str.isprintable),
    st.binary(min_size=32, max_size=32),
    st.binary(max_size=2000),
    st.binary(max_size=80),
)


@given(_credentials)
def test_a_credential_travels_whole_and_cut_off_not_at_all(credential: Credential) -> None:
    data = credential.to_bytes()

    assert Credential.from_bytes(data) == credential
    for other in (data[:-1], data + b"\0", data[1:], data + data):
        with pytest.raises(WireError):
            Credential.from_bytes(other)


@given(st.binary(max_size=300))
def test_any_other_bytes_are_no_credential(data: bytes) -> None:
    magic = Credential("a", bytes(32)).to_bytes()[:-40]
    for candidate in (data, magic + data):
        try:
            found = Credential.from_bytes(candidate)
        except WireError:
            continue
        assert found.to_bytes() == candidate, "there is one way to write a credential"


@pytest.mark.parametrize(
    "fields",
    [
        ("", bytes(32)),
        ("a\n", bytes(32)),
        ("a" * 256, bytes(32)),
        ("a", bytes(31)),
        ("a", bytes(32), bytes(8193)),
        ("a", bytes(32), b"", bytes(129)),
    ],
)
def test_credentials_that_cannot_be(fields: tuple[str, bytes]) -> None:
    with pytest.raises(WireError, match="a credential must hold"):
        Credential(*fields)
