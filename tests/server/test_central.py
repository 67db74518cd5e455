"""Holders as the unit: what one of them moves, what noise covers it, and what a restart keeps.

Unit: a holder with all its data. Neighbours: one holder more or less. Adversary: whoever sees all
models, and neither updates nor who was asked. The coordinator is trusted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.errors import ConfigurationError
from common.guarantees import CentralPrivacy
from common.plan import CLIP_ROUNDING, TrainingPlan
from common.privacy.accounting import epsilon
from common.privacy.events import Composition, Unprotected, gaussian
from common.privacy.matrix import banded_square_root, mean_square_error, participations
from common.privacy.noise import OsRandomness, Randomness, SeededRandomness
from common.privacy.step import clipped_updates, rounded_to_grid
from common.settings import plan_for
from common.wire import RoundRequest, TrainReply, Vector
from server.aggregation import STRATEGIES, build_strategy
from server.central import Central, Memory, combination_of
from server.checkpoints import Checkpoints, RunState
from server.rounds import next_round, rounds
from server.summaries import RoundSummary
from tests.fakes import FakeGrid, pulls_towards
from tests.tiny import TinyTask

C = 0.5
D = 5
SILENT = 1e-9
"""A noise multiplier that is as good as none, for looking at signals."""

Draws = Callable[[int], Randomness]


def plan(holders: int = 20, **chosen: object) -> TrainingPlan:
    common = {"unit": "holder", "epsilon": 8.0, "delta": 1e-4, "clip_norm": C, "rounds": 12}
    return plan_for(TinyTask(), {**common, **chosen}, holders=holders)


def privacy_of(plan: TrainingPlan) -> CentralPrivacy:
    assert isinstance(plan.privacy, CentralPrivacy)
    return plan.privacy


def sigma_of(plan: TrainingPlan) -> float:
    sigma = privacy_of(plan).noise_multiplier
    assert sigma is not None
    return sigma


def silenced(plan: TrainingPlan, sigma: float = SILENT) -> TrainingPlan:
    privacy = privacy_of(plan).model_copy(update={"noise_multiplier": sigma})
    return plan.model_copy(update={"privacy": privacy})


def seeded(seed: int = 0) -> Draws:
    return lambda number: SeededRandomness("coordinator", seed, number)


def central(plan: TrainingPlan, randomness: Draws | None = None) -> Central:
    found = combination_of(plan, randomness or seeded())
    assert isinstance(found, Central)
    return found


def mean_of(
    plan: TrainingPlan, replies: Sequence[TrainReply], dimension: int = D, number: int = 1
) -> Vector:
    (reply,), _ = central(plan).combined(number, replies, {}, dimension)
    return reply.update


def replies_of(updates: np.ndarray) -> list[TrainReply]:
    """What holders send: clipped, float32."""
    clipped, within = clipped_updates(torch.tensor(updates, dtype=torch.float32), C)
    return [
        TrainReply(row.numpy(), 1.0, int(bit))
        for row, bit in zip(clipped, within.tolist(), strict=True)
    ]


def clips(target: float) -> Callable[[RoundRequest], RecordDict]:
    """A holder that moves towards ``target``, and no further than it is told."""

    def answer(request: RoundRequest) -> RecordDict:
        update = torch.tensor(0.1 * (target - request.parameters)).unsqueeze(0)
        assert request.clip_norm is not None
        clipped, within = clipped_updates(update.float(), request.clip_norm)
        return TrainReply(clipped[0].numpy(), 1.0, int(within[0])).records()

    return answer


def crowd(count: int = 20) -> FakeGrid:
    return FakeGrid({f"h{i:02d}": clips(1.0 + i / count) for i in range(count)})


def start() -> RunState:
    return RunState("run", 0, np.linspace(-1, 1, D, dtype=np.float32))


def train(
    wanted: TrainingPlan, grid: FakeGrid, state: RunState | None = None, draws: Draws | None = None
) -> list[RunState]:
    """The states after every round."""
    steps = rounds(grid, wanted, build_strategy(wanted), state or start(), central(wanted, draws))
    return [each for each, _ in steps]


# -- price -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"cohort": 4},
        {"cohort": 4, "clipping": "adaptive"},
        {"mechanism": "banded", "bands": 5},
        {"mechanism": "banded", "bands": 12},
    ],
    ids=str,
)
def test_the_models_cost_what_the_plan_promises(chosen: dict[str, object]) -> None:
    wanted = plan(epsilon=2.0, **chosen)
    cost = epsilon(Composition.of(privacy_of(wanted).release(wanted)), 1e-4)
    assert cost <= 2.0
    assert cost > 1.97, "calibration wastes little"


def test_a_small_cohort_needs_less_noise_because_nobody_sees_who_is_asked() -> None:
    assert sigma_of(plan(1000, cohort=20)) < 0.6 * sigma_of(plan(1000))


def test_banded_noise_is_priced_for_every_time_that_somebody_takes_part() -> None:
    once = sigma_of(plan(mechanism="banded", bands=12))
    assert sigma_of(plan(mechanism="banded", bands=5)) == pytest.approx(math.sqrt(3) * once)
    assert sigma_of(plan(mechanism="banded", bands=1)) == pytest.approx(math.sqrt(12) * once)


def test_to_the_holder_itself_its_update_is_unprotected() -> None:
    assert plan(cohort=4).round_event() == Unprotected()
    assert epsilon(plan(cohort=4).composition(), 1e-4) == math.inf


# -- what one holder moves ------------------------------------------------------------------------

wild = st.one_of(st.floats(-10, 10), st.sampled_from([0.0, 1e-30, 1e30, -math.inf, math.nan]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(wild, min_size=D, max_size=D), min_size=1, max_size=6))
def test_one_whole_holder_moves_the_sum_by_at_most_c(values: list[list[float]]) -> None:
    wanted = silenced(plan())
    replies = replies_of(np.array(values))
    moved = mean_of(wanted, replies).astype(np.float64) - mean_of(wanted, replies[:-1])
    # In float32 a mean of norm up to 6C/20 is off by 2⁻²⁴ of that, and 20 times is the sum.
    assert np.linalg.norm(moved) * 20 <= C * CLIP_ROUNDING


def test_the_bound_is_reached_and_an_update_that_nobody_clipped_passes_it() -> None:
    """Negative control of the property above."""
    wanted, huge = silenced(plan()), np.full((1, D), 7.0)
    assert np.linalg.norm(mean_of(wanted, replies_of(huge))) * 20 == pytest.approx(C)
    naive = [TrainReply(huge[0].astype(np.float32), 1.0)]
    assert np.linalg.norm(mean_of(wanted, naive)) * 20 > 10 * C


def test_the_sum_is_divided_by_how_many_were_expected() -> None:
    wanted = silenced(plan(100, cohort=10))
    replies = replies_of(np.full((3, D), 0.1))
    np.testing.assert_allclose(mean_of(wanted, replies), 3 * 0.1 / 10, rtol=1e-5)
    assert not mean_of(wanted, []).any() or np.abs(mean_of(wanted, [])).max() < 1e-8


def test_a_holder_that_does_not_clip_is_rejected_and_the_others_count() -> None:
    wanted = silenced(plan(3))
    grid = FakeGrid({"h0": clips(9.0), "h1": clips(9.0), "bad": pulls_towards(1e3)})
    state, summary = next_round(grid, wanted, build_strategy(wanted), start(), central(wanted))
    assert summary.accepted == ("h0", "h1")
    assert "above 0.5" in summary.missed["bad"]
    assert np.linalg.norm(state.parameters - start().parameters) == pytest.approx(
        2 * C / 3, rel=1e-2
    )


def test_holders_that_are_silent_add_nothing_and_move_no_divisor() -> None:
    wanted = silenced(plan(4))
    grid = FakeGrid({"h0": clips(9.0), **{f"away{i}": lambda _: None for i in range(3)}})
    state, summary = next_round(grid, wanted, build_strategy(wanted), start(), central(wanted))
    assert summary.accepted == ("h0",)
    assert np.linalg.norm(state.parameters - start().parameters) == pytest.approx(C / 4, rel=1e-2)


# -- noise -----------------------------------------------------------------------------------

MANY = 20_000


def noise_of(wanted: TrainingPlan, dimension: int = MANY) -> np.ndarray:
    """The noise of a round to which nobody answers, in units of C, before it is divided."""
    expected = central(wanted).expected
    return mean_of(wanted, [], dimension).astype(np.float64) * expected / (C * CLIP_ROUNDING)


def fits(draws: np.ndarray, sigma: float) -> float:
    """Probability of draws at least as unlike N(0, σ²)."""
    return float(stats.kstest(draws, "norm", args=(0, sigma)).pvalue)


def test_the_sum_has_noise_of_the_plans_deviation() -> None:
    """20,000 draws; a false alarm has probability 1e-3, and the seeds are fixed."""
    wanted = plan(1000, cohort=40)
    draws, sigma = noise_of(wanted), sigma_of(wanted)
    assert fits(draws, sigma) > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert fits(draws, sigma * wrong) < 1e-9
    # Divided by the 30 that came in place of the 40 that were expected.
    assert fits(draws * 40 / 30, sigma) < 1e-9


def test_no_two_rounds_or_runs_have_the_same_noise() -> None:
    wanted = plan(100, cohort=10)
    first, second = mean_of(wanted, [], number=1), mean_of(wanted, [], number=2)
    assert not np.isclose(first, second).any()
    deployed = combination_of(wanted)
    (one,), _ = deployed.combined(1, [], {}, D)
    (other,), _ = deployed.combined(1, [], {}, D)
    assert not np.isclose(one.update, other.update).any()
    assert isinstance(deployed, Central)
    assert isinstance(deployed.randomness(1), OsRandomness)


def test_what_is_published_lies_on_a_grid_that_says_nothing_of_the_data() -> None:
    """Small numbers have room in float32 for far finer fractions than the grid's."""
    wanted = silenced(plan(1), sigma=1.0)
    std = C * CLIP_ROUNDING
    grid = 2.0 ** (math.floor(math.log2(std)) - 30)
    published = mean_of(wanted, replies_of(np.full((1, 400_000), 1e-4)), 400_000)
    small = published[np.abs(published) < grid * 2**23].astype(np.float64)
    assert len(small) > 1000
    assert (small == np.round(small / grid) * grid).all()
    noise = SeededRandomness("coordinator", 0, 1).normal((400_000,), std=std, dtype=torch.float64)
    off = noise.numpy()[np.abs(noise.numpy()) < grid * 2**23]
    assert (off != np.round(off / grid) * grid).mean() > 0.9, "negative control: noise as it comes"
    assert float((rounded_to_grid(noise.clone(), std) - noise).abs().max()) <= grid / 2


