"""Who computes a round's blocks: the trainer of one block, and workers that share them.

A job (:mod:`simulations.jobs`) is trained as one block, or a few where its holders differ much in
size, and its updates are summed where they are made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from common.errors import SottoError
from common.plan import TrainingPlan
from common.privacy.discrete_noise import discrete_gaussian
from common.privacy.noise import SeededRandomness, simulation_key
from common.privacy.step import clipped_updates
from common.tasks.base import Examples, HolderData, Task, derived_seed
from common.tasks.parameters import private_of
from common.tasks.scaling import scaled
from common.tasks.separation import require_separate_units
from simulations.batched import Block, Terms, gradient_sums, predict, train
from simulations.jobs import (
    FEWEST,
    USUAL,
    Assignment,
    Cut,
    Figures,
    Job,
    Judged,
    Outcome,
    Private,
    Total,
    Totals,
    gather,
)
from simulations.layers import Weights
from simulations.policy import simulated_policy, simulated_refusal
from simulations.randomness import block_randomness, evaluation_randomness
from simulations.stack import StackedModel
from simulations.sums import ExactSum
from simulations.unseen import part_of

__all__ = ["BlockTrainer", "InProcess", "Workers"]

logger = logging.getLogger("sotto.simulation")

BLOCK_BYTES = 2**24
"""What a block's parameters and activations may take on a CPU. Much more falls out of its caches
between two layers; much less spends its time on Python."""

KEPT_BYTES = 2**28
"""Assembled blocks kept for the next round."""

COPIES = 6
"""Arrays as large as a holder's parameters that a step touches: themselves, gradient, noise, …"""

MOST = 256
"""Holders in a job at most."""

UNLIKE = 4
"""Holders of less than one in so many of the largest one's size get a block of their own."""


