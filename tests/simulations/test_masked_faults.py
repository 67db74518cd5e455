"""Silence and lateness in masked rounds: the same with the whole protocol and with blocks alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from flwr.app import Message

from common.errors import ConfigurationError, RunError
from common.plan import TrainingPlan
from common.tasks.parameters import initial_parameters
from common.wire import RoundRequest
from server.secure import secured
from simulations.experiment import Experiment, ExperimentResult, run_experiment
from simulations.faults import ATTACKS, EXCHANGES, Byzantine, Faults, RoundFaults, Straggle
from simulations.grid import BatchedGrid, in_process
from simulations.masked_faults import FaultyMaskedGrid
from simulations.workers import BlockTrainer, InProcess
from tests.masked import masked_plan
from tests.tiny import TinyTask

CPU = torch.device("cpu")
TASK = TinyTask()
HOLDERS, ENGINES = 7, ("batched", "opacus")
START = initial_parameters(TASK, 0)


def plan(level: str = "secure", **settings: object) -> TrainingPlan:
    return masked_plan(level, HOLDERS, **{"rounds": 8, "seed": 1, **settings})


def simulate(faults: Faults, engine: str, wanted: TrainingPlan) -> ExperimentResult:
    return run_experiment(
        Experiment(TASK, wanted, (wanted.seed,), HOLDERS, engine=engine, faults=faults)
    )


def one_round(faults: Faults, engine: str, wanted: TrainingPlan, number: int = 1) -> list[Message]:
    """Replies of a round, asked from everybody."""
    data, request = dict(TASK.holder_data(HOLDERS)), RoundRequest("run", number, wanted, START)
    if engine == "opacus":
        with in_process(TASK, wanted, data, CPU) as inner:
            grid = secured(FaultyMaskedGrid(inner, faults, 0, []), wanted)
            asked = [Message(request.records(), node, "train") for node in grid.get_node_ids()]
            return list(grid.send_and_receive(asked, timeout=600.0))
    blocks = BatchedGrid(list(data), InProcess(BlockTrainer(TASK, data, CPU)))
    grid = FaultyMaskedGrid(blocks, faults, 0, [])
    asked = [Message(request.records(), node, "train") for node in grid.get_node_ids()]
    return grid.send_and_receive(asked, timeout=600.0)


class At(Faults):
    """Holders that fall silent at exchanges that the test says."""

    def __init__(self, places: dict[str, int], late: dict[str, float] | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "places", places)
        object.__setattr__(self, "delays", late or {})

    def leaves(self, *who: object) -> int:
        return self.places.get(str(who[-1]), len(EXCHANGES))  # type: ignore[attr-defined]

    def delay(self, *who: object) -> float:
        return self.delays.get(str(who[-1]), 0.0)  # type: ignore[attr-defined]


@pytest.mark.parametrize("level", ["secure", "secure-sum"])
def test_the_same_holders_fail_in_the_same_way_with_and_without_the_protocol(level: str) -> None:
    faults = Faults(0.2, Straggle(0.15, 500.0))
    wanted = plan(level)
    blocks, whole = (simulate(faults, engine, wanted) for engine in ENGINES)
    (one,), (other,) = blocks.runs, whole.runs
    for mine, theirs in zip(one.history, other.history, strict=True):
        assert mine.accepted == theirs.accepted
        assert mine.missed.keys() == theirs.missed.keys()
        assert bool(mine.lost) == bool(theirs.lost)
    lost = [bool(each.lost) for each in one.history]
    assert True in lost, "seed and chances are such that there is one of each"
    assert False in lost
    assert blocks.faults == whole.faults
    assert len(blocks.faults) == wanted.rounds
    assert any(each.late for each in blocks.faults)
    # Two engines round apart; a part may tip to the next step.
    assert np.abs(one.parameters - other.parameters).max() < 0.01


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("place", range(len(EXCHANGES)))
def test_a_part_that_has_arrived_stays_in_the_sum(engine: str, place: int) -> None:
    wanted = plan()
    replies = one_round(At({"h1": place, "h4": place}), engine, wanted)
    (good,) = [reply for reply in replies if not reply.has_error()]
    inside = HOLDERS if EXCHANGES[place].startswith("query") and place > 2 else HOLDERS - 2
    assert good.content["metrics"]["weight"] == inside


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("place", range(len(EXCHANGES)))
def test_below_the_threshold_nothing_comes_of_the_round(engine: str, place: int) -> None:
    wanted = plan()
    assert wanted.min_holders == HOLDERS - 2
    replies = one_round(At({"h1": place, "h4": place, "h6": place}), engine, wanted)
    assert replies
    assert all(reply.has_error() for reply in replies)


@pytest.mark.parametrize("engine", ENGINES)
def test_who_is_late_is_not_in_the_sum(engine: str) -> None:
    # Two exchanges come after this one, so it ends after eight tenths of the 600 s.
    replies = one_round(At({}, {"h2": 500.0, "h3": 450.0}), engine, plan())
    (good,) = [reply for reply in replies if not reply.has_error()]
    assert good.content["metrics"]["weight"] == HOLDERS - 1


def test_what_went_wrong_is_counted_once() -> None:
    data, happened = dict(TASK.holder_data(HOLDERS)), list[RoundFaults]()
    blocks = BatchedGrid(list(data), InProcess(BlockTrainer(TASK, data, CPU)))
    # h3 is late, and so it is out before it could fall silent.
    faults = At({"h1": 0, "h2": 4, "h3": 4}, {"h3": 700.0, "h5": 60.0, "h1": 90.0})
    grid = FaultyMaskedGrid(blocks, faults, 0, happened)
    request = RoundRequest("run", 1, plan(), START)
    asked = [Message(request.records(), node, "train") for node in grid.get_node_ids()]
    grid.send_and_receive(asked, timeout=600.0)
    assert happened == [RoundFaults(dropped=2, late=1, attacked=0, waited=60.0)]


def test_silence_falls_at_each_exchange_with_the_same_chance() -> None:
    faults = Faults(0.5)
    found = Counter(faults.leaves(0, number, "h0") for number in range(4000))
    assert set(found) == set(range(len(EXCHANGES) + 1))
    # Binomial: a deviation of √(4000·0.1·0.9) = 19 and √(4000/4) = 32; 4.5 of them on either side.
    assert found.pop(len(EXCHANGES)) == pytest.approx(2000, abs=145)
    assert all(count == pytest.approx(400, abs=86) for count in found.values())


def test_who_is_silent_is_who_would_be_without_masks() -> None:
    faults = Faults(0.3)
    for number in range(200):
        silent = faults.leaves(7, number, "h0") < len(EXCHANGES)
        assert silent == faults.silent(7, number, "h0")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_evaluation_reaches_everybody(engine: str) -> None:
    result = simulate(Faults(0.2), engine, plan(rounds=3, evaluate="every 1"))
    assert all(len(each.metrics) == HOLDERS for each in result.runs[0].history)


# -- lies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [name for name, kind in ATTACKS.items() if not kind.poison])
def test_what_nobody_sees_cannot_be_forged(attack: str) -> None:
    with pytest.raises(ConfigurationError, match=r"they are masked.*label-flip"):
        simulate(Faults(byzantine=Byzantine(0.2, attack)), "batched", plan())


def test_poisoned_rows_are_learned_from_whoever_sees_what() -> None:
    lying = Faults(byzantine=Byzantine(0.45, "label-flip"))
    results = [simulate(lying, engine, plan(no_dp=True)) for engine in ENGINES]
    honest = simulate(Faults(), "batched", plan(no_dp=True))
    one, other = (result.runs[0].parameters for result in results)
    assert np.abs(one - other).max() < 1e-3
    assert np.abs(one - honest.runs[0].parameters).max() > 0.1
    assert [each.attacked for each in results[0].faults] == [3] * 8
    assert results[0].faults == results[1].faults


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_of_which_nothing_comes_ends_with_a_sentence(engine: str) -> None:
    with pytest.raises(RunError, match="3 rounds in a row gave nothing"):
        simulate(Faults(0.9), engine, plan())
