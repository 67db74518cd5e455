"""Numbers as elements of a ring, so that they can be masked, and summed without rounding.

A mask hides a number only if it is uniform over everything that the number could be, so what is
masked is an integer modulo 2^b. A real number stands for the nearest multiple of a public step. The
ring is so wide that the sum of as many holders as a round may have, each at the largest number that
it may send, does not wrap around: what comes out of the ring is the sum of what went in, exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import numpy.typing as npt

from common.errors import ConfigurationError

__all__ = ["Encoding", "OutOfRange", "RingVector"]

RingVector = npt.NDArray[np.uint32] | npt.NDArray[np.uint64]
"""[D] elements of the ring of integers modulo 2^32 or 2^64."""

Width = Literal[32, 64]
"""b of the ring's 2^b elements."""


class OutOfRange(ArithmeticError):
    """A number is beyond what the plan allows one holder to send; it is never clipped instead."""


@dataclass(frozen=True)
class Encoding:
    """How numbers become ring elements, and a sum of ring elements a sum of numbers.

    Args:
        width: b, bits of a ring element.
        step: what 1 in the ring stands for; a power of two, so that scaling by it is exact.
        largest: L, the most steps, above or below 0, that one holder may send in a coordinate.
        holders: n, the most holders whose vectors are summed.

    Raises:
        ConfigurationError: n·L does not fit the ring.
    """

    width: Width
    step: float
    largest: int
    holders: int

    def __post_init__(self) -> None:
        if self.largest < 1 or self.holders < 1 or math.frexp(self.step)[0] != 0.5:
            raise ConfigurationError(
                f"an encoding needs at least one holder, a largest number of at least 1 and a step "
                f"that is a power of two, got {self}"
            )
        if self.holders * self.largest > self.most(self.width):
            raise ConfigurationError(
                f"{self.holders} holders with numbers up to {self.largest} could overflow a ring "
                f"of {self.width} bits; take 64 bits, fewer holders or a smaller bound"
            )

    @staticmethod
    def most(width: Width) -> int:
        """The largest sum that a ring can tell from a negative one."""
        return int(2 ** (width - 1)) - 1

    @property
    def dtype(self) -> np.dtype[np.uint32] | np.dtype[np.uint64]:
        """Of a vector in the ring."""
        return np.dtype(np.uint32) if self.width == 32 else np.dtype(np.uint64)

    def encode(self, values: npt.NDArray[np.floating]) -> RingVector:
        """Real numbers as ring elements, each rounded to the nearest step.

        Args:
            values: [D].

        Raises:
            OutOfRange: one is beyond ``largest`` steps, or not finite.
        """
        return self._encoded(np.rint(np.asarray(values, dtype=np.float64) / self.step))

    def encode_integers(self, steps: npt.NDArray[np.int64]) -> RingVector:
        """Whole numbers of steps as ring elements.

        Args:
            steps: [D] int64.

        Raises:
            OutOfRange: one is beyond ``largest``.
        """
        return self._encoded(steps)

    def decode(self, total: RingVector) -> npt.NDArray[np.float64]:
        """A sum of vectors in the ring as the sum of the real numbers: [D] float64."""
        return self.decode_integers(total).astype(np.float64) * self.step

    def decode_integers(self, total: RingVector) -> npt.NDArray[np.int64]:
        """A sum of vectors in the ring as the sum of the whole numbers: [D] int64."""
        return total.view(self._signed).astype(np.int64)

    @property
    def _signed(self) -> type[np.int32] | type[np.int64]:
        """Holds a sum that has not overflowed, and so any number that a holder may send."""
        return np.int32 if self.width == 32 else np.int64

    def _encoded(self, steps: npt.NDArray[np.float64] | npt.NDArray[np.int64]) -> RingVector:
        # Python's comparisons of a float and an int are exact, and false for NaN.
        least, most = (steps.min().item(), steps.max().item()) if len(steps) else (0, 0)
        if not -self.largest <= least <= most <= self.largest:
            raise OutOfRange(
                f"a number is beyond {self.largest} steps of {self.step:g}, which is all that the "
                "plan allows one holder"
            )
        return cast(RingVector, steps.astype(self._signed).view(self.dtype))
