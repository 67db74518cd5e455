"""``nn.Linear``: on vectors and on sequences of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simulations.layers.base import Call, Record, Rule, Weights, gradient, sequences, square_lengths

__all__ = ["LinearRule", "outer_square_norms"]

GRAM_COST = 2
"""Of a double-precision product, in single-precision ones."""


class LinearRule(Rule):
    """``nn.Linear`` on [H·B, in] or on sequences [H·B, ..., in]."""

    def forward(
        self,
        weights: Weights,
        holders: int,
        record: Record,
        input: Tensor,
    ) -> Tensor:
        """X Wᵀ + b, one product for all holders."""
        rows = input.reshape(holders, input.shape[0] // holders, *input.shape[1:])
        flat = rows if rows.dim() == 3 else rows.flatten(1, -2)
        weight, bias = weights["weight"].transpose(1, 2), weights.get("bias")
        if bias is None:
            output = torch.bmm(flat, weight)
        else:
            output = torch.baddbmm(bias.unsqueeze(1), flat, weight)
        shaped = output.view(*input.shape[:-1], output.shape[-1])
        return record(shaped, {"input": rows.detach()})

    def square_norms(self, weights: Weights, calls: Sequence[Call]) -> Tensor:
        """The norm of Σ_t g_t x_tᵀ, and of Σ_t g_t for the bias."""
        inputs, grads = _inputs_and_grads(calls)
        return outer_square_norms(inputs, grads, bias="bias" in weights)

    def add_sums(
        self, weights: Weights, calls: Sequence[Call], factors: Tensor, into: Weights
    ) -> None:
        """(f · G)ᵀ X."""
        del weights
        inputs, grads = _inputs_and_grads(calls)
        if inputs.dim() == 3:
            scaled = grads * factors.unsqueeze(-1)
        else:
            inputs = inputs.flatten(1, 2)
            scaled = (grads * factors[..., None, None]).flatten(1, 2)
        # A temporary, added: faster than baddbmm_ on a strided view.
        into["weight"].add_(torch.bmm(scaled.transpose(1, 2), inputs))
        if "bias" in into:
            into["bias"].add_(scaled.sum(1))


def _inputs_and_grads(calls: Sequence[Call]) -> tuple[Tensor, Tensor]:
    """Inputs [H, B, in] and output gradients [H, B, out], or of sequences [H, B, T, ·].

    A layer that is called twice has one gradient, the sum of both: as for a longer sequence.
    """
    if len(calls) == 1:
        inputs, grads = calls[0].saved["input"], gradient(calls[0])
        if inputs.dim() == 3:
            return inputs, grads
        return sequences(inputs, 1), sequences(grads, 1)
    return (
        torch.cat([sequences(call.saved["input"], 1) for call in calls], dim=2),
        torch.cat([sequences(gradient(call), 1) for call in calls], dim=2),
    )


def outer_square_norms(inputs: Tensor, grads: Tensor, *, bias: bool) -> Tensor:
    """‖Σ_t g_t x_tᵀ‖² (+ ‖Σ_t g_t‖² for a bias) of each unit, without the product where it pays.

    ``Σ_{t,t'} (g_t·g_t')(x_t·x_t' + 1)`` costs T²·(in + out), the product itself T·in·out
    (Bu et al. 2022, section 3.3: take the cheaper one); the former in double precision.

    Args:
        inputs: [H, B, T, in]; [H, B, in] for T = 1.
        grads: [H, B, T, out]; [H, B, out] for T = 1.
        bias: whether the layer has one.

    Returns:
        [H, B].
    """
    if inputs.dim() == 3:
        return _one_outer_square_norms(inputs, grads, bias=bias)
    length, width, out = *inputs.shape[2:], grads.shape[3]
    if length == 1:
        return _one_outer_square_norms(inputs.squeeze(2), grads.squeeze(2), bias=bias)
    if GRAM_COST * length * (width + out) <= width * out:
        # Terms of a unit may cancel to a small fraction of themselves; a norm that float32 rounded
        # to less than it is would let the unit pass its bound.
        exact_inputs, exact_grads = inputs.double(), grads.double()
        products = exact_inputs @ exact_inputs.transpose(-1, -2)
        if bias:
            products += 1.0
        squares = (products * (exact_grads @ exact_grads.transpose(-1, -2))).sum((-1, -2))
        return squares.clamp(min=0.0).to(grads.dtype)
    # Holder by holder: as large as all per-unit gradients of one layer of one holder, not of all.
    squares = torch.stack(
        [
            (g.transpose(-1, -2) @ x).square().sum((-1, -2))
            for x, g in zip(inputs, grads, strict=True)
        ]
    )
    return squares + grads.sum(2).square().sum(-1) if bias else squares


def _one_outer_square_norms(inputs: Tensor, grads: Tensor, *, bias: bool) -> Tensor:
    """‖g xᵀ‖² = |g|²·|x|², and |g|² more for a bias: [H, B, ·] → [H, B]."""
    of_inputs = square_lengths(inputs)
    of_grads = square_lengths(grads)
    if bias:
        return torch.addcmul(of_grads, of_grads, of_inputs)
    return of_grads * of_inputs
