"""The DP-SGD step's mathematics: clip each unit's gradient, sum, add noise, divide.

Abadi et al. 2016, "Deep learning with differential privacy", algorithm 1, with the sum divided by
the *expected* batch size, a public constant: the actual one is data. Pure functions on tensors,
shared by every engine.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from common.errors import ConfigurationError
from common.privacy.noise import Randomness

__all__ = ["check_model", "clip_factors", "clipped_sum", "noisy_mean", "unit_norms"]


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
    noise = _like_each(sums, randomness, noise_multiplier * clip_norm)
    return [(total + part) / expected_batch_size for total, part in zip(sums, noise, strict=True)]


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


def _like_each(sums: Sequence[Tensor], randomness: Randomness, std: float) -> list[Tensor]:
    """Draws from N(0, std²) in the shapes, types and places of ``sums``, drawn as one vector."""
    # In the widest type, so that no parameter's noise is coarser than its sum.
    dtype = functools.reduce(torch.promote_types, (total.dtype for total in sums))
    sizes = [total.numel() for total in sums]
    flat = randomness.normal((sum(sizes),), std=std, dtype=dtype, device=sums[0].device)
    return [
        part.view(total.shape).to(total)
        for part, total in zip(torch.split(flat, sizes), sums, strict=True)
    ]


def _rows(grad: Tensor) -> Tensor:
    """[B, ...] as [B, numbers]; B may be 0, where reshape could not infer the rest."""
    return grad.flatten(start_dim=1) if grad.dim() > 1 else grad.unsqueeze(1)


def _like(factors: Tensor, grad: Tensor) -> Tensor:
    """[B] as [B, 1, ...], to broadcast with ``grad``."""
    return factors.view(-1, *[1] * (grad.dim() - 1))