# -- adaptive clipping -----------------------------------------------------------------------


def adaptive(holders: int = 20, **chosen: object) -> TrainingPlan:
    return plan(holders, clipping="adaptive", **chosen)


@pytest.mark.parametrize("chosen", [{}, {"epsilon": 1.0}, {"epsilon": 50.0}], ids=str)
def test_update_and_bit_together_cost_what_one_gaussian_does(chosen: dict[str, object]) -> None:
    wanted = adaptive(**chosen)
    update, bit = central(wanted)._noises()
    assert bit is not None
    both = Composition.of(gaussian(update, 1)) + Composition.of(gaussian(2 * bit, 1))
    promised = epsilon(Composition.of(gaussian(sigma_of(wanted), 1)), 1e-4)
    assert epsilon(both, 1e-4) == pytest.approx(promised, rel=1e-3)
    naive = Composition.of(gaussian(sigma_of(wanted), 1)) + Composition.of(gaussian(2 * bit, 1))
    assert epsilon(naive, 1e-4) > 1.02 * promised, "a bit that nobody paid for"


def test_the_updates_noise_makes_room_for_the_bit() -> None:
    """Twenty holders expected: the bit is dear, and noise of the plan's own σ would not do."""
    wanted = adaptive()
    update, _ = central(wanted)._noises()
    assert update > 1.1 * sigma_of(wanted)
    draws = noise_of(wanted)
    assert fits(draws, update) > 1e-3
    assert fits(draws, sigma_of(wanted)) < 1e-6, "negative control: a bit that nobody paid for"


