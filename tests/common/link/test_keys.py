from __future__ import annotations

import shutil
import stat
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from common.errors import LinkError
from common.link import certificates as certs
from common.link import pem
from common.link.keys import CoordinatorKeys, HolderKeys
from common.link.signing import Identity, Trust
from tests.linking import enrol


@pytest.fixture
def coordinator(tmp_path: Path) -> CoordinatorKeys:
    return CoordinatorKeys.create_or_load(tmp_path / "coordinator", ["hub.example"])


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_holder_is_enrolled(tmp_path: Path, coordinator: CoordinatorKeys) -> None:
    keys = enrol(tmp_path / "holder", coordinator, "clinic-north")

    assert keys.name == "clinic-north"
    assert keys.authority == coordinator.authority
    assert coordinator.roster.approved() == [keys.certificate]
    assert coordinator.roster.name_of(keys.certificate) == "clinic-north"


def test_private_keys_are_readable_by_their_owner_only(
    tmp_path: Path, coordinator: CoordinatorKeys
) -> None:
    holder = enrol(tmp_path / "holder", coordinator, "a")

    for folder, name in ((coordinator.folder, "ca.key"), (coordinator.folder, "server.key")):
        assert mode_of(folder / name) == 0o600
    assert mode_of(holder.folder / "holder.key") == 0o600
    assert mode_of(holder.folder) == mode_of(coordinator.folder) == 0o700


def test_the_holders_key_is_in_nothing_that_travels(
    tmp_path: Path, coordinator: CoordinatorKeys
) -> None:
    request = HolderKeys.request(tmp_path / "holder", "a")
    bundle = coordinator.approve(request)

    assert b"PRIVATE" not in request.read_bytes() + bundle.read_bytes()


def test_loading_again_changes_nothing_unless_a_host_is_new(tmp_path: Path) -> None:
    first = CoordinatorKeys.create_or_load(tmp_path, ["hub.example", "10.0.0.7"])
    authority, identity = first.authority, first.server_identity()

    again = CoordinatorKeys.create_or_load(tmp_path, ["hub.example"])
    assert (again.authority, again.server_identity()) == (authority, identity)

    moved = CoordinatorKeys.create_or_load(tmp_path, ["hub2.example"])
    assert moved.authority == authority
    server = x509.load_pem_x509_certificate(moved.server_identity()[1])
    assert certs.hosts_of(server) == {
        *("hub.example", "hub2.example", "10.0.0.7"),
        *("localhost", "127.0.0.1", "::1"),
    }


def test_an_approved_name_needs_replace_for_another_key(
    tmp_path: Path, coordinator: CoordinatorKeys
) -> None:
    first = enrol(tmp_path / "first", coordinator, "a")
    request = HolderKeys.request(tmp_path / "second", "a")

    with pytest.raises(LinkError, match=r"approved for other keys already.*--replace"):
        coordinator.approve(request)
    assert coordinator.roster.approved() == [first.certificate]

    HolderKeys.install(tmp_path / "second", coordinator.approve(request, replace=True))
    with pytest.raises(LinkError, match="was revoked"):
        coordinator.roster.name_of(first.certificate)


def test_the_same_key_may_be_approved_again_and_has_one_certificate_once_that_is_shown(
    tmp_path: Path, coordinator: CoordinatorKeys
) -> None:
    older = enrol(tmp_path / "holder", coordinator, "a").certificate
    newer = enrol(tmp_path / "holder", coordinator, "a").certificate
    roster = coordinator.roster

    assert roster.name_of(older) == roster.name_of(newer) == "a"
    roster.settle(older)
    assert roster.name_of(older) == "a", "the newer one was not shown yet"
    roster.settle(newer)
    assert roster.name_of(newer) == "a"
    with pytest.raises(LinkError, match="was replaced"):
        roster.name_of(older)


def test_a_bundle_for_another_key_is_not_installed(
    tmp_path: Path, coordinator: CoordinatorKeys
) -> None:
    bundle = coordinator.approve(HolderKeys.request(tmp_path / "a", "a"))
    HolderKeys.request(tmp_path / "b", "b")

    with pytest.raises(LinkError, match="for another key"):
        HolderKeys.install(tmp_path / "b", bundle)
    with pytest.raises(LinkError, match="no key here yet"):
        HolderKeys.install(tmp_path / "c", bundle)
    with pytest.raises(LinkError, match="no certificate"):
        HolderKeys.load(tmp_path / "b")


