"""The fallback: any module that ``torch.func`` can run, with everything below it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from common.errors import ConfigurationError
from simulations.layers.base import Call, Record, Rule, Weights, gradient

__all__ = ["AnyModule"]

_log = logging.getLogger("sotto.simulation")

_NUMBERS = 2**24
"""Of per-unit gradients at once: 64 MiB."""

_warned: set[type[nn.Module]] = set()


@dataclass
class _Arguments:
    """What a module was called with: nested tensors that belong to units, and all else.

    Args:
        leaves: of ``(positional, named)``; None in the places of the units' tensors.
        spec: how they nest.
        places: of the units' tensors among the leaves.
    """

    leaves: list[Any]
    spec: TreeSpec
    places: list[int] = field(default_factory=list)

    def filled(self, tensors: Sequence[Tensor]) -> tuple[Any, Any]:
        """Positional and named arguments with these tensors in their places."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        positional, named = tree_unflatten(leaves, self.spec)
        return positional, named


@dataclass(frozen=True)
class _Output:
    """One output of one call of the module."""

    arguments: _Arguments
    number: int


class AnyModule(Rule):
    """A module without a closed form: ``vmap`` over holders and units of its own gradient.

    Tensors among the arguments whose dimension 0 is as long as the first one's belong to the
    units; all others are the same for every unit. Tensors among the results belong to the units.

    Args:
        layer: the module.
        name: in the model.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__(layer, name)
        if type(layer) not in _warned:
            _warned.add(type(layer))
            _log.warning(
                "layer %s (%s) has no closed form; its per-unit gradients are taken one by one "
                "with torch.func, which is slower",
                name,
                type(layer).__name__,
            )

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Whatever its settings; what cannot be run is found when it is called."""
        del layer
        return True

    def forward(
        self, weights: Weights, holders: int, record: Record, *inputs: Any, **named: Any
    ) -> Any:
        """The module itself, once for each holder, side by side."""
        arguments, rows = self._split(inputs, named)
        units = [row.reshape(holders, row.shape[0] // holders, *row.shape[1:]) for row in rows]
        results: list[Any] = []
        spec: list[TreeSpec] = []

        def one(weights: dict[str, Tensor], *units: Tensor) -> tuple[Tensor, ...]:
            results[:], found = tree_flatten(self._called(weights, arguments, units))
            spec[:] = [found]
            return tuple(result for result in results if isinstance(result, Tensor))

        with self._explained():
            stacked = iter(torch.vmap(one)(dict(weights), *units))
        saved = {str(place): value.detach() for place, value in enumerate(units)}
        # The results seen inside are of no use outside vmap: only which of them are tensors.
        outputs = [next(stacked) if isinstance(result, Tensor) else result for result in results]
        taken = iter(range(len(outputs)))
        passed = [
            self._passed(output, record, saved, arguments, next(taken))
            if isinstance(output, Tensor)
            else self._plain(output)
            for output in outputs
        ]
        return tree_unflatten(passed, spec[0])

    def square_norms(self, weights: Weights, calls: Sequence[Call]) -> Tensor:
        """Of the gradients themselves, some units at a time."""
        holders, units = gradient(calls[0]).shape[:2]
        squares = gradient(calls[0]).new_zeros((holders, units))
        for some, grads in self._unit_gradients(weights, calls, holders, units):
            for grad in grads.values():
                squares[some] += grad.flatten(2).square().sum(2)
        return squares

    def add_sums(
        self, weights: Weights, calls: Sequence[Call], factors: Tensor, into: Weights
    ) -> None:
        """The gradient of each holder's batch, with the output gradients scaled by f."""
        sums = self._sums(weights, calls, factors)
        if not all(bool(part.isfinite().all()) for part in sums.values()):
            # A unit that must not count may still give 0 · inf on the way back.
            sums = self._selected_sums(weights, calls, factors)
        for name, part in sums.items():
            into[name].add_(part)

    # -- forward -----------------------------------------------------------------------------

    def _split(self, inputs: Any, named: Any) -> tuple[_Arguments, list[Tensor]]:
        """Which of the arguments belong to units, and they themselves, [H·B, ...]."""
        leaves, spec = tree_flatten((inputs, named))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
        if not tensors:
            raise ConfigurationError(
                f"layer {self.name!r} ({type(self.layer).__name__}) was called without a tensor "
                "of units; use --engine opacus"
            )
        arguments, rows = _Arguments([], spec), []
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == len(tensors[0]):
                arguments.places.append(place)
                arguments.leaves.append(None)
                rows.append(leaf)
            else:
                arguments.leaves.append(
                    leaf.detach() if isinstance(leaf, Tensor) else self._plain(leaf)
                )
        return arguments, rows

    def _passed(
        self,
        output: Tensor,
        record: Record,
        saved: dict[str, Tensor],
        arguments: _Arguments,
        number: int,
    ) -> Tensor:
        """One result, [H, B, ...] → [H·B, ...], noted where it has gradients."""
        if output.dim() < 2:
            raise ConfigurationError(
                f"layer {self.name!r} ({type(self.layer).__name__}) returns one number for all "
                "units; return one for each, or use --engine opacus"
            )
        rows = output.flatten(0, 1)
        if not rows.is_floating_point():
            return rows
        return record(rows, saved, _Output(arguments, number))

    def _plain(self, leaf: Any) -> Any:
        """A leaf that is no tensor; what may hide tensors is refused, they would be mixed up."""
        if leaf is None or isinstance(leaf, bool | int | float | str | torch.dtype | torch.device):
            return leaf
        raise ConfigurationError(
            f"layer {self.name!r} ({type(self.layer).__name__}) takes or returns a "
            f"{type(leaf).__name__}, which may hold tensors of units; use tuples, lists and "
            "dicts of tensors, or --engine opacus"
        )

    def _called(
        self, weights: dict[str, Tensor], arguments: _Arguments, units: Sequence[Tensor]
    ) -> Any:
        positional, named = arguments.filled(units)
        return functional_call(self.layer, weights, positional, named)

    # -- gradients ---------------------------------------------------------------------------

    def _gradient(
        self,
        weights: dict[str, Tensor],
        arguments: _Arguments,
        numbers: Sequence[int],
        units: Sequence[Tensor],
        grads: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Of one holder's batch, for the outputs with these numbers."""

        def outputs(weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
            results, _ = tree_flatten(self._called(weights, arguments, units))
            tensors = [result for result in results if isinstance(result, Tensor)]
            return tuple(tensors[number] for number in numbers)

        backward: Any = vjp(outputs, weights)[1]
        found: dict[str, Tensor] = backward(tuple(grads))[0]
        return found

    def _unit_gradients(
        self, weights: Weights, calls: Sequence[Call], holders: int, units: int
    ) -> Iterator[tuple[tuple[slice, slice], dict[str, Tensor]]]:
        """Every unit's gradient, each [h, b, *shape], and which holders and units these are."""
        numbers = sum(parameter[0].numel() for parameter in weights.values())
        at_once = max(1, _NUMBERS // numbers)
        some_units = max(1, min(units, at_once))
        some_holders = max(1, at_once // some_units)
        for holder in range(0, holders, some_holders):
            for unit in range(0, units, some_units):
                some = slice(holder, holder + some_holders), slice(unit, unit + some_units)
                own = {name: parameter[some[0]] for name, parameter in weights.items()}
                yield some, self._some_gradients(own, calls, some)

    def _some_gradients(
        self, weights: Weights, calls: Sequence[Call], some: tuple[slice, slice]
    ) -> dict[str, Tensor]:
        totals: dict[str, Tensor] = {}
        for arguments, numbers, units, grads in _by_invocation(calls):

            def one(
                weights: dict[str, Tensor],
                units: list[Tensor],
                grads: list[Tensor],
                arguments: _Arguments = arguments,
                numbers: list[int] = numbers,
            ) -> dict[str, Tensor]:
                # A unit alone is a batch of one.
                batch = [unit.unsqueeze(0) for unit in units]
                each = [grad.unsqueeze(0) for grad in grads]
                return self._gradient(weights, arguments, numbers, batch, each)

            shape = grads[0][some].shape[:2]
            # One vmap over all units, each with its holder's parameters: as fast as one vmap in
            # another, in which torch 2.13 gets the gradient of prelu wrong.
            own = {name: _for_each_unit(value, shape) for name, value in weights.items()}
            with self._explained():
                found = torch.vmap(one)(
                    own,
                    [unit[some].flatten(0, 1) for unit in units],
                    [grad[some].flatten(0, 1) for grad in grads],
                )
            for name, part in found.items():
                rows = part.view(*shape, *part.shape[1:])
                totals[name] = totals[name] + rows if name in totals else rows
        return totals

    def _sums(self, weights: Weights, calls: Sequence[Call], factors: Tensor) -> dict[str, Tensor]:
        """Σ_b f_b Jᵀ_b g_b = Jᵀ (f · g): one backward pass for each holder's batch."""
        totals: dict[str, Tensor] = {}
        for arguments, numbers, units, grads in _by_invocation(calls):

            def one(
                weights: dict[str, Tensor],
                units: list[Tensor],
                grads: list[Tensor],
                arguments: _Arguments = arguments,
                numbers: list[int] = numbers,
            ) -> dict[str, Tensor]:
                return self._gradient(weights, arguments, numbers, units, grads)

            scaled = [
                grad * factors.view(*factors.shape, *[1] * (grad.dim() - 2)) for grad in grads
            ]
            with self._explained():
                found = torch.vmap(one)(dict(weights), units, scaled)
            for name, part in found.items():
                totals[name] = totals[name] + part if name in totals else part
        return totals

    def _selected_sums(
        self, weights: Weights, calls: Sequence[Call], factors: Tensor
    ) -> dict[str, Tensor]:
        """The same from every unit's own gradient, of which some are left out."""
        sums = {name: torch.zeros_like(parameter) for name, parameter in weights.items()}
        for some, grads in self._unit_gradients(weights, calls, *factors.shape):
            for name, grad in grads.items():
                rows = grad.flatten(2)
                own = factors[some].unsqueeze(2)
                scaled = torch.where(own > 0, rows * own, 0)
                sums[name][some[0]] += scaled.sum(1).view_as(sums[name][some[0]])
        return sums

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say which layer ``torch.func`` cannot run, and what can."""
        try:
            # The plain form of attention has batching rules; the fused ones are run in a loop,
            # of which torch warns once more than this rule's own warning.
            with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
                warnings.filterwarnings("ignore", message="There is a performance drop")
                yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConfigurationError(
                f"layer {self.name!r} ({type(self.layer).__name__}) cannot be run for many holders "
                f"at once; use --engine opacus. torch.func says: {error}"
            ) from error


def _for_each_unit(parameter: Tensor, shape: Sequence[int]) -> Tensor:
    """[h, *shape] → [h·b, *shape]."""
    return parameter.unsqueeze(1).expand(*shape, *parameter.shape[1:]).flatten(0, 1)


def _by_invocation(
    calls: Sequence[Call],
) -> Iterator[tuple[_Arguments, list[int], list[Tensor], list[Tensor]]]:
    """Calls of the module: arguments, which outputs have gradients, the units' inputs, gradients.

    Each output of a call of the module was recorded as a call of its own, with the same inputs.
    """
    together: dict[int, list[Call]] = {}
    for call in calls:
        assert isinstance(call.about, _Output)
        together.setdefault(id(call.about.arguments), []).append(call)
    for group in together.values():
        about = [call.about for call in group if isinstance(call.about, _Output)]
        yield (
            about[0].arguments,
            [output.number for output in about],
            list(group[0].saved.values()),
            [gradient(call) for call in group],
        )
