"""Faults are the same for every engine, hit whom they should, and leave all others alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Error, Message, MessageType

from common.data.schema import Column, Schema
from common.errors import ConfigurationError, RunError, WireError
from common.flower import BaseGrid
from common.plan import TrainingPlan
from common.settings import plan_for
from common.tasks import load
from common.tasks.base import HolderData, HolderTables, Task
from common.tasks.parameters import initial_parameters
from common.wire import FAILED, RoundRequest, TrainReply, Vector
from server.aggregation import STRATEGIES
from server.runs import RunResult
from simulations.experiment import Experiment, ExperimentResult, run_experiment
from simulations.faults import ATTACKS, Byzantine, Faults, FaultyGrid, RoundFaults, Straggle
from simulations.grid import BatchedGrid, InProcessGrid, in_process, simulated_holder
from simulations.results import document
from simulations.workers import BlockTrainer, InProcess
from tests.commands import sotto
from tests.fakes import Answer, FakeGrid, pulls_towards
from tests.tiny import SCHEMA, TinyTask, table

ENGINES = ("batched", "opacus")
CPU = torch.device("cpu")
D = 4
EVERYTHING = Faults(0.2, Straggle(0.5, 300.0), Byzantine(0.3, "scale", -2.0))


def plan(**settings: object) -> TrainingPlan:
    return plan_for(TinyTask(), {"no_dp": True, "rounds": 6, "strategy": "fedavg", **settings})


def simulate(
    faults: Faults | None,
    engine: str = "batched",
    holders: int = 10,
    seeds: Sequence[int] = (0,),
    baselines: bool = False,
    **settings: object,
) -> ExperimentResult:
    return run_experiment(
        Experiment(
            TinyTask(),
            plan(**settings),
            seeds,
            holders,
            CPU,
            engine,
            baselines=baselines,
            faults=faults,
        )
    )


def same(one: RunResult, other: RunResult) -> bool:
    """Whether two runs agree in every bit of the model, in every figure and in who took part."""
    history = [
        [(each.accepted, each.missed, each.metrics) for each in run.history] for run in (one, other)
    ]
    return bool(np.array_equal(one.parameters, other.parameters)) and history[0] == history[1]


def missed(result: ExperimentResult) -> list[frozenset[str]]:
    return [frozenset(summary.missed) for summary in result.runs[0].history]


# -- asking a Grid of functions -------------------------------------------------------------------


class Recording(FakeGrid):
    """Also remembers in how many calls it was asked, and by which of the two ways."""

    def __init__(self, count: int = 10, holders: dict[str, Answer] | None = None) -> None:
        super().__init__(holders or {f"h{i}": pulls_towards(i + 1.0) for i in range(count)})
        self.summed: list[list[str]] = []
        self.alone: list[list[str]] = []

    def send_and_receive(self, messages, *, timeout=None):  # type: ignore[no-untyped-def]
        asked = list(messages)
        self.summed.append(self._names(asked))
        return super().send_and_receive(asked, timeout=timeout)

    def individually(self, messages, *, timeout=None):  # type: ignore[no-untyped-def]
        asked = list(messages)
        self.alone.append(self._names(asked))
        return super().send_and_receive(asked, timeout=timeout)

    def _names(self, messages: Sequence[Message]) -> list[str]:
        return [self.holder_name(message.metadata.dst_node_id) for message in messages]


def faulty(grid: BaseGrid, faults: Faults, seed: int = 0) -> tuple[FaultyGrid, list[RoundFaults]]:
    happened: list[RoundFaults] = []
    return FaultyGrid(grid, faults, seed, happened), happened


def ask(
    grid: BaseGrid,
    number: int = 1,
    kind: str = MessageType.TRAIN,
    timeout: float | None = 600.0,
    chosen: TrainingPlan | None = None,
) -> dict[str, Message]:
    """The replies of everybody who is asked, by name."""
    request = RoundRequest("run", number, chosen or plan(rounds=5000), np.zeros(D, np.float32))
    content = request.records()
    messages = [Message(content, node, kind) for node in grid.get_node_ids()]
    replies = grid.send_and_receive(messages, timeout=timeout)
    return {grid.holder_name(reply.metadata.src_node_id): reply for reply in replies}


def update(reply: Message) -> np.ndarray:
    return np.frombuffer(next(iter(reply.content["arrays"].values())).data[-4 * D :], np.float32)


def updates(grid: BaseGrid, number: int = 1) -> dict[str, np.ndarray]:
    return {name: update(reply) for name, reply in ask(grid, number).items()}


# -- nothing to do --------------------------------------------------------------------------------

NOTHING = Faults(0.0, Straggle(0.0, 1.0), Byzantine(0.0, "nan"))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("strategy", ["fedavg", "fedmedian"])
def test_faults_of_probability_zero_change_no_bit(engine: str, strategy: str) -> None:
    undisturbed = simulate(None, engine, strategy=strategy, no_dp=False, epsilon=3.0)
    result = simulate(NOTHING, engine, strategy=strategy, no_dp=False, epsilon=3.0)
    assert same(result.runs[0], undisturbed.runs[0])
    assert result.faults == [RoundFaults(0, 0, 0, 0.0)] * 6
    assert undisturbed.faults == []


@pytest.mark.parametrize("attack", ["zero", "label-flip"])
def test_baselines_are_without_faults(attack: str) -> None:
    disturbed = simulate(Faults(0.2, byzantine=Byzantine(1.0, attack)), holders=3, baselines=True)
    assert disturbed.baselines == simulate(None, holders=3, baselines=True).baselines


# -- every engine ---------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fedavg", "fedmedian"])
@pytest.mark.parametrize("privacy", [{}, {"no_dp": False, "epsilon": 5.0}])
def test_every_engine_has_the_same_faults_and_the_same_results(
    strategy: str, privacy: dict[str, object]
) -> None:
    batched, opacus = (
        simulate(EVERYTHING, engine, strategy=strategy, **privacy) for engine in ENGINES
    )
    assert missed(batched) == missed(opacus)
    assert batched.faults == opacus.faults
    assert sum(each.dropped for each in batched.faults) > 0
    assert sum(each.late for each in batched.faults) > 0
    assert sum(each.attacked for each in batched.faults) > 0
    assert np.allclose(batched.runs[0].parameters, opacus.runs[0].parameters, atol=1e-5)
    # Negative control: the tolerance is far below what the faults themselves do.
    assert not np.allclose(
        batched.runs[0].parameters,
        simulate(None, strategy=strategy, **privacy).runs[0].parameters,
        atol=1e-2,
    )


def test_a_seed_has_the_same_faults_every_time_and_another_seed_others() -> None:
    first, again = simulate(EVERYTHING, seeds=(4,)), simulate(EVERYTHING, seeds=(4,))
    assert same(first.runs[0], again.runs[0])
    assert missed(first) != missed(simulate(EVERYTHING, seeds=(5,)))


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_still_reaches_everybody(engine: str) -> None:
    result = simulate(Faults(0.4, Straggle(0.3, 1e4), Byzantine(0.3, "nan")), engine)
    everyone = {f"h{i}" for i in range(10)}
    assert any(len(summary.missed) > 5 for summary in result.runs[0].history)
    for summary in result.runs[0].history:
        assert set(summary.metrics) == everyone
        assert set(summary.accepted) | set(summary.missed) == everyone


def test_a_sum_still_says_whom_it_speaks_for_when_a_round_is_asked_in_parts() -> None:
    data = TinyTask().holder_data(6)
    grid = BatchedGrid(list(data), InProcess(BlockTrainer(TinyTask(), data, CPU)))
    request = RoundRequest("run", 1, plan(), np.zeros(D, np.float32))

    def half(nodes: Sequence[int]) -> list[Message]:
        return grid.send_and_receive(
            [Message(request.records(), node, MessageType.TRAIN) for node in nodes]
        )

    (first,), (second,) = half([2, 3, 4]), half([5, 6])
    grid.individually([Message(request.records(), 7, MessageType.TRAIN)])
    assert [list(grid.answered_by(reply)) for reply in (first, second)] == [[2, 3, 4], [5, 6]]
    grid.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sum_in_parts_is_the_mean_of_all_that_count(engine: str) -> None:
    """One holder sends zero, the others their sum: FedAvg gives (n - 1)/n of their mean."""
    result = simulate(Faults(byzantine=Byzantine(0.1, "zero")), engine, rounds=1)
    (liar,) = Byzantine(0.1, "zero").malicious([f"h{i}" for i in range(10)], seed=0)
    start = initial_parameters(TinyTask(), seed=0)
    request = RoundRequest("run", 1, plan(rounds=1), start)
    with in_process(TinyTask(), request.plan, TinyTask().holder_data(10), CPU) as grid:
        messages = [Message(request.records(), node, "train") for node in grid.get_node_ids()]
        honest = [
            update(reply)
            for reply in grid.send_and_receive(messages)
            if grid.holder_name(reply.metadata.src_node_id) != liar
        ]
    expected = start + np.sum(honest, axis=0) / 10
    assert np.allclose(result.runs[0].parameters, expected, atol=1e-6)
    assert len(result.runs[0].final.accepted) == 10


# -- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.0, 0.05, 0.5, 1.0])
def test_dropouts_are_as_frequent_as_they_should_be(probability: float) -> None:
    grid, happened = faulty(Recording(50), Faults(probability))
    answered = [set(ask(grid, number)) for number in range(1, 101)]
    tries = 50 * 100
    tolerance = 4 * math.sqrt(tries * probability * (1 - probability))
    assert abs(sum(each.dropped for each in happened) - tries * probability) <= tolerance
    for name in (f"h{i}" for i in range(50)):  # each holder by itself, 4.5 deviations
        silent = sum(name not in names for names in answered)
        assert abs(silent - 100 * probability) <= 4.5 * math.sqrt(
            100 * probability * (1 - probability)
        )


def test_dropouts_of_two_holders_and_of_two_rounds_are_independent() -> None:
    grid, _ = faulty(Recording(2), Faults(0.5))
    silent = np.array(
        [[name not in answered for name in ("h0", "h1")] for answered in
         (ask(grid, number) for number in range(1, 1001))]
    )  # fmt: skip
    for one, other in ((silent[:, 0], silent[:, 1]), (silent[1:, 0], silent[:-1, 0])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / math.sqrt(1000)


def test_who_drops_out_depends_on_nobody_else() -> None:
    many, few = faulty(Recording(40), Faults(0.5))[0], faulty(Recording(20), Faults(0.5))[0]
    for number in range(1, 6):
        among_many = {name for name in ask(many, number) if int(name[1:]) < 20}
        assert among_many == set(ask(few, number))


def test_a_restart_changes_nobodys_fate() -> None:
    undisturbed, restarted = (faulty(Recording(), EVERYTHING)[0] for _ in range(2))
    for number in range(1, 5):
        ask(undisturbed, number)
    before, after = (updates(grid, number=5) for grid in (undisturbed, restarted))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_silent_holder_is_reported_as_one_that_did_not_reply_in_time() -> None:
    result = simulate(Faults(0.3))
    told = {why for summary in result.runs[0].history for why in summary.missed.values()}
    assert told == {"no reply within 600 s"}
    assert sum(map(len, missed(result))) == sum(each.dropped for each in result.faults) > 0
    assert result.seconds < 60


def test_a_round_in_which_too_few_answer_ends_the_run() -> None:
    with pytest.raises(RunError, match=r"round 1: 0 of at least 1 .*no reply within 600 s"):
        simulate(Faults(1.0))


def test_a_silent_holder_spends_nothing_and_a_late_one_does() -> None:
    chosen = plan(no_dp=False, epsilon=2.0, rounds=1)
    data = TinyTask().holder_data(10)
    holders = {name: simulated_holder(name, TinyTask(), data[name], chosen, CPU) for name in data}
    grid, happened = faulty(InProcessGrid(holders), Faults(0.4, Straggle(0.6, 1e6)))
    answered = set(ask(grid, chosen=chosen))
    spent = {name for name, holder in holders.items() if holder.state.ledger.data_sets()}
    assert len(answered) == 10 - happened[0].dropped - happened[0].late
    assert len(spent) == 10 - happened[0].dropped
    assert answered < spent
    for holder in holders.values():
        holder.state.close()


# -- straggling -----------------------------------------------------------------------------------


def test_late_answers_are_as_frequent_as_the_exponential_tail() -> None:
    grid, happened = faulty(Recording(100), Faults(straggle=Straggle(0.5, 100.0)))
    for number in range(1, 21):
        ask(grid, number, timeout=150.0)
    chance = 0.5 * math.exp(-1.5)
    expected, deviation = 2000 * chance, math.sqrt(2000 * chance * (1 - chance))
    assert abs(sum(each.late for each in happened) - expected) < 4 * deviation
    assert all(0 < each.waited <= 150.0 for each in happened)


def test_extra_times_have_their_mean_and_their_share() -> None:
    delays = np.array([Straggle(0.25, 20.0).delay(0, 1, f"h{i}") for i in range(20_000)])
    some = delays[delays > 0]
    assert abs(len(some) - 5000) < 4 * math.sqrt(20_000 * 0.25 * 0.75)
    assert abs(some.mean() - 20.0) < 4 * 20.0 / math.sqrt(5000)
    assert abs(np.median(some) - 20.0 * math.log(2)) < 1.5


def test_a_late_holder_works_apart_from_the_sum_and_its_answer_is_lost() -> None:
    inner = Recording()
    grid, (*_,) = faulty(inner, Faults(straggle=Straggle(0.5, 1e9)))
    answered = set(ask(grid))
    (alone,), (summed,) = inner.alone, inner.summed
    assert answered == set(summed)
    assert set(alone) == {f"h{i}" for i in range(10)} - answered
    assert alone


def test_a_round_waits_for_the_last_answer_that_counts() -> None:
    straggle = Straggle(1.0, 100.0)
    grid, happened = faulty(Recording(), Faults(straggle=straggle))
    in_time = ask(grid, number=3, timeout=120.0)
    delays = {f"h{i}": straggle.delay(0, 3, f"h{i}") for i in range(10)}
    assert set(in_time) == {name for name, delay in delays.items() if delay <= 120.0}
    assert happened[0].waited == max(delays[name] for name in in_time)
    assert 0 < len(in_time) < 10


def test_without_a_deadline_nobody_is_late() -> None:
    grid, happened = faulty(Recording(), Faults(straggle=Straggle(1.0, 1e9)))
    assert len(ask(grid, timeout=None)) == 10
    assert happened[0].late == 0


# -- attacks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "holders", "liars"), [(0.0, 10, 0), (0.25, 10, 3), (0.24, 10, 2), (1.0, 7, 7)]
)
def test_so_many_lie_as_the_share_says(share: float, holders: int, liars: int) -> None:
    names = [f"h{i}" for i in range(holders)]
    attack = Byzantine(share, "zero")
    chosen = attack.malicious(names, seed=3)
    assert len(chosen) == liars
    assert attack.malicious(reversed(names), seed=3) == chosen <= set(names)


def test_another_seed_has_other_liars() -> None:
    names = [f"h{i}" for i in range(50)]
    attack = Byzantine(0.2, "zero")
    assert len({attack.malicious(names, seed) for seed in range(20)}) == 20


def test_the_same_holders_lie_in_every_round_and_the_others_never() -> None:
    names = [f"h{i}" for i in range(10)]
    liars = Byzantine(0.3, "zero").malicious(names, seed=0)
    grid, happened = faulty(Recording(), Faults(byzantine=Byzantine(0.3, "zero")))
    honest = updates(Recording())
    for number in range(1, 6):
        sent = updates(grid, number)
        assert {name for name in names if not sent[name].any()} == liars
        assert all(np.array_equal(sent[name], honest[name]) for name in set(names) - liars)
    assert [each.attacked for each in happened] == [3] * 5


def test_malicious_holders_are_asked_apart_in_one_call_and_honest_ones_in_another() -> None:
    inner = Recording()
    grid, _ = faulty(inner, Faults(straggle=Straggle(0.3, 1e9), byzantine=Byzantine(0.3, "zero")))
    ask(grid)
    assert (len(inner.alone), len(inner.summed)) == (1, 1)
    asked = sorted(inner.alone[0] + inner.summed[0])
    assert asked == sorted(f"h{i}" for i in range(10))
    assert Byzantine(0.3, "zero").malicious(asked, seed=0) <= set(inner.alone[0])


def forged(attack: str, count: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Honest and forged updates, [M, D], where all of M holders lie."""
    grid, _ = faulty(Recording(count), Faults(byzantine=Byzantine.parsed(f"1:{attack}")))
    honest, sent = updates(Recording(count)), updates(grid)
    return np.stack(list(honest.values())), np.stack([sent[name] for name in honest])


