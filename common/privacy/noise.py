"""Where randomness comes from: unpredictable in deployment, seeded in simulations.

Noise protects only as far as nobody can predict it. :class:`OsRandomness` is a stream cipher under
a key from the operating system; it cannot be seeded, copied or carried into another process.
:class:`SeededRandomness` gives the same draws for the same parts, so that an experiment can be
repeated; whoever knows the parts can subtract the noise, so reports of simulations must say
``predictable``. Holders never share a stream: each has its own key, or its name among the parts.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Iterator, Sequence
from typing import NoReturn, Protocol, Self

import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from torch import Tensor

from common.errors import ConfigurationError

__all__ = [
    "DRAWS",
    "INTEGERS",
    "NOISE",
    "SAMPLING",
    "KeyStream",
    "KeyedRandomness",
    "OsRandomness",
    "Randomness",
    "SeededRandomness",
    "poisson_sample",
    "simulation_key",
    "standard_normal",
    "unit_interval",
]

BLOCK = 2**15
"""Unpredictable normals made at a time: their 1 MB of key stream stays in the cache."""

GAUSSIANS = 4
"""Gaussians summed into one, as in Opacus' secure mode; see :meth:`OsRandomness.normal`."""

SAMPLING, NOISE, DRAWS, INTEGERS = 0, 1, 2, 3
"""The streams of a key."""

PART = 2**17
"""Normal draws of a simulation made at a time: what they need stays in the cache."""

_CPU = torch.device("cpu")
_MIDDLE = torch.tensor(0.5 + 2.0**-24)
_ZEROS = memoryview(bytes(8 * GAUSSIANS * BLOCK))


class Randomness(Protocol):
    """A source of noise, samples and a task's own draws."""

    @property
    def predictable(self) -> bool:
        """Whether somebody who knows a seed could know the noise."""
        ...

    def normal(
        self,
        shape: Sequence[int],
        *,
        std: float,
        dtype: torch.dtype = torch.float32,
        device: torch.device = _CPU,
    ) -> Tensor:
        """Independent draws from N(0, std²).

        Args:
            shape: of the result.
            std: standard deviation, ≥ 0.
            dtype: of the result.
            device: of the result; the draws do not depend on it.
        """
        ...

    def uniform(self, n: int) -> Tensor:
        """``n`` independent draws from [0, 1) with 53 bits: [n] float64 on the CPU."""
        ...

    def draws(self, n: int) -> Tensor:
        """As :meth:`uniform`, for a task's own draws (negatives, augmentation).

        A stream of its own, so that what a task draws does not move who is sampled.
        """
        ...

    def words(self, n: int) -> Tensor:
        """``n`` words of 64 independent fair bits, for draws that must be exact: [n] int64.

        On the CPU, and a stream of its own as :meth:`draws` are.
        """
        ...


class OsRandomness:
    """Unpredictable randomness: AES-256 in counter mode under a key from the operating system.

    May be shared by threads. A forked child takes a new key, so it does not repeat its parent's
    stream; copying and pickling are refused for the same reason.
    """

    predictable = False

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rekey()

    def normal(
        self,
        shape: Sequence[int],
        *,
        std: float,
        dtype: torch.dtype = torch.float32,
        device: torch.device = _CPU,
    ) -> Tensor:
        """Independent draws from N(0, std²), on any device; see :class:`Randomness`.

        The cipher runs on the CPU; its words go to the device and become normals there, the same
        ones on every device but for the last bits of its logarithms and cosines.

        Each is the sum of four draws of half the size, made in float64. A single Box–Muller draw
        can take only some of the floating-point numbers, which gives away what it was added to
        (Mironov 2012); against 2n draws in sum that attack takes 2^(53(2n−1)) steps (Holohan &
        Braghin 2021, "Secure random sampling in differential privacy", section 5.1). That is about
        the draws alone. How finely floats are spaced depends on their size, so a float32 sum of
        data and noise can still show how small the data were: add in float64 and round to a public
        grid, as :func:`~common.privacy.step.noisy_mean` does. Nothing is proved for the arithmetic;
        for counts, :func:`~common.privacy.discrete_noise.discrete_gaussian` is exact.
        """
        noise = torch.empty(math.prod(shape), dtype=torch.float64, device=device)
        for start in range(0, len(noise), BLOCK):
            part = noise[start : start + BLOCK]
            words = self.words(GAUSSIANS * len(part)).to(device)
            torch.mul(_sums_of_normals(words), std, out=part)
        return noise.view(tuple(shape)).to(dtype)

    def uniform(self, n: int) -> Tensor:
        """``n`` draws from [0, 1): [n] float64; see :class:`Randomness`."""
        return unit_interval(self.words(n))

    def draws(self, n: int) -> Tensor:
        """``n`` draws from [0, 1), as :meth:`uniform` gives them; see :class:`Randomness`."""
        return self.uniform(n)

    def words(self, n: int) -> Tensor:
        """``n`` words of 64 fair bits: [n] int64; see :class:`Randomness`."""
        with self._lock:
            if os.getpid() != self._process:
                self._rekey()
            return _next_words(self._stream, n, torch.int64)

    def _rekey(self) -> None:
        self._process = os.getpid()
        self._stream = KeyStream(os.urandom(32), 0)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "OsRandomness cannot be copied: two owners of one stream would repeat noise"
        )


