from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.link import certificates as certs
from common.link import pem
from common.link.keys import CoordinatorKeys, HolderKeys
from common.link.signing import Identity, signing_fingerprint
from sotto.keys_commands import app
from sotto.keys_report import expiry_warnings
from tests.linking import enrol


def sotto_keys(*words: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    CoordinatorKeys.create_or_load(tmp_path / "hub")
    return tmp_path / "hub"


@pytest.fixture
def clinic(tmp_path: Path, hub: Path) -> Path:
    enrol(tmp_path / "clinic", CoordinatorKeys(hub / "keys"), "north")
    return tmp_path / "clinic"


def let_expire(hub: Path, clinic: Path, lasts: timedelta) -> None:
    """Give north, and the roster, a certificate that lasts as long as that."""
    coordinator, keys = CoordinatorKeys(hub / "keys"), HolderKeys(clinic / "keys")
    request = pem.read_request(keys.folder / "north.request.pem")
    ca_key = certs.key_from_pem(pem.read(coordinator.folder / "ca.key"))
    made = certs.holder_certificate(coordinator.authority, ca_key, request, lasts=lasts)
    pem.write(keys.folder / "holder.pem", certs.to_pem(made))
    coordinator.roster.enter(made)
    coordinator.roster.settle(made)


def test_from_request_to_list(tmp_path: Path, hub: Path) -> None:
    clinic = tmp_path / "clinic"
    assert "Nobody is approved yet" in sotto_keys("list", "--state", hub)

    said = sotto_keys("request", "--name", "north", "--state", clinic)
    request = clinic / "keys" / "north.request.pem"
    assert str(request) in said.replace("\n", "")

    said = sotto_keys("approve", request, "--state", hub)
    bundle = hub / "keys" / "bundles" / "north.pem"
    assert "sotto keys install north.pem" in said

    said = sotto_keys("install", bundle, "--state", clinic)
    assert "'north' has a certificate until" in said

    ours = sotto_keys("list", "--state", clinic).splitlines()
    theirs = sotto_keys("list", "--state", hub).splitlines()
    assert ours[0].startswith("authority: until ")
    assert ours[2].startswith("north: until ")
    assert set(ours) <= set(theirs), "both sides show the same fingerprints"


def test_the_pin_is_shown_on_both_sides(hub: Path, clinic: Path) -> None:
    pin = signing_fingerprint(Identity.of(HolderKeys.load(clinic)).credential)

    for state in (hub, clinic):
        assert f"  signing key  {pin}\n" in sotto_keys("list", "--state", state)
        (holder,) = json.loads(_json(state))["holders"]
        assert holder["signing_key"] == pin


def _json(state: Path) -> str:
    result = CliRunner().invoke(app, ["list", "--state", str(state), "--json", "-"])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_both_sides_show_the_same_authority(tmp_path: Path, hub: Path) -> None:
    request = HolderKeys.request(tmp_path / "clinic", "north")

    approved = sotto_keys("approve", request, "--state", hub)
    bundle = hub / "keys" / "bundles" / "north.pem"
    installed = sotto_keys("install", bundle, "--state", tmp_path / "clinic")

    authority = [line for line in approved.splitlines() if "same authority" in line]
    assert authority
    assert authority == [line for line in installed.splitlines() if "same authority" in line]


def test_an_expected_error_is_a_sentence(tmp_path: Path) -> None:
    said = sotto_keys("request", "--name", "North", "--state", tmp_path, status=1)

    assert said.startswith("sotto: 'North' cannot name a holder")
    assert "Traceback" not in said


def test_a_holder_rotates_its_key_without_replace(hub: Path, clinic: Path) -> None:
    said = sotto_keys("rotate", "--state", clinic)
    assert "What there was before stays in use" in said
    assert "--replace" not in said
    assert "pinned" not in said

    said = sotto_keys("approve", clinic / "keys" / "north.request.pem", "--state", hub)
    assert "What it has holds until it shows the new one" in said
    assert "holds until the newer one is first shown" in sotto_keys("list", "--state", hub)
    sotto_keys("install", hub / "keys" / "bundles" / "north.pem", "--state", clinic)


def test_a_new_signing_key_says_whom_to_tell_what(hub: Path, clinic: Path) -> None:
    said = sotto_keys("rotate", "--signing-key", "--state", clinic)
    assert "Tell every holder that has pinned" in said

    sotto_keys("approve", clinic / "keys" / "north.request.pem", "--state", hub)
    sotto_keys("install", hub / "keys" / "bundles" / "north.pem", "--state", clinic)
    assert signing_fingerprint(Identity.of(HolderKeys.load(clinic)).credential) in said


def test_lost_keys_are_replaced_and_what_was_before_is_revoked(hub: Path, clinic: Path) -> None:
    assert "--replace" in sotto_keys("rotate", "--all", "--state", clinic)
    request = clinic / "keys" / "north.request.pem"

    sotto_keys("approve", request, "--state", hub, status=1)
    said = sotto_keys("approve", request, "--state", hub, "--replace")
    assert "What it had before is revoked." in said
    assert "north, revoked: until" in sotto_keys("list", "--state", hub)


def test_the_coordinator_rotates_its_own_key(hub: Path) -> None:
    before = CoordinatorKeys(hub / "keys").server_certificate

    assert "holders notice nothing" in sotto_keys("rotate", "--state", hub)

    assert CoordinatorKeys(hub / "keys").server_certificate != before
    assert "has no signing key" in sotto_keys("rotate", "--all", "--state", hub, status=1)


def test_revoking(hub: Path, clinic: Path) -> None:
    finger = certs.fingerprint(HolderKeys.load(clinic).certificate)

    said = sotto_keys("revoke", "north", "--state", hub)

    assert f"Revoked: sha256:{finger}" in said
    assert "within a second" in said
    assert "nobody called 'north'" in sotto_keys("revoke", "north", "--state", hub, status=1)
    assert "not a coordinator's" in sotto_keys("revoke", "north", "--state", clinic, status=1)


@pytest.mark.parametrize(
    ("lasts", "note"),
    [
        (timedelta(days=29, minutes=5), "expires in 29 days"),
        (timedelta(seconds=-1), "expired on 20"),
        (timedelta(days=31), None),
    ],
    ids=["soon", "expired", "later"],
)
def test_what_expires_is_said_thirty_days_ahead_on_both_sides(
    hub: Path, clinic: Path, lasts: timedelta, note: str | None
) -> None:
    let_expire(hub, clinic, lasts)

    for side in (CoordinatorKeys(hub / "keys"), HolderKeys(clinic / "keys")):
        warnings = list(expiry_warnings(side))
        listed = sotto_keys("list", "--state", side.folder.parent)
        if note is None:
            assert not warnings
            assert "expire" not in listed
        else:
            (warning,) = warnings
            assert f"The certificate of 'north' {note}" in warning
            assert "`sotto keys request`" in warning
            assert f"; {note}" in listed
