"""Sums that come out the same in any order."""

from __future__ import annotations

import torch
from torch import Tensor

from simulations.travel import Travels

__all__ = ["ExactSum"]

HIGH_SCALE = 2.0**10
LOW_SCALE = 2.0**42
LARGEST_TERM = 2.0**32
"""Magnitude of a term's coordinates; 2^20 such terms fit."""


class ExactSum(Travels):
    """Σ of vectors in fixed point, so that neither order nor grouping changes a bit.

    Floating-point addition rounds, so a sum depends on which worker was done first. Here each
    coordinate is cut at 2^-52 and kept as two integers, multiples of 2^-10 and of 2^-52, whose
    sums are exact.

    Args:
        dimension: D.
    """

    def __init__(self, dimension: int) -> None:
        self._high = torch.zeros(dimension, dtype=torch.int64)
        self._low = torch.zeros(dimension, dtype=torch.int64)

    @property
    def dimension(self) -> int:
        """D."""
        return len(self._high)

    def add(self, vector: Tensor) -> None:
        """Add a term.

        Args:
            vector: [D] float64, finite and at most 2^32 in magnitude.

        Raises:
            ValueError: it is not.
        """
        term = vector.to("cpu", torch.float64)
        if not bool((term.abs() <= LARGEST_TERM).all()):
            raise ValueError(f"a term is not finite or above {LARGEST_TERM:g}")
        scaled = term * HIGH_SCALE
        high = scaled.floor()
        self._high += high.long()
        self._low += ((scaled - high) * LOW_SCALE).floor().long()

    def merge(self, other: ExactSum) -> None:
        """Add everything that ``other`` holds."""
        self._high += other._high
        self._low += other._low

    def total(self) -> Tensor:
        """The sum, [D] float64."""
        carried = self._low.div(int(LOW_SCALE), rounding_mode="floor")
        high, low = self._high + carried, self._low - carried * int(LOW_SCALE)
        return (high.double() + low.double() / LOW_SCALE) / HIGH_SCALE