class KeyedRandomness(OsRandomness):
    """The same draws under a secret key, so that work which a crash cut short repeats its noise.

    As unpredictable as the key is: it comes from the operating system, is used for one purpose, and
    is thrown away with what it belongs to. Noise and samples come from two streams of it, so that
    neither moves the other.

    Args:
        key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        super().__init__()

    def uniform(self, n: int) -> Tensor:
        """``n`` draws from [0, 1), of a stream of their own: [n] float64."""
        with self._lock:
            return unit_interval(_next_words(self._samples, n, torch.int64))

    def _rekey(self) -> None:
        self._process = os.getpid()
        self._stream = KeyStream(self._key, NOISE)
        self._samples = KeyStream(self._key, SAMPLING)


def _sums_of_normals(words: Tensor) -> Tensor:
    """[n] float64 from N(0, 1) of [4n] int64 words, which are overwritten; four draws in each.

    Box–Muller in float64, on the words' device: the first half of the words gives the radii
    r = √(−2 ln u), u in (0, 1], the second half the angles θ; each r and θ give the two draws
    r cos θ and r sin θ. The signed upper 53 bits do for both.
    """
    upper = words.bitwise_right_shift_(11).double()
    pairs = len(words) // 2
    u = upper[:pairs].add_(2.0**52 + 1.0).mul_(2.0**-53)
    radius = u.log_().mul_(-2.0).sqrt_()
    angle = upper[pairs:].mul_(2.0 * math.pi * 2.0**-53)
    both = angle.cos().add_(angle.sin_()).mul_(radius)
    n = len(words) // GAUSSIANS
    return both[:n].add_(both[n:]).div_(math.sqrt(GAUSSIANS))


class KeyStream:
    """The key stream of AES-256 in counter mode: as many bytes as asked, the same on every machine.

    Who knows the key knows the stream: a key that is to protect comes from the operating system,
    one of a simulation from :func:`simulation_key`. Not to be shared by threads.

    Args:
        key: 32 bytes.
        stream: which of the key's 2^64 streams; the upper half of the counter block.
    """

    def __init__(self, key: bytes, stream: int) -> None:
        start = stream.to_bytes(8, "big") + bytes(8)
        self._encryptor = Cipher(AES256(key), CTR(start)).encryptor()

    def fill(self, buffer: memoryview | bytearray) -> None:
        """Overwrite ``buffer``, which is contiguous, with the stream's next bytes."""
        if len(buffer) <= len(_ZEROS):
            self._encryptor.update_into(_ZEROS[: len(buffer)], buffer)
            return
        view = memoryview(buffer)
        for start in range(0, len(view), len(_ZEROS)):
            self.fill(view[start : start + len(_ZEROS)])


def simulation_key(*parts: object) -> bytes:
    """The key of a simulated holder's streams: 32 bytes, the same on every machine.

    Args:
        *parts: ints and strings that name the streams, the holder's name and the round among them.
    """
    return hashlib.sha256(repr(parts).encode()).digest()


class SeededRandomness:
    """Repeatable randomness for simulations: the same parts, the same draws, on every machine.

    Sampling, noise, a task's own draws and words for exact draws come from four key streams, so
    that none moves another. Successive calls go on where the last one stopped. Uniforms and words
    follow each other: n and then k are the same numbers as n + k. Normals do not, since a call lays
    its pairs out by its own n; see :func:`standard_normal`. The last bit of a normal may differ
    between kinds of processor, whose logarithms and cosines do.

    Not to be shared by threads.

    Args:
        *parts: ints and strings that name the stream, the holder's name and the round among them.
    """

    predictable = True

    def __init__(self, *parts: object) -> None:
        self._key = simulation_key(*parts)
        self._streams: dict[int, KeyStream] = {}

    @classmethod
    def of_key(cls, key: bytes) -> Self:
        """The randomness of a key of 32 bytes, see :func:`simulation_key`."""
        randomness = cls()
        randomness._key = key
        return randomness

    def normal(
        self,
        shape: Sequence[int],
        *,
        std: float,
        dtype: torch.dtype = torch.float32,
        device: torch.device = _CPU,
    ) -> Tensor:
        """Independent draws from N(0, std²), the same on every device; see :class:`Randomness`."""
        n = math.prod(shape)
        words = self._words(NOISE, n + n % 2, torch.int32)
        noise = standard_normal(words, out=words.view(torch.float32))[:n]
        return noise.to(dtype).mul_(std).view(tuple(shape)).to(device)

    def uniform(self, n: int) -> Tensor:
        """``n`` draws from [0, 1): [n] float64; see :class:`Randomness`."""
        return unit_interval(self._words(SAMPLING, n, torch.int64))

    def draws(self, n: int) -> Tensor:
        """``n`` draws from [0, 1): [n] float64; see :class:`Randomness`."""
        return unit_interval(self._words(DRAWS, n, torch.int64))

    def words(self, n: int) -> Tensor:
        """``n`` words of 64 bits: [n] int64; see :class:`Randomness`."""
        return self._words(INTEGERS, n, torch.int64)

    def _words(self, stream: int, n: int, dtype: torch.dtype) -> Tensor:
        """[n] words of a stream."""
        if stream not in self._streams:
            self._streams[stream] = KeyStream(self._key, stream)
        return _next_words(self._streams[stream], n, dtype)


