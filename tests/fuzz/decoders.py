"""Everything that reads bytes which somebody else may have written: one line each in ``DECODERS``.

A decoder gives a value or raises one of the errors that its documentation names, within bounded
time and memory, whatever it is given. Seeds are made by the code itself, so there is no corpus.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from cryptography import x509
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from google.protobuf.message import DecodeError

from client.policy import Policy
from client.policy_file import PolicyFile, add_policy
from common.aggregation import Masked
from common.errors import ConfigurationError, LinkError, StateError, WireError
from common.flower import incoming_message, set_identity
from common.link import certificates as certs
from common.link import federation_pb2 as pb
from common.link import pem
from common.link.codec import Incoming, decode, encode, header_for
from common.link.keys import CoordinatorKeys, HolderKeys
from common.link.npy import DTYPES, check_npy
from common.link.signing import Credential, Identity, Trust
from common.link.transfer import MIN_CHUNK_BYTES, Assembler, Beginning, check_header, continued
from common.link.versions import NEWEST, require_spoken, spoken
from common.plan import TrainingPlan
from common.privacy.anchor import Anchor, Head
from common.privacy.events import Composition, SubsampledGaussian
from common.privacy.ledger import Budget, Ledger, Release
from common.secagg.holder import advertise_keys
from common.secagg.keys import KEY_BYTES
from common.secagg.messages import (
    BOX_BYTES,
    SIGNATURE_BYTES,
    Advertisement,
    Confirmation,
    Confirmations,
    Delivery,
    EncryptedShares,
    Roster,
    Survivors,
    Unmasking,
)
from common.secagg.session import Session
from common.secagg.wire import MaskedReply, StepReply, StepRequest, message_type_of
from common.settings import plan_for
from common.statistics_plan import CategoryQuestion, NumberQuestion, StatisticsPlan
from common.tasks.scaling import InputScaling, read_scaling, scaling_text
from common.wire import (
    EvaluateReply,
    RoundRequest,
    StatisticsReply,
    StatisticsRequest,
    TrainReply,
)
from server.checkpoints import Checkpoint, Checkpoints, RunState, file_name
from server.journal import RoundJournal
from server.summaries import RoundSummary
from tests.tiny import TinyTask

__all__ = ["DECODERS", "Decoder"]


@dataclass(frozen=True)
class Decoder:
    """One way in.

    Args:
        decode: reads an input.
        seeds: honest inputs.
        refuses: the errors by which it may refuse an input.
        share: of the usual number of inputs; less than 1 where each one is a file.
    """

    decode: Callable[[bytes], object]
    seeds: Callable[[], Sequence[bytes]]
    refuses: tuple[type[Exception], ...]
    share: float = 1.0


# -- what the decoders need ----------------------------------------------------------------------

DIMENSION, CELLS, SUMS = 4, 8, 5


@cache
def scratch() -> Path:
    """A folder that is gone when the process ends."""
    memory = Path("/dev/shm")  # where there is one: ten thousand files need no disk
    place = memory if memory.is_dir() else None
    folder = tempfile.TemporaryDirectory(prefix="sotto-fuzz-", dir=place)
    atexit.register(folder.cleanup)
    return Path(folder.name)


@cache
def plan() -> TrainingPlan:
    return plan_for(TinyTask(), {"epsilon": 5.0})


@cache
def statistics_plan() -> StatisticsPlan:
    questions = (
        NumberQuestion(name="age", low=0.0, high=90.0, bins=4),
        CategoryQuestion(name="sex", values=("f", "m")),
    )
    return StatisticsPlan(
        task="t", source="s", questions=questions, epsilon=1.0, delta=1e-5, unit="record"
    ).calibrated()


def message(
    content: RecordDict | None, error: Error | None = None, message_type: str = "train"
) -> Message:
    """A message as it comes off the wire."""
    return incoming_message(
        content, error, message_id="m", message_type=message_type, src_node_id=2, dst_node_id=1,
        reply_to="r", group_id="1", run_id=1, created_at=0.0, ttl=60.0,
    )  # fmt: skip


def contents() -> list[RecordDict]:
    """One of every kind of request and reply."""
    vector = np.arange(DIMENSION, dtype=np.float32)
    return [
        RoundRequest("run-1", 2, plan(), vector).records(),
        TrainReply(vector / 10, 1.0).records(),
        EvaluateReply({"accuracy": 0.5, "auc": np.nan}, np.arange(CELLS)).records(),
        StatisticsRequest("run-1", statistics_plan()).records(),
        StatisticsReply(np.arange(SUMS)).records(),
        RecordDict(
            {
                "arrays": ArrayRecord({name: Array(np.zeros((2, 3), name)) for name in DTYPES}),
                "config": ConfigRecord(
                    {"a": 1, "b": [1.5], "c": "x", "d": b"y", "e": [True], "f": [], "g": ["z"]}
                ),
                "metrics": MetricRecord({"h": [1, 2], "i": 0.5}),
            }
        ),
    ]


# -- messages ------------------------------------------------------------------------------------


def _delimited(parts: Sequence[bytes]) -> bytes:
    return b"".join(len(part).to_bytes(3, "big") + part for part in parts)


def _parts(data: bytes) -> list[bytes]:
    parts = []
    while data:
        end = 3 + int.from_bytes(data[:3], "big")
        parts.append(data[3:end])
        data = data[end:]
    return parts


def stream_seeds(frame: type[pb.HolderFrame] | type[pb.CoordinatorFrame]) -> list[bytes]:
    """Whole streams: a header and its chunks for each content, and an error."""
    set_identity(1)
    sent = [(message(content), encode(content)) for content in contents()]
    sent.append((message(None, Error(2, "budget: 0.1 left")), encode(None)))
    streams = []
    for one, payload in sent:
        frames = [frame(header=header_for(one, payload))]
        frames += [frame(chunk=chunk) for chunk in payload.chunks()]
        streams.append(_delimited([each.SerializeToString() for each in frames]))
    beginning, rest = broken_off()
    header = frame(header=continued(beginning.header, beginning.named))
    resumed = _delimited([each.SerializeToString() for each in (header, frame(chunk=rest))])
    return [*streams, b"".join(streams), resumed, resumed + streams[0]]


@cache
def broken_off() -> tuple[Beginning, pb.Chunk]:
    """What has come of a message of two chunks, and its last one."""
    set_identity(1)
    content = TrainReply(np.zeros(MIN_CHUNK_BYTES // 4, np.float32), 1.0).records()
    payload = encode(content)
    first, last = payload.chunks(MIN_CHUNK_BYTES)
    return Beginning(header_for(message(content), payload), (first.data,)), last


def hello_seeds() -> list[bytes]:
    begun = broken_off()[0].named
    hellos = [
        pb.Hello(protocol=NEWEST, oldest=NEWEST, software="sotto", begun=begun, in_hand=["m"]),
        pb.Hello(protocol=1, software="sotto 0.1.0", name="clinic", task="tiny"),
    ]
    return [hello.SerializeToString() for hello in hellos]


def read_hello(data: bytes) -> int:
    """What a coordinator makes of a holder's first frame: a version, and where to go on."""
    hello = pb.Hello.FromString(data)
    check_header(hello)
    spoken(hello, "sotto")
    header = continued(broken_off()[0].header, hello.begun)
    assert header.offset < header.payload_bytes
    return header.offset


