"""Masked plans in blocks: what the whole protocol gives, without its masks.

The opacus engine runs every exchange of :mod:`common.secagg` with holders of a deployment; the
batched one is held against it. Where noise is in the sum of holders only, both draw it from the
holder's own seeded stream, so that the sums agree, and not only in distribution.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Message
from flwr.serverapp import Grid

from common.aggregation import Masked
from common.errors import ConfigurationError
from common.plan import TrainingPlan
from common.privacy.accounting import epsilon
from common.privacy.noise import SeededRandomness
from common.secagg.ring import OutOfRange
from common.settings import plan_for
from common.tasks import load
from common.tasks.base import HolderData
from common.tasks.parameters import initial_parameters
from common.wire import RoundRequest
from server.aggregation import build_strategy
from server.checkpoints import RunState
from server.rounds import next_round
from server.runs import RunResult
from server.secure import SecureGrid, secured
from simulations.audit import Audit
from simulations.baselines import pooled_plan, solo_plan
from simulations.batched import Block, Terms, gradient_sums
from simulations.experiment import Experiment, run_experiment
from simulations.grid import BatchedGrid, in_process, simulated_holder
from simulations.jobs import Assignment, Job, Total
from simulations.lanes import Member, Run, stacks_of
from simulations.randomness import BlockRandomness
from simulations.stack import StackedModel
from simulations.sums import ExactSum
from simulations.unseen import mean_of, part_of
from simulations.workers import BlockTrainer, InProcess
from tests.masked import masked_plan
from tests.tiny import TinyTask

CPU = torch.device("cpu")
TASK = TinyTask()
LEVELS = ("secure", "secure-sum")
START = torch.tensor(initial_parameters(TASK, 0))


def run(engine: str, plan: TrainingPlan, seed: int = 0) -> RunResult:
    (result,) = run_experiment(Experiment(TASK, plan, (seed,), 4, engine=engine)).runs
    return result


def blocks(data: dict[str, HolderData]) -> BlockTrainer:
    return BlockTrainer(TASK, data, CPU)


def part_in_a_block(data: dict[str, HolderData], name: str, plan: TrainingPlan) -> torch.Tensor:
    """What a holder adds to the first round's sum."""
    job = Job([Assignment(name, name, plan)], 1, START.unsqueeze(0))
    return blocks(data).train(job).totals[0].sum.total()


def step_of(plan: TrainingPlan) -> float:
    assert isinstance(plan.aggregation, Masked)
    return plan.aggregation.encoding(plan).step


# -- the same parts, sums and models --------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "weighting"), [("secure", "equal"), ("secure", "size"), ("secure-sum", "equal")]
)
def test_each_holders_part_is_the_one_that_a_holder_would_mask(level: str, weighting: str) -> None:
    plan = masked_plan(level, holders=4, weighting=weighting)
    data = dict(TASK.holder_data(4))
    assert isinstance(plan.aggregation, Masked)
    encoding, apart = plan.aggregation.encoding(plan), []
    for name, own in data.items():
        holder = simulated_holder(name, TASK, own, plan, CPU)
        request = RoundRequest("run", 1, plan, START.numpy())
        masked = encoding.decode(holder.contribution(request).vector)
        found = part_in_a_block(data, name, plan).numpy()
        # Two engines round apart by some 1e-5 of a number, which may tip it to the next step.
        assert np.abs(found - masked).max() <= encoding.step
        apart += list(found != masked)
        holder.state.close()
    # With one more or less of the noise's draws nearly all of 16 numbers would differ.
    assert np.mean(apart) < 0.25


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm"])
def test_the_models_of_both_engines_agree(level: str, strategy: str) -> None:
    plan = masked_plan(level, holders=4, rounds=4, strategy=strategy)
    one, whole = run("batched", plan), run("opacus", plan)
    # What four parts that round to another step each do to a mean, and to a step of descent.
    moved = step_of(plan)
    if level == "secure-sum":
        moved *= plan.learning_rate / plan.expected_batch_size
    # In each of 4 rounds, of which momentum of 0.9 keeps 1 + 0.9 + 0.81 + … < 4 at most.
    allowed = 4 * 4 * moved + 1e-5
    assert np.abs(one.parameters - whole.parameters).max() <= allowed
    assert [each.accepted for each in one.history] == [each.accepted for each in whole.history]
    other = run("batched", plan, seed=1)
    assert np.abs(other.parameters - whole.parameters).max() > 10 * allowed


def test_masked_updates_give_the_model_of_plain_ones_up_to_their_rounding() -> None:
    plain, masked = masked_plan("plain", 4, min_holders=4), masked_plan("secure", 4)
    difference = np.abs(run("batched", plain).parameters - run("batched", masked).parameters).max()
    # Each of 5 rounds rounds each part by half a step at most, and so their mean.
    assert 0 < difference <= 5 * step_of(masked) / 2 + 1e-6


