"""Every strategy is Flower's own, by name; what cannot work is refused when the plan is built."""

from __future__ import annotations

import pytest
from flwr.serverapp.strategy import FedAvgM

from common.errors import ConfigurationError
from common.settings import plan_for
from server.aggregation import STRATEGIES, build_strategy
from tests.tiny import TinyTask


def test_the_promised_names_are_there() -> None:
    assert set(STRATEGIES) == {
        "fedavg", "fedprox", "fedadam", "fedyogi", "fedadagrad",
        "fedavgm", "fedmedian", "fedtrimmedavg", "krum", "fedbuff",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - {"fedbuff"}))
def test_each_is_flowers_own_class(name: str) -> None:
    strategy = build_strategy(plan_for(TinyTask(), {"strategy": name, "min_holders": 3}))
    assert type(strategy).__module__.startswith("flwr.serverapp.strategy")
    assert type(strategy).__name__.lower() == name


def test_a_full_buffer_is_flowers_mean_with_a_learning_rate_and_without_momentum() -> None:
    settings = {"strategy": "fedbuff", "min_holders": 3, "server_learning_rate": 0.5}
    strategy = build_strategy(plan_for(TinyTask(), settings))
    assert type(strategy) is FedAvgM
    assert (strategy.server_learning_rate, strategy.server_momentum) == (0.5, 0.0)


def test_an_unknown_strategy_lists_those_that_exist() -> None:
    plan = plan_for(TinyTask(), {"strategy": "fedmagic"})
    with pytest.raises(ConfigurationError, match=r"'fedmagic'; there are fedavg, fedavgm"):
        build_strategy(plan)


def test_krum_says_how_many_holders_it_needs() -> None:
    plan = plan_for(TinyTask(), {"strategy": "krum", "malicious": 2, "min_holders": 6})
    with pytest.raises(ConfigurationError, match="at least 7 holders"):
        build_strategy(plan)


def test_strategies_that_look_at_single_updates_are_not_linear() -> None:
    assert {name for name, kind in STRATEGIES.items() if not kind.linear} == {
        "fedbuff",
        "fedmedian",
        "fedtrimmedavg",
        "krum",
    }
