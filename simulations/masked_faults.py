"""Holders that fall silent or come late in masked rounds.

A masked round is five exchanges. Whoever is silent falls silent at one of them, which chance
decides as it decides who is, and says nothing more in that round. In the third a holder gives its
part, which stays in the sum if it falls silent after that. Stragglers are late with their part.
Nothing can be forged: :meth:`~simulations.faults.Byzantine.check_seen`.

The Grid around which this is put may be asked exchange by exchange (the whole protocol in process)
or give sums by itself (blocks, without masks); the same holders fail in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from flwr.app import Message, MessageType

from common.secagg.wire import StepRequest
from common.wire import RoundRequest
from server.secure import TRAINING_SHARE
from simulations.faults import EXCHANGES, FaultyGrid, RoundFaults
from simulations.unseen import lost

__all__ = ["FaultyMaskedGrid"]

TRAINING, END = EXCHANGES.index(MessageType.TRAIN), len(EXCHANGES) - 1

Ask = Callable[..., list[Message]]


class FaultyMaskedGrid(FaultyGrid):
    """:class:`FaultyGrid` for plans with masked aggregation."""

    def _ask(self, messages: Sequence[Message], timeout: float | None, ask: Ask) -> list[Message]:
        kind = messages[0].metadata.message_type if messages else ""
        if kind not in EXCHANGES:
            return ask(messages, timeout=timeout)
        if self.sums_unseen:
            return self._summed(messages, RoundRequest.of(messages[0]), timeout, ask)
        place = EXCHANGES.index(kind)
        if place == TRAINING:
            return self._trained(messages, RoundRequest.of(messages[0]), timeout, ask)
        number = StepRequest.of(messages[0]).round
        if place == 0:
            self._begin(messages, number)
        return ask(self._after(messages, number, place), timeout=timeout)

    def _trained(
        self, messages: Sequence[Message], request: RoundRequest, timeout: float | None, ask: Ask
    ) -> list[Message]:
        """The exchange in which parts arrive, or come late."""
        there = self._after(messages, request.round, TRAINING)
        _, late = self._by_time(there, request)
        replies = ask(there, timeout=timeout)
        late_ids = {message.metadata.message_id for message in late}
        return [one for one in replies if one.metadata.reply_to_message_id not in late_ids]

    def _summed(
        self, messages: Sequence[Message], request: RoundRequest, timeout: float | None, ask: Ask
    ) -> list[Message]:
        """A whole round of a Grid that sums by itself."""
        number, fewest = request.round, request.plan.min_holders
        self._begin(messages, number)
        with_keys = self._after(messages, number, TRAINING - 1)
        if len(with_keys) < fewest:
            return lost(with_keys, fewest)
        in_time, late = self._by_time(self._after(messages, number, TRAINING), request)
        ask(late, timeout=timeout)  # they work, and nobody looks at the sum of their parts
        replies = ask(in_time, timeout=timeout)
        if len(self._after(in_time, number, END)) < fewest:
            failed = [reply for reply in replies if reply.has_error()]
            told = {reply.metadata.reply_to_message_id for reply in failed}
            others = [one for one in in_time if one.metadata.message_id not in told]
            return [*failed, *lost(others, fewest)]
        return replies

    # -- who does what -----------------------------------------------------------------------

    def _who(self, message: Message, number: int) -> tuple[int, int, str]:
        return self._seed, number, self.holder_name(message.metadata.dst_node_id)

    def _after(self, messages: Sequence[Message], number: int, place: int) -> list[Message]:
        """Requests to holders that still answer in the exchange at ``place``."""
        faults = self._faults
        return [one for one in messages if faults.leaves(*self._who(one, number)) > place]

    def _begin(self, messages: Sequence[Message], number: int) -> None:
        """Note how many of a cohort will fall silent."""
        silent = len(messages) - len(self._after(messages, number, END))
        self._happened.append(RoundFaults(silent, 0, 0, 0.0))

    def _by_time(
        self, there: Sequence[Message], request: RoundRequest
    ) -> tuple[list[Message], list[Message]]:
        """Requests whose parts come in time, and too late; noted down.

        Whoever is late has dropped out, and does not fall silent afterwards.
        """
        in_time, late, delays, attacked = list[Message](), list[Message](), [0.0], 0
        for message in there:
            who = self._who(message, request.round)
            delay = self._faults.delay(*who)
            if delay > TRAINING_SHARE * request.plan.round_deadline:
                late.append(message)
                continue
            in_time.append(message)
            delays.append(delay)
            attacked += who[-1] in self._malicious
        after = len(late) - len(self._after(late, request.round, END))
        noted = self._happened[-1]
        self._happened[-1] = replace(
            noted,
            dropped=noted.dropped - after,
            late=len(late),
            attacked=attacked,
            waited=max(delays),
        )
        return in_time, late
