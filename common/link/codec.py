"""Flower messages <-> bytes, without pickle and nearly without copies.

On the wire a message is a ``Header`` and a payload. The payload is a ``Layout`` (names, types,
shapes and all small values) followed by the bytes of every array, one after the other. Encoding
only lists the buffers that the arrays hold already; decoding copies each array once, out of the
chunks it came in.

The decoder trusts nothing: what it returns has sizes that add up, dtypes of a closed list, and
``.npy`` headers that say the same as the layout, so ``Array.numpy()`` cannot fail on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from google.protobuf.message import DecodeError, EncodeError

from common.errors import WireError
from common.flower import incoming_message
from common.link import federation_pb2 as pb
from common.link.npy import check_npy
from common.link.pieces import Reader, after, regroup

__all__ = [
    "CHUNK_BYTES",
    "MAX_LAYOUT_BYTES",
    "Incoming",
    "Payload",
    "decode",
    "encode",
    "header_for",
]

CHUNK_BYTES = 1024 * 1024
MAX_LAYOUT_BYTES = 8 * 1024 * 1024
"""A layout becomes Python objects, many times its size: big values belong into an Array."""

_MAX_TEXT = 4096
_Record = ArrayRecord | ConfigRecord | MetricRecord


@dataclass(frozen=True)
class Payload:
    """An encoded content, ready to be sent any number of times.

    Args:
        parts: the layout and then each array's bytes; together they are the payload.
    """

    parts: tuple[bytes, ...]

    @property
    def layout_bytes(self) -> int:
        """Length of the layout at the beginning."""
        return len(self.parts[0]) if self.parts else 0

    @property
    def size(self) -> int:
        """Length of the whole payload in bytes."""
        return sum(map(len, self.parts))

    def chunks(self, chunk_bytes: int = CHUNK_BYTES, offset: int = 0) -> Iterator[pb.Chunk]:
        """The payload from ``offset`` on, in pieces of ``chunk_bytes``, one at a time in memory."""
        for data in regroup(after(self.parts, offset), chunk_bytes):
            yield pb.Chunk(offset=offset, data=data)
            offset += len(data)


@dataclass(frozen=True)
class Incoming:
    """A message as it came off the wire, complete but not yet decoded."""

    header: pb.Header
    pieces: tuple[bytes, ...] = ()


def encode(content: RecordDict | None) -> Payload:
    """Lay a message's content out as bytes.

    Args:
        content: the records; None for a message that carries an error.

    Returns:
        The payload, sharing the memory of the arrays in ``content``.

    Raises:
        WireError: an integer needs more than 64 bits, a text is not Unicode, or the values beside
            the arrays are larger than :data:`MAX_LAYOUT_BYTES`.
    """
    if content is None:
        return Payload(())
    layout = pb.Layout()
    tensors: list[bytes] = []
    try:
        for name, record in content.items():
            tensors += _put_record(layout.records.add(name=name), record)
        head = layout.SerializeToString()
    except (ValueError, EncodeError) as error:
        raise WireError(
            f"a value cannot be sent: {error}; integers must fit 64 bits and texts be Unicode"
        ) from None
    if len(head) > MAX_LAYOUT_BYTES:
        raise WireError(
            f"the values beside the arrays take {len(head)} bytes, at most {MAX_LAYOUT_BYTES} "
            "are allowed; put large ones into an Array"
        )
    return Payload((head, *tensors))


def header_for(message: Message, payload: Payload) -> pb.Header:
    """The header that announces ``message`` with an already encoded ``payload``."""
    about = message.metadata
    header = pb.Header(
        message_id=about.message_id,
        reply_to=about.reply_to_message_id,
        message_type=about.message_type,
        group_id=about.group_id,
        run_id=about.run_id,
        created_at=about.created_at,
        ttl=about.ttl,
        layout_bytes=payload.layout_bytes,
        payload_bytes=payload.size,
    )
    if message.has_error():
        reason = message.error.reason
        header.failure.code = message.error.code
        if reason is not None:
            header.failure.reason = reason[:_MAX_TEXT]
    return header


def decode(incoming: Incoming, *, src_node_id: int, dst_node_id: int) -> Message:
    """Rebuild a message.

    Args:
        incoming: header and payload as received.
        src_node_id: who sent it, as the channel (never the message) says.
        dst_node_id: who received it.

    Returns:
        The message; its arrays hold the only copy of their bytes.

    Raises:
        WireError: anything about it is not what the contract says.
    """
    header = incoming.header
    if not (math.isfinite(header.created_at) and math.isfinite(header.ttl)):
        raise WireError("created_at and ttl of a message must be finite numbers of seconds")
    content, error = _body(header, Reader(incoming.pieces))
    try:
        return incoming_message(
            content,
            error,
            message_id=header.message_id,
            message_type=header.message_type,
            src_node_id=src_node_id,
            dst_node_id=dst_node_id,
            reply_to=header.reply_to,
            group_id=header.group_id,
            run_id=header.run_id,
            created_at=header.created_at,
            ttl=header.ttl,
        )
    except ValueError:
        raise WireError(
            f"unknown message type {header.message_type[:64]!r}; allowed are train, evaluate and "
            "query, each with an optional '.action'"
        ) from None


def _body(header: pb.Header, payload: Reader) -> tuple[RecordDict | None, Error | None]:
    if payload.left != header.payload_bytes:
        raise WireError(
            f"the header promises {header.payload_bytes} bytes of payload, {payload.left} came"
        )
    if header.HasField("failure"):
        if header.payload_bytes:
            raise WireError("a message with an error has no payload")
        failure = header.failure
        return None, Error(failure.code, failure.reason if failure.HasField("reason") else None)
    if not header.layout_bytes <= min(header.payload_bytes, MAX_LAYOUT_BYTES):
        raise WireError(
            f"a layout of {header.layout_bytes} bytes in a payload of {header.payload_bytes}; "
            f"it must fit the payload and {MAX_LAYOUT_BYTES} bytes"
        )
    return _content(payload.take(header.layout_bytes), payload), None


def _content(head: bytes, payload: Reader) -> RecordDict:
    try:
        layout = pb.Layout.FromString(head)
    except DecodeError:
        raise WireError("the layout of a message is not readable") from None
    records: dict[str, _Record] = {}
    for record in layout.records:
        _put_new(records, record.name, _get_record(record, payload))
    if payload.left:
        raise WireError(f"{payload.left} bytes of payload belong to no array")
    return RecordDict(records)


def _put_new(into: dict[str, Any], name: str, value: object) -> None:
    if name in into:
        raise WireError(f"the name {name[:64]!r} appears twice in one record")
    into[name] = value


# Records


def _put_record(proto: pb.Record, record: _Record) -> Iterator[bytes]:
    """Describe ``record`` in ``proto`` and yield the bytes that go out of band."""
    if isinstance(record, ArrayRecord):
        proto.arrays.SetInParent()
        for name, array in record.items():
            proto.arrays.entries.add(
                name=name,
                dtype=array.dtype,
                shape=array.shape,
                stype=array.stype,
                data_bytes=len(array.data),
            )
            yield array.data
        return
    values = proto.config if isinstance(record, ConfigRecord) else proto.metrics
    values.SetInParent()
    for name, value in record.items():
        _put_value(values.entries.add(name=name), value)


def _get_record(record: pb.Record, payload: Reader) -> _Record:
    match record.WhichOneof("kind"):
        case "arrays":
            arrays: dict[str, Array] = {}
            for entry in record.arrays.entries:
                _put_new(arrays, entry.name, _get_array(entry, payload))
            return ArrayRecord(arrays)
        case "config":
            return ConfigRecord(_get_values(record.config))
        case "metrics":
            return _metric_record(_get_values(record.metrics))
        case _:
            raise WireError(f"record {record.name[:64]!r} is of no known kind")


def _metric_record(values: dict[str, Any]) -> MetricRecord:
    try:
        return MetricRecord(values)
    except TypeError:
        raise WireError("a metric must be an int, a float or a list of one of them") from None


def _get_array(entry: pb.ArrayEntry, payload: Reader) -> Array:
    data = payload.take(entry.data_bytes)
    shape = tuple(entry.shape)
    check_npy(data, name=entry.name, dtype=entry.dtype, shape=shape, stype=entry.stype)
    return Array(dtype=entry.dtype, shape=shape, stype=entry.stype, data=data)


# Values of config and metric records: the field of ValueEntry that holds each type. bool comes
# before int, because a bool is an int.

_SCALARS: tuple[tuple[type, str], ...] = (
    (bool, "truth"),
    (int, "integer"),
    (float, "real"),
    (str, "text"),
    (bytes, "blob"),
)
_LISTS = ("truths", "integers", "reals", "texts", "blobs")


def _put_value(entry: pb.ValueEntry, value: object) -> None:
    if isinstance(value, list):
        if value:
            getattr(entry, f"{_field(value[0])}s").items.extend(value)
        else:
            entry.empty.SetInParent()
    else:
        setattr(entry, _field(value), value)


def _field(scalar: object) -> str:
    return next(field for kind, field in _SCALARS if isinstance(scalar, kind))


def _get_values(values: pb.Values) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in values.entries:
        _put_new(found, entry.name, _get_value(entry))
    return found


def _get_value(entry: pb.ValueEntry) -> Any:
    field = entry.WhichOneof("value")
    if field is None:
        raise WireError(f"value {entry.name[:64]!r} is of no known type")
    if field == "empty":
        return []
    value = getattr(entry, field)
    return list(value.items) if field in _LISTS else value
