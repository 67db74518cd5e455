"""Canaries at the clipping layer: units that show how much of one unit a run gives away.

A canary's loss is linear in a coordinate of the model that no other unit touches, with a gradient
so long that clipping must cut it to exactly C. In that coordinate the coordinator therefore sees
the mechanism itself: steps of a Poisson-sampled C, or nothing, under the plan's noise. One run
carries a thousand of them, each there by a fair coin, and they do not disturb each other or the
holder's own units (Nasr et al. 2023, "Tight auditing of differentially private machine learning",
call this the Dirac canary).

The run is a deployment's: rounds, policy, ledger, Opacus and the noise of the operating system.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pandas as pd
import torch
from flwr.app import Message, MessageType
from torch import Tensor, nn

from client.holder import Holder
from client.state import HolderState
from common.errors import ConfigurationError, DataError, RunError
from common.flower import quiet_flower
from common.guarantees import Privacy
from common.plan import TrainingPlan
from common.tasks.base import Examples, HolderData, HolderTables, Task
from common.wire import ARRAYS, UPDATE, vector_of
from server.app import federate
from simulations.baselines import solo_plan
from simulations.grid import InProcessGrid
from simulations.lower_bounds import Bools, Floats
from simulations.policy import simulated_policy

__all__ = [
    "CanaryTask",
    "MakeHolder",
    "canary_scores",
    "claimed_privacy",
    "deployed_holder",
    "expected_movement",
    "plan_with_canaries",
    "with_canaries",
]

STEEPNESS = 16.0
"""Length of a canary's gradient before clipping, in units of C."""

WHICH = "which canary"
"""Name of the tensor that says which canary a unit is; −1 for the holder's own units."""

_OF_THE_TASK = (
    "name",
    "unit",
    "headline",
    "sources",
    "preprocessings",
    "private_learning_rate",
    "draws",
    "units_at_a_time",
    "padding",
    "caveat",
    "source",
    "schema",
    "preprocessing",
)


class CanaryModel(nn.Module):
    """A task's own model, and a coordinate at zero for each canary.

    Args:
        own: the task's.
        canaries: m.
    """

    def __init__(self, own: nn.Module, canaries: int) -> None:
        super().__init__()
        self.own = own
        # Last, so that a model's canaries are the last m shared parameters.
        self.canaries = nn.Embedding(canaries, 1)
        nn.init.zeros_(self.canaries.weight)


class CanaryTask(Task):
    """Another task with canaries among its units; to a holder and its policy it is that task.

    Args:
        task: whose model and loss the holder's own units have.
        canaries: m.
        slope: length of a canary's gradient.
    """

    def __init__(self, task: Task, canaries: int, slope: float) -> None:
        for name in _OF_THE_TASK:
            setattr(self, name, getattr(task, name))
        self.__dict__["private_parameters"] = frozenset(
            f"own.{name}" for name in task.private_parameters
        )
        self._task, self._canaries, self._slope = task, canaries, slope

    def model(self, units: int) -> CanaryModel:
        """The task's model beside the canaries' coordinates."""
        return CanaryModel(self._task.model(units), self._canaries)

    def batch(self, units: Examples, draws: Tensor) -> Examples:
        """The task's batch; each unit keeps saying which canary it is."""
        batch = self._task.batch(_own(units), draws)
        return Examples({**batch.tensors, WHICH: units[WHICH]})

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        """[B]: the task's loss of its own units; −slope · its coordinate of a canary."""
        which = batch[WHICH]
        place = which.clamp(min=0).unsqueeze(1)
        coordinate: Tensor = model.canaries(place)  # type: ignore[operator]
        own = self._task.loss(model.own, _own(batch))  # type: ignore[arg-type]
        return torch.where(which >= 0, -self._slope * coordinate.flatten(), own)

    def examples(self, table: pd.DataFrame) -> Examples:
        """The task's own units."""
        return with_canaries(self._task.examples(table), np.zeros(self._canaries, dtype=np.bool_))

    def predict(self, model: nn.Module, units: Examples) -> Tensor:
        """As the task's own model does."""
        return self._task.predict(model.own, units)  # type: ignore[arg-type]

    def metrics(self, predictions: Tensor, test: Examples) -> dict[str, float]:
        """The task's."""
        return self._task.metrics(predictions, test)

    def split(self, table: pd.DataFrame, *, holder: str, seed: int) -> HolderTables:
        """The task's."""
        return self._task.split(table, holder=holder, seed=seed)

    def recommended(self, epsilon: float | None) -> Mapping[str, object]:  # type: ignore[override]
        """The task's."""
        return self._task.recommended(epsilon)


def with_canaries(units: Examples, included: Bools) -> Examples:
    """A holder's units and after them the canaries whose coin fell for them.

    Args:
        units: [n] of the task, at least one: a canary is a copy of the first with another loss.
        included: [m], the coins.

    Raises:
        DataError: there is no unit.
    """
    if not len(units):
        raise DataError("the holder has no training unit, so there is nothing to audit")
    which = torch.from_numpy(np.flatnonzero(included))
    copies = units.take(torch.zeros(len(which), dtype=torch.int64))
    own = torch.full((len(units),), -1)
    return Examples(
        {
            **Examples.concatenate([units, copies]).tensors,
            WHICH: torch.cat([own, which]),
        }
    )


def _own(units: Examples) -> Examples:
    return Examples({name: tensor for name, tensor in units.tensors.items() if name != WHICH})