def test_a_bundle_with_a_foreign_authority_is_not_installed(
    tmp_path: Path, coordinator: CoordinatorKeys
) -> None:
    bundle = coordinator.approve(HolderKeys.request(tmp_path / "a", "a"))
    certificate, _ = x509.load_pem_x509_certificates(bundle.read_bytes())
    other = CoordinatorKeys.create_or_load(tmp_path / "other").authority
    bundle.write_bytes(certs.to_pem(certificate) + certs.to_pem(other))

    with pytest.raises(LinkError, match="not signed by the authority it carries"):
        HolderKeys.install(tmp_path / "a", bundle)


@pytest.mark.parametrize("name", ["", "A", "a b", "-a", "a-", "a" * 64, "../a", "ä", "a\n"])
def test_names_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    with pytest.raises(LinkError, match="cannot name a holder"):
        HolderKeys.request(tmp_path, name)


def _request(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, name: str) -> bytes:
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    algorithm = hashes.SHA256() if isinstance(key, ec.EllipticCurvePrivateKey) else None
    return certs.to_pem(x509.CertificateSigningRequestBuilder(subject).sign(key, algorithm))


@pytest.mark.parametrize(
    ("request_pem", "sentence"),
    [
        (b"nonsense", "not a certificate request"),
        (_request(ed25519.Ed25519PrivateKey.generate(), "a"), "ECDSA P-256"),
        (_request(ec.generate_private_key(ec.SECP384R1()), "a"), "ECDSA P-256"),
        (_request(certs.new_key(), "../../etc/passwd"), "cannot name a holder"),
    ],
    ids=["garbage", "Ed25519", "P-384", "path"],
)
def test_requests_that_are_not_approved(
    tmp_path: Path, coordinator: CoordinatorKeys, request_pem: bytes, sentence: str
) -> None:
    request = tmp_path / "request.pem"
    request.write_bytes(request_pem)

    with pytest.raises(LinkError, match=sentence):
        coordinator.approve(request)
    assert coordinator.roster.approved() == []


def test_roles_do_not_mix(tmp_path: Path, coordinator: CoordinatorKeys) -> None:
    with pytest.raises(LinkError, match="coordinator's state folder"):
        HolderKeys.request(tmp_path / "coordinator", "a")
    with pytest.raises(LinkError, match="not a coordinator's state folder"):
        CoordinatorKeys.load(tmp_path / "nowhere")


