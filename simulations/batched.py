"""Local training of a block of holders at once: the DP-SGD of ``client/trainer.py``, stacked.

    sample    each holder's units for every step                          Poisson, masked
    for each step:
        forward and backward pass of all units of all holders             StackedModel
        clip      scale each unit's gradient to a norm of at most C       clip_factors
        sum       one batched product a layer
        noise     N(0, (σC)²) from each holder's own stream
        divide    by the public expected batch size
        step      SGD or Adam on the stacked parameters

Sampling, clipping, noise, divisor and the order of random draws are those of the Opacus path, so
that both give the same update up to rounding; tests hold them against each other. Where the noise
is in the sum of holders only, there is one step, which ends with the sum of each holder
(:func:`gradient_sums`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.guarantees import DistributedPrivacy, Privacy
from common.plan import TrainingPlan
from common.privacy.step import clip_factors
from common.tasks.base import Examples, Task
from simulations.layers import Weights
from simulations.optimizers import Adam, Optimizer, Sgd
from simulations.randomness import Streams
from simulations.stack import StackedModel

__all__ = ["Block", "Terms", "gradient_sums", "predict", "train"]

LARGEST_PASS = 2**25
"""Numbers that one forward and backward pass may hold at once (128 MiB), roughly."""


@dataclass(frozen=True)
class Block:
    """The units of H holders, side by side.

    Args:
        units: of all of them, [ΣU, ...].
        first: row of ``units`` at which each holder's begin, [H] int64.
        sizes: how many units each holder has.
    """

    units: Examples
    first: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def of(
        cls,
        parts: Sequence[Examples],
        padding: Mapping[str, float],
        device: torch.device,
        which: Sequence[int] | None = None,
    ) -> Block:
        """Stack data sets.

        Args:
            parts: distinct data sets.
            padding: as in :attr:`Task.padding`.
            device: where they go.
            which: of ``parts``, for each holder; None for one holder each.
        """
        starts, row = [], 0
        for part in parts:
            starts.append(row)
            row += len(part)
        chosen = range(len(parts)) if which is None else which
        return cls(
            Examples.concatenate(parts, padding).to(device),
            torch.tensor([starts[index] for index in chosen], device=device),
            tuple(len(parts[index]) for index in chosen),
        )

    def __len__(self) -> int:
        return len(self.sizes)

    def in_order(self) -> Examples:
        """Every holder's units, holder by holder; shared ones as often as they are held."""
        if sum(self.sizes) == len(self.units):
            return self.units
        starts = self.first.tolist()
        rows = [torch.arange(at, at + size) for at, size in zip(starts, self.sizes, strict=True)]
        return self.units.take(torch.cat(rows).to(self.first.device))


@dataclass(frozen=True)
class Terms:
    """What the plans of a block's holders say, stacked: numbers of shape [H, 1] float32.

    Holders may differ in everything but whether there is privacy, and which optimizer.

    Args:
        private: whether gradients are clipped, and noised unless ``summed``.
        summed: whether a sum of gradients is wanted and no update; noise is added to the sum.
        adam: whether the local optimizer is Adam.
        steps: k of each holder.
        rates: q of each holder.
        learning_rate: of the local optimizer.
        momentum: of local SGD; None where it is 0 everywhere.
        pull: FedProx's μ; None where it is 0 everywhere.
        clip_norm: C.
        noise: σ·C/B, standard deviation of the noise in the mean gradient.
        share: 1/B, the public divisor; 1 where a sum is wanted.
    """

    private: bool
    summed: bool
    adam: bool
    steps: tuple[int, ...]
    rates: Tensor
    learning_rate: Tensor
    momentum: Tensor | None
    pull: Tensor | None
    clip_norm: Tensor
    noise: Tensor
    share: Tensor

    @classmethod
    def of(
        cls, plans: Sequence[TrainingPlan], size_classes: Sequence[int], device: torch.device
    ) -> Terms:
        """Stack the plans of H holders of these declared sizes."""

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64).unsqueeze(1).float().to(device)

        def unless_zero(values: Sequence[float]) -> Tensor | None:
            return column(values) if any(values) else None

        first = plans[0]
        summed = first.privacy.kind == "distributed"
        divisors = [
            1.0 if summed else plan.divisor(size)
            for plan, size in zip(plans, size_classes, strict=True)
        ]
        clip, sigma = zip(*(_clip_and_noise(plan) for plan in plans), strict=True)
        return cls(
            private=summed or first.privacy.kind == "dp",
            summed=summed,
            adam=first.optimizer == "adam",
            steps=tuple(plan.local_steps for plan in plans),
            rates=torch.tensor([plan.sampling_rate for plan in plans], dtype=torch.float64),
            learning_rate=column([plan.learning_rate for plan in plans]),
            momentum=unless_zero([plan.momentum for plan in plans]),
            pull=unless_zero([plan.strategy.proximal_mu for plan in plans]),
            clip_norm=column(clip),
            noise=column([c * s / b for c, s, b in zip(clip, sigma, divisors, strict=True)]),
            share=column([1.0 / divisor for divisor in divisors]),
        )

    @property
    def plain(self) -> bool:
        """Whether a step is parameters − learning rate · gradient of units, and nothing else."""
        simple = self.momentum is None and self.pull is None
        return simple and not self.adam and not self.private

    def optimizer(self) -> Optimizer:
        """A fresh one: holders keep no optimizer state between rounds."""
        if self.adam:
            return Adam(self.learning_rate)
        return Sgd(self.learning_rate, self.momentum)