def test_a_sum_carries_the_noise_of_all_holders_and_no_more() -> None:
    """Of parts of holders without units, which are noise alone: σ√(4/3) where three must do."""
    numbers, small = 4000, masked_plan("secure-sum", 4, rounds=1)
    large = small.aggregation.model_copy(update={"dimension": numbers})
    plan = small.model_copy(update={"aggregation": large}).calibrated()
    assert plan.privacy.kind == "distributed"
    share = plan.privacy.share(plan)
    parts = [
        part_of(plan, torch.zeros(numbers), 1.0, SeededRandomness("noise", seed))
        for seed in range(4)
    ]
    found = float(torch.stack(parts).sum(0).std())
    # The deviation of 4,000 draws is within 5 % with probability 1 − 1e-5 (χ², 4.5 deviations).
    assert found == pytest.approx(2 * share, rel=0.05)
    assert found != pytest.approx(2 * share * 2 / 3, rel=0.05)


def test_private_parameters_take_their_step_as_they_do_in_opacus() -> None:
    task = load("recommendation")
    settings = {"aggregation": "secure-sum", "epsilon": 8.0, "rounds": 1}
    plan = plan_for(task, settings, holders=4)
    data = [own.train for own in list(task.holder_data(60).values())[:2]]
    start = torch.tensor(initial_parameters(task, 3))
    holders = [
        simulated_holder(name, task, HolderData(own, own), plan, CPU)
        for name, own in zip(("a", "b"), data, strict=True)
    ]
    units = max(map(len, data))
    private = {
        "users.weight": torch.stack(
            [
                torch.nn.functional.pad(each["users.weight"], (0, 0, 0, units - len(own)))
                for own, each in (
                    (own, holder.trainer._initial_private)
                    for own, holder in zip(data, holders, strict=True)
                )
            ]
        )
    }
    keys = [bytes([place]) * 32 for place in range(2)]
    sums, moved = gradient_sums(
        StackedModel(task, CPU),
        Block.of(data, task.padding, CPU),
        Terms.of([plan] * 2, [len(own) for own in data], CPU),
        start.expand(2, -1),
        private,
        BlockRandomness(keys),
    )
    for place, (own, holder) in enumerate(zip(data, holders, strict=True)):
        total, kept = holder.trainer.gradient_sum(
            plan, start, None, SeededRandomness.of_key(keys[place])
        )
        assert float((sums[place] - total).norm() / total.norm()) < 1e-5
        there = moved["users.weight"][place, : len(own)]
        assert float((there - kept["users.weight"]).norm()) < 1e-5 * float(there.norm())
        holder.state.close()


@pytest.mark.parametrize("level", LEVELS)
def test_runs_in_lockstep_are_those_of_their_own(level: str) -> None:
    plans = [masked_plan(level, 4, rounds=3, epsilon=chosen) for chosen in (1.0, 4.0)]
    data = dict(TASK.holder_data(4))
    members = tuple(Member(name, name) for name in data)
    runs = [Run(f"{place}", plan, members, members) for place, plan in enumerate(plans)]
    (stack,) = stacks_of(TASK, runs)
    workers = InProcess(blocks(data))
    list(stack.train(workers))
    for plan, found in zip(plans, stack.released, strict=True):
        assert np.abs(found.numpy() - run("batched", plan).parameters).max() < 2 * step_of(plan)


def test_levels_are_not_stacked_with_each_other() -> None:
    members = (Member("h0", "h0"), Member("h1", "h1"), Member("h2", "h2"))
    runs = [Run(level, masked_plan(level, 3), members, members) for level in ("plain", *LEVELS)]
    assert [len(stack.runs) for stack in stacks_of(TASK, runs)] == [1, 1, 1]


# -- what cannot be summed ------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["batched", "opacus"])
def test_a_holder_beyond_the_range_fails_and_the_round_goes_on(engine: str) -> None:
    plan = masked_plan("secure", 4, no_dp=True, max_update_norm=0.01, learning_rate=1.0, rounds=1)
    data = dict(TASK.holder_data(4))
    small = {  # so little to learn that the update is within the plan's bound
        name: HolderData(
            type(own.train)({"x": own.train["x"] * 1e-4, "y": own.train["y"] * 0 + 0.5}), own.test
        )
        for name, own in data.items()
    }
    held = {**small, "h1": data["h1"]}
    request = RoundRequest("run", 1, plan, np.zeros(4, np.float32))

    def missed(grid: Grid) -> tuple[list[str], dict[str, str]]:
        state = RunState("run", 0, request.parameters)
        _, summary = next_round(grid, plan, build_strategy(plan), state)
        return list(summary.accepted), dict(summary.missed)

    if engine == "batched":
        found = missed(BatchedGrid(list(held), InProcess(blocks(held))))
    else:
        with in_process(TASK, plan, held, CPU) as grid:
            found = missed(secured(grid, plan))
    assert found == (["h0", "h2", "h3"], {"h1": "failed: OutOfRange"})


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e9])
def test_what_is_no_number_of_the_ring_is_an_error_and_not_clipped(value: float) -> None:
    plan = masked_plan("secure", 4)
    with pytest.raises(OutOfRange):
        part_of(plan, torch.tensor([0.0, value]), 1.0, SeededRandomness("any"))