def welcome_seeds() -> list[bytes]:
    welcome = pb.Welcome(node_id=7, holder="a", protocol=NEWEST, begun=broken_off()[0].named)
    return [welcome.SerializeToString(), pb.Welcome(software="sotto 0.1.0").SerializeToString()]


def read_welcome(data: bytes) -> int:
    """What a holder makes of the answer."""
    welcome = pb.Welcome.FromString(data)
    require_spoken(welcome, "sotto")
    return continued(broken_off()[0].header, welcome.begun).offset


def read_stream(data: bytes, frame: type[pb.HolderFrame] | type[pb.CoordinatorFrame]) -> int:
    """Take a stream's frames apart, as both ends do, and decode every message in it.

    An earlier stream has broken off amid a message, so that this one may go on with it.
    """
    assembler = Assembler(1 << 20, broken_off()[0])
    messages = 0
    for part in _parts(data):
        one = frame.FromString(part)
        incoming = None
        if one.WhichOneof("kind") == "header":
            incoming = assembler.begin(one.header)
        elif one.WhichOneof("kind") == "chunk":
            incoming = assembler.add(one.chunk)
        if incoming is not None:
            decode(incoming, src_node_id=2, dst_node_id=1)
            messages += 1
    return messages


def payload_seeds() -> list[bytes]:
    """Layout and tensors of each content, behind the layout's length."""
    payloads = [encode(content) for content in contents()]
    return [one.layout_bytes.to_bytes(3, "big") + b"".join(one.parts) for one in payloads]


