"""Noise and sampling, each with a negative control.

Draws of OsRandomness cannot be seeded. Its tests use a level of 1e-9 for what must be accepted, so
that a false alarm is out of the question, and enough draws that what must be rejected always is.
"""

import copy
import hashlib
import math
import os
import pickle
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import ECB
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.overrides import TorchFunctionMode

from common.errors import ConfigurationError
from common.privacy import noise
from common.privacy.noise import (
    BLOCK,
    INTEGERS,
    NOISE,
    SAMPLING,
    KeyStream,
    OsRandomness,
    Randomness,
    SeededRandomness,
    poisson_sample,
    simulation_key,
    standard_normal,
    unit_interval,
)
from common.privacy.noise import DRAWS as DRAWS_STREAM

LEVEL = 1e-9
DRAWS = 40_000
STREAMS = (SAMPLING, NOISE, DRAWS_STREAM, INTEGERS)

sources = pytest.mark.parametrize(
    "source",
    [OsRandomness, lambda: SeededRandomness("test", 1)],
    ids=["os", "seeded"],
)
Source = Callable[[], Randomness]


def looks_normal(draws: torch.Tensor, std: float) -> bool:
    """Kolmogorov–Smirnov at level 1e-9."""
    return bool(stats.kstest(draws.double().numpy(), "norm", args=(0.0, std)).pvalue > LEVEL)


@sources
@pytest.mark.parametrize("std", [1e-3, 1.0, 25.0])
def test_noise_has_its_standard_deviation_and_no_other(source: Source, std: float) -> None:
    draws = source().normal((DRAWS,), std=std)
    assert looks_normal(draws, std)
    # At these sizes the distance to ⅔σ and 1½σ (0.12, 0.10) is over twenty times its deviation.
    assert not looks_normal(draws, std * 2 / 3)
    assert not looks_normal(draws, std * 3 / 2)


class Fixed(OsRandomness):
    """Noise of words that are known."""

    def __init__(self, words: torch.Tensor) -> None:
        super().__init__()
        self.known = words

    def words(self, n: int) -> torch.Tensor:
        assert n == len(self.known)
        return self.known.clone()


def test_each_draw_is_four_draws_in_sum() -> None:
    """The defence against floating-point attacks; one draw has the same distribution."""
    words = OsRandomness().words(4 * 1000)
    draws = Fixed(words).normal((1000,), std=3.0, dtype=torch.float64)
    upper = (words.numpy() >> 11).reshape(4, 1000).astype(float)
    u, angle = (upper[:2] + 2**52 + 1) / 2**53, 2 * np.pi * upper[2:] / 2**53
    radius = np.sqrt(-2 * np.log(u))
    four = [*(radius * np.cos(angle)), *(radius * np.sin(angle))]
    np.testing.assert_allclose(draws, 3.0 * sum(four) / 2, rtol=1e-9, atol=1e-12)


def test_extreme_words_give_finite_noise_with_long_tails() -> None:
    """All four draws at their largest; 8σ must be within reach, as δ speaks of the tails."""
    small, large, eighth = -(2**63), 2**63 - 1, 2**61  # u = 2^-53, u = 1, an angle of π/4
    draws = Fixed(torch.tensor([small, large] * 2 + [eighth] * 4)).normal((2,), std=1.0)
    assert float(draws[0]) == pytest.approx(math.sqrt(2 * 2 * 53 * math.log(2)))
    assert float(draws[0]) > 8
    assert float(draws[1]) == 0.0


