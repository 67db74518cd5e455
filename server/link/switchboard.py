"""The gRPC service: holders join, prove who they are, get their requests and send replies.

Everything here runs on one event loop (``server/grid.py`` owns it). One stream is one
:class:`Session`; a task reads it and another writes it, and gRPC's flow control suspends the
writer while the holder is slow to take what it is sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio
from flwr.app import Error
from google.protobuf.message import DecodeError

from common.errors import LinkError, WireError
from common.link import federation_pb2 as pb
from common.link.codec import Incoming
from common.link.federation_pb2_grpc import FederationServicer
from common.link.identity import check_holder_name, node_id_of
from common.link.keys import CoordinatorKeys
from common.link.log import RationedLog
from common.link.transfer import PROTOCOL, Assembler, check_header
from common.words import shown
from server.link.admission import Admission, Admitted
from server.link.door import Crowded, Door
from server.link.mailroom import Mailroom, Request
from server.link.sessions import Holder, Session

__all__ = ["UNREADABLE_REPLY", "Switchboard"]

UNREADABLE_REPLY = 2
"""Flower's code for a client that failed; the round goes on without this holder."""

_MOST_STREAMS = 4  # of one identity: one at work, one replaced, one waiting, one to spare
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
        self._federation = federation
        self._software = software
        self._max_message_bytes = max_message_bytes
        self._hello_timeout = hello_timeout
        self._on_change = on_change
        self._sessions: dict[int, Session] = {}
        self._door = Door(_MOST_STREAMS)
        self._log = RationedLog(logging.getLogger("sotto.link"))
        self._mailroom = Mailroom()
        self._exchanges: set[asyncio.Task[Any] | None] = set()
        self._draining = False

    # For the round loop

    @property
    def held_bytes(self) -> int:
        """Bytes of replies that have begun to come in; see ``LinkGrid.held_bytes``."""
        return sum(session.assembler.held for session in list(self._sessions.values()))

    async def exchange(self, requests: list[Request], timeout: float | None) -> None:
        """Have requests carried out; when this returns, each has its reply or is withdrawn.

        Raises:
            LinkError: the coordinator stops.
        """
        if self._draining:
            raise LinkError("the link is stopping; start another one to ask holders again")
        self._mailroom.post(requests)
        exchange = asyncio.current_task()
        self._exchanges.add(exchange)
        try:
            for node_id in {request.node_id for request in requests}:
                self._wake(node_id)
            async with asyncio.timeout(timeout):
                for request in requests:
                    await request.done.wait()
        except TimeoutError:
            pass
        finally:
            self._exchanges.discard(exchange)
            for request in requests:
                self._withdraw(request)

    def drain(self, reason: str) -> None:
        """Tell every holder that the coordinator stops; exchanges are cancelled or refused."""
        self._draining = True
        for exchange in self._exchanges:
            if exchange is not None:
                exchange.cancel()
        for session in self._sessions.values():
            session.end(pb.Goodbye.DRAINING, reason)

    # The RPC

    async def Join(self, request_iterator: object, context: _Context) -> None:  # noqa: ARG002, N802
        """One holder's stream, from Hello to the end."""
        try:
            admitted = self._authenticated(context)
            # Without TLS there is no name yet, and a connection has one stream at a time.
            with self._door.entered(admitted.name or context.peer()):
                holder = await self._admit(admitted.name, context)
                session = Session(holder, Assembler(self._max_message_bytes), admitted)
                await self._converse(session, context)
        except Crowded:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"there are {_MOST_STREAMS} connections of this holder already; they end within "
                "seconds, unless several processes use its certificate",
            )
        except _Turn as turn:
            await context.abort(turn.code, str(turn))

    async def _admit(self, name: str, context: _Context) -> Holder:
        hello = await _hello(context, self._hello_timeout)
        if hello.protocol != PROTOCOL:
            raise _Turn(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the holder's software ({shown(hello.software, 64)}) speaks version "
                f"{hello.protocol} of the link, the coordinator's ({self._software}) version "
                f"{PROTOCOL}; install the same release of sotto on both",
            )
        try:
            name = name or check_holder_name(hello.name)
        except LinkError as error:
            raise _Turn(grpc.StatusCode.UNAUTHENTICATED, str(error)) from None
        task, software = shown(hello.task, 64), shown(hello.software, 64)
        return Holder(node_id_of(name), name, task, software, unquote(context.peer()))

    def _authenticated(self, context: _Context) -> Admitted:
        """Who the certificate says it is; nobody yet where there is no TLS."""
        try:
            return self.admission.admit(context.auth_context())
        except LinkError as error:
            address = unquote(context.peer())
            self._log.warning("", "refused a connection from %s: %s", address, str(error))
            raise _Turn(grpc.StatusCode.PERMISSION_DENIED, str(error)) from None

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
        if older is None:
            self._log.info(holder.name, "%s joined", holder.name)
        else:
            self._log.warning(
                holder.name,
                "%s joined again, from %s; its older connection, from %s, is closed; if that was "
                "no restart, somebody else has its key: sotto keys revoke",
                *(holder.name, holder.address, older.holder.address),
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
            )
        self._announce()

    def _leave(self, session: Session) -> None:
        node_id = session.holder.node_id
        if self._sessions.get(node_id) is session:
            del self._sessions[node_id]
            self._log.info(session.holder.name, "%s left", session.holder.name)
            self._announce()

    def _announce(self) -> None:
        self._on_change({key: live.holder for key, live in self._sessions.items()})

    def _wake(self, node_id: int) -> None:
        if session := self._sessions.get(node_id):
            session.wake.set()

    def _withdraw(self, request: Request) -> None:
        if not self._mailroom.withdraw(request):
            return
        session = self._sessions.get(request.node_id)
        if session is not None and request.carried_by is session:
            session.say(_withdrawal(request))
            if session.assembler.reply_to == request.id:
                session.assembler.discard()  # a holder that writes slowly holds no memory longer

    async def _guard(self, session: Session) -> None:
        """End the stream of a holder that may no longer stay; the round goes on without it."""
        sentence = await self.admission.barred(session.admitted)
        holder = session.holder
        self._log.warning(holder.name, "closed the connection of %s: %s", holder.name, sentence)
        # A newer stream of this holder, with another certificate, goes on with what it owes.
        if self._sessions.get(holder.node_id) is session:
            for request in self._mailroom.owed_by(holder.node_id):
                self._mailroom.settle(request, Error(UNREADABLE_REPLY, sentence))
        raise _Turn(grpc.StatusCode.PERMISSION_DENIED, sentence)

    # Writing

    async def _write(self, session: Session, context: _Context) -> None:
        welcome = pb.Welcome(
            node_id=session.holder.node_id,
            holder=session.holder.name,
            federation=self._federation,
            software=self._software,
            max_message_bytes=self._max_message_bytes,
        )
        await context.write(pb.CoordinatorFrame(welcome=welcome))
        while not session.ending:
            request = self._mailroom.next_for(session.holder.node_id, session)
            if request is not None:
                await self._send(request, session, context)
            elif not session.control:
                await session.wake.wait()
            session.wake.clear()
            await self._flush(session, context)
        await self._flush(session, context)

    async def _send(self, request: Request, session: Session, context: _Context) -> None:
        request.carried_by = session
        session.asked += 1
        await context.write(pb.CoordinatorFrame(header=request.header))
        for chunk in request.payload.chunks():
            if session.ending:
                return
            if not self._mailroom.is_open(request):
                session.say(_withdrawal(request))
                return
            await context.write(pb.CoordinatorFrame(chunk=chunk))

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
                reply_to = frame.header.reply_to or session.assembler.reply_to
                if (reply := self._feed(frame, session)) is not None:
                    self._settle(reply, session.holder)
        except WireError as error:
            self._give_up(reply_to, session.holder, error)
            raise _Turn(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None

    def _feed(self, frame: pb.HolderFrame, session: Session) -> Incoming | None:
        match frame.WhichOneof("kind"):
            case "header":
                wanted = self._wanted(frame.header, session)
                return session.assembler.begin(frame.header, keep=wanted)
            case "chunk":
                return session.assembler.add(frame.chunk)
            case kind:
                raise WireError(f"a frame of kind {kind} came where a reply was due")

    def _wanted(self, header: pb.Header, session: Session) -> bool:
        holder = session.holder
        if session.ending:
            return False
        if self._mailroom.find(header.reply_to, holder.node_id) is not None:
            return True
        session.unwanted += 1
        if session.unwanted > session.asked + _MOST_UNWANTED:
            raise WireError("replies keep coming that nobody asked for")
        self._log.warning(
            holder.name,
            "dropped a reply of %s to request %s: %s",
            holder.name,
            repr(header.reply_to[:64]),
            "it was put to another holder"
            if self._mailroom.is_known(header.reply_to)
            else "it was never made, is answered already or was withdrawn",
        )
        return False

    def _settle(self, reply: Incoming, holder: Holder) -> None:
        request = self._mailroom.find(reply.header.reply_to, holder.node_id)
        if request is None:
            self._log.warning(holder.name, "dropped a reply of %s that came too late", holder.name)
        else:
            self._mailroom.settle(request, reply)

    def _give_up(self, reply_to: str, holder: Holder, error: WireError) -> None:
        """Let the round go on without a holder whose reply breaks the contract."""
        self._log.warning(holder.name, "closed the connection of %s: %s", holder.name, str(error))
        request = self._mailroom.find(reply_to, holder.node_id)
        if request is not None:
            self._mailroom.settle(request, Error(UNREADABLE_REPLY, f"unreadable reply: {error}"))


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


def _withdrawal(request: Request) -> pb.CoordinatorFrame:
    return pb.CoordinatorFrame(withdraw=pb.Withdraw(message_id=request.id))


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
