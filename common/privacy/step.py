"""The DP-SGD step's mathematics: clip each unit's gradient, sum, add noise, divide.

Abadi et al. 2016, "Deep learning with differential privacy", algorithm 1, with the sum divided by
the *expected* batch size, a public constant: the actual one is data. Pure functions on tensors,
shared by every engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from common.errors import ConfigurationError
from common.privacy.noise import Randomness

__all__ = [
    "check_model",
    "clip_factors",
    "clipped_sum",
    "clipped_updates",
    "noisy_mean",
    "rounded_to_grid",
    "unit_norms",
]


def unit_norms(grad_samples: Sequence[Tensor]) -> Tensor:
    """L2 norm of each unit's whole gradient: [B]; not finite if any number of it is not.

    Args:
        grad_samples: one tensor [B, ...] per parameter; at least one.
    """
    per_parameter = [torch.linalg.vector_norm(_rows(grad), dim=1) for grad in grad_samples]
    norms: Tensor = torch.linalg.vector_norm(torch.stack(per_parameter, dim=1), dim=1)
    return norms


def clip_factors(norms: Tensor, clip_norm: float | Tensor) -> Tensor:
    """What to scale each unit's gradient by: min(1, C/norm), and 0 where the norm is not finite.

    A norm of zero gives 1. A norm that is NaN or infinite would otherwise pass (``min(1, nan)``)
    or be scaled to NaN; such a unit adds nothing, which moves the sum by no more than C.

    Args:
        norms: [B], or [H, B] of several models.
        clip_norm: C, positive; [H, 1] of several models, whose plans have checked it.

    Returns:
        As ``norms``, in [0, 1].
    """
    if not isinstance(clip_norm, Tensor) and not clip_norm > 0:
        raise ConfigurationError(f"clip_norm must be positive, got {clip_norm!r}")
    bound = torch.as_tensor(clip_norm, dtype=norms.dtype, device=norms.device)
    return torch.where(norms.isfinite(), bound / torch.maximum(norms, bound), 0.0)


def clipped_sum(grad_samples: Sequence[Tensor], clip_norm: float) -> list[Tensor]:
    """Σ over units of each one's gradient, scaled to a norm of at most C.

    Adding or removing a unit moves the result by at most C (up to the dtype's rounding).

    Args:
        grad_samples: one tensor [B, ...] per parameter; B may be 0, which sums to zero.
        clip_norm: C, positive.

    Returns:
        One tensor [...] per parameter.
    """
    factors = clip_factors(unit_norms(grad_samples), clip_norm)
    # Selected, not only multiplied: 0 · nan is nan.
    clean = grad_samples
    if not bool((factors > 0).all()):
        clean = [torch.where(_like(factors, grad) > 0, grad, 0.0) for grad in grad_samples]
    return [torch.tensordot(factors.to(grad.dtype), grad, dims=1) for grad in clean]


def clipped_updates(updates: Tensor, clip_norm: float) -> tuple[Tensor, Tensor]:
    """Whole holders' updates, each scaled to a norm of at most C; one that is not finite is zero.

    Args:
        updates: [H, D].
        clip_norm: C, positive.

    Returns:
        The clipped updates, [H, D], and which of them were no longer than C, [H] bool.
    """
    norms = torch.linalg.vector_norm(updates, dim=1)
    factors = clip_factors(norms, clip_norm).unsqueeze(1)
    # Selected, not only multiplied: 0 · nan is nan.
    return torch.where(factors > 0, updates * factors, 0.0), norms <= clip_norm


def noisy_mean(
    sums: Sequence[Tensor],
    *,
    noise_multiplier: float,
    clip_norm: float,
    expected_batch_size: float,
    randomness: Randomness,
) -> list[Tensor]:
    """(sum + N(0, (σC)²)) / expected batch size: the noise is scaled to the sum, then divided.

    The noise is drawn as one flat vector over all parameters, in order, so that an engine that
    keeps them flat uses a seeded stream up in the same way.

    Sum and noise are added in float64 and rounded to multiples of a public number, about 2^-30 of
    the noise's deviation. How finely floats are spaced depends on their size: without that, a
    float32 result between its neighbours' multiples would show how small the sum was (Mironov 2012,
    "On significance of the least significant bits for differential privacy").

    Args:
        sums: clipped sums, one tensor per parameter; at least one.
        noise_multiplier: σ ≥ 0; 0 adds none, for plans without a guarantee.
        clip_norm: C, as the sums were clipped.
        expected_batch_size: a public constant, positive; never the number of units drawn.
        randomness: of the noise.

    Returns:
        One tensor per parameter.
    """
    if not expected_batch_size > 0:
        raise ConfigurationError(
            f"expected_batch_size must be positive, got {expected_batch_size!r}"
        )
    std = noise_multiplier * clip_norm
    sizes = [total.numel() for total in sums]
    noise = randomness.normal((sum(sizes),), std=std, dtype=torch.float64, device=sums[0].device)
    parts = zip(torch.split(noise, sizes), sums, strict=True)
    noised = [rounded_to_grid(part.view(total.shape) + total, std) for part, total in parts]
    return [
        both.div_(expected_batch_size).to(total.dtype)
        for both, total in zip(noised, sums, strict=True)
    ]


def rounded_to_grid(noised: Tensor, std: float) -> Tensor:
    """Data with noise, rounded so that the spacing of floats says nothing about the data.

    To the nearest multiples of 2^-30 times the power of two below ``std``, in place; see
    :func:`noisy_mean`.

    Args:
        noised: float64, data and noise added in that precision.
        std: standard deviation of the noise, public; 0 rounds nothing.
    """
    if std == 0:
        return noised
    grid = math.ldexp(1.0, math.frexp(std)[1] - 31)
    return noised.div_(grid).round_().mul_(grid)


def check_model(model: nn.Module) -> None:
    """Refuse layers that let one unit act on another's gradient, or keep statistics of data.

    Raises:
        ConfigurationError: naming the layer and what to use instead.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) or (
            isinstance(layer, _InstanceNorm) and layer.track_running_stats
        ):
            raise ConfigurationError(
                f"layer {name or 'model'!r} is {type(layer).__name__}, which mixes the examples of "
                "a batch, so that one unit's contribution cannot be bounded; use GroupNorm or "
                "LayerNorm"
            )


def _rows(grad: Tensor) -> Tensor:
    """[B, ...] as [B, numbers]; B may be 0, where reshape could not infer the rest."""
    return grad.flatten(start_dim=1) if grad.dim() > 1 else grad.unsqueeze(1)


def _like(factors: Tensor, grad: Tensor) -> Tensor:
    """[B] as [B, 1, ...], to broadcast with ``grad``."""
    return factors.view(-1, *[1] * (grad.dim() - 1))