def test_a_holders_certificate_is_for_clients_and_lasts_a_year(
    tmp_path: Path, coordinator: CoordinatorKeys
) -> None:
    certificate = enrol(tmp_path / "holder", coordinator, "a").certificate
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value

    assert list(usage) == [x509.ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not certs.expired(certificate, within=timedelta(days=365))
    assert certs.expired(certificate, within=timedelta(days=400))
    assert certs.signed_by(certificate, coordinator.authority)
    assert not certs.signed_by(coordinator.authority, certificate)


# -- keys that follow keys -------------------------------------------------------------------


def public(keys: HolderKeys) -> tuple[object, bytes]:
    """Both public keys in use; the pairs must fit, or there are none."""
    key, certificate = keys.identity()
    own = certs.key_from_pem(key).public_key()
    assert own == x509.load_pem_x509_certificate(certificate).public_key()
    return own, keys.signing_key.public_key().public_bytes_raw()


def test_rotating_changes_nothing_until_the_certificate_is_installed(
    tmp_path: Path, coordinator: CoordinatorKeys
) -> None:
    keys = enrol(tmp_path / "holder", coordinator, "a")
    before = public(keys)

    bundle = coordinator.approve(HolderKeys.rotate(tmp_path / "holder"))
    assert public(HolderKeys.load(tmp_path / "holder")) == before

    HolderKeys.install(tmp_path / "holder", bundle)
    after = public(keys)
    assert after[0] != before[0]
    assert after[1] == before[1], "others have pinned it"
    assert not list(keys.folder.glob("*.next.key"))
    assert mode_of(keys.folder / "signing.key") == 0o600


def test_a_new_signing_key_is_made_only_when_asked_for(
    tmp_path: Path, coordinator: CoordinatorKeys
) -> None:
    keys = enrol(tmp_path / "holder", coordinator, "a")
    before = public(keys)

    request = HolderKeys.rotate(tmp_path / "holder", key=False, signing_key=True)
    HolderKeys.install(tmp_path / "holder", coordinator.approve(request))

    after = public(keys)
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert certs.signing_key_of(keys.certificate) == after[1]


@pytest.mark.parametrize("files", range(4), ids=["none", "authority", "certificate", "all"])
def test_a_crash_between_any_two_writes_of_an_installation_leaves_keys_that_fit(
    tmp_path: Path, coordinator: CoordinatorKeys, files: int
) -> None:
    """The folder as it is after the first ``files`` writes of `install`."""
    state, crashed = tmp_path / "holder", tmp_path / "crashed"
    before = public(enrol(state, coordinator, "a"))
    bundle = coordinator.approve(HolderKeys.rotate(state, key=True, signing_key=True), replace=True)
    shutil.copytree(state, crashed)
    after = public(HolderKeys.install(state, bundle))
    for name in ("ca.pem", "holder.pem", "holder.key")[:files]:
        shutil.copy(state / "keys" / name, crashed / "keys" / name)
    if files == 3:
        (crashed / "keys" / "holder.next.key").unlink()

    keys = HolderKeys.load(crashed)

    assert public(keys) == (before if files < 2 else after)
    assert public(HolderKeys.install(crashed, bundle)) == after, "doing it again finishes it"


def test_a_server_key_follows_in_one_step(tmp_path: Path) -> None:
    keys = CoordinatorKeys.create_or_load(tmp_path, ["hub.example"])
    old_key = (keys.folder / "server.key").read_bytes()
    before = certs.hosts_of(keys.server_certificate)

    keys.rotate()
    new_key, certificate = keys.server_identity()
    (keys.folder / "server.next.key").write_bytes(new_key)  # as a crash before the last step
    (keys.folder / "server.key").write_bytes(old_key)

    assert keys.server_identity() == (new_key, certificate)
    assert new_key != old_key
    assert certs.hosts_of(keys.server_certificate) == before
    assert certs.signed_by(keys.server_certificate, keys.authority)


def test_rotating_needs_something_to_rotate(tmp_path: Path) -> None:
    HolderKeys.request(tmp_path, "a")
    with pytest.raises(LinkError, match="no certificate"):
        HolderKeys.rotate(tmp_path)


def test_keys_that_were_lost_are_not_taken_from_an_unfinished_rotation(
    tmp_path: Path, coordinator: CoordinatorKeys
) -> None:
    """Whoever copied the folder has the keys that wait in it, too."""
    enrol(tmp_path, coordinator, "a")
    HolderKeys.rotate(tmp_path)
    waiting = (tmp_path / "keys" / "holder.next.key").read_bytes()
    HolderKeys.rotate(tmp_path)
    assert (tmp_path / "keys" / "holder.next.key").read_bytes() == waiting

    HolderKeys.rotate(tmp_path, key=True, signing_key=True)
    assert (tmp_path / "keys" / "holder.next.key").read_bytes() != waiting


def test_a_key_that_does_not_belong_to_the_certificate_is_said(
    tmp_path: Path, coordinator: CoordinatorKeys
) -> None:
    keys = enrol(tmp_path / "holder", coordinator, "a")
    for name, use in (("holder.key", keys.identity), ("signing.key", lambda: keys.signing_key)):
        (keys.folder / name).unlink()
        with pytest.raises(LinkError, match=r"is not the key of the certificate.*rotate --all"):
            use()
    HolderKeys.rotate(tmp_path / "holder", key=True, signing_key=True)  # as it says


def test_a_folder_of_an_earlier_release_gets_a_signing_key(
    tmp_path: Path, coordinator: CoordinatorKeys
) -> None:
    keys = enrol(tmp_path / "holder", coordinator, "a")
    (keys.folder / "signing.key").unlink()
    key = certs.key_from_pem(keys.identity()[0])
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a")])
    old = x509.CertificateSigningRequestBuilder(subject).sign(key, hashes.SHA256())
    (tmp_path / "old.pem").write_bytes(certs.to_pem(old))
    HolderKeys.install(tmp_path / "holder", coordinator.approve(tmp_path / "old.pem"))

    loaded = HolderKeys.load(tmp_path / "holder")

    assert certs.signing_key_of(loaded.certificate) is None
    assert Trust(loaded.authority).check(Identity.of(loaded).credential).name == "a"
    assert mode_of(loaded.folder / "signing.key") == 0o600


def test_what_is_said_about_an_end_that_comes_near(
    tmp_path: Path, coordinator: CoordinatorKeys
) -> None:
    request = pem.read_request(HolderKeys.request(tmp_path / "holder", "a"))
    ca_key = certs.key_from_pem((coordinator.folder / "ca.key").read_bytes())

    def note(days: int) -> str:
        lasts = timedelta(days=days, minutes=5)
        return certs.expiry_note(
            certs.holder_certificate(coordinator.authority, ca_key, request, lasts=lasts)
        )

    assert note(30) == ""
    assert note(29) == "expires in 29 days"
    assert note(1) == "expires in 1 day"
    assert note(0) == "expires in 0 days"
