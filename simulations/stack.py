"""A task's model, stacked: the task's own code runs once for the units of many holders.

The task's loss sees a model and a batch, as always; the batch holds the units of H holders, B of
each, and the model's layers have been given stacked forwards (:mod:`simulations.layers`) that use
holder h's parameters for row h·B + b. This is sound because entry i of a loss depends on unit i
only: that is the Task contract, and clipping rests on it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.func import functional_call

from common.errors import ConfigurationError
from common.privacy.step import check_model
from common.tasks.base import Examples, Task
from common.tasks.parameters import named_shared
from simulations.layers import Call, Rule, Weights, rule_for

__all__ = ["StackedModel"]


@dataclass(frozen=True)
class _Slot:
    """Where one parameter lies: columns of the flat vector, and its shape."""

    start: int
    shape: torch.Size

    def view(self, flat: Tensor) -> Tensor:
        """[H, D] → [H, *shape], without a copy."""
        columns = flat[:, self.start : self.start + self.shape.numel()]
        return columns.view(len(flat), *self.shape)


class _StackedLayer:
    """Takes the place of one layer's ``forward``.

    Args:
        name: of the layer in the model.
        rule: what it does.
        slots: its parameters, by their name in the layer.
    """

    def __init__(self, name: str, rule: Rule, slots: Mapping[str, _Slot]) -> None:
        self.name, self.rule, self.slots = name, rule, slots
        self.weights: Weights = {}
        self.calls: list[Call] = []
        self._outputs: list[tuple[Tensor, int]] = []
        self._holders, self._rows = 0, 0
        self._training = False

    def bind(self, parameters: Tensor, *, training: bool) -> None:
        """Use these parameters, [H, D], from now on; note calls in training."""
        self.rule.layer.train(training)
        self.weights = self.views(parameters)
        self._holders, self._training = len(parameters), training

    def views(self, flat: Tensor) -> Weights:
        """This layer's part of [H, D], by parameter."""
        return {name: slot.view(flat) for name, slot in self.slots.items()}

    def expect(self, rows: int) -> None:
        """Forget earlier calls; the next batch has so many rows."""
        self.calls, self._outputs, self._rows = [], [], rows

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self.rule.forward(self.weights, self._holders, self._record, *inputs, **named)

    def _record(self, output: Tensor, saved: Mapping[str, Tensor], about: object = None) -> Tensor:
        if output.shape[0] != self._rows:
            raise ConfigurationError(
                f"layer {self.name!r} got {output.shape[0]} rows for {self._rows} units; keep "
                "dimension 0 of every layer's input for the unit, as in [B, T, d] and not [B*T, d]"
            )
        if self._training:
            if not output.requires_grad:
                output.requires_grad_()  # the first layer's: data and parameters need none
            self.calls.append(Call(saved, about))
            self._outputs.append((output, output._version))
        return output

    @property
    def outputs(self) -> list[Tensor]:
        """Of every call.

        Raises:
            ConfigurationError: one was changed since, so that its gradient would be another's.
        """
        if any(output._version != version for output, version in self._outputs):
            raise ConfigurationError(
                f"the output of layer {self.name!r} is changed in place; use an operation that "
                "makes a new tensor, or --engine opacus"
            )
        return [output for output, _ in self._outputs]

    def receive(self, gradients: Iterable[Tensor | None]) -> None:
        """Note the gradient of each output, and let go of the graph."""
        for call, gradient in zip(self.calls, gradients, strict=True):
            if gradient is not None:
                shape = (self._holders, self._rows // self._holders, *gradient.shape[1:])
                call.grad = gradient.reshape(shape)
        self._outputs = []

    @property
    def reached(self) -> list[Call]:
        """Calls whose output the loss depends on."""
        return [call for call in self.calls if call.grad is not None]


class StackedModel:
    """The task's model, for many holders at once.

    One thread at a time may use it.

    Args:
        task: what is learned.
        device: of everything.

    Raises:
        ConfigurationError: the model has layers that mix examples, or parameters that cannot be
            stacked.
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task, self.device = task, device
        with torch.random.fork_rng(devices=[]):
            self.template = task.model(1).to(device)
        check_model(self.template)
        for module in self.template.modules():
            if getattr(module, "inplace", False):
                setattr(module, "inplace", False)  # noqa: B010 - the same numbers in a new tensor
            if isinstance(module, nn.TransformerEncoderLayer):
                # Its shortcut in evaluation reads its layers' parameters instead of calling them.
                torch.backends.mha.set_fastpath_enabled(False)
        slots = _shared_slots(task, self.template)
        self.dimension = sum(slot.shape.numel() for slot in slots.values())
        self._layers: list[_StackedLayer] = []
        self._private_layers: list[_PrivateLayer] = []
        self._private: dict[str, Tensor] = {}
        for prefix, layer in list(_owners(self.template)):
            self._replace(prefix, layer, slots)

    def bind(self, parameters: Tensor, private: Weights, *, training: bool) -> None:
        """Compute with these parameters from now on.

        Args:
            parameters: shared ones, [H, D]; may change in place.
            private: by name, each [H, ...]; may change in place.
            training: whether gradients will be asked for.
        """
        self.template.train(training)
        for layer in self._layers:
            layer.bind(parameters, training=training)
        self._private = {
            name: value.detach().requires_grad_(training) for name, value in private.items()
        }
        for private_layer in self._private_layers:
            private_layer.layer.train(training)
            private_layer.bind(self._private)

    def predict(self, units: Examples) -> Tensor:
        """The task's predictions for H·B held-out units, [H·B, ...]."""
        self._expect(len(units))
        with torch.no_grad():
            return self.task.predict(self.template, units)

    def backward(self, batch: Examples, counted: Tensor) -> dict[str, Tensor]:
        """Forward and backward pass of the losses of H·B units.

        Args:
            batch: [H·B, ...].
            counted: [H, B] float32, 1 where a unit counts and 0 where it only fills up.

        Returns:
            The gradient of the sum of the units that count for each private parameter, [H, ...].

        Raises:
            ConfigurationError: the task's loss or model does not keep one entry for each unit, or
                reaches a parameter without calling its layer.
        """
        rows = counted.numel()
        self._expect(rows)
        with _in_place_explained():
            losses = self.task.loss(self.template, batch)
        if losses.shape != (rows,):
            raise ConfigurationError(
                f"the loss of task {self.task.name!r} has shape {list(losses.shape)}, expected "
                f"one value for each of {rows} units"
            )
        outputs = [layer.outputs for layer in self._layers]
        wanted = [*chain.from_iterable(outputs), *self._private.values()]
        found = iter(torch.autograd.grad(losses, wanted, counted.flatten(), allow_unused=True))
        for layer, own in zip(self._layers, outputs, strict=True):
            layer.receive(list(islice(found, len(own))))
        return {
            name: torch.zeros_like(value) if grad is None else grad
            for (name, value), grad in zip(self._private.items(), found, strict=True)
        }

    def square_norms(self) -> Tensor:
        """Squared L2 norm of each unit's gradient for all shared parameters: [H, B]."""
        parts = [
            layer.rule.square_norms(layer.weights, calls)
            for layer in self._layers
            if (calls := layer.reached)
        ]
        return torch.stack(parts).sum(0)

    def keep(self, rows: Tensor) -> None:
        """Let units where ``rows`` ([H, B] bool) is False add nothing, not even a nan."""
        for layer in self._layers:
            for call in layer.calls:
                call.keep(rows)

    def add_sums(self, factors: Tensor, into: Tensor) -> None:
        """Add Σ_b factors[h, b] · gradient of unit b to ``into[h]``.

        Args:
            factors: [H, B].
            into: [H, D]; changed in place.
        """
        for layer in self._layers:
            if calls := layer.reached:
                layer.rule.add_sums(layer.weights, calls, factors, layer.views(into))

    def numbers_a_unit(self, data: Examples) -> int:
        """How many numbers the layers keep of one unit during a pass, roughly.

        Args:
            data: a holder's training units, at least one.
        """
        first = data.take(torch.zeros(1, dtype=torch.int64, device=self.device))
        draws = torch.zeros(1, self.task.draws, dtype=torch.float64, device=self.device)
        with torch.random.fork_rng(devices=[]):
            own = self.task.model(len(data))
        private = {
            name: torch.zeros(1, *parameter.shape, device=self.device)
            for name, parameter in own.named_parameters()
            if name in self.task.private_parameters
        }
        self.bind(torch.zeros(1, self.dimension, device=self.device), private, training=True)
        batch = self.task.batch(first, draws)
        self.backward(batch, torch.ones(1, 1, device=self.device))
        kept = [
            tensor.numel()
            for layer in self._layers
            for call in layer.reached
            for tensor in (*call.saved.values(), call.grad)
            if tensor is not None
        ]
        return max(1, sum(kept))

    # -- inside ------------------------------------------------------------------------------

    def _expect(self, rows: int) -> None:
        for layer in self._layers:
            layer.expect(rows)

    def _replace(self, prefix: str, layer: nn.Module, slots: Mapping[str, _Slot]) -> None:
        """Give one layer its stacked forward, and hide its own parameters."""
        dotted = f"{prefix}." if prefix else ""
        names = {name: dotted + name for name, _ in layer.named_parameters()}
        private = {name for name in names.values() if name in self.task.private_parameters}
        original = deepcopy(layer)
        if not private:
            own = {name: slots[whole] for name, whole in names.items()}
            stacked = _StackedLayer(prefix or "model", rule_for(original, prefix), own)
            self._layers.append(stacked)
            layer.forward = stacked
        elif len(private) == len(names):
            own_layer = _PrivateLayer(original, names)
            self._private_layers.append(own_layer)
            layer.forward = own_layer
        else:
            raise ConfigurationError(
                f"layer {prefix or 'model'!r} of task {self.task.name!r} has shared and private "
                f"parameters ({', '.join(sorted(private))}); put the private ones into a layer of "
                "their own"
            )
        _hide_parameters(layer)


class _PrivateLayer:
    """Takes the place of the forward of a layer whose parameters stay with their holder.

    Each belongs to one unit and never leaves, so it gets an ordinary gradient.

    Args:
        layer: a copy of the original.
        names: its parameters: name in the layer → in the model.
    """

    def __init__(self, layer: nn.Module, names: Mapping[str, str]) -> None:
        self.layer, self._names = layer, names
        self._weights: Weights = {}

    def bind(self, private: Weights) -> None:
        """Use these parameters, each [H, ...], by their names in the model."""
        self._weights = {name: private[whole] for name, whole in self._names.items()}

    def __call__(self, *inputs: Tensor) -> Tensor:
        holders = len(next(iter(self._weights.values())))
        stacked = [rows.view(holders, -1, *rows.shape[1:]) for rows in inputs]
        if type(self.layer) is nn.Embedding:
            return _embedded(self._weights["weight"], stacked[0])

        def one(weights: dict[str, Tensor], *rows: Tensor) -> Tensor:
            output: Tensor = functional_call(self.layer, weights, rows)
            return output

        outputs: Tensor = torch.vmap(one)(dict(self._weights), *stacked)
        return outputs.flatten(0, 1)


def _embedded(tables: Tensor, index: Tensor) -> Tensor:
    """Rows of each holder's own table: [H, V, d], [H, B, ...] → [H·B, ..., d]."""
    holders, size = tables.shape[:2]
    first = torch.arange(0, holders * size, size, device=index.device)
    whole = index + first.view(-1, *[1] * (index.dim() - 1))
    return F.embedding(whole.flatten(0, 1), tables.flatten(0, 1))


def _shared_slots(task: Task, model: nn.Module) -> dict[str, _Slot]:
    """Where each shared parameter lies in the vector that travels."""
    shared = list(named_shared(task, model))
    ends = accumulate(parameter.numel() for _, parameter in shared)
    return {
        name: _Slot(end - parameter.numel(), parameter.shape)
        for (name, parameter), end in zip(shared, ends, strict=True)
    }


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that hold parameters themselves, with their names.

    Where two modules hold the same parameter their gradients belong together, so the model is
    taken as one.
    """
    held = [id(p) for module in model.modules() for p in module.parameters(recurse=False)]
    if len(set(held)) < len(held):
        yield "", model
        return

    def below(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if next(module.parameters(recurse=False), None) is not None:
            yield name, module
            return
        for child, inner in module.named_children():
            yield from below(f"{name}.{child}" if name else child, inner)

    yield from below("", model)


class _Hidden(Tensor):
    """Stands for a parameter of a stacked layer, which only that layer's forward may use.

    Not on the meta device: torch multiplies tensors on the CPU with ones there, without an error
    and without a result.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in _HARMLESS:
            raise ConfigurationError(
                "the task computes with a parameter without calling the layer that holds it, so "
                "the batched engine cannot tell the holders apart; call the layer, or use "
                "--engine opacus"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


_HARMLESS = {
    Tensor.__hash__,
    Tensor.dim,
    Tensor.is_floating_point,
    Tensor.numel,
    Tensor.size,
    *(
        getattr(Tensor, name).__get__
        for name in (
            "device",
            "dtype",
            "grad_fn",
            "is_cuda",
            "is_meta",
            "ndim",
            "requires_grad",
            "shape",
        )
    ),
}
"""What may be asked of a hidden parameter: nothing that depends on its numbers."""


def _hide_parameters(layer: nn.Module) -> None:
    """Whoever reads a stacked layer's parameters without calling it must not get stale ones."""
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            hidden = parameter.detach().new_zeros(()).expand(parameter.shape).as_subclass(_Hidden)
            hidden._is_param = True  # by which torch tells one
            setattr(module, name, hidden)


@contextmanager
def _in_place_explained() -> Iterator[None]:
    """Explain torch's refusal to change the first layer's output, which is a leaf to it."""
    try:
        yield
    except RuntimeError as error:
        if "leaf Variable" not in str(error):
            raise
        raise ConfigurationError(
            "the output of a layer is changed in place; use an operation that makes a new tensor, "
            "or --engine opacus"
        ) from error
