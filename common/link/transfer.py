"""Putting messages on a stream of frames and taking them off again; shared by both ends.

Nothing that a peer sends is kept beyond the limits here: they are checked on the header, before
the first byte of a message, and on every chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from common.errors import WireError
from common.link import federation_pb2 as pb
from common.link.codec import Incoming

__all__ = [
    "DEFAULT_MAX_MESSAGE_BYTES",
    "MAX_HEADER_BYTES",
    "MIN_CHUNK_BYTES",
    "Assembler",
    "Beginning",
    "check_header",
    "continued",
    "message_bytes",
]

DEFAULT_MAX_MESSAGE_BYTES: Final = 1024 * 1024 * 1024
"""For programs that know no plan; who knows one takes :func:`message_bytes`."""

MAX_HEADER_BYTES: Final = 16 * 1024
"""Of a Hello or a Header, which are kept for as long as their stream or message."""

MIN_CHUNK_BYTES: Final = 64 * 1024
"""Of every chunk but a message's last; a piece of one byte would cost fifty in memory."""

_ENVELOPE_BYTES = 256 * 1024  # names, plan and figures beside the numbers of a message
_NUMBER_BYTES = 8  # int64 counts, and the widest ring of secure aggregation; updates take 4
_PEER_BYTES = 8 * 1024  # keys, shares and signatures for one other holder, several times over


def message_bytes(numbers: int, peers: int = 0) -> int:
    """The longest message that a plan calls for, in bytes.

    Args:
        numbers: of the longest vector: shared parameters, cells of a histogram, or sums.
        peers: holders that a message may speak of one by one, as those of secure aggregation do.

    >>> message_bytes(1000) < 300_000
    True
    """
    return _ENVELOPE_BYTES + _NUMBER_BYTES * numbers + _PEER_BYTES * peers


def check_header(header: pb.Header | pb.Hello) -> None:
    """Refuse a header, or a first frame, that is too long to be kept.

    Raises:
        WireError: it is longer than :data:`MAX_HEADER_BYTES`.
    """
    if (size := header.ByteSize()) > MAX_HEADER_BYTES:
        raise WireError(f"a header of {size} bytes came, at most {MAX_HEADER_BYTES} are allowed")


@dataclass(frozen=True)
class Beginning:
    """What has come of a message over a stream that ended amid it.

    Args:
        header: of the message, as it was first announced.
        pieces: its payload, as far as it came.
    """

    header: pb.Header
    pieces: tuple[bytes, ...]

    @property
    def received(self) -> int:
        """Bytes of payload."""
        return sum(map(len, self.pieces))

    @property
    def named(self) -> pb.Begun:
        """How the sender is told of it."""
        return pb.Begun(message_id=self.header.message_id, received=self.received)

    def goes_on_with(self, header: pb.Header) -> bool:
        """Whether a header announces the rest of this very message, from where it broke."""
        return header.offset == self.received and _whole(header) == self.header


def continued(header: pb.Header, begun: pb.Begun) -> pb.Header:
    """The header with which a message is sent to a peer that may have its beginning already.

    Args:
        header: of the whole message.
        begun: what the peer says that it has.

    Returns:
        ``header``, with an offset if that is this message's.
    """
    if begun.message_id != header.message_id or not 0 < begun.received < header.payload_bytes:
        return header
    rest = pb.Header()
    rest.CopyFrom(header)
    rest.offset = begun.received
    return rest


def _whole(header: pb.Header) -> pb.Header:
    """A header without its offset."""
    whole = pb.Header()
    whole.CopyFrom(header)
    whole.ClearField("offset")
    return whole


