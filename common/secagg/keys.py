"""Key agreement and boxes: X25519, HKDF and AES-GCM, each key for one purpose and one round.

Bonawitz et al. 2017 call them KA and AE (section 4). Every derived key takes in the
:meth:`~common.secagg.session.Session.context` of its purpose, so a key of one run, plan, round or
pair of holders is of no use in another.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

__all__ = [
    "KEY_BYTES",
    "SEAL_BYTES",
    "agree",
    "derive",
    "open_box",
    "private_key",
    "public",
    "seal",
]

KEY_BYTES = 32
"""Of a private key, a public key, a seed and a derived key."""

SEAL_BYTES = 16
"""By how much a box is longer than what is in it."""

_NONCE = bytes(12)


def private_key(secret: bytes) -> X25519PrivateKey:
    """The key pair of 32 random bytes."""
    return X25519PrivateKey.from_private_bytes(secret)


def public(private: X25519PrivateKey) -> bytes:
    """The public half of a key pair: 32 bytes."""
    return private.public_key().public_bytes_raw()


def agree(private: X25519PrivateKey, peer: bytes) -> bytes:
    """What two holders, and nobody else, can compute of each other's public keys: 32 bytes.

    To be given to :func:`derive`, never used as a key itself.

    Raises:
        ValueError: the peer's key is of low order: the result would not depend on the secret.
    """
    return private.exchange(X25519PublicKey.from_public_bytes(peer))


def derive(secret: bytes, context: bytes) -> bytes:
    """A key for one purpose: HKDF with SHA-256 (RFC 5869), 32 bytes.

    Args:
        secret: of high entropy: an agreement, or a random seed.
        context: of the purpose.
    """
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=context).derive(secret)


def seal(key: bytes, message: bytes, context: bytes) -> bytes:
    """Encrypt and authenticate ``message``: AES-256-GCM.

    The nonce is fixed, so a key must seal one message only: derive it for the pair of holders, the
    direction and the round.

    Args:
        key: of :func:`derive`.
        message: what is in the box.
        context: authenticated with it, and not in the box.
    """
    return AESGCM(key).encrypt(_NONCE, message, context)


def open_box(key: bytes, box: bytes, context: bytes) -> bytes:
    """What :func:`seal` put into the box.

    Raises:
        ValueError: it was sealed with another key or for another context, or changed on the way.
    """
    try:
        return AESGCM(key).decrypt(_NONCE, box, context)
    except InvalidTag:
        raise ValueError("the box was not sealed with this key for this context") from None