# -- the run --------------------------------------------------------------------------------------

MakeHolder = Callable[[str, Task, HolderData, TrainingPlan, torch.device], Holder]
"""Makes the holder that is audited, from its name, task, data, plan and device."""

_CPU = torch.device("cpu")


def deployed_holder(
    name: str, task: Task, data: HolderData, plan: TrainingPlan, device: torch.device = _CPU
) -> Holder:
    """A holder as in a deployment: its noise, samples and private parameters are unpredictable.

    Its ledger is in memory, its budget the plan's, and its declared size exact.
    """
    policy = simulated_policy(name, plan, len(data.train))
    return Holder(name, task, data, policy, HolderState.in_memory(), device)


def canary_scores(
    task: Task,
    name: str,
    data: HolderData,
    plan: TrainingPlan,
    included: Bools,
    *,
    device: torch.device = _CPU,
    make_holder: MakeHolder = deployed_holder,
    on_round: Callable[[], None] = lambda: None,
) -> Floats:
    """Run the whole plan with canaries, and score each from what the coordinator saw.

    A score is the sum over all rounds of the updates' value in the canary's coordinate, in units
    of what a canary that is there moves it by on average: 1 for an included canary and 0 for
    another, and the noise. For SGD without momentum at full batches that sum is a sufficient
    statistic, so no attacker tells canaries apart better.

    Args:
        task: of the plan.
        name: of the holder.
        data: the holder's.
        plan: with privacy; what changes of it is in :func:`plan_with_canaries`.
        included: [m], the coins.
        device: where the model lives.
        make_holder: the holder to audit; tests give broken ones.
        on_round: called after every round.

    Returns:
        [m] float64.

    Raises:
        RunError: the holder did not answer a round, or not as the plan allows.
        ConfigurationError: the plan has no privacy, or δ is not below one over the holder's units
            and canaries together.
    """
    quiet_flower()
    train = with_canaries(data.train, included)
    plan = plan_with_canaries(plan, len(train))
    planted = CanaryTask(task, len(included), STEEPNESS * claimed_privacy(plan).clip_norm)
    holder = make_holder(name, planted, HolderData(train, data.test), plan, device)
    try:
        grid = _Watched({name: holder}, len(included))
        federate(grid, plan, planted, on_round=lambda _: on_round())
    finally:
        holder.state.close()
    if grid.updates != plan.rounds:
        raise RunError(f"{grid.updates} of {plan.rounds} updates came; an audit needs all of them")
    return grid.total / expected_movement(plan, plan.divisor(holder.policy.size_class))


def plan_with_canaries(plan: TrainingPlan, units: int) -> TrainingPlan:
    """The plan for one holder that has so many units, canaries included.

    Sampling rate, clip, noise multiplier and steps stay as they are. The nominal size grows where
    the canaries would take the holder past what it allows; it scales steps, and noise with them.
    """
    size = max(plan.holder_size, units)
    return solo_plan(plan).model_copy(
        update={
            "holder_size": size,
            "expected_batch_size": plan.sampling_rate * size,
            "evaluate_every": 0,
        }
    )


def expected_movement(plan: TrainingPlan, divisor: float) -> float:
    """By how much a canary that is there moves its coordinate in the whole run, on average.

    SGD with momentum β: the gradient of each of a round's k steps is qC/B, and the s-th step goes
    by the sum of s of its powers, lr · (1 − β^s)/(1 − β) times that. Adam: about lr times the
    mean over the root mean square of a noisy gradient, q/√(q + σ²); a scale and no promise.

    Args:
        plan: calibrated.
        divisor: B.
    """
    privacy, q, steps = claimed_privacy(plan), plan.sampling_rate, plan.local_steps
    sigma = privacy.noise_multiplier or 0.0
    if plan.optimizer == "adam":
        return plan.rounds * steps * plan.learning_rate * q / math.sqrt(q + sigma**2)
    speed = sum(1 - plan.momentum**step for step in range(1, steps + 1)) / (1 - plan.momentum)
    return plan.rounds * plan.learning_rate * speed * q * privacy.clip_norm / divisor


def claimed_privacy(plan: TrainingPlan) -> Privacy:
    """What the plan claims about a holder's units.

    Raises:
        ConfigurationError: nothing.
    """
    if plan.privacy.kind == "distributed":
        raise ConfigurationError(
            "an audit attacks what one holder sends, and with aggregation 'secure-sum' only the "
            "sum of many is private; audit it with aggregation 'plain' or 'secure'"
        )
    if not isinstance(plan.privacy, Privacy):
        raise ConfigurationError(
            f"a plan with privacy of kind {plan.privacy.kind!r} claims nothing about a holder's "
            "units that an audit could contradict; give an epsilon"
        )
    return plan.privacy


class _Watched(InProcessGrid):
    """Keeps what the coordinator learns about the canaries: their part of every update.

    Args:
        holders: by name.
        canaries: m.
    """

    def __init__(self, holders: Mapping[str, Holder], canaries: int) -> None:
        super().__init__(holders)
        self.total: Floats = np.zeros(canaries)
        self.updates = 0

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        asked = list(messages)
        replies = super().send_and_receive(asked, timeout=timeout)
        for message, reply in zip(asked, replies, strict=True):
            if message.metadata.message_type == MessageType.TRAIN and not reply.has_error():
                update = vector_of(reply.content.array_records[ARRAYS][UPDATE], what="update")
                self.total += update[-len(self.total) :]
                self.updates += 1
        return replies
