"""What came in for a round that has no checkpoint yet, on the coordinator's disk.

A round is a few *exchanges*: a cohort is asked to train, sometimes others after it, or all the
steps of a masked round; then holders are asked to evaluate. Whom an exchange asks, each reply as it
comes in, and that the exchange is over are records of one file. A coordinator that is started again
in the middle of a round makes the same requests; what was answered is taken from the file, an
exchange that was over stays over, and only what is missing is asked for:

* no holder is asked twice, and none that was left out comes in later;
* a masked round, whose steps each holder takes once, goes on where it stopped;
* the coordinator's own noise of a round (plans whose unit is the holder) comes from a secret key in
  the file, so that a round that is done again has the noise that it had. Fresh noise on the same
  updates would be a second release, which nobody has paid for.

Nothing is synced: a killed process loses nothing of what it wrote, and after a power cut holders
are asked again for what is gone, which they have on their disks. A file holds updates as they came
in, readable by its owner only, and goes when the checkpoints that could need it do.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from common.durable import storage_errors, write_all
from common.errors import StateError, WireError
from common.flower import Around, holder_name, stamp
from common.link import federation_pb2 as pb
from common.link.codec import Incoming, Payload, decode, encode
from common.privacy.noise import KeyedRandomness, Randomness
from common.texts import read_json
from common.wire import CONFIG, round_of

__all__ = ["Journal", "JournalGrid", "RoundJournal"]

logger = logging.getLogger("sotto.coordinator")

_CHECKSUM, _LENGTHS = struct.Struct(">I"), struct.Struct(">IQ")
"""A record begins with the CRC-32 of what follows: the lengths of its head, which is JSON, and of
its payload, and then both. It is there against accidents; who writes to the coordinator's disk can
do worse."""

Answer = RecordDict | Error
Asked = Mapping[int, str]
"""Node id → sha256 of what it is asked, in hex."""


# -- the file -------------------------------------------------------------------------------------


@dataclass
class Exchange:
    """One exchange, as far as the file knows.

    Args:
        place: among the round's exchanges.
        kind: type of its messages.
        asked: whom, and what.
        recalled: node id → what had come when the process that wrote it ended.
        over: nobody is waited for any more.
    """

    place: int
    kind: str
    asked: Asked
    recalled: dict[int, Answer] = field(default_factory=dict)
    over: bool = False


class RoundJournal:
    """The file of one round: read when it is opened, and then written to.

    Args:
        path: of the file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._exchanges: list[Exchange] = []
        self._names: dict[int, str] = {}
        self._key: bytes | None = None
        self._complete = False
        self._next = 0
        whole = self._read()
        with storage_errors(path):
            self._handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
            os.ftruncate(self._handle, whole)
            os.lseek(self._handle, whole, os.SEEK_SET)

    @property
    def names(self) -> Mapping[int, str]:
        """Node id → name of everybody who was asked."""
        return self._names

    def recalled(self, *, evaluation: bool) -> set[int]:
        """Node ids of the holders that had replied when the file was opened.

        Args:
            evaluation: to be asked to evaluate, or in the rest of the round.
        """
        return {
            node
            for each in self._exchanges
            if _is_evaluation(each.kind) == evaluation
            for node in each.recalled
        }

    @property
    def trained(self) -> bool:
        """Whether the round's updates are all here: done again, it gives the same model."""
        return self._complete

    def complete(self) -> None:
        """Note that everything that the round's model is made of stands before this record.

        That is its updates and its key: a cut or damaged file that has the record has all of it.
        """
        if not self._complete:
            self._complete = True
            self._write({"record": "complete"})

    def begun(self, *, evaluation: bool) -> list[int] | None:
        """Whom the round asked first to train or to evaluate, ascending; None if nobody yet."""
        first = self._first(evaluation=evaluation)
        if first is None:  # a cohort drawn by coins may be empty
            return [] if self._complete and not evaluation else None
        return sorted(first.asked)

    def key(self) -> bytes:
        """The round's secret: 32 bytes from the operating system, the same after a restart."""
        if self._key is None:
            self._key = os.urandom(32)
            self._write({"record": "key", "key": self._key.hex()})
        return self._key

    def exchange(self, kind: str, asked: Asked, names: Mapping[int, str]) -> Exchange:
        """Begin the next exchange, or go on with it where it was begun before.

        Args:
            kind: type of its messages.
            asked: whom, and what.
            names: of those who are asked, by node id.
        """
        for before in self._exchanges[self._next :]:
            if before.kind != kind:
                continue
            if before.asked == asked:
                self._next = before.place + 1
                return before
            if self._key is not None:
                # The same noise on other updates: the difference of two sums would be exact.
                raise StateError(
                    f"{self._path} was written for other requests, and its noise must not be used "
                    "with these: another version of sotto wrote it; go on with that version"
                )
            logger.warning("%s: the round takes another course than before", self._path.name)
            del self._exchanges[before.place :]
            self._complete = False
            self._write({"record": "forget", "place": before.place})
            break
        begun = Exchange(len(self._exchanges), kind, asked)
        known = {str(node): [names[node], digest] for node, digest in asked.items()}
        self._write({"record": "asked", "kind": kind, "asked": known})
        self._names.update(names)
        self._exchanges.append(begun)
        self._next = len(self._exchanges)
        return begun

    def take(self, exchange: Exchange, node: int, answer: Answer) -> None:
        """Write a reply down."""
        head: dict[str, Any] = {"record": "reply", "place": exchange.place, "node": node}
        payload = Payload(())
        if isinstance(answer, Error):
            head |= {"code": answer.code, "reason": answer.reason}
        else:
            payload = encode(answer)
            head["layout"] = payload.layout_bytes
        self._write(head, payload)

    def end(self, exchange: Exchange) -> None:
        """Close an exchange: what has not come by now never counts."""
        exchange.over = True
        self._write({"record": "over", "place": exchange.place})

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)

    # -- inside ------------------------------------------------------------------------------

    def _first(self, *, evaluation: bool) -> Exchange | None:
        wanted = (each for each in self._exchanges if _is_evaluation(each.kind) == evaluation)
        return next(wanted, None)

    def _write(self, head: Mapping[str, Any], payload: Payload = Payload(())) -> None:  # noqa: B008
        text = json.dumps(head).encode()
        rest = (_LENGTHS.pack(len(text), payload.size), text, *payload.parts)
        checksum = 0
        for part in rest:
            checksum = zlib.crc32(part, checksum)
        with storage_errors(self._path):
            write_all(self._handle, (_CHECKSUM.pack(checksum), *rest))

    def _read(self) -> int:
        """Take in the records that are whole; returns where they end."""
        content = memoryview(self._path.read_bytes() if self._path.exists() else b"")
        end = 0
        try:
            for head, payload, after in _records(content):
                self._apply(head, payload)
                end = after
        except (IndexError, KeyError, TypeError, ValueError, WireError) as error:
            logger.warning("%s: a record is not ours (%s)", self._path, type(error).__name__)
        if end < len(content):
            logger.warning(
                "%s is cut short or damaged after %d of %d bytes; the rest is asked for again",
                *(self._path, end, len(content)),
            )
        return end

    def _apply(self, head: Mapping[str, Any], payload: bytes) -> None:
        """Take in one record; what is not ours raises one of the errors that `_read` knows."""
        match head["record"]:
            case "key":
                self._key = bytes.fromhex(head["key"])
            case "asked":
                asked = {int(node): digest for node, (_, digest) in head["asked"].items()}
                self._names |= {int(node): name for node, (name, _) in head["asked"].items()}
                self._exchanges.append(Exchange(len(self._exchanges), head["kind"], asked))
            case "reply":
                exchange = self._exchanges[head["place"]]
                exchange.recalled[head["node"]] = _answer(head, payload)
            case "over":
                self._exchanges[head["place"]].over = True
            case "complete":
                self._complete = True
            case "forget":
                del self._exchanges[head["place"] :]
                self._complete = False
            case other:
                raise ValueError(other)


