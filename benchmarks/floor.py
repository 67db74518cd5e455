"""What a case costs at least: its matrix products and random numbers alone, on one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch

from benchmarks.simulated import Case, names_of, threads
from common.privacy.noise import NOISE, KeyStream, simulation_key, standard_normal
from simulations.randomness import BlockRandomness

__all__ = ["floor"]

BLOCK = 50
"""Holders whose products are made at once, about as the engine does it."""


def floor(case: Case, repeats: int) -> dict[str, Any]:
    """Seconds of a round that no DP-SGD with these batches and this noise can do without.

    Args:
        case: with privacy.
        repeats: of each measurement; the median counts.

    Returns:
        Seconds of the parts, of one thread; what was measured to get them; and their sum.
    """
    with threads(1):
        products, work = _products(case, repeats)
        key_stream, box_muller, sampling = _numbers(case, repeats)
    steps = case.holders * case.steps
    drawn = steps * case.dimension
    parts = {
        "products": steps * products,
        "key_stream": drawn * key_stream,
        "box_muller": drawn * box_muller,
        "sampling": steps * case.records * sampling,
    }
    return {
        "holders_in_a_block": BLOCK,
        "flops_a_holder_step": work,
        "gflops_a_second": round(work / products / 1e9, 2),
        "key_stream_ns_a_normal": round(key_stream * 1e9, 3),
        "box_muller_ns_a_normal": round(box_muller * 1e9, 3),
        "sampling_ns_a_record": round(sampling * 1e9, 3),
        "seconds": {name: round(value, 5) for name, value in parts.items()},
        "total": round(sum(parts.values()), 5),
    }


def _products(case: Case, repeats: int) -> tuple[float, int]:
    """Seconds and floating-point operations of a holder's step's products."""
    seconds, work = 0.0, 0
    for rows, inner, columns in _shapes(case):
        left, right = torch.randn(BLOCK, rows, inner), torch.randn(BLOCK, inner, columns)
        out = torch.empty(BLOCK, rows, columns)
        seconds += _seconds(lambda a=left, b=right, c=out: torch.bmm(a, b, out=c), repeats) / BLOCK
        work += 2 * rows * inner * columns
    return seconds, work


def _shapes(case: Case) -> Iterator[tuple[int, int, int]]:
    """The products of a step: forwards, the weights' gradients, and backwards but for the first."""
    for layer, (before, after) in enumerate(pairwise(case.widths)):
        yield case.batch, before, after
        yield after, case.batch, before
        if layer:
            yield case.batch, after, before


def _numbers(case: Case, repeats: int) -> tuple[float, float, float]:
    """Seconds of a normal's key stream, of its transformation, and of a uniform to sample by."""
    keys = [simulation_key("floor", name) for name in names_of(BLOCK)]
    even = case.dimension + case.dimension % 2
    words = torch.empty(BLOCK, even, dtype=torch.int32)
    streams = [KeyStream(key, NOISE) for key in keys]
    rows = [row.data.cast("B") for row in words.numpy()]

    def fill() -> None:
        for stream, row in zip(streams, rows, strict=True):
            stream.fill(row)

    normals, uniforms = BLOCK * even, BLOCK * case.steps * case.records
    draws = torch.empty(words.shape)
    key_stream = _seconds(fill, repeats) / normals
    box_muller = _seconds(lambda: standard_normal(words, out=draws), repeats) / normals
    randomness = BlockRandomness(keys)
    sizes = [case.records] * BLOCK
    sampling = _seconds(lambda: randomness.uniform(sizes, case.steps), repeats) / uniforms
    return key_stream, box_muller, sampling


def _seconds(call: Callable[[], object], repeats: int) -> float:
    """Median of a call, once it is warm."""
    call()
    measured = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        measured.append(time.perf_counter() - begin)
    return statistics.median(measured)