@pytest.mark.parametrize(
    ("attack", "factor"),
    [("sign-flip", -1), ("scale", 10), ("scale:3", 3), ("scale:-0.5", -0.5), ("zero", 0)],
)
def test_attacks_that_multiply(attack: str, factor: float) -> None:
    honest, sent = forged(attack)
    assert np.allclose(sent, factor * honest)


def test_nan_holds_no_number() -> None:
    assert np.isnan(forged("nan")[1]).all()


def test_little_is_a_little_less_than_the_mean() -> None:
    for attack, z in (("little", 1.5), ("little:0.3", 0.3)):
        honest, sent = forged(attack)
        assert np.allclose(sent, honest.mean(0) - z * honest.std(0))
    honest, sent = forged("little", count=1)
    assert np.allclose(sent, honest)  # one alone has no deviation


def test_noise_is_as_long_as_the_update_and_of_its_own_for_each_holder_and_round() -> None:
    names = [f"h{i}" for i in range(400)]
    grid, _ = faulty(Recording(400), Faults(byzantine=Byzantine.parsed("1:noise:2")))
    honest, sent, later = updates(Recording(400)), updates(grid, 1), updates(grid, 2)
    ratios = np.stack([sent[n] / (np.linalg.norm(honest[n]) / math.sqrt(D)) for n in names])
    assert abs(ratios.std() - 2.0) < 4 * 2.0 / math.sqrt(2 * ratios.size)
    assert abs(ratios.mean()) < 4 * 2.0 / math.sqrt(ratios.size)
    assert len({ratio.tobytes() for ratio in ratios}) == 400
    assert not np.array_equal(sent["h0"], later["h0"])
    again, _ = faulty(Recording(3), Faults(byzantine=Byzantine.parsed("1:noise:2")))
    assert np.array_equal(updates(again, 1)["h0"], sent["h0"])  # whoever else lies