def test_a_bit_moves_its_sum_by_half_and_its_noise_is_what_was_paid() -> None:
    """log C moves by η(share − ½), so what noise the share has can be read off it."""
    wanted = adaptive(100)
    model, logs = central(wanted), list[float]()
    for number in range(2000):
        _, memory = model.combined(number, [], {}, 1)
        logs.append(math.log(model.clip_norm(memory) / C))
    _, bit = model._noises()
    assert bit is not None
    shares = -np.array(logs) / 0.2 * model.expected
    assert fits(shares, bit) > 1e-3
    assert fits(shares, bit * 2 / 3) < 1e-6
    assert fits(shares, bit * 3 / 2) < 1e-6

    inside, outside = (
        TrainReply(np.zeros(1, np.float32), 1.0, 1),
        TrainReply(np.zeros(1, np.float32), 1.0, 0),
    )
    base = shares[0]
    for reply, half in ((inside, 0.5), (outside, -0.5)):
        _, memory = model.combined(0, [reply], {}, 1)
        moved = -math.log(model.clip_norm(memory) / C) / 0.2 * model.expected - base
        assert moved == pytest.approx(half, abs=1e-6)


@pytest.mark.parametrize("first", [0.01, 30.0])
def test_c_finds_the_median_norm_from_below_and_from_above(first: float) -> None:
    """200 holders whose norms are lognormal.

    Near the median log C is an AR(1) process: a share is off by 1/20 of noise, log C follows with
    η = 0.2 and comes back with ηf, where f = 0.4 is the density of log norms: its deviation is
    0.05·√(η/2f) = 0.025, a share of 0.01. A tenth is ten deviations.
    """
    norms = np.random.default_rng(1).lognormal(size=200)
    wanted = adaptive(200, clip_norm=first)
    model, memory = central(wanted), dict[str, np.ndarray]()
    found: Memory = memory
    for number in range(150):
        clip = model.clip_norm(found)
        replies = [
            TrainReply(np.array([min(norm, clip)], np.float32), 1.0, int(norm <= clip))
            for norm in norms
        ]
        _, found = model.combined(number, replies, found, 1)
    assert np.mean(norms <= model.clip_norm(found)) == pytest.approx(0.5, abs=0.1)


