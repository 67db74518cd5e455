"""Time that is simulated for asynchronous rounds: answers come in the order in which they would.

Requests are pushed, each answer has a moment at which it comes, and whoever waits moves the clock
to the next one. Nobody sleeps, and the same seed gives the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from flwr.app import Message, MessageType

from common.flower import BaseGrid, incoming_message, stamp
from common.wire import RoundRequest
from simulations.faults import Faults, FaultyGrid, RoundFaults

__all__ = ["AsynchronousGrid"]


@dataclass(order=True)
class _Errand:
    """A request that was pushed, and what becomes of it.

    Args:
        moment: on the simulated clock, when its answer comes; infinite if it never does.
        place: among all that were pushed; of two answers at one moment that of the earlier request
            comes first.
        number: of the round.
        deadline: on the simulated clock, after which the answer is late.
        request: whom it asks, and what.
        reply: once it is computed.
    """

    moment: float
    place: int
    number: int = field(compare=False)
    deadline: float = field(compare=False)
    request: Message = field(compare=False)
    reply: Message | None = field(default=None, compare=False)

    @property
    def closes(self) -> float:
        """When it is answered or overdue."""
        return min(self.moment, self.deadline)

    def comes_by(self, now: float) -> bool:
        """Whether its answer is there, and was in time."""
        return self.moment <= min(now, self.deadline)


class AsynchronousGrid(FaultyGrid):
    """:class:`FaultyGrid` for strategies that combine updates as they come.

    Holders take the time that ``faults`` say. What they answer is computed when the first of a
    round is wanted, for all who were asked by then, so that the engine has blocks to work on; an
    answer depends on nothing that happens between.

    Args:
        grid: reaches the holders, all of whom are there from the beginning.
        faults: how long answers take, and what goes wrong.
        seed: of the plan.
        happened: what went wrong until a model was made is appended here.
    """

    def __init__(
        self, grid: BaseGrid, faults: Faults, seed: int, happened: list[RoundFaults]
    ) -> None:
        super().__init__(grid, faults, seed, happened)
        self._errands: dict[str, _Errand] = {}
        self._uncomputed: dict[int, list[_Errand]] = {}
        self._places = count()
        self._newest, self._begun = 0, 0.0

    def push_messages(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[str]:
        """Ask holders to train; their answers come when :meth:`wait` has moved the clock."""
        deadline = self._clock + (math.inf if timeout is None else timeout)
        return [self._push(message, deadline) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The answers that have come by now, in the order in which they came."""
        there = sorted(
            (errand, key)
            for key in list(message_ids)
            if (errand := self._errands.get(key)) and errand.comes_by(self._clock)
        )
        replies = []
        for errand, key in there:
            replies.append(_answer_to(key, self._reply(errand)))
            del self._errands[key]
            self._note(waited=errand.moment - self._begun)
        return replies

    def wait(self, message_ids: Iterable[str], timeout: float) -> None:
        """Move the clock to the next answer or deadline, by ``timeout`` seconds at most."""
        closing = [self._errands[key].closes for key in message_ids if key in self._errands]
        self._clock = max(self._clock, min([*closing, self._clock + timeout]))

    def overdue(self, message_ids: Iterable[str]) -> list[str]:
        """Requests whose deadline is over; whoever is at work on one works for nothing."""
        over = [
            key
            for key in list(message_ids)
            if (errand := self._errands.get(key)) and errand.closes <= self._clock
        ]
        self._note(late=self._drop(over))
        return over

    def forget(self, message_ids: Iterable[str]) -> None:
        """Withdraw requests; whoever is at work on one works for nothing."""
        self._note(spare=self._drop([key for key in list(message_ids) if key in self._errands]))

    # -- inside ------------------------------------------------------------------------------

    def _push(self, message: Message, deadline: float) -> str:
        if message.metadata.message_type != MessageType.TRAIN:
            raise NotImplementedError("only training is asked for without waiting")
        request = RoundRequest.of(message)
        if request.round > self._newest:
            self._newest, self._begun = request.round, self._clock
            self._happened.append(RoundFaults(0, 0, 0, 0.0))
        who = (self._seed, request.round, self.holder_name(message.metadata.dst_node_id))
        silent = self._faults.silent(*who)
        self._note(dropped=int(silent))
        key = stamp(message)
        self._errands[key] = errand = _Errand(
            math.inf if silent else self._clock + self._faults.delay(*who),
            next(self._places),
            request.round,
            deadline,
            message,
        )
        if not silent:
            self._uncomputed.setdefault(request.round, []).append(errand)
        return key

    def _drop(self, keys: Sequence[str]) -> int:
        """Have holders work for nothing; how many do."""
        working = [each for key in keys if math.isfinite((each := self._errands.pop(key)).moment)]
        for errand in working:
            self._reply(errand)
        return len(working)

    def _reply(self, wanted: _Errand) -> Message:
        """What a holder answers; computed for all who were asked the same."""
        if wanted.reply is None:
            self._compute(self._uncomputed.pop(wanted.number))
        assert wanted.reply is not None
        return wanted.reply

    def _compute(self, errands: Sequence[_Errand]) -> None:
        """Have the holders answer, each for itself, and forge what is to be forged."""
        asked = [errand.request for errand in errands]
        replies = self._grid.individually(asked)
        # The other Grid has given the requests ids of its own.
        by_id = {one.metadata.reply_to_message_id: one for one in replies}
        for errand in errands:
            errand.reply = by_id[errand.request.metadata.message_id]
        lies = [
            errand.reply
            for errand in errands
            if errand.reply
            and self.holder_name(errand.request.metadata.dst_node_id) in self._malicious
        ]
        self._note(attacked=self._forge(lies, RoundRequest.of(asked[0])))

    def _note(self, *, waited: float | None = None, **more: int) -> None:
        """Add to what has happened since the newest model was first asked about."""
        now = self._happened[-1]
        added = {name: getattr(now, name) + number for name, number in more.items()}
        self._happened[-1] = replace(now, waited=now.waited if waited is None else waited, **added)


def _answer_to(key: str, reply: Message) -> Message:
    """A reply, to the id under which its request was pushed."""
    about = reply.metadata
    failed = reply.has_error()
    return incoming_message(
        None if failed else reply.content,
        reply.error if failed else None,
        message_id=about.message_id,
        message_type=about.message_type,
        src_node_id=about.src_node_id,
        dst_node_id=about.dst_node_id,
        reply_to=key,
        group_id=about.group_id,
        run_id=about.run_id,
        created_at=about.created_at,
        ttl=about.ttl,
    )