def test_the_longest_lie_points_backwards_and_is_a_hair_shorter_than_the_bound() -> None:
    honest, sent = forged("longest")
    bound = plan().largest_update_norm(D)
    lengths = np.linalg.norm(honest, axis=1, keepdims=True)
    assert np.allclose(sent, -0.999 * bound * honest / lengths, rtol=1e-5)
    for vector in sent:
        assert TrainReply.of(TrainReply(vector, 1.0).records(), plan(), D)
        with pytest.raises(WireError, match="above"):  # the bound is no longer than that
            TrainReply.of(TrainReply(vector * np.float32(1.002), 1.0).records(), plan(), D)


def test_whoever_has_nothing_to_stretch_sends_nothing() -> None:
    still = Byzantine(1.0, "longest").forged(np.zeros((2, D), np.float32), (), 10.0)
    assert not still.any()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("unit", ["no privacy", "record", "holder"])
def test_the_longest_lie_always_counts(engine: str, unit: str) -> None:
    private = {} if unit == "no privacy" else {"no_dp": None, "epsilon": 5.0, "unit": unit}
    lying = Faults(byzantine=Byzantine(0.2, "longest"))
    attacked = simulate(lying, engine, rounds=1, **private)
    assert len(attacked.runs[0].final.accepted) == 10
    assert attacked.faults[0].attacked == 2