class CosinesOf(TorchFunctionMode):
    """Notes the devices on which cosines are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.Tensor.cos:
            self.devices.append(args[0].device.type)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_noise_is_made_on_the_device_it_is_asked_for(device: str) -> None:
    """Only words go there. The meta device stands for a GPU: nothing comes back from either."""
    for dtype in (torch.float32, torch.float64):
        with CosinesOf() as cosines:
            noise = OsRandomness().normal((2, 3), std=1.0, dtype=dtype, device=torch.device(device))
        assert noise.device.type == device
        assert noise.shape == (2, 3)
        assert noise.dtype == dtype
        assert cosines.devices == [device]


@sources
def test_tails_are_normal(source: Source) -> None:
    draws = source().normal((DRAWS,), std=1.0)
    beyond = int((draws.abs() > 3).sum())
    assert stats.binomtest(beyond, DRAWS, 2 * stats.norm.sf(3)).pvalue > LEVEL


@sources
def test_draws_are_independent_of_their_neighbours(source: Source) -> None:
    """Also at the distance of the four parts of a block, where an indexing error would show."""
    n = 2 * BLOCK
    draws = source().normal((n,), std=1.0).double()
    for lag in (1, 2, BLOCK // 2, BLOCK):
        correlation = float((draws[:-lag] * draws[lag:]).mean()) * np.sqrt(n - lag)
        assert abs(correlation) < stats.norm.isf(LEVEL / 2)


@sources
@pytest.mark.parametrize("shape", [(), (0,), (3,), (0, 4), (2, 3, 5), (BLOCK + 1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_and_type_are_as_asked(
    source: Source, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    randomness = source()
    noise = randomness.normal(shape, std=1.0, dtype=dtype)
    assert noise.shape == shape
    assert noise.dtype == dtype
    # float32 has few enough numbers for draws to meet by chance, and seeded ones are made in it.
    if dtype == torch.float64 and not randomness.predictable:
        assert len(set(noise.flatten().tolist())) == noise.numel()


@sources
def test_no_noise_is_exactly_none(source: Source) -> None:
    assert not source().normal((100,), std=0.0).any()


@sources
@pytest.mark.parametrize("stream", ["uniform", "draws"])
def test_uniforms_fill_the_unit_interval(source: Source, stream: str) -> None:
    randomness = source()
    uniform = randomness.uniform if stream == "uniform" else randomness.draws
    draws = uniform(DRAWS)
    assert draws.dtype == torch.float64
    assert float(draws.min()) >= 0.0
    assert float(draws.max()) < 1.0
    assert stats.kstest(draws.numpy(), "uniform").pvalue > LEVEL
    assert stats.kstest((draws.numpy() * 1024) % 1, "uniform").pvalue > LEVEL  # the lower bits
    assert stats.kstest(draws.numpy() ** 1.1, "uniform").pvalue < LEVEL
    assert len(uniform(5 * BLOCK)) == 5 * BLOCK
    assert len(uniform(0)) == 0


@sources
def test_words_are_fair_bits(source: Source) -> None:
    """Each bit, and each two bits of a word; a source that loses its top bit does not pass."""
    words = source().words(DRAWS)
    assert words.dtype == torch.int64

    def fair(words: torch.Tensor) -> bool:
        bits = np.unpackbits(words.numpy().view(np.uint8)).reshape(-1, 64) * 2.0 - 1.0
        worst = np.abs(np.vstack([bits.T @ bits - DRAWS * np.eye(64), bits.sum(axis=0)])).max()
        return bool(worst / np.sqrt(DRAWS) < stats.norm.isf(LEVEL / 64**2))

    assert fair(words)
    assert not fair(words & (2**63 - 1))
    assert not fair(words | (words >> 1 & 1))
    assert len(source().words(9 * BLOCK)) == 9 * BLOCK
    assert len(source().words(0)) == 0


# -- streams ---------------------------------------------------------------------------------


def test_two_os_sources_never_share_a_stream() -> None:
    assert not torch.equal(
        OsRandomness().normal((100,), std=1.0), OsRandomness().normal((100,), std=1.0)
    )
    # Equal words in other places would be a shared stream too.
    first, second = (set(OsRandomness().words(DRAWS).tolist()) for _ in range(2))
    assert not first & second


def test_seeding_torch_numpy_and_python_does_not_move_os_randomness() -> None:
    def drawn_after_seeding() -> torch.Tensor:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        return OsRandomness().words(4)

    with torch.random.fork_rng(devices=[]):
        assert not torch.equal(drawn_after_seeding(), drawn_after_seeding())


def test_threads_share_a_stream_and_no_part_of_it() -> None:
    source = OsRandomness()
    with ThreadPoolExecutor(4) as pool:
        words = torch.cat(list(pool.map(source.words, [1000] * 16)))
    assert len(words.unique()) == 16_000


def test_os_randomness_cannot_be_copied() -> None:
    source = OsRandomness()
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied"):
            duplicate(source)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork beside other threads
def test_a_forked_child_has_another_stream() -> None:
    source = OsRandomness()
    source.uniform(1)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, source.words(4).numpy().tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 32) != source.words(4).numpy().tobytes()
    os.close(reader)
    os.close(writer)


def test_seeded_streams_repeat_and_differ_between_holders() -> None:
    def draw(*parts: object) -> torch.Tensor:
        return SeededRandomness(*parts).normal((50,), std=1.0)

    assert torch.equal(draw(0, "clinic-a", 3), draw(0, "clinic-a", 3))
    others = [draw(0, "clinic-b", 3), draw(0, "clinic-a", 4), draw(1, "clinic-a", 3)]
    assert not any(torch.equal(draw(0, "clinic-a", 3), other) for other in others)


def test_sources_say_whether_they_can_be_predicted() -> None:
    assert SeededRandomness(0).predictable
    assert not OsRandomness().predictable


def test_no_stream_of_a_source_moves_another() -> None:
    alone = SeededRandomness("a")
    noise = alone.normal((50,), std=1.0)
    mixed = SeededRandomness("a")
    mixed.uniform(3)
    mixed.draws(4)
    mixed.words(5)
    assert torch.equal(mixed.normal((50,), std=1.0), noise)
    assert torch.equal(mixed.draws(3), SeededRandomness("a").draws(7)[4:])
    assert torch.equal(mixed.uniform(3), SeededRandomness("a").uniform(6)[3:])
    assert torch.equal(mixed.words(3), SeededRandomness("a").words(8)[5:])


def test_a_seeded_sources_streams_are_independent() -> None:
    source = SeededRandomness("streams")
    words = [source._words(stream, DRAWS, torch.int32).double() for stream in STREAMS]
    other = SeededRandomness("streams", "other")
    words += [other._words(stream, DRAWS, torch.int32).double() for stream in STREAMS]
    correlations = np.corrcoef(torch.stack(words).numpy())[np.triu_indices(2 * len(STREAMS), 1)]
    bound = float(stats.norm.isf(LEVEL / 2)) / np.sqrt(DRAWS)
    assert np.abs(correlations).max() < bound
    assert np.corrcoef(words[0], words[0])[0, 1] > bound


def test_successive_calls_go_on_where_the_last_stopped() -> None:
    source = SeededRandomness("calls")
    parts = [source.uniform(n) for n in (3, 0, 1, 5)]
    assert torch.equal(torch.cat(parts), SeededRandomness("calls").uniform(9))
    source = SeededRandomness("calls")
    noise = [source.normal((n,), std=1.0) for n in (4, 3, 5)]
    words = SeededRandomness("calls")._words(NOISE, 4 + 4 + 6, torch.int32)
    expected = [standard_normal(part) for part in words.split([4, 4, 6])]
    assert torch.equal(torch.cat(noise), torch.cat([expected[0], expected[1][:3], expected[2][:5]]))


def test_a_source_can_be_made_from_its_key() -> None:
    key = simulation_key(0, "clinic-a", 3)
    assert len(key) == 32
    assert key == hashlib.sha256(b"(0, 'clinic-a', 3)").digest()
    of_key, of_parts = SeededRandomness.of_key(key), SeededRandomness(0, "clinic-a", 3)
    for _ in range(2):
        assert torch.equal(of_key.normal((9,), std=2.0), of_parts.normal((9,), std=2.0))
        assert torch.equal(of_key.draws(9), of_parts.draws(9))


# -- key streams and what is made of them ----------------------------------------------------

# Known answer of AES-256 for a block of zeros under a key of zeros, as in CAVP's vectors (NIST).
ZEROS_ENCRYPTED = bytes.fromhex("dc95c078a2408989ad48a21492842087")


def stream_of(key: bytes, stream: int, n: int) -> bytes:
    buffer = bytearray(n)
    KeyStream(key, stream).fill(buffer)
    return bytes(buffer)


def test_a_key_stream_is_aes_in_counter_mode() -> None:
    assert stream_of(bytes(32), 0, 16) == ZEROS_ENCRYPTED
    key = bytes(range(32))
    for stream in (*STREAMS, 2**64 - 1):
        counters = b"".join(stream.to_bytes(8, "big") + i.to_bytes(8, "big") for i in range(5))
        expected = Cipher(AES256(key), ECB()).encryptor().update(counters)
        assert stream_of(key, stream, 75) == expected[:75]


@given(st.lists(st.integers(0, 70), max_size=8))
def test_a_key_stream_goes_on_through_parts(sizes: list[int]) -> None:
    whole, stream = stream_of(b"k" * 32, NOISE, sum(sizes)), KeyStream(b"k" * 32, NOISE)
    buffer = memoryview(bytearray(b"x" * sum(sizes)))
    start = 0
    for size in sizes:
        stream.fill(buffer[start : start + size])
        start += size
    assert bytes(buffer) == whole


def test_a_key_stream_is_as_long_as_asked() -> None:
    """Longer than the zeros that are encrypted at a time."""
    n = 2 * len(noise._ZEROS) + 5
    long = stream_of(bytes(32), DRAWS_STREAM, n)
    counters = (n - 1) // 16
    last = Cipher(AES256(bytes(32)), ECB()).encryptor()
    block = last.update(DRAWS_STREAM.to_bytes(8, "big") + counters.to_bytes(8, "big"))
    assert long[16 * counters :] == block[: n - 16 * counters]


def test_normals_are_box_muller_of_the_words() -> None:
    words = SeededRandomness("words")._words(NOISE, 20_000, torch.int32)
    radii, angles = words.double().numpy().reshape(2, -1)
    r = np.sqrt(-2 * np.log((np.floor(radii / 256) + 2**23 + 1) / 2**24))
    angle = angles * 2 * np.pi / 2**32
    expected = np.concatenate([r * np.cos(angle), r * np.sin(angle)])
    # float32 has 2^-23 of the angle and of the result; near u = 1 also of log u.
    np.testing.assert_allclose(standard_normal(words), expected, rtol=0, atol=3e-6)


EXTREMES = [0, -1, -(2**31), 2**31 - 1, 255, 256, -256]


def test_extreme_words_give_finite_normals() -> None:
    radius, angle = torch.cartesian_prod(*[torch.tensor(EXTREMES, dtype=torch.int32)] * 2).T
    draws = standard_normal(torch.cat([radius, angle]))
    assert draws.isfinite().all()
    assert float(draws.abs().max()) == pytest.approx(math.sqrt(48 * math.log(2)))
    # The greatest word gives u = 1, so r = 0.
    assert not draws.view(2, -1)[:, radius == 2**31 - 1].any()


def test_extreme_words_give_uniforms_below_one() -> None:
    words = torch.tensor([0, 2047, 2048, 2**63 - 1, -(2**63), -1])
    uniforms = [0.0, 0.0, 2.0**-53, 0.5 - 2.0**-53, 0.5, 1.0 - 2.0**-53]
    assert unit_interval(words).tolist() == uniforms


@given(
    st.lists(st.integers(0, 4), max_size=2), st.integers(0, 30), st.integers(1, 40), st.booleans()
)
def test_normals_do_not_depend_on_the_size_of_parts(
    leading: list[int], half: int, part: int, in_place: bool
) -> None:
    words = SeededRandomness("parts")._words(NOISE, math.prod(leading) * 2 * half, torch.int32)
    words = words.view(*leading, 2 * half)
    with pytest.MonkeyPatch.context() as patch:
        whole = standard_normal(words)
        patch.setattr(noise, "PART", part)
        out = words.clone().view(torch.float32) if in_place else None
        source = words if out is None else out.view(torch.int32)
        parts = standard_normal(source, out=out)
    assert parts.shape == words.shape
    assert torch.equal(parts, whole)
    if words.numel():
        rows = [standard_normal(row) for row in words.view(-1, 2 * half)]
        assert torch.equal(torch.cat(rows), whole.flatten())


# -- Poisson sampling ------------------------------------------------------------------------


@sources
def test_sample_sizes_are_binomial(source: Source) -> None:
    """Batches of a fixed size, or of another rate, do not pass."""
    n, rate, rounds = 200, 0.3, 3000
    randomness = source()
    sizes = np.array([len(poisson_sample(n, rate, randomness)) for _ in range(rounds)])

    def pvalue(sizes: np.ndarray, rate: float) -> float:
        edges = stats.binom.ppf(np.linspace(0, 1, 9)[1:-1], n, rate)
        observed = np.bincount(np.digitize(sizes, edges, right=True), minlength=8)
        expected = np.diff([0.0, *stats.binom.cdf(edges, n, rate), 1.0]) * rounds
        return float(stats.chisquare(observed, expected).pvalue)

    assert pvalue(sizes, rate) > LEVEL
    assert pvalue(sizes, rate * 1.1) < LEVEL
    assert pvalue(np.full(rounds, int(n * rate)), rate) < LEVEL


@sources
def test_units_are_taken_independently(source: Source) -> None:
    """Every unit at the rate, every pair at its square; shuffled batches fail the second."""
    n, rate, rounds = 20, 0.25, 4000
    randomness = source()
    taken = np.zeros((rounds, n))
    for row in taken:
        row[poisson_sample(n, rate, randomness).numpy()] = 1

    def pairs(taken: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The correlation of each two units."""
        return np.asarray(np.corrcoef(taken.T))[np.triu_indices(n, 1)]

    def worst_pair(taken: np.ndarray) -> float:
        """Largest pairwise correlation, in standard deviations."""
        return float(np.abs(pairs(taken)).max() * np.sqrt(rounds))

    each = [stats.binomtest(int(column.sum()), rounds, rate).pvalue for column in taken.T]
    bound = float(stats.norm.isf(LEVEL))
    assert min(each) > LEVEL
    assert worst_pair(taken) < bound
    # Exactly q·n units in every batch: the mean correlation is −1/(n−1).
    shuffled = np.random.default_rng(0).permuted(
        np.tile(np.arange(n) < rate * n, (rounds, 1)), axis=1
    )
    assert pairs(shuffled.astype(float)).mean() == pytest.approx(-1 / 19, abs=0.01)
    assert abs(pairs(taken).mean()) < 0.02


def test_no_unit_enters_more_often_than_its_rate() -> None:
    """Uniforms are multiples of 2^-53: compared with q itself, 0 passes however small q is."""

    class Zeros(SeededRandomness):
        def uniform(self, n: int) -> torch.Tensor:
            return torch.zeros(n, dtype=torch.float64)

    assert len(poisson_sample(5, 2.0**-53, Zeros())) == 5
    assert len(poisson_sample(5, 0.99 * 2.0**-53, Zeros())) == 0
    assert len(poisson_sample(5, 1e-300, Zeros())) == 0


@sources
def test_rate_one_takes_every_unit_and_no_units_are_ordinary(source: Source) -> None:
    assert poisson_sample(7, 1.0, source()).tolist() == list(range(7))
    for rate in (0.5, 1.0):
        empty = poisson_sample(0, rate, source())
        assert empty.shape == (0,)
        assert empty.dtype == torch.int64


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.01, float("nan")])
def test_a_rate_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(ConfigurationError, match="sampling_rate must be above 0 and at most 1"):
        poisson_sample(10, rate, SeededRandomness(0))
