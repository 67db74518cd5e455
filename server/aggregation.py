"""Flower's strategies by name. Adding one is a line here (and its test)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    Strategy,
)

from common.errors import ConfigurationError
from common.plan import StrategyPlan, TrainingPlan
from common.wire import ARRAYS, CONFIG, WEIGHT

__all__ = ["STRATEGIES", "Kind", "build_strategy", "is_buffered", "restore", "snapshot"]

NDArray = npt.NDArray[Any]

# The round loop chooses the cohort and waits for it, so a strategy asks everyone it is shown.
_EVERYONE: dict[str, Any] = {
    "fraction_train": 1.0,
    "fraction_evaluate": 1.0,
    "min_train_nodes": 1,
    "min_evaluate_nodes": 1,
    "min_available_nodes": 1,
    "weighted_by_key": WEIGHT,
    "arrayrecord_key": ARRAYS,
    "configrecord_key": CONFIG,
}


@dataclass(frozen=True)
class Kind:
    """One strategy.

    Args:
        build: from the plan's settings.
        linear: whether it needs only the weighted sum of updates; secure aggregation and
            pre-summed blocks work with these alone.
        memory: attributes that it carries from round to round, and a checkpoint must hold.
        fewest: replies it needs.
        buffered: whether updates are combined as they come (:mod:`server.buffered`), not in rounds.
    """

    build: Callable[[StrategyPlan], Strategy]
    linear: bool
    memory: tuple[str, ...] = ()
    fewest: Callable[[StrategyPlan], int] = lambda _: 1
    buffered: bool = False


STRATEGIES: Mapping[str, Kind] = {
    "fedavg": Kind(lambda _: FedAvg(**_EVERYONE), linear=True),
    "fedavgm": Kind(
        lambda plan: FedAvgM(
            **_EVERYONE, server_learning_rate=plan.learning_rate, server_momentum=plan.momentum
        ),
        linear=True,
        memory=("momentum_vector",),
    ),
    "fedprox": Kind(lambda plan: FedProx(**_EVERYONE, proximal_mu=plan.proximal_mu), linear=True),
    "fedadam": Kind(
        lambda plan: FedAdam(**_EVERYONE, eta=plan.learning_rate),
        linear=True,
        memory=("m_t", "v_t"),
    ),
    "fedyogi": Kind(
        lambda plan: FedYogi(**_EVERYONE, eta=plan.learning_rate),
        linear=True,
        memory=("m_t", "v_t"),
    ),
    "fedadagrad": Kind(
        lambda plan: FedAdagrad(**_EVERYONE, eta=plan.learning_rate),
        linear=True,
        memory=("m_t", "v_t"),
    ),
    "fedmedian": Kind(lambda _: FedMedian(**_EVERYONE), linear=False),
    "fedtrimmedavg": Kind(lambda plan: FedTrimmedAvg(**_EVERYONE, beta=plan.trim), linear=False),
    "krum": Kind(
        lambda plan: Krum(**_EVERYONE, num_malicious_nodes=plan.malicious),
        linear=False,
        # Blanchard et al. 2017, section 4: Krum needs n > 2f + 2 to withstand f.
        fewest=lambda plan: 2 * plan.malicious + 3,
    ),
    # Nguyen et al. 2022, algorithm 1. An update weighs less with age, so it takes single ones.
    "fedbuff": Kind(
        lambda plan: FedAvgM(
            **_EVERYONE, server_learning_rate=plan.learning_rate, server_momentum=0.0
        ),
        linear=False,
        fewest=lambda plan: plan.buffer,
        buffered=True,
    ),
}


def is_buffered(name: str) -> bool:
    """Whether a strategy combines updates as they come, not in rounds."""
    return name in STRATEGIES and STRATEGIES[name].buffered


def build_strategy(plan: TrainingPlan) -> Strategy:
    """The plan's strategy.

    Raises:
        ConfigurationError: unknown name, or fewer holders than the strategy can work with.
    """
    settings = plan.strategy
    kind = STRATEGIES.get(settings.name)
    if kind is None:
        raise ConfigurationError(
            f"there is no strategy {settings.name!r}; there are {', '.join(STRATEGIES)}"
        )
    why = _only_sums(plan)
    if why and not kind.linear:
        linear = ", ".join(name for name, other in STRATEGIES.items() if other.linear)
        raise ConfigurationError(
            f"strategy {settings.name!r} looks at single updates"
            f"{' and their age' if kind.buffered else ''}, and {why}; use one of {linear}"
        )
    fewest = kind.fewest(settings)
    if plan.min_holders < fewest:
        own = "buffer" if kind.buffered else "malicious"
        raise ConfigurationError(
            f"strategy {settings.name!r} with {own}={getattr(settings, own)} needs at least "
            f"{fewest} holders a round, min_holders is {plan.min_holders}"
        )
    if kind.buffered and plan.over_selection:
        raise ConfigurationError(
            f"over_selection is for strategies that go in rounds, and {settings.name!r} waits for "
            "nobody: leave it out, and say with cohort how many are to be at work at a time"
        )
    return kind.build(settings)


def _only_sums(plan: TrainingPlan) -> str:
    """Why a strategy gets to see sums of updates only; empty if it sees each."""
    if plan.privacy.kind == "central":
        return "where holders are the unit only their noised sum is to be seen"
    if plan.aggregation.kind != "plain":
        return f"under aggregation {plan.aggregation.kind!r} there is only their sum"
    return ""


def snapshot(name: str, strategy: Strategy) -> dict[str, NDArray]:
    """What the strategy carries to the next round, as arrays."""
    arrays: dict[str, NDArray] = {}
    for attribute in STRATEGIES[name].memory:
        value = getattr(strategy, attribute)
        items = value.items() if isinstance(value, dict) else enumerate(value or ())
        arrays |= {f"{attribute}/{key}": np.asarray(item) for key, item in items}
    return arrays


def restore(name: str, strategy: Strategy, arrays: Mapping[str, NDArray]) -> None:
    """Give a fresh strategy the memory that :func:`snapshot` took."""
    for attribute in STRATEGIES[name].memory:
        prefix = f"{attribute}/"
        items = {
            key.removeprefix(prefix): value
            for key, value in arrays.items()
            if key.startswith(prefix)
        }
        if items:
            # Flower keeps a list of arrays in FedAvgM and a dict by array name in FedOpt.
            listed = all(key.isdigit() for key in items)
            setattr(strategy, attribute, list(items.values()) if listed else items)
