"""Putting messages on a stream of frames and taking them off again; shared by both ends.

Nothing that a peer sends is kept beyond the limits here: they are checked on the header, before
the first byte of a message, and on every chunk.
"""

from __future__ import annotations

from typing import Final

from common.errors import WireError
from common.link import federation_pb2 as pb
from common.link.codec import CHUNK_BYTES, Incoming

__all__ = [
    "CHANNEL_OPTIONS",
    "DEFAULT_MAX_MESSAGE_BYTES",
    "MAX_HEADER_BYTES",
    "MIN_CHUNK_BYTES",
    "PROTOCOL",
    "SERVER_OPTIONS",
    "Assembler",
    "check_header",
    "message_bytes",
]

PROTOCOL: Final = 1
"""Raised when an older peer could no longer follow; both ends must have the same."""

DEFAULT_MAX_MESSAGE_BYTES: Final = 1024 * 1024 * 1024
"""For programs that know no plan; who knows one takes :func:`message_bytes`."""

MAX_HEADER_BYTES: Final = 16 * 1024
"""Of a Hello or a Header, which are kept for as long as their stream or message."""

MIN_CHUNK_BYTES: Final = 64 * 1024
"""Of every chunk but a message's last; a piece of one byte would cost fifty in memory."""

_ENVELOPE_BYTES = 256 * 1024  # names, plan and figures beside the numbers of a message
_NUMBER_BYTES = 8  # int64 counts, and the widest ring of secure aggregation; updates take 4
_PEER_BYTES = 8 * 1024  # keys, shares and signatures for one other holder, several times over

_FRAME_OVERHEAD = 64 * 1024  # everything in a frame but a chunk's data is far smaller
_PING_EVERY_MS = 20_000
_PING_TIMEOUT_MS = 10_000
_METADATA_BYTES = 8 * 1024

# Both ends ping, so that a peer that vanished without a word (power, a cut cable, a proxy that
# dropped the connection) is noticed within half a minute, however long a holder computes.
_COMMON_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", CHUNK_BYTES + _FRAME_OVERHEAD),
    ("grpc.max_send_message_length", CHUNK_BYTES + _FRAME_OVERHEAD),
    ("grpc.keepalive_time_ms", _PING_EVERY_MS),
    ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_metadata_size", _METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", 2 * _METADATA_BYTES),
    # Without compression, a few bytes cannot become a megabyte.
    ("grpc.compression_enabled_algorithms_bitset", 1),
)
CHANNEL_OPTIONS: Final = (
    *_COMMON_OPTIONS,
    # Reconnecting is the node's own business; a shared subchannel would keep an old failure.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
)
SERVER_OPTIONS: Final = (
    *_COMMON_OPTIONS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", _PING_EVERY_MS // 4),
    # Two coordinators on one port would each see half of the holders.
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", 1),
)


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


class Assembler:
    """Collects the chunks of one message after the other from one stream.

    Args:
        max_bytes: the longest payload that is accepted; a longer one is refused by its header,
            before a byte of it is kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._header: pb.Header | None = None
        self._pieces: list[bytes] = []
        self._received = 0
        self._keep = True

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
        """Bytes of the message that is coming in that are kept."""
        return sum(map(len, self._pieces))

    def begin(self, header: pb.Header, *, keep: bool = True) -> Incoming | None:
        """Start a message.

        Args:
            header: its header.
            keep: False lets its chunks pass by unkept; the message is then never returned.

        Returns:
            The message, if its header is all of it.

        Raises:
            WireError: another message is not finished, or this one or its header is too long.
        """
        if self._header is not None:
            raise WireError("a message began before the one before it was complete")
        check_header(header)
        if header.payload_bytes > self._max_bytes:
            raise WireError(
                f"a message of {header.payload_bytes} bytes is announced, at most "
                f"{self._max_bytes} are allowed"
            )
        self._header, self._keep = header, keep
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
        if self._keep:
            self._pieces.append(data)
        return self._complete()

    def discard(self) -> None:
        """Let what is left of the message that is coming in pass by unkept."""
        self._pieces, self._keep = [], False

    def abandon(self) -> None:
        """Forget the message that is coming in."""
        self._header, self._pieces, self._received = None, [], 0

    def _complete(self) -> Incoming | None:
        header = self._header
        if header is None or self._received < header.payload_bytes:
            return None
        incoming = Incoming(header, tuple(self._pieces)) if self._keep else None
        self.abandon()
        return incoming
