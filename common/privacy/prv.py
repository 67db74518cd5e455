"""The PRV bound: privacy loss variables put on a mesh and convolved.

Source: Gopi, Lee & Wutschitz 2021, "Numerical composition of differential privacy". Opacus' PRV
accountant does the same, and its mesh, convolution and conversion to ε are used here. The single
losses are ours (:mod:`common.privacy.losses`): they are accurate for large σ and small q, know the
discrete Gaussian, and both directions, removing a unit and adding one, where Opacus has the former
only. The mesh is chosen from our own bounds of the tails, which for small ε are far closer.

**Error.** Let k runs of n mechanisms have losses Y_i of sum S, of which a mesh of width h on
[−L, L] makes discrete losses Z_i of sum T. With what :func:`mesh_for` chooses, |S − T| ≤ error but
for a probability below δ_error, so that T's ε at δ − δ_error, plus ``error``, is an upper bound of
S's ε at δ. What may go wrong:

* truncation: each Y_i is conditioned on |Y_i| ≤ L. All of them were there already but for a
  probability of Σ P(|Y_i| > L) ≤ δ_error/8;
* rounding: each moves to the nearest mesh point, at most by h/2, and all points move together so
  that the mean is right. By Hoeffding's inequality the sum is then off by more than ``error`` with
  probability at most 2·exp(−2·error²/(k·h²)) = δ_error/6 (theorem 5.5 of the paper);
* wrapping: the convolutions are cyclic or cut, which matters only if the sum of a part of the Z_i,
  one of at most 2n, leaves the mesh. The tails of S beyond L less the rest are δ_error/8 for all
  of them together; the rest is 2·error for rounding (the probability of more is of fourth order
  in δ_error) and ``slack``, for the points' moving together. That it suffices is checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.privacy.losses import Loss
from common.privacy.renyi import Divergences, renyi_tail

if TYPE_CHECKING:
    from opacus.accountants.analysis.prv import DiscretePRV, Domain

__all__ = ["LARGEST_ERROR", "MOST_POINTS", "Mesh", "composed_epsilon", "mesh_for"]

LARGEST_ERROR = 0.5
"""Absolute error (nats) past which there is no point in this bound."""

MOST_POINTS = 2**20
"""Mesh points, for time and memory; where they do not suffice the error is made larger."""

EPS = float(np.finfo(np.float64).eps)


class Mesh(NamedTuple):
    """Where privacy losses are discretised: [−reach, reach] in steps of ``width``, all in nats."""

    reach: float
    width: float
    error: float
    """Of ε, that a mesh of this width causes."""
    slack: float
    """How far the points may move together, over all runs."""


def mesh_for(
    singles: Sequence[Divergences], counts: Sequence[int], error: float, delta_error: float
) -> Mesh:
    """A mesh for ``error``, or for the least error that :data:`MOST_POINTS` allow.

    Args:
        singles: Rényi divergences of each mechanism, run once.
        counts: how often each runs.
        error: of ε, in nats, to ask for.
        delta_error: of δ.
    """
    runs = sum(counts)
    together = np.sum([count * single for single, count in zip(singles, counts, strict=True)], 0)
    tails = max(
        renyi_tail(together, delta_error / (32 * len(singles))),
        *(renyi_tail(single, delta_error / (16 * runs)) for single in singles),
    )
    error_per_width = math.sqrt(runs * math.log(12 / delta_error) / 2)
    # Half a mesh a run is the most they can move, and far more than they do where that is much.
    meshes = min(runs / 2, MOST_POINTS / 8)
    # reach = tails + 2·error + meshes·width, and 2·reach/width is to be at most MOST_POINTS. Opacus
    # rounds both ends outward to whole meshes; four points are kept for that.
    points = (MOST_POINTS - 4) / 2 - 2 * error_per_width - meshes
    if not points > 0:
        return Mesh(math.inf, math.inf, math.inf, math.inf)
    width = max(error / error_per_width, tails / points)
    error, slack = width * error_per_width, width * meshes
    return Mesh(_reach_of_quick_length(tails + 2 * error + slack, width), width, error, slack)


def _reach_of_quick_length(reach: float, width: float) -> float:
    """At least ``reach``, such that the mesh has 2^i or 3·2^i points: fewer than twice as many.

    Fourier transforms of other lengths take longer. And a holder asks after every release, each
    time for a slightly longer mesh, while the transforms keep tables of the last sixteen lengths:
    tens of megabytes for as many that are nearly the same.
    """
    if not math.isfinite(reach):
        return reach
    points = 2 * math.ceil(reach / width) + 2  # as Opacus counts them
    power = 1 << (points - 1).bit_length()
    length = 3 * power // 4 if points <= 3 * power // 4 else power
    # Opacus rounds both ends outward, to this length from anywhere within the last mesh.
    return max(reach, (length / 2 - 1.5) * width)


def composed_epsilon(
    losses: Sequence[Loss], counts: Sequence[int], mesh: Mesh, delta: float, delta_error: float
) -> float:
    """ε at δ of the losses added up, with the mesh's error on top.

    Args:
        losses: of each mechanism, run once.
        counts: how often each runs.
        mesh: of :func:`mesh_for`.
        delta: δ.
        delta_error: the part of δ that the mesh may cost.

    Raises:
        RuntimeError, ValueError, IndexError, ArithmeticError: the numerics do not carry it.
    """
    from opacus.accountants.analysis import prv  # seconds to import, and often not needed

    domain = prv.Domain.create_aligned(-mesh.reach, mesh.reach, mesh.width)
    with np.errstate(all="ignore"):
        discrete = [_discretized(loss, domain) for loss in losses]
        moved = sum(
            abs(loss.domain.shifts) * count for loss, count in zip(discrete, counts, strict=True)
        )
        if not moved <= mesh.slack * (1 + 1e-6):
            raise RuntimeError("the discrete losses moved too far together")
        composed = prv.compose_heterogeneous(discrete, list(counts))
        _, _, upper = composed.compute_epsilon(delta, delta_error, mesh.error)
    # Less than the error that was added to it, or NaN, is what a broken sum looks like.
    return float(upper) if upper >= mesh.error else math.inf


def rounding(runs: int) -> float:
    """Of δ, what sums over a mesh may lose: one rounding error a point and a run."""
    return EPS * (MOST_POINTS + runs)


def _discretized(loss: Loss, domain: Domain) -> DiscretePRV:
    """``loss``, truncated to the mesh, rounded to its points, its mean restored."""
    from opacus.accountants.analysis.prv import DiscretePRV

    middles = domain.ts
    edges = np.append(middles - domain.dt / 2, middles[-1] + domain.dt / 2)
    mass = np.diff(loss.cdf(edges))
    mass = mass / np.sum(mass)
    shift = loss.mean(edges[0], edges[-1]) - float(np.dot(middles, mass))
    # Rounding moves each value by half a mesh at most, so the mean too.
    if not abs(shift) <= domain.dt * (0.5 + 1e-6):
        raise RuntimeError("the discrete mean differs from the continuous mean")
    return DiscretePRV(pmf=mass, domain=domain.shift_right(shift))
