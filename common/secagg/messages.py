"""The messages of secure aggregation, in the order in which they are sent.

=====================  ===========  ================  ==========================================
round                  from         message           holds
=====================  ===========  ================  ==========================================
AdvertiseKeys          holder       Advertisement     c_u^PK, s_u^PK, whose they are, a signature
..                     coordinator  Roster            every holder's advertisement
ShareKeys              holder       EncryptedShares   for every neighbour, a box of two shares
..                     coordinator  Delivery          from every neighbour, its box
MaskedInputCollection  holder       a vector          the masked input, y_u
..                     coordinator  Survivors         U3: whose masked input was counted
ConsistencyCheck       holder       Confirmation      a signature for U3
..                     coordinator  Confirmations     the signatures of U4
Unmasking              holder       Unmasking         of each neighbour, one share of one kind
=====================  ===========  ================  ==========================================

There is one way to write each, and what was not written that way is a
:class:`~common.errors.WireError`. No list is longer than the session's cohort, so what a decoder
does is bounded. Whether a message is *right* is for the states to find out.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

from common.errors import WireError
from common.link.signing import Credential
from common.secagg.keys import KEY_BYTES, SEAL_BYTES
from common.secagg.session import Session
from common.secagg.shamir import PRIME, SHARE_BYTES

__all__ = [
    "Advertisement",
    "Confirmation",
    "Confirmations",
    "Delivery",
    "EncryptedShares",
    "Message",
    "Roster",
    "Survivors",
    "Unmasking",
]

SIGNATURE_BYTES = 64
BOX_BYTES = 2 * SHARE_BYTES + SEAL_BYTES
TAG_BYTES = 16
"""Of a session's digest: enough to say that a message belongs to another one."""

_NUMBER_BYTES = 2
_LONGEST_NAME = 255
_LONGEST_CREDENTIAL = 2**14


class Message(ABC):
    """What every message is: there is one way to write it, and one to read it."""

    KIND: ClassVar[bytes]
    """The byte that it begins with."""

    def to_bytes(self) -> bytes:
        """The message as it travels."""
        writer = _Writer(self.KIND)
        self._write(writer)
        return writer.data

    @classmethod
    def from_bytes(cls, data: bytes, session: Session) -> Self:
        """Inverse of :meth:`to_bytes`.

        Raises:
            WireError: it is not such a message.
        """
        with _Reader(cls.KIND, data, session) as reader:
            return cls._read(reader)

    @abstractmethod
    def _write(self, writer: _Writer) -> None:
        """Write all fields."""

    @classmethod
    @abstractmethod
    def _read(cls, reader: _Reader) -> Self:
        """Read what :meth:`_write` wrote."""


@dataclass(frozen=True)
class Advertisement(Message):
    """What a holder shows of itself in AdvertiseKeys.

    Args:
        session: the first 16 bytes of the session's digest.
        credential: whose keys these are.
        box_key: c_u^PK, with which shares are encrypted; 32 bytes.
        mask_key: s_u^PK, with which masks are agreed on; 32 bytes.
        signature: for all of the above in this session.
    """

    KIND = b"A"

    session: bytes
    credential: Credential
    box_key: bytes
    mask_key: bytes
    signature: bytes

    @property
    def name(self) -> str:
        """The holder's name."""
        return self.credential.name

    def signed(self, session: Session) -> bytes:
        """What the signature is for."""
        credential = hashlib.sha256(self.credential.to_bytes()).digest()
        return session.context("AdvertiseKeys", credential, self.box_key, self.mask_key)

    def _write(self, writer: _Writer) -> None:
        writer.raw(self.session).raw(self.box_key).raw(self.mask_key).raw(self.signature)
        writer.sized(self.credential.to_bytes())

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        session, box_key, mask_key, signature = map(
            reader.raw, (TAG_BYTES, KEY_BYTES, KEY_BYTES, SIGNATURE_BYTES)
        )
        credential = Credential.from_bytes(reader.sized(_LONGEST_CREDENTIAL))
        return cls(session, credential, box_key, mask_key, signature)


@dataclass(frozen=True)
class Roster(Message):
    """Who takes part: U1.

    Args:
        advertisements: in order of names.
    """

    KIND = b"R"

    advertisements: tuple[Advertisement, ...]

    def to_bytes(self) -> bytes:
        """The message as it travels."""
        return self._bytes

    @property
    def digest(self) -> bytes:
        """Names this roster: 32 bytes."""
        return self._digest

    @cached_property
    def _bytes(self) -> bytes:
        return super().to_bytes()

    @cached_property
    def _digest(self) -> bytes:
        return hashlib.sha256(self._bytes).digest()

    def __hash__(self) -> int:
        return hash(self._digest)

    def _write(self, writer: _Writer) -> None:
        writer.number(len(self.advertisements))
        for advertisement in self.advertisements:
            advertisement._write(writer)

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        return cls(tuple(Advertisement._read(reader) for _ in range(reader.count())))