def test_the_bound_is_loose_for_records_and_tight_for_holders() -> None:
    """Two of ten liars go as far as they may; how far that is says what the bound is worth."""
    lying = Faults(byzantine=Byzantine(0.2, "longest"))
    start = initial_parameters(TinyTask(), seed=0)

    def moved(faults: Faults | None, **settings: object) -> float:
        parameters = simulate(faults, rounds=1, **settings).runs[0].parameters
        return float(np.linalg.norm(parameters - start))

    records = {"no_dp": None, "epsilon": 50.0}
    assert moved(lying, **records) > 5 * moved(None, **records)
    # Where holders are the unit nobody's update is longer than C, honest or not.
    holders = plan(no_dp=None, epsilon=5.0, unit="holder", clip_norm=0.3)
    assert holders.largest_update_norm(D) == pytest.approx(0.3, rel=1e-3)


def test_the_weight_stays_the_holders_own() -> None:
    grid, _ = faulty(Recording(3), Faults(byzantine=Byzantine(1.0, "zero")))
    for reply in ask(grid).values():
        assert TrainReply.of(reply.content, plan(), D).weight == 1.0


def test_a_holder_that_has_nothing_honest_to_send_sends_what_it_has() -> None:
    holders: dict[str, Answer] = {
        "fails": lambda _: Error(FAILED, "OSError"),
        "breaks": lambda _: TrainReply(np.full(D, np.inf, np.float32), 1.0).records(),
        "works": pulls_towards(1.0),
    }
    grid, happened = faulty(Recording(holders=holders), Faults(byzantine=Byzantine(1.0, "zero")))
    replies = ask(grid)
    assert replies["fails"].has_error()
    assert np.isinf(update(replies["breaks"])).all()
    assert not update(replies["works"]).any()
    assert happened[0].attacked == 1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {"fedbuff"}))