def read_payload(data: bytes) -> RecordDict:
    """Decode a payload whose header is honest."""
    header = pb.Header(
        message_type="train",
        layout_bytes=int.from_bytes(data[:3], "big"),
        payload_bytes=max(0, len(data) - 3),
    )
    return decode(Incoming(header, (data[3:],)), src_node_id=2, dst_node_id=1).content


def read_as(read: Callable[[RecordDict], object]) -> Callable[[bytes], object]:
    """Decode a payload and read what is in it as one kind of request or reply."""
    return lambda data: read(read_payload(data))


def npy_seeds() -> list[bytes]:
    shapes: Sequence[tuple[int, ...]] = ((), (3,), (2, 3))
    return [Array(np.zeros(shape, name)).data for name in sorted(DTYPES) for shape in shapes]


def read_npy(data: bytes) -> None:
    check_npy(data, name="x", dtype="float32", shape=(3,), stype="numpy.ndarray")


# -- texts ---------------------------------------------------------------------------------------


def text(read: Callable[[str], object]) -> Callable[[bytes], object]:
    """Read bytes as the text that protobuf would have made of them."""
    return lambda data: read(data.decode("utf-8", errors="replace"))


def policy_seeds() -> list[bytes]:
    path = scratch() / "honest-policy.toml"
    if not path.exists():
        policy = Policy(data_set="default", tasks=("tiny",), budget=Budget(8.0, 1e-5), size_class=9)
        add_policy(path, policy)
    return [path.read_bytes()]


def scaling_seeds() -> list[bytes]:
    scaling = [InputScaling(input="x", shift=(0.5, 1.0), scale=(1.0, 2.0))]
    return [scaling_text(scaling, "A comment").encode()]


# -- files ---------------------------------------------------------------------------------------


def from_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """Read bytes as a file of some name, alone in its folder."""

    def decode_file(data: bytes) -> object:
        folder = scratch() / name.replace(".", "-")
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            if old.name != name:  # what a database left beside itself
                old.unlink()
        (folder / name).write_bytes(data)
        return read(folder / name)

    return decode_file


CHECKPOINT = "checkpoint-000001.safetensors"


def checkpoint_seeds() -> list[bytes]:
    folder = scratch() / "honest-checkpoint"
    folder.mkdir(exist_ok=True)
    vector = np.arange(DIMENSION, dtype=np.float32)
    state = RunState("run", 1, vector, vector.astype(np.float64), 1, {"memory": vector})
    Checkpoints(folder).save(state, plan(), RoundSummary(1, ("north",), {}, 0.1))
    (path,) = folder.glob("checkpoint-*")
    return [path.read_bytes()]


def read_checkpoint(path: Path) -> Checkpoint | None:
    """As if whoever changed it had changed the checksum, too."""
    named = path.with_name(file_name(1, hashlib.sha256(path.read_bytes()).hexdigest()))
    return Checkpoints(path.rename(named).parent).load(plan())[0]


JOURNAL, LOG = "journal-000001.bin", logging.getLogger("sotto.coordinator")


def journal_seeds() -> list[bytes]:
    path = scratch() / "honest-journal.bin"
    path.unlink(missing_ok=True)
    journal = RoundJournal(path)
    journal.key()
    exchange = journal.exchange("train", {2: "ab", 3: "cd"}, {2: "north", 3: "south"})
    journal.take(exchange, 2, TrainReply(np.ones(DIMENSION, np.float32), 1.0).records())
    journal.take(exchange, 3, Error(1, "declined"))
    journal.end(exchange)
    journal.close()
    return [path.read_bytes()]


def resealed(content: bytes) -> bytes:
    """The records with right checksums, as far as their lengths lead."""
    sealed, begin, lengths = bytearray(content), 0, struct.Struct(">IQ")
    while begin + 4 + lengths.size <= len(sealed):
        end = begin + 4 + lengths.size + sum(lengths.unpack_from(sealed, begin + 4))
        sealed[begin : begin + 4] = zlib.crc32(sealed[begin + 4 : end]).to_bytes(4, "big")
        begin = end
    return bytes(sealed)


def read_journal(path: Path) -> set[int]:
    """With every record's checksum put right, as a checksum is no defence against a writer."""
    path.write_bytes(resealed(path.read_bytes()))
    LOG.disabled = True  # a line about each, which pytest would keep
    try:
        journal = RoundJournal(path)
    finally:
        LOG.disabled = False
    journal.close()
    return journal.recalled(evaluation=False)