@dataclass(frozen=True)
class EncryptedShares(Message):
    """A holder's secrets, shared among its neighbours.

    Args:
        commitment: to the seed of the self mask, b_u; 32 bytes.
        boxes: recipient → e_{u,v}: a share of s_u^SK and one of b_u, encrypted for it.
    """

    KIND = b"E"

    commitment: bytes
    boxes: Mapping[str, bytes]

    def _write(self, writer: _Writer) -> None:
        writer.raw(self.commitment).entries(self.boxes)

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        return cls(reader.raw(KEY_BYTES), reader.entries(BOX_BYTES))


@dataclass(frozen=True)
class Delivery(Message):
    """What the neighbours that are still there, U2, have encrypted for one holder.

    Args:
        boxes: sender → e_{v,u}.
    """

    KIND = b"D"

    boxes: Mapping[str, bytes]

    def _write(self, writer: _Writer) -> None:
        writer.entries(self.boxes)

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        return cls(reader.entries(BOX_BYTES))


@dataclass(frozen=True)
class Survivors(Message):
    """Whose masked input was counted: U3.

    Args:
        names: of the holders.
    """

    KIND = b"S"

    names: frozenset[str]

    def _write(self, writer: _Writer) -> None:
        writer.entries(dict.fromkeys(self.names, b""))

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        return cls(frozenset(reader.entries(0)))


@dataclass(frozen=True)
class Confirmation(Message):
    """A holder's word that it was shown one list of survivors, and will be shown no other.

    Args:
        signature: for U3.
    """

    KIND = b"C"

    signature: bytes

    def _write(self, writer: _Writer) -> None:
        writer.raw(self.signature)

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        return cls(reader.raw(SIGNATURE_BYTES))


@dataclass(frozen=True)
class Confirmations(Message):
    """What the holders that answered the consistency check, U4, have signed.

    Args:
        signatures: holder → its signature for U3.
    """

    KIND = b"L"

    signatures: Mapping[str, bytes]

    def _write(self, writer: _Writer) -> None:
        writer.entries(self.signatures)

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        return cls(reader.entries(SIGNATURE_BYTES))


@dataclass(frozen=True)
class Unmasking(Message):
    """Of each neighbour one share: of one kind or of the other.

    Args:
        self_mask_shares: neighbour in U3 → share of its b_v.
        mask_key_shares: neighbour in U2 but not in U3 → share of its s_v^SK.
    """

    KIND = b"U"

    self_mask_shares: Mapping[str, int]
    mask_key_shares: Mapping[str, int]

    def _write(self, writer: _Writer) -> None:
        for shares in (self.self_mask_shares, self.mask_key_shares):
            writer.entries({n: s.to_bytes(SHARE_BYTES, "big") for n, s in shares.items()})

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        return cls(reader.shares(), reader.shares())


class _Writer:
    """A message while it is written, field by field."""

    def __init__(self, kind: bytes) -> None:
        self._parts = [kind]

    @property
    def data(self) -> bytes:
        return b"".join(self._parts)

    def raw(self, data: bytes) -> Self:
        self._parts.append(data)
        return self

    def number(self, number: int) -> Self:
        return self.raw(number.to_bytes(_NUMBER_BYTES, "big"))

    def sized(self, data: bytes) -> Self:
        return self.number(len(data)).raw(data)

    def entries(self, values: Mapping[str, bytes]) -> Self:
        """A mapping whose values are all of one length, in order of names."""
        self.number(len(values))
        for name in sorted(values):
            self.sized(name.encode()).raw(values[name])
        return self


class _Reader:
    """A message while it is read; as a context, it insists that all of it was."""

    def __init__(self, kind: bytes, data: bytes, session: Session) -> None:
        self._data, self._at, self._most = data, len(kind), session.cohort
        if not data.startswith(kind):
            raise WireError(f"a message of secure aggregation is not of the kind {kind.decode()!r}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is None and self._at != len(self._data):
            raise WireError("more bytes follow a whole message of secure aggregation")

    def raw(self, length: int) -> bytes:
        start, self._at = self._at, self._at + length
        if self._at > len(self._data):
            raise WireError("a message of secure aggregation is cut off")
        return self._data[start : self._at]

    def count(self) -> int:
        return self._number(self._most)

    def sized(self, most: int) -> bytes:
        return self.raw(self._number(most))

    def entries(self, length: int) -> dict[str, bytes]:
        values: dict[str, bytes] = {}
        last = ""
        for _ in range(self.count()):
            name = self._name()
            if not last < name:
                raise WireError("holders are named twice, or not in order of names")
            values[name] = self.raw(length)
            last = name
        return values

    def shares(self) -> dict[str, int]:
        values = {n: int.from_bytes(b, "big") for n, b in self.entries(SHARE_BYTES).items()}
        if any(value >= PRIME for value in values.values()):
            raise WireError("a share is not an element of the field")
        return values

    def _name(self) -> str:
        try:
            return self.sized(_LONGEST_NAME).decode()
        except UnicodeDecodeError:
            raise WireError("a holder's name is not UTF-8") from None

    def _number(self, most: int) -> int:
        number = int.from_bytes(self.raw(_NUMBER_BYTES), "big")
        if number > most:
            raise WireError(
                f"a message of secure aggregation says {number} where {most} is the most"
            )
        return number