def test_nan_costs_the_holder_its_round_and_not_the_run(engine: str, strategy: str) -> None:
    chosen = {"strategy": strategy, "min_holders": 3, "rounds": 2}
    result = simulate(Faults(byzantine=Byzantine(0.2, "nan")), engine, **chosen)
    liars = Byzantine(0.2, "nan").malicious([f"h{i}" for i in range(10)], seed=0)
    for summary in result.runs[0].history:
        assert set(summary.missed) == liars
        assert all("holds NaN or infinite" in why for why in summary.missed.values())
    assert np.isfinite(result.runs[0].parameters).all()


def test_an_update_that_overflows_is_rejected_like_nan() -> None:
    result = simulate(Faults(byzantine=Byzantine(0.2, "scale", 1e300)))
    for summary in result.runs[0].history:
        assert len(summary.missed) == 2
        assert all("NaN or infinite" in why for why in summary.missed.values())


ROBUST = (
    {"strategy": "fedmedian"},
    {"strategy": "fedtrimmedavg", "trim": 0.3},
    {"strategy": "krum", "malicious": 3, "min_holders": 9},
)


@cache
def trained(attack: str | None, **settings: object) -> Vector:
    faults = None if attack is None else Faults(byzantine=Byzantine.parsed(f"0.3:{attack}"))
    settings = {"rounds": 20, "learning_rate": 0.2, "evaluate": "never", **settings}
    return simulate(faults, **settings).runs[0].parameters


def shift(attack: str, **settings: object) -> float:
    """How far an attack of three in ten moves the model, relative to the way it goes without."""
    undisturbed, attacked = trained(None, **settings), trained(attack, **settings)
    way = undisturbed - initial_parameters(TinyTask(), seed=0)
    return float(np.linalg.norm(attacked - undisturbed) / np.linalg.norm(way))


@pytest.mark.parametrize("attack", ["sign-flip", "scale", "scale:-10"])
def test_robust_strategies_withstand_what_the_mean_does_not(attack: str) -> None:
    assert shift(attack) > 0.45
    for settings in ROBUST:
        assert shift(attack, **settings) < 0.3, settings


def test_a_robust_strategy_keeps_the_accuracy_that_the_mean_loses() -> None:
    def accuracy(strategy: str) -> float:
        faults = Faults(byzantine=Byzantine(0.3, "scale", -10.0))
        (final,) = simulate(faults, strategy=strategy, rounds=20).finals
        return float(np.mean([figures["accuracy"] for figures in final.values()]))

    assert accuracy("fedmedian") > 0.8
    assert accuracy("fedavg") < 0.4