def _next_words(stream: KeyStream, n: int, dtype: torch.dtype) -> Tensor:
    """The stream's next ``n`` words of a type."""
    words = torch.empty(n, dtype=dtype)
    if n:
        stream.fill(words.numpy().data.cast("B"))
    return words


def unit_interval(words: Tensor) -> Tensor:
    """Words of 64 random bits as uniforms in [0, 1): the upper 53 bits, times 2^-53.

    Args:
        words: int64, of any shape, on any device.

    Returns:
        float64, of the same shape.
    """
    # torch shifts the sign in; the mask makes the shift a logical one.
    return (words >> 11).bitwise_and_(2**53 - 1).double().mul_(2.0**-53)


def standard_normal(words: Tensor, out: Tensor | None = None) -> Tensor:
    """Random words as draws from N(0, 1), by Box–Muller: (r cos θ, r sin θ) with r = √(−2 ln u).

    Box & Muller 1958, "A note on the generation of random normal deviates". Each row of 2m words
    by itself: words 0 to m−1 give the radii, from the upper 24 bits, u = (⌊word / 2^8⌋ + 2^23 + 1)
    · 2^-24 in (0, 1], each exact in float32; words m to 2m−1 give the angles, word · 2π / 2^32. The
    row's draws are the m cosines and then the m sines. No draw is beyond √(48 ln 2) ≈ 5.8.

    Args:
        words: [..., 2m] int32, contiguous, on any device.
        out: for the result, contiguous; the words' own memory (``words.view(torch.float32)``) will
            do.

    Returns:
        [..., 2m] float32.
    """
    if out is None:
        out = torch.empty_like(words, dtype=torch.float32)
    half = words.shape[-1] // 2
    shape = (math.prod(words.shape[:-1]), 2, half)
    pairs, draws = words.view(shape), out.view(shape)
    for part in _parts(shape[0], half, PART if words.device.type == "cpu" else words.numel()):
        _box_muller(pairs[part], draws[part])
    return out


def _parts(rows: int, half: int, most: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of [rows, 2, half] that are of about ``most`` numbers: rows, or pieces of one row."""
    columns = max(1, min(half, most // 2))
    height = max(1, most // (2 * columns))
    for row in range(0, rows, height):
        for column in range(0, half, columns):
            yield slice(row, row + height), slice(None), slice(column, column + columns)


def _box_muller(words: Tensor, out: Tensor) -> None:
    """Normal draws from words, both [R, 2, p]; see :func:`standard_normal`."""
    # Every intermediate below has at most 24 bits, so float32 holds u exactly.
    u = torch.add(_MIDDLE, (words[:, 0] >> 8).float(), alpha=2.0**-24)
    radius = u.log_().mul_(-2.0).sqrt_()
    angle = words[:, 1] * (2.0 * math.pi / 2**32)
    torch.cos(angle, out=out[:, 0]).mul_(radius)
    torch.sin(angle, out=out[:, 1]).mul_(radius)


def poisson_sample(n: int, sampling_rate: float, randomness: Randomness) -> Tensor:
    """A Poisson sample: each of ``n`` units by itself with probability ``sampling_rate``.

    The size varies, and may be 0: that is what the accountant's subsampling is about, and why
    sums are divided by the expected batch size (Abadi et al. 2016, algorithm 1).

    Args:
        n: units.
        sampling_rate: q, in (0, 1]; 1 takes all.
        randomness: of the draws.

    Returns:
        Indices in ascending order: [B] int64 on the CPU.
    """
    if not 0.0 < sampling_rate <= 1.0:
        raise ConfigurationError(
            f"sampling_rate must be above 0 and at most 1, got {sampling_rate!r}"
        )
    if sampling_rate == 1.0:
        return torch.arange(n)
    # Draws are multiples of 2^-53. Rounded down to one, no unit enters more often than is paid for.
    threshold = math.ldexp(math.floor(math.ldexp(sampling_rate, 53)), -53)
    return torch.nonzero(randomness.uniform(n) < threshold).flatten()