def _clip_and_noise(plan: TrainingPlan) -> tuple[float, float]:
    """C and σ of a holder's step; of a plan without privacy, numbers that nothing reads."""
    if isinstance(plan.privacy, DistributedPrivacy):
        return plan.privacy.clip_norm, 0.0
    if not isinstance(plan.privacy, Privacy):
        return 1.0, 0.0
    event = plan.privacy.event(plan.sampling_rate, plan.local_steps)
    return plan.privacy.clip_norm, event.noise_multiplier


def train(
    model: StackedModel,
    block: Block,
    terms: Terms,
    starts: Tensor,
    private: Weights,
    streams: Streams,
    *,
    a_unit: int = 64,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Every holder's local steps.

    Args:
        model: on the block's device.
        block: the holders' training units.
        terms: what their plans say.
        starts: shared parameters that each begins with, [H, D]; may be expanded.
        private: private parameters by name, each [H, ...].
        streams: the holders' randomness.
        a_unit: numbers that the layers keep of one unit during a pass; bounds the memory.

    Returns:
        The updates new − old, [H, D], and the private parameters after them.
    """
    parameters = starts.clone(memory_format=torch.contiguous_format)
    private = {name: value.clone() for name, value in private.items()}
    model.bind(parameters, private, training=True)
    optimizer = terms.optimizer()
    most = max(1, LARGEST_PASS // (len(block) * a_unit))
    for sample in _samples(block, terms, streams):
        batches = _batches(model.task, block, sample, streams, most)
        if terms.plain and sample.rows.shape[1] <= most:
            moved = _descend(model, terms, sample, batches, parameters)
        else:
            gradients = _noise(terms, parameters, streams)
            moved = _add_gradients(model, terms, sample, batches, gradients)
            if terms.pull is not None:
                gradients += terms.pull * (parameters - starts)
            optimizer.step(parameters, gradients, sample.active)
        _step_private(model.task, private, moved, sample.active)
    return parameters - starts, private


def gradient_sums(
    model: StackedModel,
    block: Block,
    terms: Terms,
    starts: Tensor,
    private: Weights,
    streams: Streams,
    *,
    a_unit: int = 64,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Every holder's sum of clipped gradients where it starts: what ``Trainer.gradient_sum`` gives.

    Without noise, so it is no release. Up to the rounding of float32: this is a simulation.

    Args:
        model: on the block's device.
        block: the holders' training units.
        terms: what their plans say, ``summed``.
        starts: shared parameters that each begins with, [H, D]; may be expanded.
        private: private parameters by name, each [H, ...].
        streams: the holders' randomness.
        a_unit: as in :func:`train`.

    Returns:
        The sums, [H, D], and the private parameters after a step of their own.
    """
    parameters = starts.contiguous()
    private = {name: value.clone() for name, value in private.items()}
    model.bind(parameters, private, training=True)
    most = max(1, LARGEST_PASS // (len(block) * a_unit))
    (sample,) = _samples(block, terms, streams)
    batches = _batches(model.task, block, sample, streams, most)
    sums = torch.zeros_like(parameters)
    moved = _add_gradients(model, terms, sample, batches, sums)
    _step_private(model.task, private, moved, sample.active)
    return sums, private


def predict(model: StackedModel, block: Block, parameters: Tensor, private: Weights) -> Tensor:
    """The task's predictions for every held-out unit, holder by holder: [ΣU, ...].

    Args:
        model: on the block's device.
        block: the holders' held-out units.
        parameters: shared, [H, D]; may be expanded.
        private: private parameters by name, each [H, ...].
    """
    model.bind(parameters, private, training=False)
    index, inside = _everyone(block)
    rows = block.first.unsqueeze(1) + index
    most = max(1, model.task.units_at_a_time // max(1, len(block)))
    parts = []
    for start in range(0, index.shape[1], most):
        some = rows[:, start : start + most]
        predictions = model.predict(block.units.take(some.flatten()))
        parts.append(predictions.view(*some.shape, *predictions.shape[1:]))
    return torch.cat(parts, dim=1)[inside]


# -- sampling -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sample:
    """The units of one step.

    Args:
        rows: of the block's units, [H, B]; holders with fewer repeat one of theirs.
        counted: 1 where a unit was sampled, 0 where it only fills up: [H, B] float32.
        counts: units sampled: [H, 1] float32.
        numbers: the same, where the host can read them without waiting: [H].
        active: whether each holder takes this step, [H, 1] bool; None if all do.
    """

    rows: Tensor
    counted: Tensor
    counts: Tensor
    numbers: Sequence[int]
    active: Tensor | None


def _samples(block: Block, terms: Terms, streams: Streams) -> Iterator[_Sample]:
    """Every step's sample; one look at the device for all of them."""
    steps = max(terms.steps)
    if bool((terms.rates == 1).all()):
        index, inside = _everyone(block)
        counts = inside.sum(1).unsqueeze(1).expand(-1, steps)
        index, inside = (tensor.unsqueeze(1).expand(-1, steps, -1) for tensor in (index, inside))
        numbers = [block.sizes] * steps
    else:
        rates = terms.rates.to(block.first.device).view(-1, 1, 1)
        taken = streams.uniform(block.sizes, steps) < rates
        counts = taken.sum(2)
        numbers = list(zip(*counts.tolist(), strict=True))
        index, inside = _packed(taken, counts, max(map(max, numbers)))
    idle = _idle(terms, counts)
    rows, counted = index + block.first.view(-1, 1, 1), inside.float()
    sizes = counts.float()
    for step in range(steps):
        width = max(numbers[step])
        yield _Sample(
            rows[:, step, :width],
            counted[:, step, :width],
            sizes[:, step : step + 1],
            numbers[step],
            None if idle is None else ~idle[:, step : step + 1],
        )


def _everyone(block: Block) -> tuple[Tensor, Tensor]:
    """Each holder's units in order, [H, B] int64, and which of these are there, [H, B] bool."""
    sizes = torch.tensor(block.sizes, device=block.first.device).unsqueeze(1)
    index = torch.arange(max(block.sizes), device=block.first.device).expand(len(block), -1)
    inside = index < sizes
    return torch.where(inside, index, 0), inside


def _packed(taken: Tensor, counts: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The places where ``taken`` holds, to the front of each row.

    Args:
        taken: [H, k, n] bool.
        counts: how many in each row, [H, k].
        width: the largest count.

    Returns:
        Places in ascending order, then the first again (0 in an empty row), [H, k, width] int64;
        and which of these are sampled, bool.
    """
    holders, steps, units = taken.shape
    place = torch.arange(width, device=taken.device)
    inside = place < counts.unsqueeze(2)
    packed = torch.zeros(holders, steps, width, dtype=torch.int64, device=taken.device)
    # Both sides list rows in the same order, so each row's places meet its own slots.
    packed[inside] = taken.flatten().nonzero().squeeze(1) % max(1, units)
    return torch.where(inside, packed, packed[..., :1]) if width else packed, inside


def _idle(terms: Terms, counts: Tensor) -> Tensor | None:
    """Steps that a holder does not take, [H, k] bool: it has done its own, or has no gradient.

    Without privacy an empty batch has no mean; with it, it is an ordinary step of pure noise.
    """
    steps = torch.tensor(terms.steps, device=counts.device).unsqueeze(1)
    unequal = len(set(terms.steps)) > 1
    if terms.private and not unequal:
        return None
    idle = torch.arange(counts.shape[1], device=counts.device) >= steps
    return idle if terms.private else idle | (counts == 0)


# -- one step -------------------------------------------------------------------------------------


def _noise(terms: Terms, parameters: Tensor, streams: Streams) -> Tensor:
    """What a step's gradient begins with: noise of the mean, or nothing; [H, D]."""
    if not terms.private:
        return torch.zeros_like(parameters)
    return streams.normal(parameters.shape[1]).mul_(terms.noise)


def _batches(
    task: Task, block: Block, sample: _Sample, streams: Streams, most: int
) -> Iterator[tuple[Tensor, Examples]]:
    """A step's units, at most ``most`` of each holder at a time.

    Yields:
        Which count, [H, b] float32, and what the loss sees of them, [H·b, ...].
    """
    holders, width = sample.rows.shape
    if task.draws:
        draws = streams.draws(sample.numbers, task.draws)
    else:
        draws = torch.empty(holders, width, 0, dtype=torch.float64, device=sample.rows.device)
    for start in range(0, width, most):
        part = slice(start, start + most)
        units = block.units.take(sample.rows[:, part].flatten())
        yield sample.counted[:, part], task.batch(units, draws[:, part].flatten(0, 1))


def _add_gradients(
    model: StackedModel,
    terms: Terms,
    sample: _Sample,
    batches: Iterable[tuple[Tensor, Examples]],
    into: Tensor,
) -> dict[str, Tensor]:
    """Add each holder's mean gradient to ``into``, [H, D]; return those of private parameters."""
    moved: dict[str, Tensor] = {}
    for counted, batch in batches:
        for name, gradient in model.backward(batch, counted).items():
            moved[name] = moved[name] + gradient if name in moved else gradient
        model.add_sums(_factors(model, terms, sample, counted), into)
    return moved


def _descend(
    model: StackedModel,
    terms: Terms,
    sample: _Sample,
    batches: Iterable[tuple[Tensor, Examples]],
    parameters: Tensor,
) -> dict[str, Tensor]:
    """A step of plain gradient descent: the same, added to the parameters themselves.

    That saves passes over [H, D], and where a layer is sparse in its units, as an embedding is,
    only the rows that occur are touched. (Noise is dense: with it nothing would be saved.)
    """
    moved: dict[str, Tensor] = {}
    rate = terms.learning_rate
    if sample.active is not None:
        rate = torch.where(sample.active, rate, 0.0)
    for counted, batch in batches:
        moved = model.backward(batch, counted)
        model.add_sums(_factors(model, terms, sample, counted) * -rate, parameters)
    return moved


def _factors(model: StackedModel, terms: Terms, sample: _Sample, counted: Tensor) -> Tensor:
    """What each unit's gradient is scaled by: clipped and divided by B, or by the batch's size."""
    if not terms.private:
        if 0 in sample.numbers:  # what fills up an empty batch must not add 0 · nan
            model.keep(counted > 0)
        return counted / sample.counts.clamp(min=1.0)
    norms = model.square_norms().sqrt()
    finite = norms.isfinite()
    # A look at the result would make a GPU wait; on a CPU it saves a pass over everything.
    if finite.is_cuda or not bool(finite.all()):
        model.keep(finite)
    return clip_factors(norms, terms.clip_norm) * counted * terms.share


def _step_private(task: Task, private: Weights, gradients: Weights, active: Tensor | None) -> None:
    """Plain SGD on what stays with the holder, in place."""
    for name, gradient in gradients.items():
        if active is not None:
            gradient = torch.where(active.view(-1, *[1] * (gradient.dim() - 1)), gradient, 0.0)
        private[name].sub_(gradient, alpha=task.private_learning_rate)
