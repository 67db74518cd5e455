"""Local training: k DP-SGD steps with Opacus, from the coordinator's parameters to an update."""

from __future__ import annotations

import hashlib
import math
import re
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from common.errors import ConfigurationError
from common.guarantees import DistributedPrivacy, Privacy
from common.plan import TrainingPlan
from common.privacy.noise import Randomness, poisson_sample
from common.privacy.step import check_model, clipped_sum, noisy_mean
from common.tasks.base import Examples, Task
from common.tasks.parameters import (
    load_private,
    load_shared,
    named_shared,
    private_of,
    shared_of,
)
from common.tasks.scaling import scaled
from common.tasks.separation import require_separate_units

__all__ = ["Trainer", "pick_device"]

LARGEST_GRADIENT_CHUNK = 2**26
"""Numbers of per-unit gradient held at once (256 MiB); larger batches go through in parts."""

ROWS = 64
"""Units go through a model in multiples of so many. How a row of a matrix product is rounded
depends on how many rows there are, as the last few go through another kernel. With parameters on
which a unit's output is all cancellation, rounding would decide its clipped gradient, and one unit
that comes or goes would move the gradients of others."""


def pick_device(name: str) -> torch.device:
    """``auto`` (a GPU where there is one), ``cpu`` or ``cuda:N``.

    Raises:
        ConfigurationError: another name, or a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", name):
        raise ConfigurationError(f"device must be auto, cpu or cuda:N, got {name!r}")
    device, gpus = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ConfigurationError(f"device {name!r} is not there: torch sees {gpus} GPUs")
    return device


class _PrivateOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimizer around our step: clip (non-finite gradients count zero), sum, noise."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, randomness: Randomness, **settings: float
    ) -> None:
        super().__init__(optimizer, loss_reduction="mean", **settings)
        self._randomness = randomness

    def clip_and_accumulate(self) -> None:
        """Add the clipped sum of this chunk to what earlier chunks left."""
        sums = clipped_sum(self.grad_samples, self.max_grad_norm)
        for parameter, total in zip(self.params, sums, strict=True):
            seen = parameter.summed_grad
            parameter.summed_grad = total if seen is None else seen + total

    def add_noise(self) -> None:
        """The noisy sum over the public batch size, as every parameter's gradient."""
        means = noisy_mean(
            [parameter.summed_grad for parameter in self.params],
            noise_multiplier=self.noise_multiplier,
            clip_norm=self.max_grad_norm,
            expected_batch_size=self.expected_batch_size,
            randomness=self._randomness,
        )
        for parameter, mean in zip(self.params, means, strict=True):
            parameter.grad = mean.view_as(parameter)

    def scale_grad(self) -> None:
        """Nothing is left to divide: :meth:`add_noise` has."""


class _Step(Protocol):
    """One optimizer step over a sampled batch, whatever its privacy."""

    def __call__(self, batch: Examples) -> None: ...


