"""The gRPC service: holders join, prove who they are, get their requests and send replies.

Everything here runs on one event loop (``server/grid.py`` owns it). One stream is one
:class:`Session`; a task reads it and another writes it, and gRPC's flow control suspends the
writer while the holder is slow to take what it is sent.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn
from urllib.parse import unquote

import grpc
import grpc.aio
from flwr.app import Error
from google.protobuf.message import DecodeError

from common.errors import LinkError, WireError
from common.link import federation_pb2 as pb
from common.link.codec import CHUNK_BYTES, Incoming
from common.link.federation_pb2_grpc import FederationServicer
from common.link.identity import check_holder_name, node_id_of
from common.link.keys import CoordinatorKeys
from common.link.log import RationedLog
from common.link.traffic import Counts, Traffic
from common.link.transfer import Assembler, Beginning, check_header, continued
from common.link.versions import spoken
from common.words import shown
from server.link.admission import Admission, Admitted
from server.link.door import Crowded, Door
from server.link.mailroom import Errand, Mailroom, Reply, Request
from server.link.posting import UNREADABLE_REPLY
from server.link.sessions import Holder, Session
from server.link.vigil import Vigil

__all__ = ["STOPPING", "Switchboard"]

STOPPING = "the link is stopping; start another one to ask holders again"

_MOST_STREAMS = 4  # of one identity: one at work, one replaced, one waiting, one to spare
_STOOD_STILL = 0.5  # seconds; no timer is so late unless the process or its machine was suspended
_MOST_UNWANTED = 32  # replies that nobody waits for, beyond one for each request that was sent

_Context = grpc.aio.ServicerContext[pb.HolderFrame, pb.CoordinatorFrame]


class _Turn(Exception):
    """Ends a stream with a status that the holder shows to its people."""

    def __init__(self, code: grpc.StatusCode, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


class Switchboard(FederationServicer):
    """Connects holders' streams with the mailroom.

    Args:
        keys: roster and certificates; None for plain text on loopback, where names are believed.
        federation: name of the federation, for people.
        software: name and version of this software, for people.
        max_message_bytes: the longest reply that is accepted.
        hello_timeout: seconds until a stream that says nothing is closed.
        on_change: called with everybody who is connected, whenever that changes.
    """

    def __init__(
        self,
        *,
        keys: CoordinatorKeys | None,
        federation: str,
        software: str,
        max_message_bytes: int,
        hello_timeout: float = 10.0,
        on_change: Callable[[Mapping[int, Holder]], None],
    ) -> None:
        self.admission = Admission(keys)
        self._vigil = Vigil(self.admission, self._bar)
        self._federation = federation
        self._software = software
        self._max_message_bytes = max_message_bytes
        self._hello_timeout = hello_timeout
        self._on_change = on_change
        self._sessions: dict[int, Session] = {}
        self._door = Door(_MOST_STREAMS)
        self._log = RationedLog(logging.getLogger("sotto.link"))
        self._mailroom = Mailroom()
        self._counts = Counts()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._draining = False
        self._news = asyncio.Event()

    # For the round loop

    @property
    def held_bytes(self) -> int:
        """Bytes of replies that have begun to come in; see ``LinkGrid.held_bytes``."""
        coming = sum(session.assembler.held for session in list(self._sessions.values()))
        return coming + self._mailroom.held_bytes

    @property
    def traffic(self) -> Traffic:
        """Counts since the start."""
        return Traffic.of(self._counts)

    @property
    def errands(self) -> Mapping[int, Errand]:
        """What each holder was asked last, by node id; see ``LinkGrid.errands``."""
        return dict(self._mailroom.errands)

    async def post(self, requests: Sequence[Request]) -> None:
        """Have requests carried out; each is closed once it has its reply or its time is over.

        Raises:
            LinkError: the coordinator stops, or two open requests would have the same id.
        """
        if self._draining:
            raise LinkError(STOPPING)
        self._mailroom.post(requests)
        self._counts["requests"] += len(requests)
        for request in requests:
            self._look_again(request)
        for node_id in {request.node_id for request in requests}:
            if session := self._sessions.get(node_id):
                session.wake.set()
            elif self._mailroom.owed_by(node_id):
                self._vigil.begin(node_id)

    def withdraw(self, requests: Iterable[Request]) -> None:
        """Close requests that are still open; their holders are told."""
        for request in requests:
            self._withdraw(request)

    async def drain(self, reason: str, grace: float) -> None:
        """Tell every holder that the coordinator stops.

        A holder that is in the middle of a reply is told once that is complete, or when ``grace``
        is over: what has come of it may be worth minutes of its time.

        Args:
            reason: for people.
            grace: seconds.
        """
        self._draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while self._say_goodbye(reason):
                    self._news.clear()
                    await self._news.wait()
        self._say_goodbye(reason, to_all=True)

    # The RPC

    async def Join(self, request_iterator: object, context: _Context) -> None:  # noqa: ARG002, N802
        """One holder's stream, from Hello to the end."""
        try:
            admitted = self._authenticated(context)
            # Without TLS there is no name yet, and a connection has one stream at a time.
            with self._door.entered(admitted.name or context.peer()):
                session = await self._admit(admitted, context)
                await self._converse(session, context)
        except Crowded:
            self._counts["refused"] += 1
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"there are {_MOST_STREAMS} connections of this holder already; they end within "
                "seconds, unless several processes use its certificate",
            )
        except _Turn as turn:
            await context.abort(turn.code, str(turn))

    async def _admit(self, admitted: Admitted, context: _Context) -> Session:
        """Hear who it is; the session takes over what an earlier one has begun."""
        hello = await _hello(context, self._hello_timeout)
        if self._draining:
            self._refuse(grpc.StatusCode.UNAVAILABLE, "the coordinator stops")
        try:
            version = spoken(hello, self._software)
        except LinkError as error:
            self._refuse(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        try:
            name = admitted.name or check_holder_name(hello.name)
        except LinkError as error:
            self._refuse(grpc.StatusCode.UNAUTHENTICATED, str(error))
        task, software = shown(hello.task, 64), shown(hello.software, 64)
        holder = Holder(node_id_of(name), name, task, software, unquote(context.peer()))
        assembler = Assembler(self._max_message_bytes, self._take_beginning(holder.node_id))
        return Session(holder, assembler, admitted, hello, version)

    def _refuse(self, code: grpc.StatusCode, sentence: str) -> NoReturn:
        self._counts["refused"] += 1
        raise _Turn(code, sentence) from None

    def _authenticated(self, context: _Context) -> Admitted:
        """Who the certificate says it is; nobody yet where there is no TLS."""
        try:
            return self.admission.admit(context.auth_context())
        except LinkError as error:
            address = unquote(context.peer())
            self._log.warning(
                "",
                "refused a connection from %s: %s",
                address,
                str(error),
                event="connection_refused",
            )
            self._refuse(grpc.StatusCode.PERMISSION_DENIED, str(error))

    async def _converse(self, session: Session, context: _Context) -> None:
        # A TimeoutError is the session's limit; a BaseError a stream that broke under a task.
        try:
            async with session.limit:
                self._enter(session)
                await _until_first(
                    self._write(session, context),
                    self._read(session, context),
                    self._guard(session),
                )
        except (TimeoutError, grpc.aio.BaseError) as error:
            name = session.holder.name
            self._log.debug(name, "the stream of %s broke: %s", name, repr(error))
        finally:
            self._leave(session)

    # Who is there

    def _enter(self, session: Session) -> None:
        holder = session.holder
        older = self._sessions.get(holder.node_id)
        self._sessions[holder.node_id] = session
        self._vigil.note(holder.node_id, session.admitted)
        self._counts["connections"] += 1
        if older is None:
            self._log.info(holder.name, "%s joined", holder.name, event="holder_joined")
        else:
            self._log.warning(
                holder.name,
                "%s joined again, from %s; its older connection, from %s, is closed; if that was "
                "no restart, somebody else has its key: sotto keys revoke",
                *(holder.name, holder.address, older.holder.address),
                event="holder_joined_again",
            )
            older.end(
                pb.Goodbye.REPLACED,
                f"another process has joined as {holder.name!r}, from {holder.address}; run one "
                "process for each holder, or request a key of its own for the other; if it is none "
                "of yours, your key is in other hands: have the coordinator run `sotto keys "
                "revoke`",
            )
        if note := session.admitted.expiry_note:
            self._log.warning(
                holder.name,
                "the certificate of %s %s; have it run `sotto keys request`, approve that, and "
                "have it install the bundle",
                *(holder.name, note),
                event="certificate_expires",
            )
        self._announce()

    def _leave(self, session: Session) -> None:
        node_id = session.holder.node_id
        if self._sessions.get(node_id) is session:
            del self._sessions[node_id]
            self._mailroom.keep(node_id, session.assembler.break_off())
            self._log.info(session.holder.name, "%s left", session.holder.name, event="holder_left")
            self._announce()
            if self._mailroom.owed_by(node_id):
                self._vigil.begin(node_id)
        self._news.set()

    def _take_beginning(self, node_id: int) -> Beginning | None:
        """What has come of a reply over earlier streams of a holder.

        One of them may still stand: where its end did not reach the coordinator, the next one is
        the first sign of it.
        """
        if session := self._sessions.get(node_id):
            self._mailroom.keep(node_id, session.assembler.break_off())
        return self._mailroom.take(node_id)

    def _announce(self) -> None:
        self._on_change({key: live.holder for key, live in self._sessions.items()})

    def _say_goodbye(self, reason: str, *, to_all: bool = False) -> bool:
        """Tell the holders that are not amid a reply; whether there are any others."""
        waiting = False
        for session in self._sessions.values():
            reply_to = session.assembler.reply_to
            amid = self._mailroom.find(reply_to, session.holder.node_id) is not None
            if amid and not to_all:
                waiting = True
            else:
                session.end(pb.Goodbye.DRAINING, reason)
        return waiting

    # Requests that end without a reply

    def _look_again(self, request: Request) -> None:
        """Withdraw a request once its time is over."""
        loop = asyncio.get_running_loop()
        self._timers.pop(request.id, None)
        late = loop.time() - request.deadline.due
        if late > _STOOD_STILL:
            request.deadline.excuse(loop.time(), late)
        if request.deadline.passed(loop.time()):
            self._withdraw(request)
        elif request.deadline.due < math.inf:
            self._timers[request.id] = loop.call_at(request.deadline.due, self._look_again, request)

    def _withdraw(self, request: Request) -> None:
        if not self._mailroom.withdraw(request):
            return
        self._close(request)
        session = self._sessions.get(request.node_id)
        if session is not None:
            if request.carried_by is session:
                session.say(_withdrawal(request.id))
            # A holder that writes slowly holds no memory longer.
            session.assembler.forget(request.id)

    def _settle(self, request: Request, reply: Reply) -> None:
        self._mailroom.settle(request, reply)
        self._close(request)

    def _close(self, request: Request) -> None:
        """Nobody waits for a request any more."""
        if timer := self._timers.pop(request.id, None):
            timer.cancel()
        if not self._mailroom.owed_by(request.node_id):
            self._vigil.end(request.node_id)
        self._news.set()

    def _settle_all(self, node_id: int, sentence: str) -> None:
        for request in self._mailroom.owed_by(node_id):
            self._settle(request, Error(UNREADABLE_REPLY, sentence))

    def _bar(self, node_id: int, name: str, sentence: str) -> None:
        """A holder that is away may not come back."""
        self._log.warning(name, "%s may not come back: %s", name, sentence, event="holder_barred")
        self._settle_all(node_id, sentence)

    async def _guard(self, session: Session) -> None:
        """End the stream of a holder that may no longer stay; the round goes on without it."""
        sentence = await self.admission.barred(session.admitted)
        holder = session.holder
        self._log.warning(
            holder.name,
            "closed the connection of %s: %s",
            holder.name,
            sentence,
            event="holder_barred",
        )
        # A newer stream of this holder, with another certificate, goes on with what it owes.
        if self._sessions.get(holder.node_id) is session:
            self._settle_all(holder.node_id, sentence)
        raise _Turn(grpc.StatusCode.PERMISSION_DENIED, sentence)

    # Writing

    async def _write(self, session: Session, context: _Context) -> None:
        begun = session.assembler.beginning
        welcome = pb.Welcome(
            node_id=session.holder.node_id,
            holder=session.holder.name,
            federation=self._federation,
            software=self._software,
            max_message_bytes=self._max_message_bytes,
            protocol=session.version,
            begun=begun.named if begun else None,
        )
        await context.write(pb.CoordinatorFrame(welcome=welcome))
        self._forget_withdrawn(session)
        await self._flush(session, context)
        first = session.hello.begun.message_id
        while not session.ending:
            request = self._mailroom.next_for(session.holder.node_id, session, first)
            if request is not None and not self._draining:
                await self._send(request, session, context)
            elif not session.control:
                await session.wake.wait()
            session.wake.clear()
            await self._flush(session, context)
        await self._flush(session, context)

    def _forget_withdrawn(self, session: Session) -> None:
        """Let a holder forget requests that were withdrawn while it was away."""
        hello, node_id = session.hello, session.holder.node_id
        for message_id in (hello.begun.message_id, *hello.in_hand):
            if message_id and self._mailroom.find(message_id, node_id) is None:
                session.say(_withdrawal(message_id))

    async def _send(self, request: Request, session: Session, context: _Context) -> None:
        begun = pb.Begun() if session.asked else session.hello.begun
        request.carried_by = session
        session.asked += 1
        if request.id in session.hello.in_hand:
            await context.write(pb.CoordinatorFrame(again=pb.Again(message_id=request.id)))
            return
        header = continued(request.header, begun)
        await context.write(pb.CoordinatorFrame(header=header))
        for chunk in request.payload.chunks(offset=header.offset):
            if session.ending:
                return
            if not self._mailroom.is_open(request):
                session.say(_withdrawal(request.id))
                return
            await context.write(pb.CoordinatorFrame(chunk=chunk))
            self._counts["bytes_sent"] += min(CHUNK_BYTES, header.payload_bytes - chunk.offset)
            request.deadline.progressed(_now())

    async def _flush(self, session: Session, context: _Context) -> None:
        while session.control:
            await context.write(session.control.popleft())

    # Reading

    async def _read(self, session: Session, context: _Context) -> None:
        reply_to = ""
        try:
            while (frame := await _next(context)) is not None:
                if frame.HasField("goodbye"):
                    return
                if frame.HasField("progress"):
                    self._note_progress(frame.progress, session)
                    continue
                reply_to = frame.header.reply_to or session.assembler.reply_to
                if (reply := self._feed(frame, session)) is not None:
                    self._take_reply(reply, session.holder)
        except WireError as error:
            self._give_up(reply_to, session.holder, error)
            raise _Turn(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None

    def _feed(self, frame: pb.HolderFrame, session: Session) -> Incoming | None:
        match frame.WhichOneof("kind"):
            case "header":
                wanted = self._wanted(frame.header, session)
                return session.assembler.begin(frame.header, keep=wanted)
            case "chunk":
                return self._add(frame.chunk, session)
            case kind:
                raise WireError(f"a frame of kind {kind} came where a reply was due")

    def _add(self, chunk: pb.Chunk, session: Session) -> Incoming | None:
        """Take a chunk of a reply, which is a sign of life."""
        assembler = session.assembler
        if request := self._mailroom.find(assembler.reply_to, session.holder.node_id):
            request.deadline.progressed(_now())
        before = assembler.taken
        reply = assembler.add(chunk)
        self._counts["bytes_received"] += assembler.taken - before
        return reply

    def _note_progress(self, progress: pb.Progress, session: Session) -> None:
        """A holder says that it has completed a step; as often as it was asked to, and no more."""
        request = self._mailroom.find(progress.message_id, session.holder.node_id)
        if request is None or not request.deadline.heard(_now()):
            self._count_unwanted(session, "signs of life")

    def _wanted(self, header: pb.Header, session: Session) -> bool:
        holder = session.holder
        if session.ending:
            return False
        if self._mailroom.find(header.reply_to, holder.node_id) is not None:
            return True
        self._count_unwanted(session, "replies")
        self._counts["replies_dropped"] += 1
        self._log.warning(
            holder.name,
            "dropped a reply of %s to request %s: %s",
            holder.name,
            repr(header.reply_to[:64]),
            "it was put to another holder"
            if self._mailroom.is_known(header.reply_to)
            else "it was never made, is answered already or was withdrawn",
            event="reply_dropped",
        )
        return False

    def _count_unwanted(self, session: Session, what: str) -> None:
        session.unwanted += 1
        if session.unwanted > session.asked + _MOST_UNWANTED:
            raise WireError(f"{what} keep coming that nobody asked for")

    def _take_reply(self, reply: Incoming, holder: Holder) -> None:
        request = self._mailroom.find(reply.header.reply_to, holder.node_id)
        if request is None:
            self._counts["replies_dropped"] += 1
            self._log.warning(
                holder.name,
                "dropped a reply of %s that came too late",
                holder.name,
                event="reply_dropped",
            )
        else:
            self._counts["replies"] += 1
            self._settle(request, reply)

    def _give_up(self, reply_to: str, holder: Holder, error: WireError) -> None:
        """Let the round go on without a holder whose reply breaks the contract."""
        self._log.warning(
            holder.name,
            "closed the connection of %s: %s",
            holder.name,
            str(error),
            event="connection_closed",
        )
        request = self._mailroom.find(reply_to, holder.node_id)
        if request is not None:
            self._settle(request, Error(UNREADABLE_REPLY, f"unreadable reply: {error}"))


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _next(context: _Context) -> pb.HolderFrame | None:
    """The next frame, or None at the end of the stream.

    Raises:
        WireError: it is not a frame.
    """
    try:
        frame: object = await context.read()
    except DecodeError:
        raise WireError("a frame is not readable") from None
    return frame if isinstance(frame, pb.HolderFrame) else None


async def _hello(context: _Context, timeout: float) -> pb.Hello:
    with suppress(TimeoutError, WireError):
        async with asyncio.timeout(timeout):
            frame = await _next(context)
        if frame is not None and frame.HasField("hello"):
            check_header(frame.hello)
            return frame.hello
    raise _Turn(grpc.StatusCode.INVALID_ARGUMENT, "a stream must begin with Hello")


def _withdrawal(message_id: str) -> pb.CoordinatorFrame:
    return pb.CoordinatorFrame(withdraw=pb.Withdraw(message_id=message_id))


async def _until_first(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run together until the first one ends or fails; the others are cancelled."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
