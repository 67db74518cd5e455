"""What ``sotto keys list`` shows: for programs a document, for people the lines made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cryptography import x509

from common.link import certificates as certs
from common.link.identity import fingerprint_of
from common.link.keys import CoordinatorKeys, HolderKeys

__all__ = ["coordinator_document", "expiry_warnings", "holder_document", "keys_sentence", "lines"]

_STATUS = {
    "retiring": "holds until the newer one is first shown",
    "revoked": "revoked",
}


def coordinator_document(keys: CoordinatorKeys) -> dict[str, Any]:
    """Authority, server and everybody who may join, or might.

    Args:
        keys: of the coordinator.
    """
    roster, server = keys.roster, keys.server_certificate
    groups = {
        "approved": roster.approved(),
        "retiring": roster.retiring(),
        "revoked": roster.revoked(),
    }
    return {
        "side": "coordinator",
        "authority": _entry(keys.authority),
        "server": {**_entry(server), "hosts": sorted(certs.hosts_of(server))},
        "holders": [
            {**_entry(certificate), "status": status}
            for status, group in groups.items()
            for certificate in group
        ],
    }


def holder_document(keys: HolderKeys) -> dict[str, Any]:
    """A holder's authority and its own certificate.

    Args:
        keys: of the holder.
    """
    own = {**_entry(keys.certificate), "status": "own"}
    own["signing_key"] = fingerprint_of(keys.signing_key.public_key().public_bytes_raw())
    return {"side": "holder", "authority": _entry(keys.authority), "holders": [own]}


def keys_sentence(keys: HolderKeys | None) -> str:
    """The fingerprints of a holder's certificate and signing key, for its ledger.

    Args:
        keys: of the holder; None where there is no TLS.
    """
    if keys is None:
        return "no certificate, plain text"
    (own,) = holder_document(keys)["holders"]
    return f"certificate {own['certificate']}, signing key {own['signing_key']}"


def lines(document: Mapping[str, Any]) -> Iterator[str]:
    """A document, for people; fingerprints whole, to be compared and copied."""
    yield from _lines("authority", document["authority"])
    if (server := document.get("server")) is not None:
        yield from _lines(f"server, for {', '.join(server['hosts'])}", server)
    for holder in document["holders"]:
        status = _STATUS.get(holder["status"])
        yield from _lines(f"{holder['name']}, {status}" if status else holder["name"], holder)
    if not document["holders"]:
        yield "Nobody is approved yet; see `sotto keys approve`."


def expiry_warnings(keys: CoordinatorKeys | HolderKeys) -> Iterator[str]:
    """A sentence for each certificate of this side that expires within 30 days, or has.

    Args:
        keys: of this side.
    """
    if isinstance(keys, HolderKeys):
        if note := certs.expiry_note(keys.certificate):
            yield (
                f"The certificate of {keys.name!r} {note}: run `sotto keys request`, have the "
                "coordinator approve it, and install the bundle."
            )
        return
    if note := certs.expiry_note(keys.server_certificate):
        yield f"The server's certificate {note}: run `sotto keys rotate`."
    if note := certs.expiry_note(keys.authority):
        yield (
            f"The federation's authority {note}: begin a new state folder and enrol every holder "
            "again."
        )
    for certificate in keys.roster.approved():
        if note := certs.expiry_note(certificate):
            yield (
                f"The certificate of {certs.common_name(certificate)!r} {note}: ask it to run "
                "`sotto keys request`, approve that, and have it install the bundle."
            )


def _entry(certificate: x509.Certificate) -> dict[str, Any]:
    signing_key = certs.signing_key_of(certificate)
    return {
        "name": certs.common_name(certificate),
        "until": certs.last_day(certificate),
        "note": certs.expiry_note(certificate) or None,
        "certificate": f"sha256:{certs.fingerprint(certificate)}",
        "signing_key": None if signing_key is None else fingerprint_of(signing_key),
    }


def _lines(title: str, entry: Mapping[str, Any]) -> Iterator[str]:
    note = f"; {entry['note']}" if entry["note"] else ""
    yield f"{title}: until {entry['until']}{note}"
    yield f"  certificate  {entry['certificate']}"
    if entry["signing_key"] is not None:
        yield f"  signing key  {entry['signing_key']}"