# -- poisoned rows --------------------------------------------------------------------------------


def accuracies(result: ExperimentResult) -> list[float]:
    return [figures["accuracy"] for figures in result.finals[0].values()]


def test_flipped_rows_have_the_other_label_and_are_otherwise_as_they_were() -> None:
    own = HolderTables(table(30, seed=1), table(10, seed=2))
    found = Byzantine(0.5, "label-flip").poisoned(own, SCHEMA)
    assert (found.train["y"] == 1 - own.train["y"]).all()
    assert found.train["y"].dtype == own.train["y"].dtype
    assert found.train.drop(columns="y").equals(own.train.drop(columns="y"))
    assert found.test.equals(own.test)
    assert Byzantine(0.5, "sign-flip").poisoned(own, SCHEMA) is own


@pytest.mark.parametrize(
    ("name", "source"), [("medical-diagnosis", "breast-cancer"), ("credit-risk", "synthetic")]
)
def test_the_labels_of_every_binary_task_are_flipped_and_flipped_back(
    name: str, source: str
) -> None:
    task, flip = load(name, source), Byzantine(0.5, "label-flip")
    flip.check(task)
    rows = next(iter(task.source.tables().values()))
    own = HolderTables(rows, rows)
    once = flip.poisoned(own, task.schema)
    true, lie = (task.examples(each.train)["label"] for each in (own, once))
    assert torch.equal(lie, 1 - true)
    assert flip.poisoned(once, task.schema).train.equals(rows)


@pytest.mark.parametrize(
    ("strategy", "privacy"), [("fedavg", {"no_dp": None, "epsilon": 5.0}), ("fedmedian", {})]
)
def test_every_engine_trains_on_the_same_poisoned_rows(
    strategy: str, privacy: dict[str, object]
) -> None:
    flip = Faults(byzantine=Byzantine(0.3, "label-flip"))
    batched, opacus = (simulate(flip, each, strategy=strategy, **privacy) for each in ENGINES)
    assert np.allclose(batched.runs[0].parameters, opacus.runs[0].parameters, atol=1e-5)
    assert [each.attacked for each in batched.faults] == [3] * 6
    # Negative control: the tolerance is far below what the flipped labels do.
    honest = simulate(None, strategy=strategy, **privacy).runs[0].parameters
    assert not np.allclose(batched.runs[0].parameters, honest, atol=1e-2)


def test_models_of_flipped_labels_are_judged_by_true_ones() -> None:
    settings = {"rounds": 20, "learning_rate": 0.5}
    everyone = Faults(byzantine=Byzantine(1.0, "label-flip"))
    assert np.mean(accuracies(simulate(None, **settings))) > 0.8
    assert np.mean(accuracies(simulate(everyone, **settings))) < 0.2


@pytest.mark.parametrize("cohort", [None, 3])
def test_the_rows_of_honest_holders_stay_true(cohort: int | None) -> None:
    """With one local round from the same start, an update depends on its holder's rows alone."""
    trained_on: dict[str, list[torch.Tensor]] = {}

    class Watching(TinyTask):
        def prepare(self, tables: HolderTables) -> HolderData:
            data = super().prepare(tables)
            key = tables.train["x0"].to_numpy().tobytes()
            trained_on.setdefault(names[key], []).append(data.train["y"])
            return data

    rows = TinyTask().source.tables(10)
    names = {
        TinyTask().split(own, holder="", seed=0).train["x0"].to_numpy().tobytes(): name
        for name, own in rows.items()
    }
    flip = Byzantine(0.3, "label-flip")
    settings = plan(cohort=cohort, rounds=8)
    run_experiment(Experiment(Watching(), settings, (0,), 10, CPU, faults=Faults(byzantine=flip)))
    liars = flip.malicious(rows, seed=0)
    assert trained_on.keys() >= liars
    for name, times in trained_on.items():
        true = torch.tensor(rows[name]["y"].to_numpy(np.float32)[:40])
        expected = 1 - true if name in liars else true
        assert all(torch.equal(labels, expected) for labels in times), name


@cache
def three_labels() -> TinyTask:
    task = TinyTask()
    task.schema = Schema((*SCHEMA.columns[:-1], Column("y", "label", categories=(0, 1, 2))))
    return task


@pytest.mark.parametrize(
    ("task", "found"),
    [
        (load("recommendation"), "'recommendation' has no label"),
        (three_labels(), "'tiny' has one of 3 values"),
    ],
)
def test_a_task_without_a_binary_label_is_refused_before_anything_is_trained(
    task: Task, found: str
) -> None:
    flip = Faults(byzantine=Byzantine(0.3, "label-flip"))
    with pytest.raises(ConfigurationError, match="needs a task whose label has two") as raised:
        Experiment(task, plan(), faults=flip)
    assert found in str(raised.value)
    assert "attacks that work on every task are sign-flip, scale, noise" in str(raised.value)
    Experiment(task, plan(), faults=Faults(byzantine=Byzantine(0.3, "sign-flip")))