class BlockTrainer:
    """Trains and judges blocks; keeps the stacked model and assembled blocks warm.

    Args:
        task: what is learned.
        data: every holder's, by key; made on demand perhaps.
        device: of models and data.
    """

    def __init__(self, task: Task, data: Mapping[str, HolderData], device: torch.device) -> None:
        self._task, self._data, self._device = task, data, device
        if device.type == "cuda":
            # torch rounds convolutions to TF32 unless told otherwise, and products if it is asked.
            asked = torch.get_float32_matmul_precision() != "highest"
            torch.backends.cudnn.allow_tf32 = asked
        self._model = StackedModel(task, device)
        self._blocks = _Shelf(KEPT_BYTES)
        self._separate = False

    @property
    def dimension(self) -> int:
        """D, the number of shared parameters."""
        return self._model.dimension

    def measure(self, assignment: Assignment) -> Cut:
        """How many holders like this one to train at once; the same for any number of workers.

        Their parameters, gradients and activations should stay in a CPU's cache between two
        layers; on a GPU they may fill its memory.

        Raises:
            ConfigurationError: a unit's loss depends on who else is in the batch.
        """
        try:
            units = self._data[assignment.data].train.to(self._device)
            if not len(units):
                return Cut(FEWEST, USUAL)
            self._require_separate_units(units)
            a_unit = self._model.numbers_a_unit(units)
        except SottoError:
            raise
        except Exception:  # this holder's own data; it will be told apart when it is asked
            return Cut(FEWEST, USUAL)
        width = max(1.0, assignment.plan.sampling_rate * len(units))
        bytes_each = 4 * (COPIES * self._model.dimension + int(2 * width * a_unit))
        return Cut(_holders_at_once(self._device, bytes_each), a_unit)

    def train(self, job: Job) -> Outcome:
        """Train every assignment of a job."""
        outcome = Outcome()

        def do(part: Sequence[int]) -> None:
            self._train_block(job, part, outcome)

        def allowed(sizes: dict[int, int]) -> dict[int, int]:
            return self._allowed(job, sizes, outcome)

        with _one_thread(self._device):
            outcome.failed.update(self._each_part(job, "train", do, allowed))
        return outcome

    def evaluate(self, job: Job) -> list[Judged]:
        """Figures of each assignment's holder, of the shared parameters that it starts from."""
        found: dict[int, Judged] = {}

        def do(part: Sequence[int]) -> None:
            found.update(zip(part, self._judge(job, part), strict=True))

        with _one_thread(self._device):
            found.update(self._each_part(job, "test", do))
        return [found[position] for position in range(len(job.assignments))]

    # -- inside ------------------------------------------------------------------------------

    def _each_part(
        self,
        job: Job,
        half: str,
        do: Callable[[Sequence[int]], None],
        allowed: Callable[[dict[int, int]], dict[int, int]] = lambda sizes: sizes,
    ) -> dict[int, str]:
        """Do every block of a job; where one fails, its holders one by one.

        So one holder's data cost that holder its round, as in a deployment, and nobody else.

        Args:
            job: to do.
            half: ``train`` or ``test``.
            do: a block, given by the positions of its assignments.
            allowed: of all positions with their sizes, those to do.

        Returns:
            Position of an assignment that fails by itself → the error's type.
        """
        failed: dict[int, str] = {}
        sizes: dict[int, int] = {}
        for position, one in enumerate(job.assignments):
            with self._failing(one, position, failed):
                sizes[position] = len(getattr(self._data[one.data], half))
        for part in _alike(allowed(sizes)):
            try:
                do(part)
            except SottoError:
                raise  # about the task or the plan, and so about everybody
            except Exception:
                for position in part:
                    with self._failing(job.assignments[position], position, failed):
                        do([position])
        return failed

    def _allowed(self, job: Job, sizes: dict[int, int], outcome: Outcome) -> dict[int, int]:
        """The positions whose holders' policies allow the plan, with their sizes.

        Raises:
            ConfigurationError: the policy does not fit a holder's data.
        """
        for position, units in sizes.items():
            one = job.assignments[position]
            simulated_policy(one.holder, one.plan, units).check_data(units)
            if (refusal := simulated_refusal(one.plan, self._task, units)) is not None:
                outcome.declined[position] = (refusal.code, refusal.sentence)
        return {place: size for place, size in sizes.items() if place not in outcome.declined}

    @contextmanager
    def _failing(
        self, assignment: Assignment, position: int, failed: dict[int, str]
    ) -> Iterator[None]:
        try:
            yield
        except SottoError:
            raise
        except Exception as error:
            logger.exception("%s failed", assignment.holder)
            failed[position] = type(error).__name__

    def _require_separate_units(self, units: Examples) -> None:
        """Look once, at the first units of which there are two: fewer tell nothing."""
        if self._separate or len(units) < 2:
            return
        with torch.random.fork_rng(devices=[]):
            model = self._task.model(len(units)).to(self._device)
        require_separate_units(self._task, model, units)
        self._separate = True

    def _train_block(self, job: Job, part: Sequence[int], outcome: Outcome) -> None:
        chosen = [job.assignments[position] for position in part]
        if not self._separate:
            largest = max((self._data[one.data].train for one in chosen), key=len)
            self._require_separate_units(largest.to(self._device))
        block = self._block(job, part, "train")
        classes = [max(1, size) for size in block.sizes]
        keys = [
            simulation_key("simulation", one.plan.seed, one.holder, job.number) for one in chosen
        ]
        own = self._private(job, part)
        terms = Terms.of([one.plan for one in chosen], classes, self._device)
        work = gradient_sums if terms.summed else train
        with _seeded(keys[0], self._device):
            moved, private = work(
                self._model,
                block,
                terms,
                self._starts(job, part),
                _stacked(own, self._device),
                block_randomness(keys, self._device),
                a_unit=job.a_unit,
            )
        if chosen[0].plan.aggregation.kind == "plain":
            self._sum(job, part, moved, classes, outcome)
        else:
            self._sum_unseen(job, part, moved, classes, keys, outcome)
        if private:
            outcome.private.update(zip(part, _cut(private, own), strict=True))

    def _judge(self, job: Job, part: Sequence[int]) -> Sequence[Figures]:
        held_out = self._block(job, part, "test")
        if not len(held_out.units):
            with torch.random.fork_rng(devices=[]):
                model = self._task.model(1)
            units = held_out.units.to(torch.device("cpu"))
            predictions = self._task.predictions(model, units)
            metrics = [self._task.metrics(predictions, units)] * len(part)
            return self._figures(job, part, metrics, predictions, units, [0] * len(part))
        private = _stacked(self._private(job, part), self._device)
        predictions = predict(self._model, held_out, self._starts(job, part), private)
        test, sizes = held_out.in_order(), held_out.sizes
        metrics = self._task.metrics_by_holder(predictions, test, sizes)
        return self._figures(job, part, metrics, predictions, test, sizes)

    def _figures(
        self,
        job: Job,
        part: Sequence[int],
        metrics: Sequence[dict[str, float]],
        predictions: Tensor,
        test: Examples,
        sizes: Sequence[int],
    ) -> list[Figures]:
        """Exact metrics, and where the plan asks for them, noised histograms, of each holder.

        Args:
            job: of the evaluation.
            part: positions of H assignments.
            metrics: [H].
            predictions: [B, …] of all held-out units, holder by holder.
            test: [B], in the same order.
            sizes: [H] held-out units of each holder, B in sum.
        """
        plans = [job.assignments[position].plan for position in part]
        if all(plan.evaluation.kind != "histogram" for plan in plans):
            return [Figures(each) for each in metrics]
        parts = zip(predictions.split(list(sizes)), test.split(sizes), strict=True)  # type: ignore[no-untyped-call]
        figures = []
        for position, plan, each, (own, units) in zip(part, plans, metrics, parts, strict=True):
            histogram: tuple[int, ...] = ()
            if plan.evaluation.kind == "histogram":
                counts = self._task.histogram(own, units)
                noise = discrete_gaussian(
                    len(counts),
                    plan.evaluation.event().noise_multiplier,
                    evaluation_randomness(plan, job.assignments[position].holder, job.number),
                )
                histogram = tuple((counts + noise).tolist())
            figures.append(Figures(each, histogram))
        return figures

    def _sum(
        self,
        job: Job,
        part: Sequence[int],
        updates: Tensor,
        classes: Sequence[int],
        outcome: Outcome,
    ) -> None:
        """Put updates that the plan allows into the totals, and all others aside."""
        plans = [job.assignments[position].plan for position in part]
        weights = [plan.weight(size) for plan, size in zip(plans, classes, strict=True)]
        inside: list[int] = []
        if job.clip_norm is not None:
            updates, unclipped = clipped_updates(updates, job.clip_norm)
            inside = [int(one) for one in unclipped.tolist()]
        norms = torch.linalg.vector_norm(updates, dim=1)
        bounds = _bounds(plans, self.dimension, job.clip_norm)
        allowed = (norms <= bounds.to(self._device)).tolist()
        summed: dict[int, list[int]] = {}
        aside: list[int] = []
        for row, position in enumerate(part):
            if job.individually or not allowed[row]:
                aside.append(row)
            else:
                summed.setdefault(job.assignments[position].point, []).append(row)
        # All or nothing: of a part that fails, each holder is done again.
        totals: Totals = {}
        for point, rows in summed.items():
            some = updates if len(rows) == len(part) else updates[rows]
            shares = torch.tensor([weights[row] for row in rows], dtype=torch.float64)
            totals[point] = Total(ExactSum(self.dimension))
            within = sum(inside[row] for row in rows) if inside else 0
            totals[point].add(_weighted_sum(some, shares), float(shares.sum()), within)
        gather(outcome.totals, totals)
        for row in aside:
            outcome.singles[part[row]] = updates[row].cpu()
            outcome.weights[part[row]] = weights[row]
            if inside:
                outcome.within[part[row]] = inside[row]

    def _sum_unseen(
        self,
        job: Job,
        part: Sequence[int],
        moved: Tensor,
        classes: Sequence[int],
        keys: Sequence[bytes],
        outcome: Outcome,
    ) -> None:
        """Put what holders would mask into the totals: all of it, as nobody sees a single one.

        Args:
            job: to do.
            part: positions of H assignments.
            moved: their updates, or their sums of gradients: [H, D].
            classes: the size that each declares.
            keys: of their randomness.
            outcome: to write to.

        Raises:
            OutOfRange: one of them cannot be masked.
        """
        totals: Totals = {}
        for row, position in enumerate(part):
            one, randomness = job.assignments[position], SeededRandomness.of_key(keys[row])
            weight = one.plan.weight(classes[row])
            total = totals.setdefault(one.point, Total(ExactSum(self.dimension)))
            total.add(part_of(one.plan, moved[row], weight, randomness), weight)
        gather(outcome.totals, totals)

    def _block(self, job: Job, part: Sequence[int], half: str) -> Block:
        """The units of some assignments, side by side; holders that share data share its rows."""
        keys = [
            (job.assignments[position].data, job.assignments[position].plan.scaling)
            for position in part
        ]
        name = (half, *keys)
        block = self._blocks.get(name)
        if block is None:
            distinct = {key: place for place, key in enumerate(dict.fromkeys(keys))}
            examples = [
                scaled(getattr(self._data[data], half), scaling) for data, scaling in distinct
            ]
            which = [distinct[key] for key in keys]
            block = Block.of(examples, self._task.padding, self._device, which)
            if all(job.assignments[position].plan.cohort is None for position in part):
                self._blocks.put(name, block)  # drawn cohorts do not come again
        return block

    def _starts(self, job: Job, part: Sequence[int]) -> Tensor:
        """Shared parameters that each holder begins with: [H, D]."""
        points = [job.assignments[position].point for position in part]
        parameters = job.parameters.to(self._device)
        if len(set(points)) == 1:
            return parameters[points[0]].expand(len(points), -1)
        return parameters[points]

    def _private(self, job: Job, part: Sequence[int]) -> list[Private]:
        """What each holder keeps from its last round, or starts with as in the Opacus path."""
        if not self._task.private_parameters:
            return [{}] * len(part)
        return [
            job.private.get(position) or self._initial(job.assignments[position])
            for position in part
        ]

    def _initial(self, assignment: Assignment) -> Private:
        units = len(self._data[assignment.data].train)
        seed = derived_seed("private", assignment.plan.seed, assignment.holder)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return private_of(self._task, self._task.model(units))


