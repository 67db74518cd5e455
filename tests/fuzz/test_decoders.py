"""Every decoder gives a value or a documented error, for ten thousand inputs of each.

``make fuzz`` tries a million and more, guided by coverage. Nothing here asserts on wall time: an
input that hangs runs into the suite's own limit.
"""

from __future__ import annotations

import gc
import resource
import sys
import tracemalloc
from collections.abc import Iterable

import pytest

from tests.fuzz.decoders import DECODERS, Decoder
from tests.fuzz.mutations import MOST_BYTES, inputs

pytestmark = pytest.mark.filterwarnings(
    # Of a certificate whose serial number is negative; it is refused or read all the same.
    "ignore::cryptography.utils.CryptographyDeprecationWarning"
)

INPUTS = 10_000
SEED = 5

PEAK_BYTES = 4 * 1024 * 1024 + 64 * MOST_BYTES
"""Most memory that one input of at most 64 KiB may take: 64 times its length (a layout of many tiny
values becomes 32 times as long, measured) and 4 MiB that a decoder needs for any input."""

GROWTH_BYTES = 32 * 1024 * 1024
"""Most that the process may grow by over all inputs of a decoder: caches and the allocator's slack,
but not a kilobyte that each of ten thousand inputs leaves behind and then some."""


def try_all(decoder: Decoder, data: Iterable[bytes]) -> tuple[int, int]:
    """Decode inputs, and count those that were read and those that were refused.

    Raises:
        AssertionError: an input raised something that is not documented.
    """
    read = refused = 0
    for one in data:
        try:
            decoder.decode(one)
            read += 1
        except decoder.refuses:
            refused += 1
        except Exception as error:
            raise AssertionError(
                f"{type(error).__name__}: {str(error)[:200]} for {one[:2000]!r}"
            ) from error
    return read, refused


@pytest.mark.parametrize("name", DECODERS)
def test_every_input_is_read_or_refused(name: str) -> None:
    decoder = DECODERS[name]
    seeds = decoder.seeds()
    try_all(decoder, inputs(seeds, 100, SEED))  # whatever is loaded or cached once
    before = peak_memory()

    read, refused = try_all(decoder, inputs(seeds, int(INPUTS * decoder.share), SEED))

    assert read, "the seeds at least are fit to be read"
    assert refused or not decoder.refuses, "a decoder that reads everything refuses nothing"
    assert peak_memory() - before < GROWTH_BYTES


def peak_memory() -> int:
    """Most bytes that this process has had in memory so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@pytest.mark.parametrize("name", DECODERS)
def test_no_input_takes_or_leaves_much_memory(name: str) -> None:
    decoder = DECODERS[name]
    seeds, count = decoder.seeds(), max(50, int(200 * decoder.share))
    try_all(decoder, inputs(seeds, count, SEED))
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for one in inputs(seeds, count, SEED + 1):
            tracemalloc.reset_peak()
            now, _ = tracemalloc.get_traced_memory()
            try_all(decoder, [one])
            assert tracemalloc.get_traced_memory()[1] - now < PEAK_BYTES
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 1000 * count, "less than a kilobyte of each input stays"


def test_a_decoder_that_breaks_its_word_is_noticed() -> None:
    broken = Decoder(lambda data: {}[data], lambda: [b""], (WireErrorStandIn,))
    with pytest.raises(AssertionError, match="KeyError"):
        try_all(broken, inputs(broken.seeds(), 2, SEED))


class WireErrorStandIn(Exception):
    """What the broken decoder promises to raise."""


def test_the_same_seed_makes_the_same_inputs() -> None:
    seeds = [b"an honest input", b"another"]
    assert list(inputs(seeds, 100, 1)) == list(inputs(seeds, 100, 1))
    assert list(inputs(seeds, 100, 1)) != list(inputs(seeds, 100, 2))