def _records(content: memoryview) -> Iterator[tuple[Any, bytes, int]]:
    """Head, payload and end of each record, up to the first that is not whole."""
    begin = 0
    while begin + _CHECKSUM.size + _LENGTHS.size <= len(content):
        body = begin + _CHECKSUM.size
        head, payload = _LENGTHS.unpack_from(content, body)
        first = body + _LENGTHS.size
        end = first + head + payload
        (checksum,) = _CHECKSUM.unpack_from(content, begin)
        if end > len(content) or zlib.crc32(content[body:end]) != checksum:
            return
        text = bytes(content[first : first + head]).decode()
        yield read_json(text), bytes(content[first + head : end]), end
        begin = end


def _answer(head: Mapping[str, Any], payload: bytes) -> Answer:
    """The reply in a record; raises WireError."""
    if "code" in head:
        return Error(head["code"], head["reason"])
    header = pb.Header(
        message_type=MessageType.TRAIN, layout_bytes=head["layout"], payload_bytes=len(payload)
    )
    pieces = (payload,) if payload else ()
    return decode(Incoming(header, pieces), src_node_id=0, dst_node_id=0).content


def _is_evaluation(kind: str) -> bool:
    return kind == MessageType.EVALUATE


# -- the files of a run ---------------------------------------------------------------------------