class Workers(Protocol):
    """Computes jobs, several at once perhaps."""

    def measure(self, assignment: Assignment) -> Cut:
        """See :meth:`BlockTrainer.measure`."""
        ...

    def train(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """The outcome of every job, in their order."""
        ...

    def evaluate(self, jobs: Sequence[Job]) -> Iterator[list[Judged]]:
        """The figures of every job's assignments, in their order."""
        ...

    def close(self) -> None:
        """Let go of processes and machines."""
        ...


class InProcess:
    """Workers that are one: this process does every job when its outcome is asked for.

    Args:
        trainer: does them.
    """

    def __init__(self, trainer: BlockTrainer) -> None:
        self._trainer = trainer

    def measure(self, assignment: Assignment) -> Cut:
        """See :meth:`BlockTrainer.measure`."""
        return self._trainer.measure(assignment)

    def train(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """The outcome of every job, in their order."""
        return map(self._trainer.train, jobs)

    def evaluate(self, jobs: Sequence[Job]) -> Iterator[list[Judged]]:
        """The figures of every job's assignments, in their order."""
        return map(self._trainer.evaluate, jobs)

    def close(self) -> None:
        """Nothing to let go of."""


# -- parts ----------------------------------------------------------------------------------------


class _Shelf:
    """Blocks that were assembled, as many as there is room for.

    Nothing is thrown out for a newcomer: rounds ask for the same blocks in the same order, and
    then a shelf that forgets the oldest would forget each one just before it is asked for.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._blocks: dict[Hashable, Block] = {}

    def get(self, name: Hashable) -> Block | None:
        """The block of that name, if it is here."""
        return self._blocks.get(name)

    def put(self, name: Hashable, block: Block) -> None:
        """Keep a block, if there is room."""
        tensors = block.units.tensors.values()
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if size <= self._room:
            self._room -= size
            self._blocks[name] = block


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Compute with one thread: how a product is cut among threads changes its last bits."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _alike(sizes: Mapping[int, int]) -> list[list[int]]:
    """Positions of assignments, given with their sizes, in blocks of similar ones.

    A block is as wide as its largest holder, so holders of a tenth of its size waste nine tenths.
    """
    order = sorted(sizes, key=lambda position: (-sizes[position], position))
    blocks: list[list[int]] = []
    for position in order:
        if blocks and sizes[position] * UNLIKE >= sizes[blocks[-1][0]]:
            blocks[-1].append(position)
        else:
            blocks.append([position])
    return [sorted(block) for block in blocks]


@contextmanager
def _seeded(key: bytes, device: torch.device) -> Iterator[None]:
    """What layers draw from torch's own generator, as dropout does, follows from the key."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: without a GPU that notes down a traceback for it, every time.
        torch.default_generator.manual_seed(derived_seed("layers", key))
        if device.type == "cuda":
            torch.cuda.manual_seed(derived_seed("layers", key))
        yield


def _bounds(plans: Sequence[TrainingPlan], dimension: int, clip_norm: float | None) -> Tensor:
    """The norm that each plan allows an update: [H] float32."""
    distinct = {id(plan): plan for plan in plans}
    bound = {key: plan.largest_update_norm(dimension, clip_norm) for key, plan in distinct.items()}
    return torch.tensor([bound[id(plan)] for plan in plans])


def _weighted_sum(updates: Tensor, weights: Tensor) -> Tensor:
    """Σ_h weights[h] · updates[h] in double precision: [H, D], [H] → [D]."""
    if bool((weights == 1).all()):
        return updates.sum(0, dtype=torch.float64)
    return (updates.double() * weights.to(updates.device).unsqueeze(1)).sum(0)


def _stacked(own: Sequence[Private], device: torch.device) -> dict[str, Tensor]:
    """Private parameters of H holders side by side, the smaller filled up with zeros: [H, ...]."""
    return {name: _padded([each[name] for each in own]).to(device) for name in own[0]}


def _padded(values: Sequence[Tensor]) -> Tensor:
    widest = [max(sizes) for sizes in zip(*(value.shape for value in values), strict=True)]
    stacked = values[0].new_zeros(len(values), *widest)
    for row, value in zip(stacked, values, strict=True):
        row[tuple(slice(size) for size in value.shape)] = value
    return stacked


def _cut(private: Weights, own: Sequence[Private]) -> list[Private]:
    """Inverse of :func:`_stacked`, on the CPU; ``own`` gives the sizes."""
    here = {name: value.cpu() for name, value in private.items()}
    return [
        {
            name: value[row][tuple(slice(size) for size in each[name].shape)].clone()
            for name, value in here.items()
        }
        for row, each in enumerate(own)
    ]


def _holders_at_once(device: torch.device, bytes_each: int) -> int:
    """How many holders of that size a block has."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(1, free // 2 // bytes_each)
    return max(1, min(MOST, BLOCK_BYTES // bytes_each))