class Trainer:
    """A warm model and its data; trains on request.

    Args:
        task: what to learn.
        data: the holder's training units.
        device: where model and data live between rounds.
        seed: of the private parameters' start; None for an unpredictable one. Each unit's must be
            independent of who else is there, so a known seed is for simulations.

    Raises:
        ConfigurationError: the model has layers that mix examples (batch norm).

    Attributes:
        on_step: called after every local step, as many times as the plan has, so that somebody can
            say that the work goes on. How many parts a large batch goes through in depends on the
            data, and is not told.
    """

    def __init__(
        self, task: Task, data: Examples, device: torch.device, *, seed: int | None = None
    ) -> None:
        self.task = task
        self.device = device
        self.units = len(data)
        self._data = data.to(device)
        model = self._new_model(secrets.randbits(63) if seed is None else seed)
        check_model(model)
        self._model = model
        self._separate = False
        self._initial_private = private_of(task, model)
        self._gradients: GradSampleModule | None = None
        self.on_step: Callable[[], None] = _nobody_asks

    def warm_up(self) -> None:
        """Do now what the first round would wait for: hooks, and torch's late imports."""
        model = self._per_unit_gradients()
        torch.optim.SGD(model.parameters(), lr=1.0)

    @property
    def dimension(self) -> int:
        """D, the number of shared parameters."""
        return sum(parameter.numel() for _, parameter in named_shared(self.task, self._model))

    @property
    def private_bytes(self) -> int:
        """Bytes of the private parameters; their number follows that of the units."""
        return sum(value.nbytes for value in self._initial_private.values())

    @property
    def units_digest(self) -> str:
        """Names the training units and their order; private parameters belong to these only."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._data.tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def evaluate(
        self, parameters: Tensor, private: Mapping[str, Tensor] | None, test: Examples
    ) -> dict[str, float]:
        """The task's metrics of the given parameters on held-out units."""
        test = test.to(self.device)
        return self.task.metrics(self.predictions(parameters, private, test), test)

    def predictions(
        self, parameters: Tensor, private: Mapping[str, Tensor] | None, test: Examples
    ) -> Tensor:
        """What the task's metrics and cells need to know of held-out units: [B, …]."""
        self._load(parameters, private)
        self._model.eval()
        predictions = self.task.predictions(self._model, _filled_up(test.to(self.device), ROWS))
        return predictions[: len(test)]

    def train(
        self,
        plan: TrainingPlan,
        parameters: Tensor,
        private: Mapping[str, Tensor] | None,
        randomness: Randomness,
        *,
        divisor: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``plan.local_steps`` steps from ``parameters``.

        Args:
            plan: calibrated.
            parameters: shared, [D] float32.
            private: this holder's private parameters after its last round; None for the first.
            randomness: of sampling, noise and the task's own draws.
            divisor: B, the public expected batch size.

        Returns:
            The update new − old [D] float32 on the CPU, and the private parameters after it.
        """
        self._load(parameters, private)
        step = self._step(plan, parameters.to(self.device), randomness, divisor)
        self._model.train()
        try:
            for _ in range(plan.local_steps):
                step(self._sample(plan, randomness))
                self.on_step()
        except BaseException:
            # Opacus' hooks keep what a broken step left in them, and would fail every later one.
            self._unhook()
            raise
        return shared_of(self.task, self._model) - parameters, private_of(self.task, self._model)

    def gradient_sum(
        self,
        plan: TrainingPlan,
        parameters: Tensor,
        private: Mapping[str, Tensor] | None,
        randomness: Randomness,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over all units of each one's gradient at ``parameters``, clipped, without noise.

        It must not leave as it is: :func:`common.privacy.distributed.noised_steps` adds this
        holder's share of the noise, which protects only in the sum with other holders'.

        Gradients are computed in the model's float32; norms, clipping and the sum in float64,
        whose rounding moves a sum of about two million clipped gradients by less than a thousandth
        of C.

        Args:
            plan: calibrated, its noise in the sum.
            parameters: shared, [D] float32.
            private: this holder's private parameters after its last round; None for the first.
            randomness: of the task's own draws.

        Returns:
            The sum, [D] float64 on the CPU, and the private parameters after a step of their own.

        Raises:
            ConfigurationError: the plan's noise is not in the sum.
        """
        if not isinstance(plan.privacy, DistributedPrivacy):
            raise ConfigurationError(
                f"a sum leaves without its full noise where the noise is in the sum of holders "
                f"only, and the plan's privacy is {plan.privacy.kind!r}"
            )
        self._load(parameters, private)
        optimizer = self._private_optimizer()
        model = self._per_unit_gradients()
        total = torch.zeros(self.dimension, dtype=torch.float64)
        self._model.train()
        try:
            _zero(optimizer)
            for part, _ in self._chunks(self._sample(plan, randomness)):
                total += self._clipped_sum(model, part, plan.privacy.clip_norm)
            if optimizer is not None:
                optimizer.step()
            self.on_step()
        except BaseException:
            # As in train: what a broken step left would fail every later one.
            self._unhook()
            raise
        return total, private_of(self.task, self._model)

    # -- one step ----------------------------------------------------------------------------

    def _clipped_sum(self, model: GradSampleModule, batch: Examples, clip_norm: float) -> Tensor:
        """Of a batch, in float64: [D] on the CPU."""
        shared: list[Any] = self._shared_parameters()  # Opacus gives them grad_sample
        for parameter in shared:
            parameter.grad = parameter.grad_sample = None
        self._backward(model, shared, batch)
        sums = clipped_sum([parameter.grad_sample.double() for parameter in shared], clip_norm)
        return torch.cat([each.flatten() for each in sums]).cpu()

    def _sample(self, plan: TrainingPlan, randomness: Randomness) -> Examples:
        """The batch of a Poisson sample of the units."""
        index = poisson_sample(self.units, plan.sampling_rate, randomness)
        shape = (len(index), self.task.draws)
        if self.task.draws:
            draws = randomness.draws(math.prod(shape)).view(shape)
        else:
            draws = torch.empty(shape, dtype=torch.float64)
        units = scaled(self._data.take(index.to(self.device)), plan.scaling)
        return self.task.batch(units, draws.to(self.device))

    def _step(
        self, plan: TrainingPlan, start: Tensor, randomness: Randomness, divisor: float
    ) -> _Step:
        shared = self._optimizer(plan)
        private = self._private_optimizer()
        pull = self._proximal_pull(plan, start)
        if isinstance(plan.privacy, Privacy):
            return self._private_step(plan.privacy, shared, private, pull, randomness, divisor)
        return self._exact_step(shared, private, pull)

    def _exact_step(
        self,
        shared: torch.optim.Optimizer,
        private: torch.optim.Optimizer | None,
        pull: Callable[[], None],
    ) -> _Step:
        """The mean gradient of the batch at hand; without privacy its size is nobody's secret."""
        self._unhook()

        def step(batch: Examples) -> None:
            if not len(batch):
                return
            _zero(shared, private)
            self.task.loss(self._model, batch).sum().backward()  # type: ignore[no-untyped-call]
            for group in shared.param_groups:
                for parameter in group["params"]:
                    parameter.grad /= len(batch)
            pull()
            shared.step()
            if private is not None:
                private.step()

        return step

    def _private_step(
        self,
        privacy: Privacy,
        shared: torch.optim.Optimizer,
        private: torch.optim.Optimizer | None,
        pull: Callable[[], None],
        randomness: Randomness,
        divisor: float,
    ) -> _Step:
        """DP-SGD (Abadi et al. 2016, algorithm 1) with the sum divided by the public B."""
        model = self._per_unit_gradients()
        optimizer = _PrivateOptimizer(
            shared,
            randomness,
            noise_multiplier=privacy.event(1.0, 1).noise_multiplier,
            max_grad_norm=privacy.clip_norm,
            expected_batch_size=divisor,
        )
        optimizer.attach_step_hook(lambda _: pull())

        def step(batch: Examples) -> None:
            _zero(optimizer, private)
            for part, last in self._chunks(batch):
                optimizer.signal_skip_step(do_skip=not last)
                self._backward(model, optimizer.params, part)
                optimizer.step()
                if not last:
                    optimizer.zero_grad(set_to_none=True)
            if private is not None:
                private.step()

        return step

    def _backward(
        self, model: GradSampleModule, parameters: Sequence[Any], batch: Examples
    ) -> None:
        """Leaves each unit's gradient in ``parameters``."""
        if len(batch):
            with warnings.catch_warnings():
                # torch warns that inputs of the first layer need no gradient; they never do here.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                whole = _filled_up(batch, min(ROWS, self._chunk_units))
                losses = self.task.loss(model, whole)
                self._require_one_loss_a_unit(len(whole), losses)
                losses[: len(batch)].sum().backward()  # type: ignore[no-untyped-call]
            self._require_one_gradient_a_unit(len(whole))
            for parameter in parameters:
                parameter.grad_sample = parameter.grad_sample[: len(batch)]
        else:
            # An empty Poisson batch is ordinary: its clipped sum is zero, and noise is added.
            for parameter in parameters:
                parameter.grad_sample = torch.zeros((0, *parameter.shape), device=self.device)

    def _require_one_loss_a_unit(self, units: int, losses: Tensor) -> None:
        if losses.shape != (units,):
            raise ConfigurationError(
                f"the loss of task {self.task.name!r} has shape {list(losses.shape)}, expected "
                f"one value for each of {units} units"
            )

    def _require_one_gradient_a_unit(self, units: int) -> None:
        """What clipping bounds is one unit's whole gradient; more rows would each get a bound.

        Raises:
            ConfigurationError: the task's model does not keep one entry for each unit.
        """
        for name, parameter in named_shared(self.task, self._model):
            rows = getattr(parameter, "grad_sample", None)
            if not isinstance(rows, Tensor) or len(rows) != units:
                found = len(rows) if isinstance(rows, Tensor) else "several sets of"
                raise ConfigurationError(
                    f"task {self.task.name!r}: parameter {name!r} got {found} gradients for "
                    f"{units} units; keep dimension 0 of every layer's input for the unit, as in "
                    "[B, T, d] and not [B*T, d]"
                )

    def _unhook(self) -> None:
        """Take Opacus' hooks off the model."""
        if self._gradients is not None:
            self._gradients.to_standard_module()
            self._gradients = None

    def _chunks(self, batch: Examples) -> Iterator[tuple[Examples, bool]]:
        """The batch in parts whose per-unit gradients fit in memory, and whether it is the last."""
        parts = torch.split(torch.arange(len(batch), device=self.device), self._chunk_units)
        if len(parts) <= 1:
            yield batch, True
            return
        for number, index in enumerate(parts, start=1):
            yield batch.take(index), number == len(parts)

    @property
    def _chunk_units(self) -> int:
        """Units whose gradients are held at once: a multiple of :data:`ROWS`, or fewer."""
        size = max(1, LARGEST_GRADIENT_CHUNK // self.dimension)
        return size - size % ROWS if size > ROWS else size

    def _proximal_pull(self, plan: TrainingPlan, start: Tensor) -> Callable[[], None]:
        """FedProx (Li et al. 2020, eq. 2): adds μ(w − w_start) to the gradient.

        It depends on parameters only, so it comes after the noise and costs no privacy.
        """
        mu = plan.strategy.proximal_mu
        parameters = self._shared_parameters()
        anchors = torch.split(start, [parameter.numel() for parameter in parameters])

        def pull() -> None:
            with torch.no_grad():
                for parameter, anchor in zip(parameters, anchors, strict=True):
                    if parameter.grad is not None:
                        parameter.grad += mu * (parameter - anchor.view_as(parameter))

        return pull if mu else lambda: None

    # -- the warm model ----------------------------------------------------------------------

    def _load(self, parameters: Tensor, private: Mapping[str, Tensor] | None) -> None:
        load_shared(self.task, self._model, parameters)
        load_private(self._model, dict(private or self._initial_private))

    def _per_unit_gradients(self) -> GradSampleModule:
        """The model under Opacus' hooks, wrapped once.

        Private parameters get ordinary gradients: each belongs to one unit and never leaves, so
        they are hidden from Opacus, which hooks only modules that have something to train.
        """
        if self._gradients is None:
            self._require_separate_units()
            private = [
                parameter
                for name, parameter in self._model.named_parameters()
                if name in self.task.private_parameters
            ]
            for parameter in private:
                parameter.requires_grad_(False)
            self._gradients = GradSampleModule(self._model, loss_reduction="sum")
            for parameter in private:
                parameter.requires_grad_(True)
        return self._gradients

    def _require_separate_units(self) -> None:
        """Once, and on a model of our own.

        On one that was sent, how far rounding parts two equal losses is for its sender to choose;
        whether it refuses would then answer questions about the first units.

        Raises:
            ConfigurationError: a unit's loss depends on who else is in the batch.
        """
        if not self._separate:
            require_separate_units(self.task, self._new_model(0), self._data)
            self._separate = True

    def _new_model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.task.model(self.units).to(self.device)

    def _optimizer(self, plan: TrainingPlan) -> torch.optim.Optimizer:
        parameters = self._shared_parameters()
        if plan.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=plan.learning_rate)
        return torch.optim.SGD(parameters, lr=plan.learning_rate, momentum=plan.momentum)

    def _shared_parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in named_shared(self.task, self._model)]

    def _private_optimizer(self) -> torch.optim.Optimizer | None:
        if not self.task.private_parameters:
            return None
        parameters: list[nn.Parameter] = [
            parameter
            for name, parameter in self._model.named_parameters()
            if name in self.task.private_parameters
        ]
        return torch.optim.SGD(parameters, lr=self.task.private_learning_rate)


def _nobody_asks() -> None:
    """What is called after a step unless somebody wants to know."""


def _filled_up(units: Examples, multiple: int) -> Examples:
    """Units and, behind them, the first one again until there is a multiple of so many."""
    missing = -len(units) % multiple
    if not missing or not len(units):
        return units
    device = next(iter(units.tensors.values())).device
    index = torch.arange(len(units) + missing, device=device)
    return units.take(torch.where(index < len(units), index, 0))


def _zero(*optimizers: torch.optim.Optimizer | None) -> None:
    for optimizer in optimizers:
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