def test_where_updates_are_masked_rows_can_be_poisoned_and_updates_not_forged() -> None:
    settings = {"no_dp": True, "rounds": 6, "strategy": "fedavg", "cohort": 10}
    masked = plan_for(TinyTask(), {**settings, "aggregation": "secure"}, holders=10)
    open_plan = plan_for(TinyTask(), {**settings, "min_holders": masked.min_holders}, holders=10)

    def experiment(chosen: TrainingPlan, attack: str) -> Experiment:
        lying = Faults(byzantine=Byzantine(0.3, attack))
        return Experiment(TinyTask(), chosen, (0,), 10, CPU, faults=lying)

    with pytest.raises(ConfigurationError, match=r"'sign-flip' forges .* they are masked"):
        experiment(masked, "sign-flip")
    unseen, seen = (
        run_experiment(experiment(chosen, "label-flip")) for chosen in (masked, open_plan)
    )
    assert np.allclose(unseen.runs[0].parameters, seen.runs[0].parameters, atol=1e-3)
    assert [each.attacked for each in unseen.faults] == [3] * 6


def test_the_command_refuses_it_with_a_sentence(tmp_path: Path) -> None:
    said = sotto(
        "simulate", "recommendation", "--byzantine", "0.2:label-flip", "--out", tmp_path / "run"
    )
    assert said.code == 2
    assert "'recommendation' has no label" in said.err
    assert not (tmp_path / "run").exists()


# -- a Grid around a Grid -------------------------------------------------------------------------


def test_everything_but_training_is_as_the_other_grid_has_it() -> None:
    class Aware(Recording):
        def away(self) -> list[str]:
            return ["gone"]

        def answered_by(self, reply: Message) -> Sequence[int]:
            return [7, 8]

    inner = Aware()
    grid, happened = faulty(inner, Faults(1.0, byzantine=Byzantine(1.0, "nan")))
    assert grid.get_node_ids() == inner.get_node_ids()
    assert grid.holder_name(3) == "h1"
    assert grid.away() == ["gone"]
    assert grid.run is inner.run
    answered = ask(grid, kind=MessageType.EVALUATE)
    assert len(answered) == 10
    assert grid.answered_by(answered["h0"]) == [7, 8]
    assert not any(np.isnan(update(reply)).any() for reply in answered.values())
    assert happened == []


def test_asked_individually_the_honest_are_too() -> None:
    inner = Recording()
    grid, _ = faulty(inner, Faults(0.2, byzantine=Byzantine(0.2, "zero")))
    request = RoundRequest("run", 1, plan(), np.zeros(D, np.float32))
    messages = [Message(request.records(), node, "train") for node in grid.get_node_ids()]
    assert len(grid.individually(messages)) == sum(map(len, inner.alone))
    assert inner.summed == []


# -- settings -------------------------------------------------------------------------------------


def test_flags_are_read() -> None:
    assert Faults.parsed(None, None, None) is None
    assert Faults.parsed(0.0, None, None) == Faults()
    assert Faults.parsed(0.1, "0.2:30", "0.3:little") == Faults(
        0.1, Straggle(0.2, 30.0), Byzantine(0.3, "little", 1.5)
    )
    assert Byzantine.parsed("0.3:sign-flip").strength is None
    assert Byzantine.parsed("0.3:scale:-4") == Byzantine(0.3, "scale", -4.0)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((1.5, None, None), "dropout: the probability must be from 0 to 1, got 1.5"),
        ((math.nan, None, None), "dropout: the probability must be from 0 to 1, got nan"),
        ((None, "0.2", None), "straggle must be P:SECONDS, as in 0.2:30, got '0.2'"),
        ((None, "-1:3", None), "straggle: the probability must be from 0 to 1, got -1"),
        ((None, "0.5:0", None), "straggle: SECONDS must be a positive number, got 0"),
        ((None, "0.5:inf", None), "straggle: SECONDS must be a positive number, got inf"),
        ((None, "0.5:soon", None), "straggle: SECONDS must be a number, got 'soon'"),
        ((None, None, "0.2"), "as in 0.2:sign-flip, got '0.2'; attacks are sign-flip, scale, "),
        ((None, None, "2:nan"), "byzantine: the share must be from 0 to 1, got 2"),
        ((None, None, "half:nan"), "byzantine: P must be a number, got 'half'"),
        ((None, None, "0.2:sing-flip"), "no attack 'sing-flip'. Did you mean 'sign-flip'? There"),
        ((None, None, "0.2:mean"), "There are: sign-flip, scale, noise, nan, zero, little"),
        ((None, None, "0.2:nan:3"), "'nan' takes no number, got 3; those that do are scale, noise"),
        ((None, None, "0.2:scale:lots"), "byzantine: scale must be a number, got 'lots'"),
        ((None, None, "0.2:scale:inf"), "the number of an attack must be finite, got inf"),
    ],
)
def test_a_wrong_flag_is_answered_with_what_it_may_be(
    flags: tuple[float | None, str | None, str | None], says: str
) -> None:
    with pytest.raises(ConfigurationError) as error:
        Faults.parsed(*flags)
    assert says in str(error.value)


