"""A rule against the plain layer, one unit at a time, with each holder's own parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simulations.layers import Call, Rule, rule_for

Program = Callable[..., Sequence[Tensor]]
"""Calls a layer, once or several times, with some inputs; returns what the loss depends on."""


def once(layer: Any, *inputs: Tensor) -> list[Tensor]:
    return [layer(*inputs)]


@dataclass
class Found:
    """Of all units: what a layer's calls come to."""

    outputs: list[Tensor]
    """Each [H·B, ...]."""
    inputs: list[Tensor]
    """The gradients of the inputs, each [H·B, ...]."""
    square_norms: Tensor
    """[H, B]."""
    sums: dict[str, Tensor]
    """Σ_b f_b · gradient, each [H, *shape]."""


@dataclass
class Stacked:
    """A rule and parameters for it, which lie in a buffer with others before and after."""

    rule: Rule
    weights: dict[str, Tensor]
    flat: Tensor

    @classmethod
    def of(cls, layer: nn.Module, holders: int) -> Stacked:
        parameters = dict(layer.named_parameters())
        dtype = next(iter(parameters.values())).dtype
        size = sum(parameter.numel() for parameter in parameters.values())
        flat = torch.randn(holders, size + 5, dtype=dtype)
        return cls(rule_for(layer, "the.layer"), views(flat, parameters), flat)

    def into(self, layer: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        flat = torch.randn_like(self.flat)
        return flat, views(flat, dict(layer.named_parameters()))


def views(flat: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start, found = 2, {}
    for name, parameter in parameters.items():
        found[name] = flat[:, start : start + parameter.numel()].unflatten(1, parameter.shape)
        start += parameter.numel()
    return found


def cotangents(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The same for the same shapes."""
    fixed = torch.Generator().manual_seed(7)
    return [torch.randn(o.shape, generator=fixed, dtype=o.dtype) for o in outputs]


class Recorder:
    """Stands in for the stacked model: notes calls and their gradients."""

    def __init__(self, holders: int) -> None:
        self.holders = holders
        self.calls: list[Call] = []
        self.taps: list[Tensor] = []

    def __call__(self, output: Tensor, saved: Mapping[str, Tensor], about: object = None) -> Tensor:
        assert not any(value.requires_grad for value in saved.values())
        for value in saved.values():
            assert value.shape[:2] == (self.holders, len(output) // self.holders)
        self.calls.append(Call(saved, about))
        self.taps.append(torch.zeros_like(output, requires_grad=True))
        return output + self.taps[-1]

    def reached(self, grads: Sequence[Tensor | None]) -> list[Call]:
        for call, grad in zip(self.calls, grads, strict=True):
            call.grad = None if grad is None else grad.unflatten(0, (self.holders, -1))
        return [call for call in self.calls if call.grad is not None]


def recorded(
    stacked: Stacked, program: Program, inputs: Sequence[Tensor], holders: int
) -> tuple[list[Tensor], list[Call], list[Tensor]]:
    """Outputs, calls that the loss depends on, and gradients of the inputs."""
    record = Recorder(holders)
    leaves = [value.clone().requires_grad_(value.is_floating_point()) for value in inputs]

    def layer(*args: Any, **named: Any) -> Any:
        return stacked.rule.forward(stacked.weights, holders, record, *args, **named)

    outputs = list(program(layer, *leaves))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(
        outputs, [*record.taps, *wanted], cotangents(outputs), allow_unused=True
    )
    calls = record.reached(grads[: len(record.taps)])
    of_inputs = [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(wanted, grads[len(record.taps) :], strict=True)
    ]
    return [output.detach() for output in outputs], calls, of_inputs


def by_rule(
    layer: nn.Module,
    stacked: Stacked,
    program: Program,
    inputs: Sequence[Tensor],
    factors: Tensor,
) -> Found:
    outputs, calls, of_inputs = recorded(stacked, program, inputs, len(factors))
    square_norms = stacked.rule.square_norms(stacked.weights, calls)
    flat, into = stacked.into(layer)
    before = flat.clone()
    stacked.rule.add_sums(stacked.weights, calls, factors, into)
    difference = flat - before
    assert not difference[:, :2].any(), "numbers before the layer's changed"
    assert not difference[:, -3:].any(), "numbers after the layer's changed"
    sums = views(difference, dict(layer.named_parameters()))
    return Found(outputs, of_inputs, square_norms, sums)


def one_by_one(
    layer: nn.Module,
    stacked: Stacked,
    program: Program,
    inputs: Sequence[Tensor],
    factors: Tensor,
    of_outputs: Sequence[Tensor],
) -> Found:
    holders, units = factors.shape
    grads: dict[str, list[Tensor]] = {name: [] for name in stacked.weights}
    outputs: list[list[Tensor]] = []
    of_inputs: list[list[Tensor]] = []
    for row in range(holders * units):
        own = deepcopy(layer)
        with torch.no_grad():
            for name, parameter in own.named_parameters():
                parameter.copy_(stacked.weights[name][row // units])
        unit = [v[row : row + 1].clone().requires_grad_(v.is_floating_point()) for v in inputs]
        results = list(program(own, *unit))
        loss = sum(
            (result * given[row : row + 1]).sum()
            for result, given in zip(results, of_outputs, strict=True)
        )
        parameters = dict(own.named_parameters())
        wanted = [leaf for leaf in unit if leaf.requires_grad]
        found = torch.autograd.grad(
            loss, [*parameters.values(), *wanted], allow_unused=True, materialize_grads=True
        )
        for name, grad in zip(parameters, found, strict=False):
            grads[name].append(grad)
        outputs.append([result.detach() for result in results])
        of_inputs.append(list(found[len(parameters) :]))
    by_unit = {
        name: torch.stack(parts).unflatten(0, (holders, units)) for name, parts in grads.items()
    }
    return Found(
        [torch.cat(parts) for parts in zip(*outputs, strict=True)],
        [torch.cat(parts) for parts in zip(*of_inputs, strict=True)],
        torch.stack([grad.flatten(2).square().sum(2) for grad in by_unit.values()]).sum(0),
        {name: torch.einsum("hb,hb...->h...", factors, g) for name, g in by_unit.items()},
    )


def check(
    layer: nn.Module,
    *inputs: Tensor,
    holders: int = 3,
    program: Program = once,
    rtol: float = 1e-9,
) -> Found:
    """All that a rule computes is what the plain layer gives, one unit at a time."""
    units = len(inputs[0]) // holders
    stacked = Stacked.of(layer, holders)
    dtype = stacked.flat.dtype
    factors = torch.rand(holders, units, dtype=dtype)
    factors[0, 0] = 0.0
    found = by_rule(layer, stacked, program, inputs, factors)
    expected = one_by_one(layer, stacked, program, inputs, factors, cotangents(found.outputs))
    for ours, theirs in (
        (found.outputs, expected.outputs),
        (found.inputs, expected.inputs),
        ([found.square_norms], [expected.square_norms]),
        (found.sums.values(), expected.sums.values()),
    ):
        for one, other in zip(ours, theirs, strict=True):
            assert one.shape == other.shape
            scale = float(other.abs().max()) if other.numel() else 1.0
            torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * max(scale, 1.0))
    return found
