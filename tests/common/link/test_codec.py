from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import WireError
from common.flower import set_identity, stamp
from common.link import federation_pb2 as pb
from common.link.codec import Incoming, decode, encode, header_for
from common.link.npy import DTYPES

set_identity(1)

integers = st.integers(-(2**63), 2**63 - 1)
reals = st.floats(allow_nan=False)
texts = st.text(st.characters(codec="utf-8"), max_size=8)
numbers = st.one_of(integers, reals)
metrics = st.one_of(numbers, st.lists(integers, max_size=4), st.lists(reals, max_size=4))
configs = st.one_of(
    metrics,
    *(
        st.one_of(kind, st.lists(kind, max_size=4))
        for kind in (st.booleans(), texts, st.binary(max_size=8))
    ),
)
arrays = hnp.arrays(
    st.sampled_from(sorted(DTYPES)), hnp.array_shapes(min_dims=0, min_side=0, max_side=5)
).map(Array)
records = st.one_of(
    st.dictionaries(texts, arrays, max_size=3).map(ArrayRecord),
    st.dictionaries(texts, configs, max_size=3).map(ConfigRecord),
    st.dictionaries(texts, metrics, max_size=3).map(MetricRecord),
)
contents = st.dictionaries(texts, records, max_size=4).map(RecordDict)


def over_the_wire(message: Message, chunk_bytes: int) -> Message:
    payload = encode(message.content if message.has_content() else None)
    header = pb.Header.FromString(header_for(message, payload).SerializeToString())
    pieces = tuple(chunk.data for chunk in payload.chunks(chunk_bytes))
    assert all(len(piece) == chunk_bytes for piece in pieces[:-1])
    return decode(Incoming(header, pieces), src_node_id=1, dst_node_id=9)


@given(contents, st.integers(1, 300))
def test_contents_survive(content: RecordDict, chunk_bytes: int) -> None:
    message = Message(content, 9, "train", group_id="3")
    stamp(message)

    received = over_the_wire(message, chunk_bytes)

    assert received.content == content
    assert [type(record) for record in received.content.values()] == [
        type(record) for record in content.values()
    ]
    assert _types(received.content) == _types(content)
    for name in ("message_id", "group_id", "run_id", "created_at", "ttl", "message_type"):
        assert getattr(received.metadata, name) == getattr(message.metadata, name)


def _types(content: RecordDict) -> list[type]:
    """Types of all values: True equals 1 and 1 equals 1.0, and neither may become the other."""
    values = [v for record in content.values() for v in record.values()]
    return [type(v) for v in values] + [type(e) for v in values if isinstance(v, list) for e in v]


@pytest.mark.parametrize("reason", [None, "", "budget: 0.1 left"])
def test_errors_survive(reason: str | None) -> None:
    request = Message(RecordDict(), 9, "train")
    stamp(request, "request")

    received = over_the_wire(Message(Error(2, reason), reply_to=request), 100)

    assert received.error == Error(2, reason)
    assert received.metadata.reply_to_message_id == "request"


def test_encoding_shares_the_memory_of_arrays() -> None:
    array = Array(np.zeros(1000, np.float32))

    payload = encode(RecordDict({"arrays": ArrayRecord({"update": array})}))

    assert payload.parts[1] is array.data


def test_the_sender_is_whom_the_channel_says() -> None:
    message = Message(RecordDict(), 9, "train")
    message.metadata.__dict__["_src_node_id"] = 666

    assert over_the_wire(message, 100).metadata.src_node_id == 1


@pytest.mark.parametrize("value", [2**63, "\ud800", [1, 2**70], b"x" * (9 * 1024 * 1024)])
def test_what_cannot_be_sent_is_said(value: object) -> None:
    with pytest.raises(WireError, match=r"64 bits|values beside the arrays"):
        encode(RecordDict({"config": ConfigRecord({"value": value})}))


# Hostile input


def _npy(dtype: str = "float32", shape: tuple[int, ...] = (3,)) -> bytes:
    return Array(np.zeros(shape, dtype)).data


def _with_array(**changes: object) -> Incoming:
    fields: dict[str, object] = {
        "name": "update",
        "dtype": "float32",
        "shape": [3],
        "stype": "numpy.ndarray",
    }
    data = bytes(changes.pop("data", _npy()))  # type: ignore[call-overload]
    entry = pb.ArrayEntry(**{**fields, "data_bytes": len(data), **changes})
    return _incoming(pb.Layout(records=[pb.Record(arrays=pb.Arrays(entries=[entry]))]), data)


def _with_values(kind: str, *entries: pb.ValueEntry) -> Incoming:
    record = pb.Record(**{kind: pb.Values(entries=entries)})
    return _incoming(pb.Layout(records=[record]))


