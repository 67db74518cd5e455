"""Federated training without rounds: updates are combined as they come.

FedBuff (Nguyen et al. 2022, "Federated learning with buffered asynchronous aggregation", algorithm
1). Holders are kept at work. Each update that is accepted enters a buffer, and K of them make the
next model:

    w ← w + η/K · Σ s(τᵢ) Δᵢ        s(τ) = 1/√(1 + τ)

where τᵢ is how many models were made since the one that update Δᵢ was computed on, and η the
coordinator's learning rate. Nobody waits for the slowest.

In the words of a plan a *round* is one new model; whoever works on the model of round v is asked
for round v + 1. A holder is asked once for a model at most, so that its ledger has one release a
round, as anywhere else, and never more of them than the plan has rounds: their composition is the
price.

That price is right whoever is fast. An update is private by itself, whichever model it was computed
on and whatever becomes of it, and composition holds where a model depends on all that was released
before (Dwork, Rothblum & Vadhan 2010; Mironov 2017, proposition 1). So it holds for every order of
arrival that does not depend on the data. Time itself is outside the account: how long a holder
takes is not noised, here as in rounds, but here it also decides whose update makes which model.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

from flwr.app import Message, MessageType
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from common.errors import RunError, WireError
from common.flower import BaseGrid, holder_name
from common.plan import TrainingPlan
from common.tasks.base import derived_seed
from common.wire import RoundRequest, TrainReply, error_message
from server.aggregation import restore, snapshot
from server.checkpoints import RunState
from server.polling import PollingGrid
from server.rounds import (
    Answer,
    named,
    others_than,
    reasons_of,
    requests_to,
    result_of,
    timed,
    validated,
)
from server.summaries import RoundSummary

__all__ = ["buffered_rounds", "staleness_weight"]

POLL = 0.2
"""Seconds between two looks for holders that have come, while others are at work."""


def staleness_weight(staleness: int) -> float:
    """s(τ) = 1/√(1 + τ) (Nguyen et al. 2022, section 5.1).

    Args:
        staleness: τ, models made since the one that the update was computed on.
    """
    return 1 / math.sqrt(1 + staleness)


def buffered_rounds(
    grid: Grid, plan: TrainingPlan, strategy: Strategy, state: RunState
) -> Iterator[tuple[RunState, RoundSummary]]:
    """Train from ``state`` to the end of the plan, yielding the state after every new model.

    A state is everything that outlives the process. After a restart everybody is asked for the
    current model. Who had answered for it answers again, from its disk and at no price; what was
    computed on older models, in the buffer or at work, is lost, and its price stays.

    Args:
        grid: reaches the holders.
        plan: calibrated.
        strategy: of the plan.
        state: to go on from.

    Raises:
        RunError: too few updates come for a model, and nobody is left to ask.
    """
    restore(plan.strategy.name, strategy, state.strategy)
    desk = _Desk(grid if isinstance(grid, BaseGrid) else PollingGrid(grid), plan, strategy)
    try:
        while state.round < plan.rounds:
            state, summary = _next_model(desk, state)
            yield state, summary
    finally:
        desk.withdraw()


# -- one model ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Buffered:
    """An update that counts.

    Args:
        node: of its holder.
        staleness: τ.
        reply: as it came.
    """

    node: int
    staleness: int
    reply: TrainReply

    @property
    def weighed(self) -> TrainReply:
        """The same with s(τ)Δ in place of Δ."""
        weight = staleness_weight(self.staleness)
        return replace(self.reply, update=(weight * self.reply.update).astype("float32"))


def _next_model(desk: _Desk, state: RunState) -> tuple[RunState, RoundSummary]:
    """Wait for K updates, and make a model of them."""
    begin, phases = time.perf_counter(), dict[str, float]()
    request = RoundRequest(state.run_id, state.round + 1, desk.plan, state.parameters)
    with timed(phases, "exchange"):
        buffer = _filled(desk, request)
    with timed(phases, "aggregate"):
        state = _aggregated(desk, state, buffer)
    counted = [holder_name(desk.grid, one.node) for one in buffer]
    return state, RoundSummary(
        request.round,
        tuple(counted),
        {name: why for name, why in desk.missed().items() if name not in counted},
        time.perf_counter() - begin,
        phases=phases,
        staleness=tuple(one.staleness for one in buffer),
    )


def _filled(desk: _Desk, request: RoundRequest) -> list[_Buffered]:
    """K updates by ascending node: float sums then come out the same in whatever order they came.

    Raises:
        RunError: fewer come, and nobody is left to ask.
    """
    buffer: list[_Buffered] = []
    desk.begin(request)
    while len(buffer) < desk.plan.strategy.buffer:
        desk.ask(request)
        if desk.at_work:
            if (update := desk.next_update(request)) is not None:
                buffer.append(update)
        elif not desk.others(request.round):
            raise RunError(_why_it_stops(desk, request.round, len(buffer)))
    return sorted(buffer, key=lambda one: (one.node, one.staleness))


def _aggregated(desk: _Desk, state: RunState, buffer: Sequence[_Buffered]) -> RunState:
    """The state that a full buffer leads to."""
    plan, number, old = desk.plan, state.round + 1, state.parameters
    messages = [Message(one.weighed.parameters(old), 1, MessageType.TRAIN) for one in buffer]
    arrays, _ = desk.strategy.aggregate_train(number, messages)
    return state.advanced(
        result_of(arrays, old),
        snapshot(plan.strategy.name, desk.strategy),
        average=number > plan.average_from * plan.rounds,
    )


def _why_it_stops(desk: _Desk, number: int, found: int) -> str:
    return (
        f"round {number}: {found} of the {desk.plan.strategy.buffer} updates that make a model "
        f"came, and nobody is left to ask ({reasons_of(desk.missed())}). The model of round "
        f"{number - 1} is kept; start again with the same state folder to go on"
    )


# -- who is at work -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Errand:
    """A request that is out.

    Args:
        node: whom it asks.
        number: of the round; its model is that of the round before.
    """

    node: int
    number: int


class _Desk:
    """Who is at work on which model, and what became of the others.

    Args:
        grid: reaches the holders.
        plan: calibrated.
        strategy: whose requests they are.
    """

    def __init__(self, grid: BaseGrid, plan: TrainingPlan, strategy: Strategy) -> None:
        self.grid, self.plan, self.strategy = grid, plan, strategy
        self._out: dict[str, _Errand] = {}
        self._come: deque[tuple[_Errand, Message]] = deque()
        self._asked: dict[int, int] = {}
        self._silent: dict[int, str] = {}
        self._missed: dict[int, str] = {}
        self._drawings = count()

    @property
    def at_work(self) -> bool:
        """Whether there is an update to wait for."""
        return bool(self._out or self._come)

    def begin(self, request: RoundRequest) -> None:
        """Turn to the next model, which ``request`` asks holders to work on."""
        self._missed = {}
        # A strategy takes down the parameters that a round begins with, whoever is asked.
        requests_to([], self.strategy, request, self.grid)

    def ask(self, request: RoundRequest) -> None:
        """Give the current model to those who have time; ``cohort`` are at work at most."""
        idle = self._idle(request.round)
        if not idle:
            return
        # Flower's strategies shuffle whom they ask.
        messages = sorted(
            requests_to(idle, self.strategy, request, self.grid),
            key=lambda message: message.metadata.dst_node_id,
        )
        errands = [_Errand(message.metadata.dst_node_id, request.round) for message in messages]
        keys = self.grid.push_messages(messages, timeout=self.plan.round_deadline)
        self._out |= dict(zip(keys, errands, strict=True))
        self._asked |= {errand.node: errand.number for errand in errands}

    def others(self, number: int) -> list[int]:
        """Holders that were not asked for a model, waiting for one to come."""
        asked = {node for node, last in self._asked.items() if last == number}
        return others_than(asked, self.grid, time.monotonic() + self.plan.round_deadline)

    def next_update(self, request: RoundRequest) -> _Buffered | None:
        """The next update that counts; None if what came does not, or nothing has come yet."""
        if not self._come:
            self._collect()
        if not self._come:
            return None
        errand, reply = self._come.popleft()
        self._silent.pop(errand.node, None)
        try:
            return self._judged(errand, reply, request)
        except WireError as error:
            self._missed[errand.node] = str(error)
            return None

    def missed(self) -> dict[str, str]:
        """Name → why a holder has nothing in the current model, as far as there is a reason."""
        away = dict.fromkeys(self.grid.away(), "away")
        return away | named(self.grid, {**self._silent, **self._missed})

    def withdraw(self) -> None:
        """Want nothing any more."""
        self.grid.forget(list(self._out))

    # -- inside ------------------------------------------------------------------------------

    def _idle(self, number: int) -> list[int]:
        """Whom to ask: those who are not at work, and were not asked for this model yet."""
        busy = {errand.node for errand in self._out.values()}
        idle = [
            node
            for node in sorted(set(self.grid.get_node_ids()) - busy)
            if self._asked.get(node, 0) < number
        ]
        free = len(idle) if self.plan.cohort is None else max(0, self.plan.cohort - len(busy))
        if free >= len(idle):
            return idle
        # Drawn anew whenever somebody is free: who has just answered is no likelier than another.
        chance = random.Random(derived_seed("idle", self.plan.seed, number, next(self._drawings)))
        return sorted(chance.sample(idle, free))

    def _collect(self) -> None:
        """Wait for replies, and note who is overdue."""
        # Somebody else may come meanwhile, unless everybody is there.
        self.grid.wait(list(self._out), math.inf if self.grid.complete else POLL)
        for reply in self.grid.pull_messages(list(self._out)):
            self._come.append((self._out.pop(reply.metadata.reply_to_message_id), reply))
        for key in self.grid.overdue(list(self._out)):
            node = self._out.pop(key).node
            self._silent[node] = f"no reply within {self.plan.round_deadline:.3g} s"

    def _judged(self, errand: _Errand, reply: Message, request: RoundRequest) -> _Buffered:
        """A reply as an update that counts.

        Raises:
            WireError: it does not; says why.
        """
        staleness, most = request.round - errand.number, self.plan.strategy.max_staleness
        if reply.has_error():
            raise WireError(error_message(reply.error))
        if most is not None and staleness > most:
            raise WireError(
                f"update dropped: {staleness} models were made since its own, and max_staleness is "
                f"{most}"
            )
        return _Buffered(errand.node, staleness, validated(Answer((errand.node,), reply), request))
