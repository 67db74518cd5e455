from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import WireError
from common.link import federation_pb2 as pb
from common.link.codec import Incoming, Payload
from common.link.transfer import (
    MAX_HEADER_BYTES,
    MIN_CHUNK_BYTES,
    Assembler,
    Beginning,
    continued,
    message_bytes,
)

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


# Messages that break off


def sent(header: pb.Header, payload: Payload, begun: pb.Begun) -> Iterator[pb.HolderFrame]:
    """The frames of a message to a peer that may have its beginning, as they come off the wire."""
    first = continued(header, begun)
    frames = [pb.HolderFrame(header=first)]
    chunks = payload.chunks(MIN_CHUNK_BYTES, first.offset)
    for frame in (*frames, *(pb.HolderFrame(chunk=chunk) for chunk in chunks)):
        yield pb.HolderFrame.FromString(frame.SerializeToString())


def take(assembler: Assembler, frames: Iterable[pb.HolderFrame]) -> Incoming | None:
    incoming = None
    for frame in frames:
        if frame.HasField("header"):
            incoming = assembler.begin(frame.header)
        else:
            incoming = assembler.add(frame.chunk)
    return incoming


def transferred(
    header: pb.Header, payload: Payload, breaks: Sequence[int], most: int
) -> tuple[bytes, int]:
    """Send a message over streams that end after some frames each; what came, and how much went."""
    beginning, went = None, 0
    for frames in (*breaks, None):
        assembler = Assembler(most, beginning)
        begun = beginning.named if beginning else pb.Begun()
        incoming = take(assembler, islice(sent(header, payload, begun), frames))
        went += assembler.taken
        if incoming is not None:
            assert incoming.header == header
            return b"".join(incoming.pieces), went
        beginning = assembler.break_off()
        assert assembler.held == 0
    raise AssertionError("the last stream brings everything")


@settings(max_examples=60)
@given(
    st.integers(0, 5 * MIN_CHUNK_BYTES),
    st.lists(st.integers(0, 7), max_size=8),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 2 * MIN_CHUNK_BYTES), max_size=3),
)
def test_however_often_it_breaks_a_message_comes_whole_and_every_byte_of_it_once(
    size: int, breaks: list[int], seed: int, cuts: list[int]
) -> None:
    data = random.Random(seed).randbytes(size)
    ends = [0, *accumulate(cuts), size]
    parts = tuple(data[low:high] for low, high in pairwise(sorted(min(e, size) for e in ends)))
    header = pb.Header(message_id="m", reply_to="r", payload_bytes=size)

    came, went = transferred(header, Payload(parts), breaks, size)

    assert came == data
    assert went == size, "no chunk went twice"


@given(
    st.integers(1, 3),
    st.sampled_from(
        ["message_id", "reply_to", "payload_bytes", "offset", "created_at", "group_id"]
    ),
    st.integers(1, 2 * MIN_CHUNK_BYTES),
)
def test_a_beginning_goes_with_no_other_message(chunks: int, field: str, change: int) -> None:
    payload = Payload((bytes(4 * MIN_CHUNK_BYTES),))
    header = pb.Header(message_id="m", reply_to="r", payload_bytes=payload.size)
    first = Assembler(2 * payload.size)
    take(first, islice(sent(header, payload, pb.Begun()), 1 + chunks))
    beginning = first.break_off()
    assert beginning is not None
    rest = continued(header, beginning.named)
    assert take(Assembler(2 * payload.size, beginning), [pb.HolderFrame(header=rest)]) is None

    value = getattr(rest, field)
    setattr(rest, field, value + (str(change) if isinstance(value, str) else change))

    with pytest.raises(WireError, match=r"beginning is not here|bytes begins at"):
        Assembler(2 * payload.size, beginning).begin(rest)


def test_without_the_comparison_two_messages_would_be_mixed() -> None:
    """The negative control of the test before this one: what an unchecked prefix would do."""

    class Careless(Beginning):
        def goes_on_with(self, header: pb.Header) -> bool:
            return True

    old = Careless(pb.Header(message_id="old", payload_bytes=2 * len(PIECE)), (PIECE,))
    new = pb.Header(message_id="new", payload_bytes=2 * len(PIECE), offset=len(PIECE))
    assembler = Assembler(2 * len(PIECE), old)
    assembler.begin(new)
    mixed = assembler.add(pb.Chunk(offset=len(PIECE), data=b"q" * len(PIECE)))

    assert mixed is not None
    assert mixed.pieces == (PIECE, b"q" * len(PIECE))


@pytest.mark.parametrize("received", [0, 4 * MIN_CHUNK_BYTES, 2**63])
def test_a_sender_believes_no_beginning_that_cannot_be(received: int) -> None:
    header = pb.Header(message_id="m", payload_bytes=4 * MIN_CHUNK_BYTES)

    assert continued(header, pb.Begun(message_id="m", received=received)) is header
    assert continued(header, pb.Begun(message_id="other", received=1)) is header


def begun_assembler(most: int = 4 * MIN_CHUNK_BYTES) -> Assembler:
    """One that knows the first chunk of a message from an earlier stream."""
    header = pb.Header(message_id="m", reply_to="r", payload_bytes=2 * MIN_CHUNK_BYTES)
    return Assembler(most, Beginning(header, (PIECE,)))


def test_another_message_or_the_same_from_its_first_byte_takes_the_beginnings_place() -> None:
    for header in (
        pb.Header(message_id="other", payload_bytes=1),
        pb.Header(message_id="m", reply_to="r", payload_bytes=2 * MIN_CHUNK_BYTES),
    ):
        assembler = begun_assembler()
        assert assembler.held == len(PIECE)
        assembler.begin(header)
        assert assembler.held == 0
        assert assembler.beginning is None


def test_what_is_no_longer_wanted_is_not_kept_whichever_stream_brought_it() -> None:
    for forget in (
        lambda assembler: assembler.forget("r"),
        lambda assembler: assembler.withdraw("m"),
        lambda assembler: assembler.abandon(),
    ):
        assembler = begun_assembler()
        forget(assembler)
        assert assembler.held == 0
        assert assembler.break_off() is None


def test_the_rest_of_a_message_that_is_not_wanted_passes_by() -> None:
    assembler = begun_assembler()
    assembler.forget("r")
    rest = pb.Header(message_id="m", reply_to="r", payload_bytes=2 * len(PIECE), offset=len(PIECE))

    assert assembler.begin(rest, keep=False) is None
    assert assembler.add(pb.Chunk(offset=len(PIECE), data=PIECE)) is None
    assert assembler.begin(pb.Header(message_id="next")) is not None


def test_a_stream_that_ends_before_the_message_goes_on_hands_the_beginning_on() -> None:
    beginning = begun_assembler().break_off()

    assert beginning is not None
    assert beginning.named == pb.Begun(message_id="m", received=len(PIECE))


def test_what_was_broken_off_passes_by_if_it_comes_all_the_same() -> None:
    assembler = Assembler(2 * len(PIECE))
    assembler.begin(pb.Header(message_id="m", payload_bytes=2 * len(PIECE)))
    assembler.add(pb.Chunk(offset=0, data=PIECE))
    assert assembler.break_off() is not None

    assert assembler.add(pb.Chunk(offset=len(PIECE), data=PIECE)) is None
    assert assembler.held == 0
