"""A private key in a file, and the one that is to follow it.

The key in use lies in ``NAME.key``. A new one lies in ``NAME.next.key`` until there is a
certificate for it. Which of the two is in use is for the certificate to say: writing that is the
one step that changes keys, so a crash at any moment leaves a key and a certificate that fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import LinkError
from common.link import certificates as certs
from common.link import pem

__all__ = ["KeyFile"]

_K = TypeVar("_K", EllipticCurvePrivateKey, Ed25519PrivateKey)


@dataclass(frozen=True)
class KeyFile(Generic[_K]):
    """Where a private key lies, readable by its owner only.

    Args:
        path: of the key in use.
        generate: makes a new key.
        parse: reads one from PEM.
    """

    path: Path
    generate: Callable[[], _K]
    parse: Callable[[bytes], _K]

    @property
    def exists(self) -> bool:
        """Whether there is any key."""
        return any(path.exists() for path in self._paths)

    def ensure(self) -> None:
        """Make the key, unless there is one."""
        if not self.exists:
            pem.write_private(self.path, certs.key_to_pem(self.generate()))

    def first(self) -> _K:
        """The key where no certificate says which.

        Raises:
            LinkError: there is none, or it is not readable.
        """
        return self.parse(pem.read(self.path))

    def next(self, *, afresh: bool = False) -> _K:
        """The key that is to follow.

        Args:
            afresh: make another one even if one waits for its certificate already.
        """
        following = self._paths[1]
        if afresh or not following.exists():
            pem.write_private(following, certs.key_to_pem(self.generate()))
        return self.parse(pem.read(following))

    def find(self, public: object) -> _K | None:
        """The private key to a public one, if it is one of the two."""
        found = self._search(public)
        return None if found is None else found[1]

    def key_of(self, public: object) -> _K:
        """The private key to a public one.

        Raises:
            LinkError: it is neither of the two.
        """
        if (key := self.find(public)) is None:
            raise LinkError(
                f"{self.path} is not the key of the certificate beside it; restore both from one "
                "backup, or make new ones with `sotto keys rotate --all`"
            )
        return key

    def settle(self, public: object) -> None:
        """Give the key of the installed certificate the name of the key in use."""
        found = self._search(public)
        if found is not None and found[0] != self.path:
            pem.move(found[0], self.path)

    @property
    def _paths(self) -> tuple[Path, Path]:
        return self.path, self.path.with_name(f"{self.path.stem}.next{self.path.suffix}")

    def _search(self, public: object) -> tuple[Path, _K] | None:
        # The first again at last: another process may just have given the next key its name.
        for path in (*self._paths, self.path):
            if path.exists():
                key = self.parse(pem.read(path))
                if key.public_key() == public:
                    return path, key
        return None
