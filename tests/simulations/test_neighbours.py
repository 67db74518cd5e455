"""Neighbouring data sets, for every built-in task: one unit more moves a step by at most C.

Unit: a record, or a user with everything that the user did. Neighbours: that unit added. What is
compared is the clipped sum of one step, with next to no noise, of the very engines that compute it:
the holder's own trainer, and the simulator's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from client.trainer import Trainer
from common.guarantees import DistributedPrivacy, Privacy
from common.plan import TrainingPlan
from common.privacy.noise import SeededRandomness, simulation_key
from common.settings import plan_for
from common.tasks import load
from common.tasks.base import Examples, Task
from common.tasks.parameters import initial_parameters
from simulations.batched import Block, Terms, train
from simulations.randomness import block_randomness
from simulations.stack import StackedModel

CPU = torch.device("cpu")
C = 0.5
ROUNDING = 1 + 1e-3
"""Sums are read off float32 parameters; a unit of C is thousands of their last bits."""
RECORDS = ("medical-diagnosis", "credit-risk")
UNITS = 20


@dataclass(frozen=True)
class Person:
    """Somebody who joins a data set.

    Args:
        units: what they add to it; one row, if they are one unit.
        private: rows of the private parameters that belong to it, by name.
    """

    units: Examples
    private: Mapping[str, Tensor]


Private = Mapping[str, Tensor]
Engine = Callable[[Task, TrainingPlan, Examples, Private, int], Tensor]


def plan_of(task: Task, sampling_rate: float = 1.0) -> TrainingPlan:
    """One step whose update is the clipped sum itself: learning rate B, and no noise to speak of.

    That is 1e-9 and not 0, which a plan with privacy does not allow.
    """
    plan = plan_for(
        task,
        {
            "epsilon": 8.0,
            "rounds": 1,
            "local_steps": 1,
            "clip_norm": C,
            "holder_size": 100,
            "batch_size": 100 * sampling_rate,
            "optimizer": "sgd",
            "momentum": 0.0,
            "learning_rate": 100 * sampling_rate,
        },
    )
    assert isinstance(plan.privacy, Privacy)
    privacy = plan.privacy.model_copy(update={"noise_multiplier": 1e-9})
    return plan.model_copy(update={"privacy": privacy})


def start_of(task: Task) -> Tensor:
    """Parameters somewhere else than at the start, where some gradients are zero."""
    parameters = torch.tensor(initial_parameters(task, 3))
    return parameters + 0.1 * SeededRandomness("start").normal(parameters.shape, std=1.0)


def on_the_holder(
    task: Task, plan: TrainingPlan, units: Examples, private: Private, seed: int
) -> Tensor:
    randomness = SeededRandomness.of_key(simulation_key("neighbours", seed))
    trainer = Trainer(task, units, CPU, seed=0)
    update, _ = trainer.train(
        plan, start_of(task), private, randomness, divisor=plan.expected_batch_size
    )
    return update


def in_a_block(
    task: Task, plan: TrainingPlan, units: Examples, private: Private, seed: int
) -> Tensor:
    updates, _ = train(
        StackedModel(task, CPU),
        Block.of([units], task.padding, CPU),
        Terms.of([plan], [plan.holder_size], CPU),
        start_of(task).unsqueeze(0),
        {name: value.unsqueeze(0) for name, value in private.items()},
        block_randomness([simulation_key("neighbours", seed)], CPU),
    )
    return updates[0]


def in_a_sum(
    task: Task, plan: TrainingPlan, units: Examples, private: Private, seed: int
) -> Tensor:
    """What a holder rounds, noises and masks where the noise is in the sum of holders."""
    assert isinstance(plan.privacy, Privacy)
    own = plan.privacy.model_dump(include={"epsilon", "delta", "unit", "clip_norm"})
    summed = plan.model_copy(update={"privacy": DistributedPrivacy(**own)})
    randomness = SeededRandomness.of_key(simulation_key("neighbours", seed))
    total, _ = Trainer(task, units, CPU, seed=0).gradient_sum(
        summed, start_of(task), private, randomness
    )
    return total


SAMPLING: Mapping[str, Engine] = {"holder": on_the_holder, "batched": in_a_block}
ENGINES: Mapping[str, Engine] = {**SAMPLING, "sum": in_a_sum}


the = cache(load)


@cache
def source_of(task: Task) -> Examples:
    """The first holder's training units, of the task's embedded source."""
    return next(iter(task.holder_data().values())).train


def data_of(task: Task) -> tuple[Examples, Private]:
    """Some units of the embedded source, and their private parameters."""
    units = source_of(task).take(torch.arange(UNITS))
    if not task.private_parameters:
        return units, {}
    return units, {"users.weight": SeededRandomness("users").normal((UNITS, 16), std=0.5)}


def moved(engine: str, task: Task, person: Person, *, rate: float = 1.0, seed: int = 0) -> Tensor:
    """What the person's presence changes in the clipped sum of a step: [D]."""
    units, private = data_of(task)
    plan, compute = plan_of(task, rate), ENGINES[engine]
    both = Examples.concatenate([units, person.units], task.padding)
    all_private = {name: torch.cat([private[name], own]) for name, own in person.private.items()}
    with_them = compute(task, plan, both, all_private, seed)
    return with_them - compute(task, plan, units, private, seed)