@dataclass
class Journal:
    """The journals of a run: a file for each round that no checkpoint has made needless.

    Args:
        folder: of the run.
    """

    folder: Path
    _number: int = field(default=0, init=False)
    _open: RoundJournal | None = field(default=None, init=False)

    def of(self, number: int) -> RoundJournal:
        """The journal of a round; it stays open until another round's is asked for."""
        if self._open is None or self._number != number:
            self.close()
            self._open, self._number = RoundJournal(self._path(number)), number
        return self._open

    def randomness(self, number: int) -> Randomness:
        """The coordinator's own in a round: unpredictable, and the same if it is done again."""
        return KeyedRandomness(self.of(number).key())

    def has_trained(self, number: int) -> bool:
        """Whether a round, done again, gives the model that it gave."""
        return self._path(number).exists() and self.of(number).trained

    def complete(self, number: int) -> None:
        """A round's model is about to leave."""
        self.of(number).complete()

    @property
    def newest(self) -> int:
        """The last round that has a journal; 0 if none has."""
        found = (int(path.stem.rpartition("-")[2]) for path in self.folder.glob("journal-*.bin"))
        return max(found, default=0)

    def drop(self, *, up_to: int) -> None:
        """Delete the journals of rounds up to that of the oldest checkpoint."""
        for path in self.folder.glob("journal-*.bin"):
            if path <= self._path(up_to):
                path.unlink()

    def discard(self, number: int) -> None:
        """Delete the journal of a round that failed: it is to be asked for anew."""
        self.close()
        self._path(number).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete all: the run has ended."""
        self.close()
        for path in self.folder.glob("journal-*.bin"):
            path.unlink()

    def close(self) -> None:
        """Close what is open."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _path(self, number: int) -> Path:
        return self.folder / f"journal-{number:06d}.bin"


