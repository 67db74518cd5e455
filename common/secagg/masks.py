"""Masks: a 256-bit seed stretched to as many uniform ring elements as the vector has.

The generator, PRG in Bonawitz et al. 2017, is the key stream of AES-256 in counter mode under the
seed. A seed must stretch to one mask only: both ends derive it for one pair of holders and one
round. Addition in the ring of integers modulo 2^32 or 2^64 is numpy's own, which wraps around.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from common.privacy.noise import KeyStream
from common.secagg.ring import RingVector

__all__ = ["add_mask", "apply_masks", "subtract_mask"]

BLOCK_BYTES = 2**17
"""Of key stream made at a time; it is added while it is in the cache."""


def add_mask(vector: RingVector, seed: bytes) -> None:
    """Add the mask of a seed to ``vector``, in place.

    Args:
        vector: [D] uint32 or uint64, contiguous.
        seed: 32 bytes.
    """
    for part, mask in _blocks(vector, seed):
        np.add(part, mask, out=part)


def subtract_mask(vector: RingVector, seed: bytes) -> None:
    """Inverse of :func:`add_mask`."""
    for part, mask in _blocks(vector, seed):
        np.subtract(part, mask, out=part)


def apply_masks(
    vector: RingVector, *, added: Iterable[bytes] = (), subtracted: Iterable[bytes] = ()
) -> None:
    """Add the masks of some seeds to ``vector`` and subtract those of others, in place."""
    for seed in added:
        add_mask(vector, seed)
    for seed in subtracted:
        subtract_mask(vector, seed)


def _blocks(vector: RingVector, seed: bytes) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Parts of the vector, each with as much of the mask; its words are little-endian."""
    length = BLOCK_BYTES // vector.itemsize
    block = np.empty(min(length, len(vector)), dtype=vector.dtype.newbyteorder("<"))
    stream = KeyStream(seed, 0)
    for start in range(0, len(vector), length):
        part = vector[start : start + length]
        mask = block[: len(part)]
        stream.fill(mask.view(np.uint8).data)
        yield part, mask
