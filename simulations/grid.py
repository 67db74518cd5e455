"""Simulated holders: two Flower Grids in this process.

:class:`InProcessGrid` asks holders one after another, through the ClientApp of a deployment with
its policy, ledger and Opacus. :class:`BatchedGrid` trains a whole cohort as stacked blocks: the
same mechanism, without the account of each holder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import numpy as np
import torch
from flwr.app import Context, Error, Message, MessageType, RecordDict
from torch import Tensor

from client.app import build_app
from client.holder import Holder
from client.requests import Request
from client.secure import Participant
from client.state import HolderState
from common.errors import Refusal
from common.flower import BaseGrid, stamp
from common.plan import TrainingPlan
from common.privacy.noise import Randomness, SeededRandomness
from common.tasks.base import HolderData, Task, derived_seed
from common.wire import FAILED, EvaluateReply, RoundRequest, TrainReply, refusal_error
from server.aggregation import STRATEGIES
from simulations.jobs import Assignment, Cut, Figures, Job, Private, Total, jobs_of
from simulations.policy import simulated_policy
from simulations.randomness import evaluation_randomness
from simulations.sums import ExactSum
from simulations.unseen import lost, mean_of
from simulations.workers import Workers

__all__ = ["BatchedGrid", "InProcessGrid", "in_process", "simulated_holder"]


def simulated_holder(
    name: str, task: Task, data: HolderData, plan: TrainingPlan, device: torch.device
) -> Holder:
    """A holder of a simulation: its ledger is real but in memory, its randomness is seeded."""

    def randomness(request: Request) -> Randomness:
        return SeededRandomness("simulation", plan.seed, name, request.round)

    def of_evaluation(request: Request) -> Randomness:
        return evaluation_randomness(plan, name, request.round)

    policy = simulated_policy(name, plan, len(data.train))
    state = HolderState.in_memory()
    seed = derived_seed("private", plan.seed, name)
    return Holder(
        name,
        task,
        data,
        policy,
        state,
        device,
        randomness=randomness,
        evaluation_randomness=of_evaluation,
        seed=seed,
    )


@contextmanager
def in_process(
    task: Task, plan: TrainingPlan, data: Mapping[str, HolderData], device: torch.device
) -> Iterator[InProcessGrid]:
    """A Grid of simulated holders, whose ledgers are closed at the end."""
    holders = {name: simulated_holder(name, task, data[name], plan, device) for name in data}
    try:
        yield InProcessGrid(holders)
    finally:
        for holder in holders.values():
            holder.state.close()


class InProcessGrid(BaseGrid):
    """Asks holders one after another, in this process, through the very ClientApp of deployment.

    Args:
        holders: by name; node ids follow their order.
        run_id: Flower's.
    """

    def __init__(self, holders: Mapping[str, Holder], run_id: int = 1) -> None:
        super().__init__(run_id)
        self.holders = holders
        self._names = dict(enumerate(holders, start=2))
        participants = {name: Participant.unsigned(holder) for name, holder in holders.items()}
        self._app = build_app(lambda context: participants[str(context.node_config["holder"])])
        self._contexts = {
            node: Context(run_id, node, {"holder": name}, RecordDict(), {})
            for node, name in self._names.items()
        }

    @property
    def complete(self) -> bool:
        """Every holder is always there."""
        return True

    def get_node_ids(self) -> list[int]:
        """Every holder is always there."""
        return list(self._names)

    def holder_name(self, node_id: int) -> str:
        """The holder's own name."""
        return self._names[node_id]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Each holder answers in turn; nobody is late."""
        del timeout
        return [self._ask(message) for message in messages]

    def _ask(self, message: Message) -> Message:
        stamp(message, message.metadata.message_id or None)
        return self._app(message, self._contexts[message.metadata.dst_node_id])


class BatchedGrid(BaseGrid):
    """Trains the cohort as blocks of stacked models.

    A strategy that needs only the weighted sum gets one reply for everybody: the weighted mean of
    their updates. A robust one gets every update. An update that the plan does not allow comes by
    itself, so that the round loop can reject it.

    Under masked aggregation that one reply is all there is. The masks themselves, which cancel in
    it, are not computed (:mod:`simulations.unseen`).

    Args:
        names: of the holders; node ids follow their order.
        workers: compute the blocks; closed with the Grid.
        run_id: Flower's.
    """

    def __init__(self, names: Sequence[str], workers: Workers, run_id: int = 1) -> None:
        super().__init__(run_id)
        self._names, self._workers = list(names), workers
        self._cut: Cut | None = None
        self._private: dict[str, Private] = {}
        # Held as long as the reply itself, so that a round may be asked in several parts.
        self._speaks_for: WeakKeyDictionary[Message, Sequence[int]] = WeakKeyDictionary()

    @property
    def complete(self) -> bool:
        """Every holder is always there."""
        return True

    def get_node_ids(self) -> list[int]:
        """Every holder is always there."""
        return list(range(2, 2 + len(self._names)))

    def holder_name(self, node_id: int) -> str:
        """The holder's own name."""
        return self._names[node_id - 2]

    @property
    def sums_unseen(self) -> bool:
        """Yes: what masks would leave of a round, without computing them."""
        return True

    def answered_by(self, reply: Message) -> Sequence[int]:
        """The holders whose updates a reply is the mean of."""
        return self._speaks_for.get(reply, [reply.metadata.src_node_id])

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Everyone answers, together where the plan's strategy needs only the sum."""
        del timeout
        return self._answers(list(messages), individually=False)

    def individually(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Everyone answers, each for itself; only under masks there is no such answer."""
        del timeout
        return self._answers(list(messages), individually=True)

    def close(self) -> None:
        """Let go of the workers."""
        self._workers.close()

    # -- inside ------------------------------------------------------------------------------

    def _answers(self, messages: Sequence[Message], *, individually: bool) -> list[Message]:
        if not messages:
            return []
        for message in messages:
            stamp(message, message.metadata.message_id or None)
        # A round's requests differ in nothing but the addressee.
        request = RoundRequest.of(messages[0])
        names = [self.holder_name(message.metadata.dst_node_id) for message in messages]
        assignments = [Assignment(name, name, request.plan) for name in names]
        if messages[0].metadata.message_type == MessageType.EVALUATE:
            return self._evaluate(messages, request, assignments)
        linear = STRATEGIES[request.plan.strategy.name].linear
        summed = request.plan.aggregation.kind != "plain" or (linear and not individually)
        return self._train(messages, request, assignments, individually=not summed)

    def _jobs(
        self, request: RoundRequest, assignments: Sequence[Assignment], individually: bool
    ) -> list[Job]:
        if self._cut is None:
            self._cut = self._workers.measure(assignments[0])
        private = {
            place: self._private[one.holder]
            for place, one in enumerate(assignments)
            if one.holder in self._private
        }
        parameters = torch.tensor(request.parameters).unsqueeze(0)
        return jobs_of(
            assignments,
            self._cut,
            request.round,
            parameters,
            private,
            individually=individually,
            clip_norm=request.clip_norm,
        )

    def _train(
        self,
        messages: Sequence[Message],
        request: RoundRequest,
        assignments: Sequence[Assignment],
        *,
        individually: bool,
    ) -> list[Message]:
        jobs = self._jobs(request, assignments, individually)
        replies: list[Message] = []
        together = Total(ExactSum(len(request.parameters)))
        summed: list[Message] = []
        first = 0
        for job, outcome in zip(jobs, self._workers.train(jobs), strict=True):
            for place, private in outcome.private.items():
                self._private[job.assignments[place].holder] = private
            for place, message in enumerate(messages[first : first + len(job.assignments)]):
                if place in outcome.declined:
                    refusal = Refusal(*outcome.declined[place])
                    replies.append(Message(refusal_error(refusal), reply_to=message))
                elif place in outcome.failed:
                    replies.append(_failure(message, outcome.failed[place]))
                elif place in outcome.singles:
                    weight = outcome.weights[place]
                    within = outcome.within.get(place)
                    replies.append(_reply(message, outcome.singles[place], weight, within))
                else:
                    summed.append(message)
            for total in outcome.totals.values():
                together.merge(total)
            first += len(job.assignments)
        masked = request.plan.aggregation.kind != "plain"
        if masked and len(summed) < request.plan.min_holders:
            replies += lost(summed, request.plan.min_holders)
        elif summed:
            within = None if request.clip_norm is None else together.within
            update = mean_of(request.plan, together)
            reply = _reply(summed[0], update, float(together.weight), within)
            self._speaks_for[reply] = [message.metadata.dst_node_id for message in summed]
            replies.append(reply)
        return replies

    def _evaluate(
        self,
        messages: Sequence[Message],
        request: RoundRequest,
        assignments: Sequence[Assignment],
    ) -> list[Message]:
        jobs = self._jobs(request, assignments, individually=True)
        judged = [figures for each in self._workers.evaluate(jobs) for figures in each]
        return [
            _failure(message, figures)
            if isinstance(figures, str)
            else Message(_evaluation(figures).records(), reply_to=message)
            for message, figures in zip(messages, judged, strict=True)
        ]


def _failure(message: Message, kind: str) -> Message:
    return Message(Error(FAILED, kind), reply_to=message)


def _evaluation(figures: Figures) -> EvaluateReply:
    counts = np.array(figures.histogram, dtype=np.int64) if figures.histogram else None
    return EvaluateReply(dict(figures.metrics), counts)


def _reply(message: Message, update: Tensor, weight: float, within: int | None) -> Message:
    reply = TrainReply(update.to(torch.float32).numpy(), weight, within)
    return Message(reply.records(), reply_to=message)