def test_every_request_states_the_c_of_its_round() -> None:
    stated: list[float] = []

    def answer(request: RoundRequest) -> RecordDict:
        assert request.clip_norm is not None
        stated.append(request.clip_norm)
        return TrainReply(np.zeros(D, np.float32), 1.0, 1).records()  # C is too large for it

    wanted = silenced(adaptive(50, clip_norm=1.0), sigma=0.1)
    train(wanted, FakeGrid({f"h{i}": answer for i in range(50)}))
    by_round = np.array(stated).reshape(12, 50)
    assert (by_round == by_round[:, :1]).all()
    assert by_round[0, 0] == 1.0
    # All bits are 1: C falls by exp(−0.1) a round, give or take η/20 = 0.01 of noise each.
    assert np.diff(np.log(by_round[:, 0])) == pytest.approx(-0.1, abs=0.05)


# -- banded noise ----------------------------------------------------------------------------


def released(wanted: TrainingPlan, dimension: int, *, forget: bool = False) -> np.ndarray:
    """The noise of all rounds, [T, D], in units of what the sensitivity asks of Z."""
    model, memory, rows = central(wanted), dict[str, np.ndarray](), list[np.ndarray]()
    known: Memory = memory
    for number in range(1, wanted.rounds + 1):
        (reply,), known = model.combined(number, [], {} if forget else known, dimension)
        rows.append(reply.update.astype(np.float64) * model.expected)
    return np.array(rows) / (sigma_of(wanted) * C * CLIP_ROUNDING)


def unshaped(rows: np.ndarray, bands: int) -> np.ndarray:
    """C times the rows: white if they are C⁻¹Z."""
    column = banded_square_root(bands)
    return np.array(
        [
            sum(column[age] * rows[place - age] for age in range(min(bands, place + 1)))
            for place in range(len(rows))
        ]
    )


def neighbours_correlation(rows: np.ndarray) -> float:
    return float(np.mean(rows[1:] * rows[:-1]) / np.mean(rows**2))


def test_c_times_the_banded_noise_is_white_and_as_large_as_was_paid_for() -> None:
    """12 · 3,000 draws: the correlation of neighbours is 0 with deviation 1/√33,000 = 0.0055."""
    wanted = plan(mechanism="banded", bands=4)
    white = unshaped(released(wanted, 3000), 4)
    assert fits(white.ravel(), 1.0) > 1e-3
    assert abs(neighbours_correlation(white)) < 4 * 0.0055
    # Negative control: rows that are independent, or a coordinator that forgets the last ones.
    forgotten = unshaped(released(wanted, 3000, forget=True), 4)
    assert neighbours_correlation(forgotten) > 20 * 0.0055


