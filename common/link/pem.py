"""PEM files in a state folder: read with a sentence on failure, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from cryptography import x509

from common.durable import sync_folder
from common.errors import LinkError
from common.link import certificates as certs

__all__ = [
    "move",
    "read",
    "read_bundle",
    "read_certificate",
    "read_request",
    "stamps",
    "write",
    "write_private",
]


def read(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        LinkError: it is not there, or is something else.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise LinkError(f"cannot read {path}: {error.strerror}") from None


def read_certificate(path: Path) -> x509.Certificate:
    """The certificate in a file.

    Raises:
        LinkError: it is not there, or is something else.
    """
    try:
        return certs.whole(x509.load_pem_x509_certificate(read(path)))
    except certs.MALFORMED:
        raise LinkError(f"{path} is not a certificate in PEM form; restore it") from None


def read_request(path: Path) -> x509.CertificateSigningRequest:
    """The certificate request in a file.

    Raises:
        LinkError: it is not there, or is something else.
    """
    try:
        return certs.whole(x509.load_pem_x509_csr(read(path)))
    except certs.MALFORMED:
        raise LinkError(
            f"{path} is not a certificate request; it should be the file that `sotto keys "
            "request` made on the holder"
        ) from None


def read_bundle(path: Path) -> tuple[x509.Certificate, x509.Certificate]:
    """The holder's certificate and the authority's in a bundle.

    Raises:
        LinkError: it is not there, or is something else.
    """
    try:
        certificate, ca = map(certs.whole, x509.load_pem_x509_certificates(read(path)))
    except certs.MALFORMED:
        raise LinkError(
            f"{path} is not a bundle; it should be the file that `sotto keys approve` made on "
            "the coordinator"
        ) from None
    return certificate, ca


def stamps(paths: Iterable[Path]) -> tuple[object, ...]:
    """Something that differs whenever one of the files was replaced, made or taken away; cheap."""
    return tuple(map(_stamp, paths))


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)  # noqa: PTH116  # once a second for each holder; half the time
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def write(path: Path, data: bytes) -> None:
    """Replace a file that anybody may read."""
    _replace(path, data, 0o644)


def write_private(path: Path, data: bytes) -> None:
    """Replace a file that only its owner may read."""
    _replace(path, data, 0o600)


def move(path: Path, target: Path) -> None:
    """Give a file another name in its folder, for good once this returns."""
    path.replace(target)
    sync_folder(target.parent)


def _replace(path: Path, data: bytes, mode: int) -> None:
    """Write a file that is there wholly or not at all, and never readable wider than ``mode``."""
    for folder in _missing(path.parent):
        folder.mkdir(mode=0o700)
    draft = path.with_name(f".{path.name}.draft")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    move(draft, path)


def _missing(folder: Path) -> Iterator[Path]:
    """Folders that have to be made, outermost first."""
    if not folder.exists():
        yield from _missing(folder.parent)
        yield folder
