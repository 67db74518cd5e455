"""A data holder's answers: train, evaluate, tell statistics, in the order that keeps account.

    allowed?  →  answered before?  →  reserve  →  compute  →  store  →  commit  →  send

Whatever is asked, it goes through :meth:`Holder._answered_once`. What is to be masked
(:mod:`client.secure`) leaves once and is not given again.

Where the disk does not let us, at whichever of these steps, a :class:`~common.errors.StorageError`
ends the request and nothing leaves; the same request made again goes on from what is on the disk:

====================  ==========================  ==============================================
what could not be     is on the disk              the same request then
====================  ==========================  ==============================================
room for the answer   nothing                     is a new one
the reservation       nothing, or a reservation   is charged, unless it was
the answer            a reservation               is computed again, at no further price
the commit            a reservation, an answer    gets that answer, committed
the ledger's head     a commit, an answer         gets that answer, and the head is written
====================  ==========================  ==============================================
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

import numpy as np
import pandas as pd
import torch

from client.attempts import Attempts
from client.policy import Policy
from client.requests import Request, Terms
from client.state import Answer, HolderState, Stored
from client.statistics import check_questions, statistics_reply
from client.trainer import Trainer
from common.aggregation import Masked
from common.durable import append_line
from common.errors import ConfigurationError, Refusal, StorageError
from common.plan import LARGEST_UNDERSTATEMENT, TrainingPlan
from common.privacy.discrete_noise import discrete_gaussian
from common.privacy.distributed import noised_steps
from common.privacy.events import Composition, DiscreteGaussian, Event
from common.privacy.ledger import Budget, Release
from common.privacy.limits import Limits
from common.privacy.noise import OsRandomness, Randomness
from common.privacy.releases import Kind
from common.privacy.step import clipped_updates
from common.secagg.ring import RingVector
from common.tasks.base import HolderData, Task, no_histogram
from common.tasks.scaling import check_scaling, scaled
from common.wire import (
    EvaluateReply,
    RoundRequest,
    StatisticsReply,
    StatisticsRequest,
    TrainReply,
    request_id,
)

__all__ = ["Contribution", "Holder", "RandomnessFor"]

logger = logging.getLogger("sotto.holder")

RandomnessFor = Callable[[Request], Randomness]
LedgerTerms = tuple[Release, Budget | None, Composition, Limits]


class MaskedRequest(Request, Protocol):
    """Of a masked round, whichever of its steps."""

    @property
    def plan(self) -> TrainingPlan:
        """Of the run."""
        ...


OnPhase = Callable[[str, float], None]


def _nobody_asks(phase: str, seconds: float) -> None:
    """What is told of a phase unless somebody wants to know."""
    del phase, seconds


def _unpredictable(request: Request) -> Randomness:
    del request
    return OsRandomness()


@dataclass(frozen=True)
class Contribution:
    """A holder's part of a sum, not yet masked.

    Args:
        vector: [D] in the ring of the plan.
        weight: the holder's public aggregation weight, which is in the vector already.
    """

    vector: RingVector
    weight: float


@dataclass
class Holder:
    """A data holder, warm: what it serves, what it allows, and what it remembers.

    Args:
        name: as in its certificate.
        task: what it has data for.
        data: encoded, split.
        policy: what it allows.
        state: ledger and answers.
        device: where model and data live.
        coordinator: who asks, for the ledger.
        randomness: of one request; unpredictable unless this is a simulation.
        evaluation_randomness: the same for the noise of an evaluation, which must be another
            stream than that of the training request of the same round.
        seed: of the private parameters' start; None for an unpredictable one.
        rows: the training rows before encoding, for statistics; None if there are to be none of
            columns.
        on_phase: told how many seconds each phase of a request took, ``"admit"`` (the ledger's
            reservation), ``"compute"``, ``"store"`` and ``"commit"``, also where it failed. How
            long computing took may depend on the data: it is for this side's eyes.

    Raises:
        ConfigurationError: the policy does not fit the data.
    """

    name: str
    task: Task
    data: HolderData
    policy: Policy
    state: HolderState
    device: torch.device
    coordinator: str = "coordinator"
    randomness: RandomnessFor = _unpredictable
    evaluation_randomness: RandomnessFor = _unpredictable
    seed: int | None = None
    rows: pd.DataFrame | None = None
    on_phase: OnPhase = _nobody_asks

    def __post_init__(self) -> None:
        self.policy.check_data(len(self.data.train))
        self.trainer = Trainer(self.task, self.data.train, self.device, seed=self.seed)
        self._units = self.trainer.units_digest if self.task.private_parameters else ""
        self._attempts, self._update_bytes = Attempts(), self._largest_update()

    def train(self, request: RoundRequest) -> TrainReply:
        """Answer a training request.

        Raises:
            Refusal: the policy or the budget does not allow it; nothing was computed.
            StorageError: the disk does not; nothing leaves, and it may be asked again.
        """
        plan = request.plan
        self.policy.check(plan, self.task, self.coordinator)
        if plan.aggregation.kind != "plain":
            raise Refusal(
                "aggregation",
                f"under aggregation {plan.aggregation.kind!r} an update leaves masked or not at "
                "all, and this request is not part of a masked round",
            )
        self._check_dimension(request)
        release = self._release(request, request.request_id, "update", plan.round_event())

        def compute() -> Stored:
            update, private = self.trainer.train(
                plan,
                torch.tensor(request.parameters),
                self._private(request, request.round - 1),
                self.randomness(request),
                divisor=plan.divisor(self.policy.size_class),
            )
            weight, within = plan.weight(self.policy.size_class), None
            if request.clip_norm is not None:
                clipped, inside = clipped_updates(update.unsqueeze(0), request.clip_norm)
                update, within = clipped[0], int(inside[0])
            reply = TrainReply(update.numpy(), weight, within)
            return Answer(reply, private, self._units).stored()

        stored = self._answered_once(request, release, compute, self._update_bytes)
        reply = Answer.of(stored).reply
        assert reply is not None  # nothing of a plain plan leaves masked
        return reply

    def contribution(self, request: RoundRequest) -> Contribution:
        """This holder's part of a sum: to be masked, and never to leave as it is.

        It is given once. A second time, beside other holders, the difference of two sums would be
        somebody's own part.

        Raises:
            Refusal: the policy or the budget does not allow it, or it was given; nothing was
                computed.
            StorageError: the disk does not; nothing leaves.
        """
        plan, aggregation = request.plan, request.plan.aggregation
        release = self._admitted(request)
        if not isinstance(aggregation, Masked):
            raise Refusal("aggregation", "the plan's aggregation is plain, and the request masked")
        self._check_dimension(request)
        weight, encoding = plan.weight(self.policy.size_class), aggregation.encoding(plan)
        vectors: list[RingVector] = []

        def compute() -> Stored:
            private = self._private(request, request.round - 1)
            parameters, randomness = torch.tensor(request.parameters), self.randomness(request)
            if plan.privacy.kind == "distributed":
                total, private = self.trainer.gradient_sum(plan, parameters, private, randomness)
                vectors.append(encoding.encode_integers(noised_steps(total, plan, randomness)))
            else:
                divisor = plan.divisor(self.policy.size_class)
                update, private = self.trainer.train(
                    plan, parameters, private, randomness, divisor=divisor
                )
                vectors.append(encoding.encode(update.numpy().astype(np.float64) * weight))
            return Answer(None, private, self._units).stored()

        self._answered_once(request, release, compute, self._update_bytes)
        (vector,) = vectors
        return Contribution(vector, weight)

    def check_contribution(self, request: MaskedRequest) -> None:
        """Refuse a masked round before it begins, not in its middle, where others pay for it.

        Args:
            request: run, round and plan of it.

        Raises:
            Refusal: :meth:`contribution` would raise it.
            StorageError: there is no room for what it stores.
        """
        release = self._admitted(request)
        for refusal in self.state.ledger.refusals(*self._terms(request, release)):
            raise refusal
        if self.policy.dry_run:
            raise self._rehearsed(f"taken part in round {request.round}", request.run_id)
        with self.state.answers.room(release.request_id, self._update_bytes):
            pass

    def evaluate(self, request: RoundRequest) -> EvaluateReply:
        """Evaluate on held-out units, note it down here, and send what plan and policy say.

        That is a noised histogram where the plan pays for one, and exact metrics where the policy
        says that the data are public; else nothing.

        Raises:
            Refusal: the policy or the budget does not allow it; nothing was computed.
        """
        self.policy.check(request.plan, self.task, self.coordinator)
        self._check_dimension(request)
        if request.plan.evaluation.kind == "histogram":
            return self._released_histogram(request, request.plan.evaluation.event())
        if self.policy.dry_run:
            raise self._rehearsed(f"evaluated round {request.round}", request.run_id)
        private = self._private(request, request.round)
        try:
            metrics = self.trainer.evaluate(
                torch.tensor(request.parameters),
                private,
                scaled(self.data.test, request.plan.scaling),
            )
        except Exception:
            if self.policy.share_metrics:
                raise
            # Nothing is paid for an evaluation, so not even whether it failed may be told.
            logger.exception("the evaluation of round %d failed", request.round)
            return EvaluateReply({})
        self._note(request, metrics)
        return EvaluateReply(metrics if self.policy.share_metrics else {})

    def statistics(self, request: StatisticsRequest) -> StatisticsReply:
        """Answer a request for statistics of the training rows.

        Raises:
            Refusal: the policy or the budget does not allow it; nothing was computed.
        """
        plan = request.plan
        self.policy.check_statistics(Terms.of_statistics(plan), self.task, self.coordinator)
        check_questions(plan, self.task, self.data.train, self.rows)
        release = self._release(request, request.request_id, "statistics", plan.event())

        def compute() -> Stored:
            randomness = self.randomness(request)
            reply = statistics_reply(plan, self.task, self.data.train, self.rows, randomness)
            return Stored({"sums": reply.sums})

        return StatisticsReply(self._answered_once(request, release, compute).tensors["sums"])

    def spent(self) -> float:
        """ε of everything released about the data set so far; infinite if any was unprotected."""
        budget = self.policy.budget
        delta = budget.delta if budget else self.task.source.delta
        return self.state.ledger.epsilon(self.policy.data_set, delta)

    # -- inside ------------------------------------------------------------------------------

    def _released_histogram(self, request: RoundRequest, event: DiscreteGaussian) -> EvaluateReply:
        """Count held-out units by cell, with noise, at the plan's price."""
        if not self.task.cells:
            raise Refusal("evaluation", no_histogram(self.task))
        if not request.plan.evaluates(request.round):
            raise Refusal(
                "evaluation", f"the plan has no evaluation after round {request.round} to pay for"
            )
        name = request_id(f"{request.run_id}.evaluation", request.round)
        release = self._release(request, name, "evaluation", event)

        def compute() -> Stored:
            test = scaled(self.data.test, request.plan.scaling).to(self.device)
            private = self._private(request, request.round)
            parameters = torch.tensor(request.parameters)
            predictions = self.trainer.predictions(parameters, private, test)
            metrics = self.task.metrics(predictions, test)
            self._note(request, metrics)
            counts = self.task.histogram(predictions, test)
            randomness = self.evaluation_randomness(request)
            noise = discrete_gaussian(len(counts), event.noise_multiplier, randomness)
            return Stored({"histogram": (counts + noise).numpy()}, {"metrics": json.dumps(metrics)})

        stored = self._answered_once(request, release, compute)
        metrics = json.loads(stored.about["metrics"]) if self.policy.share_metrics else {}
        return EvaluateReply(metrics, stored.tensors["histogram"])

    def _budget(self, request: Request) -> Budget | None:
        """The budget to hold the ledger to; the policy has allowed a plan without privacy."""
        plan = request.plan
        exact = isinstance(plan, TrainingPlan) and plan.privacy.kind in ("none", "central")
        return None if exact else self.policy.budget

    def _admitted(self, request: MaskedRequest) -> Release:
        """What a part of a sum releases, if the policy allows it and it has not left already."""
        plan = request.plan
        self.policy.check(plan, self.task, self.coordinator)
        if isinstance(plan.aggregation, Masked):
            self._check_model(plan.aggregation.dimension)
        name = request_id(request.run_id, request.round)
        entry = self.state.ledger.find(name)
        if entry is not None and entry.state == "committed":
            raise Refusal(
                "answered",
                f"this holder's masked part of round {request.round} has left already, and a "
                "second one could tell it from the others'; the round is lost, go on with the next",
            )
        return self._release(request, name, "update", plan.round_event())

    def _terms(self, request: Request, release: Release) -> LedgerTerms:
        """What the ledger judges a release by."""
        return (release, self._budget(request), request.plan.composition(), self.policy.limits)

    def _release(self, request: Request, request_id: str, kind: Kind, event: Event) -> Release:
        return Release(
            request_id=request_id,
            data_set=self.policy.data_set,
            task=self.task.name,
            coordinator=self.coordinator,
            run_id=request.run_id,
            plan_digest=request.plan.digest,
            round=request.round,
            kind=kind,
            event=event,
        )

    def _answered_once(
        self, request: Request, release: Release, compute: Callable[[], Stored], size: int = 0
    ) -> Stored:
        """Reserve, compute, store, commit: in this order, and once for each request.

        Args:
            request: as asked.
            release: what it would release.
            compute: makes the answer.
            size: of the answer in bytes, roughly; by nothing that depends on data.

        Raises:
            Refusal: the budget does not allow it, or it was begun before on another model; nothing
                was computed.
            StorageError: see the table above.
        """
        terms = self._terms(request, release)
        if self.policy.dry_run:
            for refusal in self.state.ledger.refusals(*terms):
                raise refusal
            would = f"sent the {release.kind} of round {release.round}"
            raise self._rehearsed(would, request.run_id)
        answer = self._stored_answer(release)
        if answer is None:
            # Before anything is charged: else a full disk pays for round after round with nothing.
            with self.state.answers.room(release.request_id, size):
                answer = self._computed(request, terms, compute)
        self._attempts.end(release.request_id)
        return answer

    def _computed(
        self, request: Request, terms: LedgerTerms, compute: Callable[[], Stored]
    ) -> Stored:
        name = terms[0].request_id
        with self._phase("admit"):
            again = self.state.ledger.reserve(*terms).repeated
        self._attempts.begin(terms[0], _model_digest(request), again=again)
        with self._phase("compute"):
            answer = compute()
        with self._phase("store"):
            digest = self.state.answers.put(name, answer)
        with self._phase("commit"):
            # Committed before the first byte leaves: after a crash the account shows too much,
            # never too little.
            self.state.ledger.commit(name, digest)
        return answer

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.on_phase(name, time.perf_counter() - begin)

    def _largest_update(self) -> int:
        """Bytes of an update's answer on the disk, for the most units that the policy allows.

        Whether a request is declined for want of room must not depend on how many there are.
        """
        a_unit = self.trainer.private_bytes / max(1, self.trainer.units)
        units = LARGEST_UNDERSTATEMENT * self.policy.size_class
        return 4 * self.trainer.dimension + math.ceil(a_unit * units)

    def _rehearsed(self, would: str, run_id: str) -> Refusal:
        """What the policy's dry run says instead of an answer, here and to the coordinator."""
        logger.warning("dry run: would have %s of run %s", would, run_id)
        return Refusal(
            "dry-run",
            "the holder is on a dry run: it allows this request, and computes and sends nothing",
        )

    def _check_dimension(self, request: RoundRequest) -> None:
        """Before anything is charged: is this a model that we can train, on inputs that we have?"""
        self._check_model(len(request.parameters))
        try:
            check_scaling(request.plan.scaling, self.task, self.data.train)
        except ConfigurationError as error:  # in figures of plan and task only
            raise Refusal("scaling", str(error)) from None

    def _check_model(self, dimension: int) -> None:
        """Refuse a request for a model of another size."""
        if dimension != self.trainer.dimension:
            raise Refusal(
                "model",
                f"the request has {dimension} shared parameters and this holder's model "
                f"{self.trainer.dimension}; the two sides need the same version of the task",
            )

    def _stored_answer(self, release: Release) -> Stored | None:
        """The answer that this very request has; none if there is none yet.

        One that was stored, and whose commit failed, becomes the answer now.
        """
        entry = self.state.ledger.find(release.request_id)
        if entry is None:
            return None
        if different := entry.release.differences(release):
            raise Refusal(
                "request",
                f"round {release.round} was asked before with another {', '.join(different)}",
            )
        committed = entry.state == "committed"
        digest = entry.reply_digest if committed else self.state.answers.digest(release.request_id)
        if digest is None:
            return None
        answer = self.state.answers.get(release.request_id, digest)
        if not committed and (answer is None or not answer.can_be_given):
            return None
        if answer is None:
            raise Refusal(
                "answered",
                f"round {release.round} was answered before and the answer is no longer kept; "
                "it will not be computed twice",
            )
        # Also where it was committed before: the ledger's head may not know yet.
        self.state.ledger.commit(release.request_id, digest)
        return answer

    def _private(self, request: RoundRequest, number: int) -> dict[str, torch.Tensor] | None:
        """Private parameters after the last round of this run up to ``number`` answered here.

        None, for a fresh start, if there are none or they belong to other units than ours.
        """
        if not self.task.private_parameters:
            return None
        for candidate in self.state.answers.rounds(request.run_id):
            name = request_id(request.run_id, candidate)
            entry = self.state.ledger.find(name) if candidate <= number else None
            if entry is not None and entry.state == "committed":
                stored = self.state.answers.get(name, entry.reply_digest)
                answer = None if stored is None else Answer.of(stored)
                if answer is not None and answer.units == self._units:
                    return dict(answer.private)
        return None

    def _note(self, request: RoundRequest, metrics: dict[str, float]) -> None:
        """Keep the holder's own figures in its own folder; they do not leave with this.

        A line that cannot be written costs the round nothing.
        """
        if self.state.folder is None:
            return
        try:
            line = json.dumps(self._figures(request, metrics))
            append_line(self.state.folder / "metrics.jsonl", line)
        except StorageError as error:
            logger.warning("round %d has no line in metrics.jsonl: %s", request.round, error)

    def _figures(self, request: RoundRequest, metrics: dict[str, float]) -> dict[str, object]:
        return {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "run": request.run_id,
            "round": request.round,
            "metrics": {name: None if value != value else value for name, value in metrics.items()},
            "epsilon_spent": _finite(self.spent()),
            "epsilon_budget": self.policy.budget.epsilon if self.policy.budget else None,
        }


def _model_digest(request: Request) -> bytes:
    """Names the model that a request brings; the same for all that bring none."""
    model = request.parameters.tobytes() if isinstance(request, RoundRequest) else b""
    return hashlib.sha256(model).digest()


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None
