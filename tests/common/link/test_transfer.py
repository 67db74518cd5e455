from __future__ import annotations

import pytest

from common.errors import WireError
from common.link import federation_pb2 as pb
from common.link.codec import Incoming
from common.link.transfer import MAX_HEADER_BYTES, MIN_CHUNK_BYTES, Assembler, message_bytes

PIECE = b"p" * MIN_CHUNK_BYTES


def test_chunks_become_a_message() -> None:
    assembler = Assembler(2 * MIN_CHUNK_BYTES)
    header = pb.Header(message_id="m", payload_bytes=MIN_CHUNK_BYTES + 2)

    assert assembler.begin(header) is None
    assert assembler.message_id == "m"
    assert assembler.add(pb.Chunk(offset=0, data=PIECE)) is None
    last = pb.Chunk(offset=MIN_CHUNK_BYTES, data=b"de")
    assert assembler.add(last) == Incoming(header, (PIECE, b"de"))
    assert assembler.message_id is None


def test_a_message_without_payload_is_complete_at_once() -> None:
    header = pb.Header(message_id="m")

    assert Assembler(0).begin(header) == Incoming(header)
    assert Assembler(0).begin(header, keep=False) is None


def test_a_long_message_is_refused_by_its_header() -> None:
    assembler = Assembler(100)

    with pytest.raises(WireError, match="101 bytes is announced, at most 100"):
        assembler.begin(pb.Header(payload_bytes=101))
    with pytest.raises(WireError, match="without a header"):
        assembler.add(pb.Chunk(data=b"x"))


def test_an_unwanted_message_passes_by_unkept() -> None:
    assembler = Assembler(100)
    assembler.begin(pb.Header(payload_bytes=2), keep=False)

    assert assembler.add(pb.Chunk(offset=0, data=b"ab")) is None
    assert assembler.begin(pb.Header(message_id="next")) is not None


@pytest.mark.parametrize(
    "chunk",
    [
        pb.Chunk(offset=0, data=b""),
        pb.Chunk(offset=1, data=b"a"),
        pb.Chunk(offset=0, data=b"abc"),
    ],
    ids=["empty", "gap", "too long"],
)
def test_chunks_that_do_not_fit_are_refused(chunk: pb.Chunk) -> None:
    assembler = Assembler(100)
    assembler.begin(pb.Header(payload_bytes=2))

    with pytest.raises(WireError, match="were due"):
        assembler.add(chunk)


def test_a_message_cannot_begin_within_another_unless_that_is_abandoned() -> None:
    assembler = Assembler(2 * MIN_CHUNK_BYTES)
    assembler.begin(pb.Header(payload_bytes=2 * MIN_CHUNK_BYTES))
    assembler.add(pb.Chunk(offset=0, data=PIECE))

    with pytest.raises(WireError, match="before the one before it"):
        assembler.begin(pb.Header())

    assembler.abandon()
    assert assembler.begin(pb.Header()) is not None


def test_a_small_chunk_amid_a_message_is_refused() -> None:
    assembler = Assembler(2 * MIN_CHUNK_BYTES)
    assembler.begin(pb.Header(payload_bytes=2 * MIN_CHUNK_BYTES))

    with pytest.raises(WireError, match="a chunk of 65535 bytes came amid a message"):
        assembler.add(pb.Chunk(offset=0, data=PIECE[1:]))


def test_a_long_header_is_refused() -> None:
    assembler = Assembler(100)

    with pytest.raises(WireError, match=f"at most {MAX_HEADER_BYTES} are allowed"):
        assembler.begin(pb.Header(group_id="g" * MAX_HEADER_BYTES))
    assert assembler.message_id is None


def test_what_is_left_of_a_discarded_message_passes_by() -> None:
    assembler = Assembler(2 * MIN_CHUNK_BYTES)
    assembler.begin(pb.Header(payload_bytes=MIN_CHUNK_BYTES + 1))
    assembler.add(pb.Chunk(offset=0, data=PIECE))

    assembler.discard()

    assert assembler.held == 0
    assert assembler.add(pb.Chunk(offset=MIN_CHUNK_BYTES, data=b"x")) is None
    following = pb.Header(message_id="next")
    assert assembler.begin(following) == Incoming(following)


def test_the_longest_message_follows_from_the_plan() -> None:
    small, large, masked = message_bytes(1000), message_bytes(10_000_000), message_bytes(1000, 64)

    assert 8 * 1000 < small < 300_000
    assert large - small == 8 * 9_999_000
    assert masked - small == 64 * 8 * 1024