def _incoming(layout: pb.Layout, data: bytes = b"", **changes: object) -> Incoming:
    head = layout.SerializeToString()
    fields: dict[str, object] = {
        "message_type": "train",
        "layout_bytes": len(head),
        "payload_bytes": len(head) + len(data),
    }
    return Incoming(pb.Header(**{**fields, **changes}), (head + data,))


_EMPTY = pb.Layout()
_LIAR = _npy().replace(b"(3,)", b"(9,)")
_PICKLED = _npy().replace(b"'<f4'", b"'|O'").replace(b" \n", b"  \n")

MALFORMED: dict[str, tuple[Callable[[], Incoming], str]] = {
    "too short": (lambda: _incoming(_EMPTY, payload_bytes=5), "promises 5"),
    "too long": (lambda: _incoming(_EMPTY, b"xx"), "belong to no array"),
    "layout beyond payload": (lambda: _incoming(_EMPTY, layout_bytes=5), "must fit"),
    "layout garbage": (lambda: _incoming(_EMPTY, b"\xff" * 9, layout_bytes=9), "not readable"),
    "huge layout": (lambda: Incoming(pb.Header(layout_bytes=2**60)), "must fit"),
    "unknown type": (lambda: _incoming(_EMPTY, message_type="x"), "message type 'x'"),
    "time": (lambda: _incoming(_EMPTY, created_at=float("nan")), "finite"),
    "failure and content": (
        lambda: _incoming(_EMPTY, b"x", failure=pb.Failure(code=1)),
        "no payload",
    ),
    "no record kind": (lambda: _incoming(pb.Layout(records=[pb.Record(name="r")])), "known kind"),
    "two records": (
        lambda: _incoming(pb.Layout(records=[pb.Record(name="r", config=pb.Values())] * 2)),
        "twice",
    ),
    "no value": (lambda: _with_values("config", pb.ValueEntry(name="v")), "known type"),
    "text metric": (lambda: _with_values("metrics", pb.ValueEntry(text="x")), "metric"),
    "bool metric": (lambda: _with_values("metrics", pb.ValueEntry(truth=True)), "metric"),
    "pickle as stype": (lambda: _with_array(stype="pickle"), "'pickle' is not known"),
    "object dtype": (lambda: _with_array(dtype="object"), "'object' is not allowed"),
    "pickled npy": (lambda: _with_array(data=_PICKLED), r"'\|O', which is no element type"),
    "other dtype": (lambda: _with_array(dtype="int32"), "but its data say float32"),
    "other shape": (lambda: _with_array(shape=[4]), r"but its data say float32 \[3\]"),
    "lying npy": (lambda: _with_array(data=_LIAR, shape=[9]), "12 bytes of elements"),
    "huge shape": (lambda: _with_array(shape=[2**62, 2**62]), "but its data say"),
    "many dimensions": (lambda: _with_array(shape=[1] * 40), "40 dimensions"),
    "no npy": (lambda: _with_array(data=b"x" * 200), "not an npy array"),
    "no data": (lambda: _with_array(data=b""), "not an npy array"),
    "beyond payload": (lambda: _with_array(data_bytes=2**60), "too early"),
    "newer npy": (lambda: _with_array(data=b"\x93NUMPY\x03\x00" + b" " * 99), "version 1.0"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_messages_are_refused(case: str) -> None:
    make, sentence = MALFORMED[case]

    with pytest.raises(WireError, match=sentence):
        decode(make(), src_node_id=1, dst_node_id=2)


@given(st.binary(max_size=200), st.integers(0, 200))
def test_garbage_is_refused_or_read(payload: bytes, layout_bytes: int) -> None:
    header = pb.Header(message_type="train", layout_bytes=layout_bytes, payload_bytes=len(payload))
    with suppress(WireError):
        decode(Incoming(header, (payload,)), src_node_id=1, dst_node_id=2)


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_an_array_with_a_damaged_byte_is_refused_or_readable(position: int, value: int) -> None:
    content = RecordDict({"arrays": ArrayRecord({"update": Array(np.arange(3.0))})})
    payload = encode(content)
    wire = bytearray(b"".join(payload.parts))
    wire[position % len(wire)] = value
    header = pb.Header(
        message_type="train", layout_bytes=payload.layout_bytes, payload_bytes=len(wire)
    )
    try:
        received = decode(Incoming(header, (bytes(wire),)), src_node_id=1, dst_node_id=2)
    except WireError:
        return
    for record in received.content.array_records.values():
        for array in record.values():
            assert array.numpy().shape == array.shape