class JournalGrid(Around):
    """Asks through another Grid, and only for what the journal does not have.

    Args:
        grid: reaches the holders.
        journal: of the run.
        known: names of holders that were part of the run before this process began.
    """

    def __init__(self, grid: Grid, journal: Journal, known: Iterable[str] = ()) -> None:
        super().__init__(grid)
        self._journal = journal
        self._round: RoundJournal | None = None
        self._evaluating = False
        self._seen = set(known)

    @property
    def _recalled(self) -> set[int]:
        """Node ids of those whose replies are here already."""
        return set() if self._round is None else self._round.recalled(evaluation=self._evaluating)

    def get_node_ids(self) -> list[int]:
        """Whom the other Grid reaches, and those whose replies of this round are here already."""
        return sorted(self._recalled.union(self._grid.get_node_ids()))

    def wait_for_change(self, present: Collection[int], timeout: float) -> list[int]:
        """Wait until others can be asked than could be."""
        recalled = self._recalled
        reached = set(present) - recalled | recalled.intersection(self._grid.get_node_ids())
        super().wait_for_change(reached, timeout)
        return self.get_node_ids()

    def holder_name(self, node_id: int) -> str:
        """The name that the other Grid knows, or that the journal recalls."""
        recalled = {} if self._round is None else self._round.names
        return recalled.get(node_id) or holder_name(self._grid, node_id)

    def away(self) -> list[str]:
        """Names of holders that were part of the run, in this process or before, and are not there.

        Those that the other Grid has seen and does not reach count as well.
        """
        present = {self.holder_name(node) for node in self.get_node_ids()}
        return sorted(self._seen.union(super().away()) - present)

    def begun(self, number: int, *, evaluation: bool = False) -> list[int] | None:
        """Whom a round had asked before this process began."""
        self._round, self._evaluating = self._journal.of(number), evaluation
        return self._round.begun(evaluation=evaluation)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Ask, and write down; see :meth:`replies`."""
        requests = list(messages)
        found = {
            reply.metadata.reply_to_message_id: reply
            for reply in self.replies(requests, timeout=timeout)
        }
        ids = [request.metadata.message_id for request in requests]
        return [found[message_id] for message_id in ids if message_id in found]

    def replies(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,
        enough: int | None = None,
    ) -> Iterator[Message]:
        """What the journal recalls, and then replies as they come in, each written down first."""
        requests = list(messages)
        if not requests:
            return
        for request in requests:
            stamp(request, request.metadata.message_id or None)
        _, number = round_of(requests[0].content.get(CONFIG))
        journal = self._round = self._journal.of(number)
        exchange = journal.exchange(
            requests[0].metadata.message_type,
            _digests(requests),
            {node: self.holder_name(node) for node in map(_addressee, requests)},
        )
        recalled = [each for each in requests if _addressee(each) in exchange.recalled]
        for request in recalled:
            yield Message(exchange.recalled[_addressee(request)], reply_to=request)
        if exchange.over:
            return
        left = [each for each in requests if _addressee(each) not in exchange.recalled]
        if enough is not None:
            enough -= sum(isinstance(each, RecordDict) for each in exchange.recalled.values())
        if left and (enough is None or enough > 0):
            nodes: dict[str, int] = {}
            for reply in self._asked(left, timeout, enough):
                # Not before: a Grid may give ids of its own when it is asked.
                nodes = nodes or {each.metadata.message_id: _addressee(each) for each in left}
                node = nodes[reply.metadata.reply_to_message_id]
                journal.take(exchange, node, reply.error if reply.has_error() else reply.content)
                yield reply
        journal.end(exchange)

    def _asked(
        self, requests: list[Message], timeout: float | None, enough: int | None
    ) -> Iterator[Message]:
        if self._known is None:
            return iter(self._grid.send_and_receive(requests, timeout=timeout))
        return self._known.replies(requests, timeout=timeout, enough=enough)


def _addressee(message: Message) -> int:
    return message.metadata.dst_node_id


def _digests(requests: Iterable[Message]) -> dict[int, str]:
    """Node id → sha256 of what it is asked; what several are asked is looked at once."""
    known: dict[int, bytes] = {}
    found = {}
    for request in requests:
        payload = encode(request.content)
        layout, arrays = payload.parts[:1], payload.parts[1:]
        for array in arrays:
            if id(array) not in known:  # arrays are shared, and live as long as the requests do
                known[id(array)] = hashlib.sha256(array).digest()
        whole = hashlib.sha256(b"".join((*layout, *(known[id(array)] for array in arrays))))
        found[_addressee(request)] = whole.hexdigest()
    return found