def test_sums_over_rounds_have_the_error_that_the_matrix_says() -> None:
    """A mean over 3,000 coordinates of squares that hang together over 12 rounds; 5 % is enough
    for a deviation of at most √(2/3000) = 2.6 % of each round's square."""
    wanted = plan(mechanism="banded", bands=4)
    error = np.mean(np.cumsum(released(wanted, 3000), axis=0) ** 2)
    assert error == pytest.approx(mean_square_error(12, 4), rel=0.05)
    assert error < 0.5 * mean_square_error(12, 1)


def test_as_a_whole_banded_noise_beats_independent_noise_at_one_epsilon() -> None:
    """The same holders expected in a round: by coins, with all that sampling gives; or in turn."""
    banded = plan(1000, epsilon=8.0, mechanism="banded", bands=10, rounds=60)
    coins = plan(1000, epsilon=8.0, cohort=100, rounds=60)
    assert central(banded).expected == central(coins).expected
    errors = {
        "banded": sigma_of(banded) ** 2 * mean_square_error(60, 10),
        "coins": sigma_of(coins) ** 2 * mean_square_error(60, 1),
    }
    assert errors["banded"] < errors["coins"]


def test_everybody_is_asked_once_in_so_many_rounds_whoever_comes_or_goes() -> None:
    wanted = plan(30, mechanism="banded", bands=5)
    model, present = central(wanted), {node: f"h{node}" for node in range(2, 32)}
    asked = {
        number: set(model.cohort(list(present), present.__getitem__, number))
        for number in range(1, 13)
    }
    for number in range(1, 9):
        window = [asked[later] for later in range(number, number + 5)]
        assert sum(map(len, window)) == 30
        assert set.union(*window) == set(present)
    for node in present:
        assert sum(node in each for each in asked.values()) <= participations(12, 5)
    # Half of them leave, and come back as other nodes: nobody's turn moves.
    later = {90 - node: name for node, name in present.items() if node % 2}
    for number in asked:
        names = {later[node] for node in model.cohort(list(later), later.__getitem__, number)}
        assert names == {present[node] for node in asked[number]} & set(later.values())


# -- coins -----------------------------------------------------------------------------------


def test_each_holder_is_asked_by_a_coin_of_its_own() -> None:
    """2,000 rounds, 50 holders, q = 1/5: a holder is asked 400 ± 17.9 times, and a cohort has
    10 holders with variance 8, ± 8·√(2/2000) = 0.25. Five deviations."""
    wanted = plan(50, cohort=10, rounds=2000)
    model, present = central(wanted), {node: f"h{node}" for node in range(2, 52)}
    cohorts = [model.cohort(list(present), present.__getitem__, number) for number in range(2000)]
    times = np.bincount(np.concatenate(cohorts), minlength=52)[2:]
    assert np.abs(times - 400).max() < 5 * 17.9
    sizes = np.array([len(each) for each in cohorts])
    assert abs(sizes.var() - 8) < 5 * 0.25  # a cohort of fixed size has 0
    assert np.corrcoef(sizes[1:], sizes[:-1])[0, 1] < 5 / math.sqrt(2000)


def test_the_rate_is_the_plans_whoever_is_there() -> None:
    """Few holders there are not asked more often: the accountant's rate would not hold."""
    wanted = plan(1000, cohort=100)
    few = {node: f"h{node}" for node in range(2, 12)}
    asked = sum(
        len(central(wanted).cohort(list(few), few.__getitem__, number)) for number in range(1000)
    )
    assert asked == pytest.approx(1000, abs=5 * math.sqrt(900))  # 10,000 coins of 1/10


def test_in_deployment_the_coins_are_secret() -> None:
    deployed = combination_of(plan(1000, cohort=500))
    present = {node: f"h{node}" for node in range(2, 1002)}
    assert deployed.cohort(list(present), present.__getitem__, 1) != deployed.cohort(
        list(present), present.__getitem__, 1
    )


@pytest.mark.parametrize(
    "strategy", sorted(name for name, kind in STRATEGIES.items() if kind.linear)
)
def test_a_cohort_may_be_empty(strategy: str) -> None:
    """Nobody is asked in the first round and in many later ones; that ends no run."""
    wanted = plan(1000, cohort=1, strategy=strategy, rounds=12)
    grid = crowd(300)
    states = train(wanted, grid)
    assert [state.round for state in states] == list(range(1, 13))
    counts = [sum(number == asked for _, _, asked in grid.asked) for number in range(1, 13)]
    assert 0 in counts
    assert sum(counts) > 0
    assert not np.allclose(states[0].parameters, start().parameters), "noise is added all the same"