class Assembler:
    """Collects the chunks of one message after the other from one stream.

    Args:
        max_bytes: the longest payload that is accepted; a longer one is refused by its header,
            before a byte of it is kept.
        beginning: of the message that the stream before this one broke off. It is kept until a
            message begins: that is its rest, or it is forgotten.
    """

    def __init__(self, max_bytes: int, beginning: Beginning | None = None) -> None:
        self._max_bytes = max_bytes
        self._beginning = beginning
        self._header: pb.Header | None = None
        self._pieces: list[bytes] = []
        self._received = 0
        self._keep = True
        self.taken = 0
        """Bytes of payload that have come on this stream, kept or not."""

    @property
    def beginning(self) -> Beginning | None:
        """What an earlier stream has brought of a message whose rest may still come."""
        return self._beginning

    @property
    def message_id(self) -> str | None:
        """Id of the message that is coming in, if any."""
        return self._header.message_id if self._header else None

    @property
    def reply_to(self) -> str:
        """What the message that is coming in answers, or ``""``."""
        return self._header.reply_to if self._header else ""

    @property
    def held(self) -> int:
        """Bytes that are kept of messages that are not complete."""
        beginning = self._beginning
        return sum(map(len, self._pieces)) + (beginning.received if beginning else 0)

    def begin(self, header: pb.Header, *, keep: bool = True) -> Incoming | None:
        """Start a message, or go on with the one that an earlier stream began.

        Args:
            header: its header.
            keep: False lets its chunks pass by unkept; the message is then never returned.

        Returns:
            The message, if its header is all of it.

        Raises:
            WireError: another message is not finished, this one or its header is too long, or it
                claims to go on with something else than what is here.
        """
        if self._header is not None:
            raise WireError("a message began before the one before it was complete")
        check_header(header)
        if header.payload_bytes > self._max_bytes:
            raise WireError(
                f"a message of {header.payload_bytes} bytes is announced, at most "
                f"{self._max_bytes} are allowed"
            )
        if header.offset > header.payload_bytes:
            raise WireError(f"a message of {header.payload_bytes} bytes begins at {header.offset}")
        self._pieces = list(self._prefix(header)) if keep else []
        self._beginning = None
        self._header, self._received, self._keep = _whole(header), header.offset, keep
        return self._complete()

    def add(self, chunk: pb.Chunk) -> Incoming | None:
        """Take the next chunk.

        Returns:
            The message, if this chunk completes it.

        Raises:
            WireError: the chunk is too short, out of order or beyond the announced length.
        """
        if self._header is None:
            raise WireError("a chunk came without a header before it")
        data = chunk.data
        end = self._received + len(data)
        due = self._header.payload_bytes
        if not data or chunk.offset != self._received or end > due:
            raise WireError(
                f"a chunk of {len(data)} bytes at {chunk.offset} came where bytes "
                f"{self._received} to {due} were due"
            )
        if len(data) < MIN_CHUNK_BYTES and end < due:
            raise WireError(
                f"a chunk of {len(data)} bytes came amid a message; all but the last must have "
                f"at least {MIN_CHUNK_BYTES}"
            )
        self._received = end
        self.taken += len(data)
        if self._keep:
            self._pieces.append(data)
        return self._complete()

    def discard(self) -> None:
        """Let what is left of the message that is coming in pass by unkept."""
        self._pieces, self._keep = [], False

    def forget(self, reply_to: str) -> None:
        """Keep nothing more of the reply to a request, whichever stream brought it."""
        if self.reply_to == reply_to:
            self.discard()
        if self._beginning is not None and self._beginning.header.reply_to == reply_to:
            self._beginning = None

    def withdraw(self, message_id: str) -> None:
        """Nothing more will come of a message, whichever stream began it."""
        if self.message_id == message_id:
            self.abandon()
        if self._beginning is not None and self._beginning.header.message_id == message_id:
            self._beginning = None

    def abandon(self) -> None:
        """Forget the message that is coming in, and what an earlier stream has brought."""
        self._header, self._pieces, self._received = None, [], 0
        self._beginning = None

    def break_off(self) -> Beginning | None:
        """Give away what has come of a message whose rest another stream may bring.

        What is left of it passes by unkept if it comes on this stream all the same.
        """
        beginning, self._beginning = self._beginning, None
        if self._header is not None and self._keep and self._pieces:
            beginning = Beginning(self._header, tuple(self._pieces))
        self.discard()
        return beginning

    def _prefix(self, header: pb.Header) -> tuple[bytes, ...]:
        """The bytes before a message's first chunk."""
        if not header.offset:
            return ()
        beginning = self._beginning
        if beginning is None or not beginning.goes_on_with(header):
            raise WireError(
                f"a message goes on at byte {header.offset}, and its beginning is not here"
            )
        return beginning.pieces

    def _complete(self) -> Incoming | None:
        header = self._header
        if header is None or self._received < header.payload_bytes:
            return None
        incoming = Incoming(header, tuple(self._pieces)) if self._keep else None
        self.abandon()
        return incoming