# -- the command ----------------------------------------------------------------------------------

TASK = "medical-diagnosis"


def command(tmp_path: Path, *flags: object) -> dict[str, object]:
    target = tmp_path / "result.json"
    said = sotto(
        "simulate", TASK, "--rounds", 6, "--no-dp", "--quiet", "--out", tmp_path / "run",
        "--json", target, *flags,
    )  # fmt: skip
    assert said.code == 0, said.err
    return {"said": " ".join(said.out.split()), **json.loads(target.read_text())}


def test_the_command_says_what_went_wrong(tmp_path: Path) -> None:
    told = command(
        tmp_path, "--dropout", 0.2, "--straggle", "0.4:400", "--byzantine", "0.25:scale:2",
        "--seeds", 2,
    )  # fmt: skip
    faults = told["faults"]
    assert isinstance(faults, dict)
    assert {key: faults[key] for key in ("dropout", "straggle", "byzantine")} == {
        "dropout": 0.2,
        "straggle": {"probability": 0.4, "mean_seconds": 400.0},
        "byzantine": {"share": 0.25, "attack": "scale", "strength": 2.0},
    }
    assert set(faults) == {
        "dropout", "straggle", "byzantine", "pace", "dropped", "late", "attacked", "spare",
        "waited_median",
    }  # fmt: skip
    assert f"Faults: {faults['dropped']} answers never came, {faults['late']} came" in told["said"]
    assert f"{faults['attacked']} of those that came in time were forged" in told["said"]
    assert 0 < faults["dropped"] < 2 * 6 * 4


def test_a_document_without_faults_has_none() -> None:
    assert "faults" not in document(simulate(None, holders=3, rounds=1))
    written = document(simulate(Faults(), holders=3, rounds=1))["faults"]
    assert (written["straggle"], written["byzantine"]) == (None, None)
    assert (written["dropout"], written["dropped"], written["waited_median"]) == (0.0, 0, 0.0)


@pytest.mark.parametrize(
    ("flags", "quorum"),
    [
        ((), 8),
        (("--dropout", 0.0), 1),
        (("--dropout", 0.0, "--strategy", "krum", "--malicious", 1), 5),
        (("--dropout", 0.0, "--min-holders", 3), 3),
    ],
)
def test_with_faults_the_quorum_is_as_small_as_the_strategy_allows(
    flags: tuple[object, ...], quorum: int, tmp_path: Path
) -> None:
    command(tmp_path, "--holders", 8, "--rounds", 1, *flags)
    kept = TrainingPlan.from_toml((tmp_path / "run" / "plan.toml").read_text())
    assert kept.min_holders == quorum


def test_a_wrong_flag_ends_the_command_with_a_sentence(tmp_path: Path) -> None:
    said = sotto("simulate", TASK, "--byzantine", "0.2:lie", "--out", tmp_path / "run")
    assert said.code == 2
    assert "there is no attack 'lie'" in said.err
    assert "There are: sign-flip, scale" in said.err
    assert not (tmp_path / "run").exists()


def test_every_attack_is_in_the_documents() -> None:
    text = (Path(__file__).parents[2] / "docs" / "simulate.md").read_text()
    for name, attack in ATTACKS.items():
        assert f"| `{name}" in text, name
        assert attack.source.partition(" (")[0].partition(",")[0] in text, name
        if attack.strength is not None:
            assert f"| {attack.strength:g} |" in text, name


@pytest.mark.parametrize("engine", ENGINES)
def test_lies_that_are_short_enough_count_where_holders_are_the_unit(engine: str) -> None:
    """C adapts, so what is short enough is what the round's request says, and bits must survive."""
    settings = {"no_dp": None, "epsilon": 8.0, "unit": "holder", "clipping": "adaptive"}
    quiet = Faults(byzantine=Byzantine(0.3, "sign-flip"))
    honest = simulate(None, engine, clip_norm=0.3, **settings).runs[0]
    forged = simulate(quiet, engine, clip_norm=0.3, **settings).runs[0]
    assert all(len(summary.accepted) == 10 for summary in forged.history)
    assert not np.allclose(honest.parameters, forged.parameters, atol=1e-3)

    loud = Faults(byzantine=Byzantine(0.3, "scale"))
    rejected = simulate(loud, engine, clip_norm=0.3, **settings).runs[0]
    assert len(rejected.history[0].accepted) == 7
    assert all("reply rejected" in why for why in rejected.history[0].missed.values())