def test_a_strategy_sees_where_an_empty_round_begins() -> None:
    """FedAdagrad takes the difference to the parameters that it was shown: old ones would count
    the rounds in between once more."""
    wanted = silenced(plan(1000, cohort=1, strategy="fedadagrad", rounds=40))
    grid = crowd(800)
    states = [start(), *train(wanted, grid)]
    asked = {number for _, _, number in grid.asked}
    empty = [number for number in range(2, 41) if number not in asked]
    assert asked
    assert empty
    for number in empty:
        moved = np.abs(states[number].parameters - states[number - 1].parameters).max()
        assert moved < 1e-5
    for number in asked:
        assert np.abs(states[number].parameters - states[number - 1].parameters).max() > 1e-3


# -- restarts --------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam"])
@pytest.mark.parametrize(
    "chosen",
    [
        {"cohort": 5},
        {"cohort": 5, "clipping": "adaptive"},
        {"mechanism": "banded", "bands": 4},
    ],
    ids=str,
)
def test_a_restart_changes_no_bit(chosen: dict[str, object], strategy: str, tmp_path: Path) -> None:
    wanted = plan(strategy=strategy, **chosen)
    at_once = train(wanted, crowd())
    Checkpoints(tmp_path).save(at_once[4], wanted, RoundSummary(5, (), {}, 0.0))
    checkpoint, _ = Checkpoints(tmp_path).load(wanted)
    assert checkpoint is not None
    state = checkpoint.state
    resumed = train(wanted, crowd(), state)
    np.testing.assert_array_equal(resumed[-1].parameters, at_once[-1].parameters)
    if "clipping" in chosen or "mechanism" in chosen:
        kept = {key: each for key, each in state.strategy.items() if "central" not in key}
        forgot = train(wanted, crowd(), replace(state, strategy=kept))
        assert not np.array_equal(forgot[-1].parameters, at_once[-1].parameters)


def test_the_rows_that_a_checkpoint_holds_are_as_exact_as_they_were(tmp_path: Path) -> None:
    wanted = plan(mechanism="banded", bands=4)
    state = train(wanted, crowd())[-1]
    Checkpoints(tmp_path).save(state, wanted, RoundSummary(state.round, (), {}, 0.0))
    loaded, _ = Checkpoints(tmp_path).load(wanted)
    assert loaded is not None
    kept = loaded.state.strategy
    rows = {key: each for key, each in kept.items() if key.startswith("central/noise")}
    assert len(rows) == 3
    for key, row in rows.items():
        assert row.dtype == np.float64
        np.testing.assert_array_equal(row, state.strategy[key])


# -- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({"weighting": "size"}, "weighting must be 'equal'"),
        ({"mechanism": "banded", "bands": 4, "cohort": 5}, "cohort must be left out"),
        ({"mechanism": "banded", "clipping": "adaptive"}, "clipping must be fixed"),
        ({"mechanism": "banded", "bands": 13}, "bands must be at most rounds=12"),
        ({"bands": 3}, "bands must be 1 with mechanism 'gaussian', got 3"),
        ({"delta": 0.06}, r"delta must be below 1/population = 0.05, got 0.06"),
        ({"clipping": "sometimes"}, "clipping"),
        ({"unit": "record", "clipping": "adaptive"}, "clipping is for noise that a trusted"),
        ({"epsilon": None, "no_dp": True, "bands": 2}, "bands is for noise that a trusted"),
        ({"unit": "user"}, "unit must be 'record', which task 'tiny' is counted by, or 'holder'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_when_the_plan_is_made(
    chosen: Mapping[str, object], says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        plan(**chosen)


@pytest.mark.parametrize(
    "name", sorted(name for name, kind in STRATEGIES.items() if not kind.linear)
)
def test_strategies_that_look_at_single_updates_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="looks at single updates"):
        build_strategy(plan(strategy=name, min_holders=3))


def test_turns_need_a_grid_that_knows_its_holders() -> None:
    class Nameless:
        """As Flower's own runtime: nodes, and no names."""

    wanted = plan(mechanism="banded", bands=4)
    with pytest.raises(ConfigurationError, match="does not say which node is which holder"):
        next(iter(rounds(Nameless(), wanted, build_strategy(wanted), start())))  # type: ignore[arg-type]