def test_too_few_holders_lose_the_round() -> None:
    plan = masked_plan("secure", 4)
    data = dict(TASK.holder_data(2))
    grid = BatchedGrid(list(data), InProcess(blocks(data)))
    request = RoundRequest("run", 1, plan, START.numpy())
    asked = [Message(request.records(), node, "train") for node in grid.get_node_ids()]
    replies = grid.send_and_receive(asked)
    assert [reply.error.reason for reply in replies] == [
        "lost: fewer than 3 holders remained for a masked sum"
    ] * 2


# -- who sums -------------------------------------------------------------------------------------


def test_only_a_grid_that_does_not_sum_is_wrapped() -> None:
    plan = masked_plan("secure", 4)
    data = dict(TASK.holder_data(4))
    there = BatchedGrid(list(data), InProcess(blocks(data)))
    assert secured(there, plan) is there
    with in_process(TASK, plan, data, CPU) as grid:
        assert isinstance(secured(grid, plan), SecureGrid)
        assert secured(grid, masked_plan("plain", 4, min_holders=4)) is grid


def test_under_masks_nobody_answers_for_itself() -> None:
    plan = masked_plan("secure", 4)
    data = dict(TASK.holder_data(4))
    grid = BatchedGrid(list(data), InProcess(blocks(data)))
    request = RoundRequest("run", 1, plan, START.numpy())
    asked = [Message(request.records(), node, "train") for node in grid.get_node_ids()]
    (reply,) = grid.individually(asked)
    assert list(grid.answered_by(reply)) == grid.get_node_ids()


def test_a_mean_is_that_of_the_plans_own_kind() -> None:
    total = Total(ExactSum(2))
    total.add(torch.tensor([1.0, -2.0], dtype=torch.float64), 1.0)
    total.add(torch.tensor([3.0, 2.0], dtype=torch.float64), 1.0)
    for level in ("plain", "secure"):
        plan = masked_plan(level, 4, min_holders=4)
        assert mean_of(plan, total).tolist() == [2.0, 0.0]
    plan = masked_plan("secure-sum", 4)
    gradient = 4.0 / (2 * plan.expected_batch_size)
    expected = -plan.learning_rate * gradient
    assert mean_of(plan, total).tolist() == [pytest.approx(expected), 0.0]


# -- without a federation -------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_baselines_are_plain_with_the_same_guarantee(level: str) -> None:
    plan = masked_plan(level, 4, rounds=7)
    for own in (solo_plan(plan), pooled_plan(plan, 4)):
        assert (own.aggregation.kind, own.privacy.kind) == ("plain", "dp")
        assert (own.min_holders, own.cohort) == (1, None)
        for name in ("epsilon", "delta", "unit", "clip_norm"):
            assert getattr(own.privacy, name) == getattr(plan.privacy, name)
        assert own.strategy == plan.strategy
        assert own.rounds == plan.rounds
        spent = epsilon(own.composition(), own.privacy.delta)
        assert 0.98 * plan.privacy.epsilon < spent <= plan.privacy.epsilon
        type(own).from_toml(own.to_toml())  # a valid plan, all of it


def test_of_what_each_baseline_learns_pooled_noise_is_the_least() -> None:
    """Central DP-SGD: the noise of one over the units of all."""
    plan = masked_plan("secure-sum", 4)
    alone, together = solo_plan(plan), pooled_plan(plan, 4)
    assert alone.privacy == together.privacy
    assert together.expected_batch_size == 4 * alone.expected_batch_size


def test_a_robust_strategy_has_nothing_to_look_at() -> None:
    with pytest.raises(ConfigurationError, match="there is only their sum"):
        run("batched", masked_plan("secure", 4, strategy="fedmedian"))


def test_an_audit_of_sums_says_what_to_audit_instead() -> None:
    with pytest.raises(ConfigurationError, match="audit it with aggregation 'plain'"):
        Audit(TASK, masked_plan("secure-sum", 4))
    Audit(TASK, masked_plan("secure", 4))  # of one holder's updates, as without masks