# -- who joins -------------------------------------------------------------------------------


def record(task: Task, change: Callable[[Tensor], Tensor] = lambda values: values) -> Person:
    """One more record of the source, its numbers changed."""
    one = source_of(task).take(torch.tensor([UNITS]))
    inputs = [name for name in ("features", "numbers") if name in one.tensors]
    return Person(Examples({**one.tensors, **{name: change(one[name]) for name in inputs}}), {})


CHANGES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "ordinary": lambda values: values,
    "all zero": torch.zeros_like,
    "large": lambda values: 1e4 * values + 1e4,
    "huge": lambda values: torch.full_like(values, 1e30),
    "one infinite": lambda values: values.index_fill(1, torch.tensor([0]), math.inf),
    "one NaN": lambda values: values.index_fill(1, torch.tensor([0]), math.nan),
}


def user(task: Task, interactions: int, size: float = 0.5) -> Person:
    """A user with so many different items, and a private vector of that deviation."""
    draws = SeededRandomness("items").draws(int(task.padding["items"]))
    items = draws.argsort()[:interactions].sort().values.unsqueeze(0)
    units = Examples(
        {
            "user": torch.tensor([UNITS]),
            "items": items,
            "count": torch.tensor([interactions]),
        }
    )
    vector = size * SeededRandomness("somebody").normal((1, 16), std=1.0)
    return Person(units, {"users.weight": vector})


USERS: Mapping[str, tuple[int, float]] = {
    "one interaction": (1, 0.5),
    "very many interactions": (199, 0.5),
    "many, and a large vector": (150, 1e3),
    "a huge vector": (20, 1e25),
    "an infinite vector": (20, math.inf),
    "a vector of NaN": (20, math.nan),
}


# -- one unit --------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", RECORDS)
def test_one_record_moves_the_sum_by_at_most_c(name: str, change: str, engine: str) -> None:
    task = the(name)
    difference = moved(engine, task, record(task, CHANGES[change]))
    assert float(difference.norm()) <= C * ROUNDING  # NaN fails
    if change == "large":
        assert float(difference.norm()) >= C / ROUNDING, "the bound is reached, so it is tested"
    if change in ("one infinite", "one NaN"):
        assert not difference.any(), "no gradient, no part in the sum"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", USERS)
def test_one_user_moves_the_sum_by_at_most_c_with_all_interactions(kind: str, engine: str) -> None:
    task = the("recommendation")
    difference = moved(engine, task, user(task, *USERS[kind]))
    assert float(difference.norm()) <= C * ROUNDING
    if kind in ("very many interactions", "many, and a large vector"):
        assert float(difference.norm()) >= C / ROUNDING
    if kind in ("an infinite vector", "a vector of NaN"):
        assert not difference.any()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_users_interactions_clipped_one_by_one_would_move_it_by_far_more(engine: str) -> None:
    """Negative control: the same interactions, each as a unit of its own."""
    task = the("recommendation")
    whole = user(task, 100)
    items = whole.units["items"][0]
    apart = Person(
        Examples(
            {
                "user": torch.arange(UNITS, UNITS + len(items)),
                "items": items.unsqueeze(1),
                "count": torch.ones_like(items),
            }
        ),
        {"users.weight": whole.private["users.weight"].expand(len(items), -1)},
    )
    assert float(moved(engine, task, apart).norm()) > 5 * C


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_does_not_clip_would_be_noticed(engine: str) -> None:
    """Negative control: a bound as good as none, and a record far out."""
    task = the("credit-risk")
    plan = plan_of(task)
    assert isinstance(plan.privacy, Privacy)
    privacy = plan.privacy.model_copy(update={"clip_norm": 1e6, "noise_multiplier": 1e-15})
    loose = plan.model_copy(update={"privacy": privacy})
    units, private = data_of(task)
    wild = Examples.concatenate([units, record(task, CHANGES["large"]).units])
    compute = ENGINES[engine]
    difference = compute(task, loose, wild, private, 0) - compute(task, loose, units, private, 0)
    assert float(difference.norm()) > 2 * C


@pytest.mark.parametrize("engine", SAMPLING)
def test_a_user_is_sampled_as_one(engine: str) -> None:
    """At q = 1/2 a user is in a step with everything, or not at all: the sum moves by C or by 0.

    In 24 draws both come up but for a chance of 2⁻²³. Interactions drawn one by one would always
    be there in part.
    """
    task = the("recommendation")
    person = user(task, 199)
    found = [float(moved(engine, task, person, rate=0.5, seed=seed).norm()) for seed in range(24)]
    assert all(norm == pytest.approx(C, rel=1e-3) or norm < 1e-6 for norm in found)
    assert min(found) < 1e-6
    assert max(found) > C / ROUNDING