@cache
def ledger_seeds() -> list[bytes]:
    path = scratch() / "honest-ledger.sqlite"
    event = SubsampledGaussian(1.0, 10.0, 1)
    with Ledger.open(path) as ledger:
        for number in (1, 2):
            release = Release(f"r/{number}", "d", "tiny", "hub", "r", "plan", number, event)
            ledger.reserve(release, Budget(5.0, 1e-5), Composition.of(event))
            ledger.commit(f"r/{number}", "digest")
    return [path.read_bytes()]


def read_ledger(path: Path) -> object:
    shutil.copy(scratch() / "honest-ledger.head", path.with_name("ledger.head"))
    with Ledger.open(path) as ledger:
        return ledger.epsilon("d", 1e-5)


def anchor_seeds() -> list[bytes]:
    heads = [Head(number, f"{number:064x}") for number in (1, 2, 3)]
    return [b"".join(head.line() for head in heads)]


@cache
def keys() -> CoordinatorKeys:
    return CoordinatorKeys.create_or_load(scratch() / "coordinator")


@cache
def pem_seeds() -> list[bytes]:
    state = scratch() / "holder"
    request = HolderKeys.request(state, "clinic")
    bundle = keys().approve(request)
    installed = HolderKeys.install(state, bundle)
    signing = installed.folder / "signing.key"
    return [
        request.read_bytes(), bundle.read_bytes(), *installed.identity(), signing.read_bytes()
    ]  # fmt: skip


@cache
def authority_key() -> certs.Key:
    return certs.key_from_pem(pem.read(keys().folder / "ca.key"))


def approve(data: bytes) -> object:
    """What ``sotto keys approve`` does with a request, but for the roster."""
    request = from_file("holder.request.pem", pem.read_request)(data)
    assert isinstance(request, x509.CertificateSigningRequest)
    return certs.holder_certificate(keys().authority, authority_key(), request)


def credential_seeds() -> list[bytes]:
    pem_seeds()
    own = Identity.of(HolderKeys.load(scratch() / "holder")).credential
    return [own.to_bytes(), Identity.unsigned("clinic").credential.to_bytes()]


# -- secure aggregation ----------------------------------------------------------------------------

SESSION = Session("run-1", "plan", 1, threshold=3, cohort=4)

MASKED_KINDS = (
    *(Advertisement, Roster, EncryptedShares, Delivery, Survivors),
    *(Confirmation, Confirmations, Unmasking),
)


class MaskedMessage(Protocol):
    """What all of them can."""

    def to_bytes(self) -> bytes: ...


@cache
def masked_messages() -> dict[type, MaskedMessage]:
    """One honest message of each kind."""
    shown = [advertise_keys(SESSION, Identity.unsigned(name), Trust())[1] for name in "abc"]
    boxes = dict.fromkeys("abc", bytes(BOX_BYTES))
    signatures = dict.fromkeys("abc", bytes(SIGNATURE_BYTES))
    made: list[MaskedMessage] = [
        *(shown[0], Roster(tuple(shown)), EncryptedShares(bytes(KEY_BYTES), boxes)),
        *(Delivery(boxes), Survivors(frozenset("abc")), Confirmation(bytes(SIGNATURE_BYTES))),
        *(Confirmations(signatures), Unmasking({"a": 1}, {"b": 2, "c": 3})),
    ]
    return {type(message): message for message in made}


def masked_decoder(kind: Any) -> Decoder:
    """The decoder of one kind of message; seeds are those of all kinds."""
    return Decoder(
        lambda data: kind.from_bytes(data, SESSION),
        lambda: [message.to_bytes() for message in masked_messages().values()],
        (WireError,),
    )


@cache
def masked_plan() -> TrainingPlan:
    return plan_for(TinyTask(), {"epsilon": 5.0, "aggregation": "secure"}, holders=4)


def read_masked(content: RecordDict) -> MaskedReply:
    aggregation = masked_plan().aggregation
    assert isinstance(aggregation, Masked)
    return MaskedReply.of(content, masked_plan(), aggregation)


def step_seeds() -> list[bytes]:
    """Payloads of the steps' requests and replies."""
    aggregation = masked_plan().aggregation
    assert isinstance(aggregation, Masked)
    vector = np.zeros(aggregation.dimension, aggregation.encoding(masked_plan()).dtype)
    made = [
        StepRequest("advertise_keys", "run-1", 1, plan=masked_plan()).records(),
        StepRequest("share_keys", "run-1", 1, b"body").records(),
        StepReply(b"body").records(),
        MaskedReply(vector, 1.0).records(),
    ]
    payloads = [encode(content) for content in made]
    return [one.layout_bytes.to_bytes(3, "big") + b"".join(one.parts) for one in payloads]


def read_step(content: RecordDict) -> StepRequest:
    return StepRequest.of(message(content, message_type=message_type_of("advertise_keys")))


# -- the table -----------------------------------------------------------------------------------

_UNREADABLE = (WireError, DecodeError)

DECODERS: dict[str, Decoder] = {
    "replies on a stream": Decoder(
        lambda data: read_stream(data, pb.HolderFrame),
        lambda: stream_seeds(pb.HolderFrame),
        _UNREADABLE,
    ),
    "requests on a stream": Decoder(
        lambda data: read_stream(data, pb.CoordinatorFrame),
        lambda: stream_seeds(pb.CoordinatorFrame),
        _UNREADABLE,
    ),
    "hello": Decoder(read_hello, hello_seeds, (*_UNREADABLE, LinkError)),
    "welcome": Decoder(read_welcome, welcome_seeds, (*_UNREADABLE, LinkError)),
    "payload": Decoder(read_payload, payload_seeds, (WireError,)),
    "npy array": Decoder(read_npy, npy_seeds, (WireError,)),
    "round request": Decoder(
        read_as(lambda content: RoundRequest.of(message(content))), payload_seeds, (WireError,)
    ),
    "train reply": Decoder(
        read_as(lambda content: TrainReply.of(content, plan(), DIMENSION)),
        payload_seeds,
        (WireError,),
    ),
    "evaluate reply": Decoder(
        read_as(lambda content: EvaluateReply.of(content, cells=CELLS, largest=1000)),
        payload_seeds,
        (WireError,),
    ),
    "statistics request": Decoder(
        read_as(lambda content: StatisticsRequest.of(message(content))),
        payload_seeds,
        (WireError,),
    ),
    "statistics reply": Decoder(
        read_as(lambda content: StatisticsReply.of(content, SUMS)), payload_seeds, (WireError,)
    ),
    "plan as JSON": Decoder(
        text(TrainingPlan.from_json), lambda: [plan().to_json().encode()], (ConfigurationError,)
    ),
    "plan as TOML": Decoder(
        text(TrainingPlan.from_toml), lambda: [plan().to_toml().encode()], (ConfigurationError,)
    ),
    "statistics plan": Decoder(
        text(StatisticsPlan.from_json),
        lambda: [statistics_plan().to_json().encode()],
        (ConfigurationError,),
    ),
    "events": Decoder(
        text(Composition.from_json),
        lambda: [Composition.of(SubsampledGaussian(0.1, 2.0, 30)).to_json().encode()],
        (ConfigurationError,),
    ),
    "policy": Decoder(
        from_file("policy.toml", PolicyFile.load), policy_seeds, (ConfigurationError,)
    ),
    "scaling": Decoder(
        from_file("scaling.toml", read_scaling), scaling_seeds, (ConfigurationError,)
    ),
    "checkpoint": Decoder(from_file(CHECKPOINT, read_checkpoint), checkpoint_seeds, (StateError,)),
    "journal": Decoder(from_file(JOURNAL, read_journal), journal_seeds, ()),
    "ledger": Decoder(
        from_file("ledger.sqlite", read_ledger), ledger_seeds, (StateError,), share=0.02
    ),
    "anchor": Decoder(from_file("ledger.head", lambda path: Anchor(path).read()), anchor_seeds, ()),
    "certificate": Decoder(from_file("holder.pem", pem.read_certificate), pem_seeds, (LinkError,)),
    "certificate request": Decoder(
        from_file("holder.request.pem", pem.read_request), pem_seeds, (LinkError,)
    ),
    "bundle": Decoder(from_file("bundle.pem", pem.read_bundle), pem_seeds, (LinkError,)),
    "private key": Decoder(certs.key_from_pem, pem_seeds, (LinkError,)),
    "peer's certificate": Decoder(
        lambda data: keys().roster.name_of(certs.from_pem(data)), pem_seeds, (LinkError,)
    ),
    "credential": Decoder(Credential.from_bytes, credential_seeds, (WireError,)),
    "signing key": Decoder(certs.signing_key_from_pem, pem_seeds, (LinkError,)),
    "request to approve": Decoder(approve, pem_seeds, (LinkError,), share=0.2),
    **{f"secagg {kind.__name__}": masked_decoder(kind) for kind in MASKED_KINDS},
    "secagg step": Decoder(read_as(read_step), step_seeds, (WireError,)),
    "secagg step's reply": Decoder(read_as(StepReply.of), step_seeds, (WireError,)),
    "masked reply": Decoder(read_as(read_masked), step_seeds, (WireError,)),
}
"""Name → decoder."""
