"""The streams of many simulated holders at once: what each holder alone would draw, as blocks.

:class:`BlockRandomness` gives on the CPU, number for number, what
:class:`~common.privacy.noise.SeededRandomness` gives each holder. :class:`DeviceRandomness` lays
its numbers out in the same way, but makes them where they are used, with a generator that needs
nothing but integer arithmetic: on a GPU the noise is another stream than on the CPU. Both are
predictable by whoever knows the keys: for simulations only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common.plan import TrainingPlan
from common.privacy.noise import (
    DRAWS,
    NOISE,
    PART,
    SAMPLING,
    KeyStream,
    SeededRandomness,
    standard_normal,
    unit_interval,
)

__all__ = [
    "BlockRandomness",
    "DeviceRandomness",
    "Streams",
    "block_randomness",
    "evaluation_randomness",
    "squares",
]

LOW = 2**32 - 1
"""The lower half of a word of 64 bits."""


def evaluation_randomness(plan: TrainingPlan, holder: str, number: int) -> SeededRandomness:
    """The noise of a simulated holder's evaluation, which is in no stream of its training.

    Args:
        plan: its seed names the streams.
        holder: its name.
        number: of the round.
    """
    return SeededRandomness("simulated evaluation", plan.seed, holder, number)


class Streams(Protocol):
    """The randomness of H holders, each with its own streams for sampling, noise and draws.

    Successive calls go on where the last one stopped, each holder by as much as it used itself: its
    numbers do not depend on who else is in the block.
    """

    def uniform(self, sizes: Sequence[int], steps: int) -> Tensor:
        """Uniforms in [0, 1) to sample by: [H, steps, max(sizes)] float64.

        Args:
            sizes: units of each holder; beyond its own, the numbers are 1: never sampled.
            steps: how many successive draws of all units.
        """
        ...

    def normal(self, n: int) -> Tensor:
        """Each holder's next ``n`` draws from N(0, 1): [H, n] float32."""
        ...

    def draws(self, counts: Sequence[int], width: int) -> Tensor:
        """Uniforms in [0, 1) for a task's own draws: [H, max(counts), width] float64.

        Args:
            counts: rows of each holder; beyond its own, the numbers are 0.
            width: numbers a row.
        """
        ...


class BlockRandomness:
    """The numbers of :class:`~common.privacy.noise.SeededRandomness`, bit for bit, in blocks.

    Several blocks may be used from several threads at once; one block from one at a time.

    Args:
        keys: one per holder, see :func:`~common.privacy.noise.simulation_key`.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = list(keys)
        self._streams: dict[int, list[KeyStream]] = {}
        self._words = torch.empty((0, 0), dtype=torch.int32)
        self._rows: list[memoryview] = []

    def uniform(self, sizes: Sequence[int], steps: int) -> Tensor:
        """[H, steps, max(sizes)] float64; see :class:`Streams`.

        A holder's are what ``steps`` successive calls of its own ``uniform(size)`` would give.
        """
        numbers = self._uniforms(SAMPLING, [steps * size for size in sizes])
        return _padded(numbers, _present(sizes)[:, None, :].expand(-1, steps, -1), 1.0)

    def normal(self, n: int) -> Tensor:
        """[H, n] float32, each row its holder's ``normal((n,), std=1.0)``; see :class:`Streams`."""
        draws = torch.empty((len(self._keys), n + n % 2))
        if not draws.numel():
            return draws[:, :n]
        self._resize(draws.shape[1])
        streams, height = self._each(NOISE), len(self._rows)
        for start in range(0, len(streams), height):
            part = streams[start : start + height]
            for stream, row in zip(part, self._rows, strict=False):  # the last part has fewer
                stream.fill(row)
            standard_normal(self._words[: len(part)], out=draws[start : start + height])
        return draws[:, :n]

    def draws(self, counts: Sequence[int], width: int) -> Tensor:
        """[H, max(counts), width] float64; see :class:`Streams`.

        A holder's are its own ``draws(count * width)``, in rows of ``width``.
        """
        numbers = self._uniforms(DRAWS, [count * width for count in counts])
        return _padded(numbers, _present(counts)[:, :, None].expand(-1, -1, width), 0.0)

    def _uniforms(self, stream: int, sizes: Sequence[int]) -> Tensor:
        """The next ``sizes[h]`` numbers of each holder h, one holder after another: [Σ sizes]."""
        words = torch.empty(sum(sizes), dtype=torch.int64)
        if len(words):
            buffer, start = words.numpy().data.cast("B"), 0
            for holder, size in zip(self._each(stream), sizes, strict=True):
                holder.fill(buffer[start : start + 8 * size])
                start += 8 * size
        return unit_interval(words)

    def _each(self, stream: int) -> list[KeyStream]:
        """Every holder's stream of that number."""
        if stream not in self._streams:
            self._streams[stream] = [KeyStream(key, stream) for key in self._keys]
        return self._streams[stream]

    def _resize(self, n: int) -> None:
        """Make room for ``n`` words of as many holders as leave the words in the cache.

        A training run asks for the same number at each step, so this is done once.
        """
        if self._words.shape[1] != n:
            self._words = torch.empty(
                (min(len(self._keys), max(1, PART // n)), n), dtype=torch.int32
            )
            self._rows = [row.data.cast("B") for row in self._words.numpy()]


class DeviceRandomness:
    """Streams in the layout of :class:`BlockRandomness`, made on a device without waiting for it.

    Counter-based, by :func:`squares`: the same seed gives the same numbers on the same kind of
    device, however holders are divided into blocks. On a GPU the noise is another stream than on
    the CPU, so a simulation's results agree between the two in distribution only.

    Args:
        keys: one per holder, see :func:`~common.privacy.noise.simulation_key`.
        device: where the numbers are made and stay.
    """

    def __init__(self, keys: Sequence[bytes], device: torch.device) -> None:
        # Of a key's four words, three are the streams' keys, odd as squares asks, and one is where
        # their counters start: equal words of two holders alone do not make equal streams.
        words = np.frombuffer(b"".join(keys), dtype="<i8").reshape(len(keys), 4).copy()
        words[:, :3] |= 1
        each = torch.from_numpy(words).to(device)
        self._keys = [each[:, stream, None] for stream in (SAMPLING, NOISE, DRAWS)]
        self._counters = [each[:, 3, None].clone() for _ in self._keys]
        self._device = device

    def uniform(self, sizes: Sequence[int], steps: int) -> Tensor:
        """[H, steps, max(sizes)] float64; see :class:`Streams`."""
        own, widest = self._integers(sizes), max(sizes, default=0)
        step = torch.arange(steps, device=self._device)[:, None]
        column = torch.arange(widest, device=self._device)
        numbers = self._uniforms(SAMPLING, step * own + column, steps * own)
        return torch.where(column < own, numbers, 1.0)

    def normal(self, n: int) -> Tensor:
        """[H, n] float32; see :class:`Streams`."""
        used = n + n % 2
        words = self._words(NOISE, torch.arange(used, device=self._device))
        self._counters[NOISE] += used
        return standard_normal(words.to(torch.int32))[:, :n]

    def draws(self, counts: Sequence[int], width: int) -> Tensor:
        """[H, max(counts), width] float64; see :class:`Streams`."""
        own, most = self._integers(counts), max(counts, default=0)
        row = torch.arange(most, device=self._device)[:, None]
        column = torch.arange(width, device=self._device)
        positions = (row * width + column).expand(len(counts), -1, -1)
        numbers = self._uniforms(DRAWS, positions, width * own)
        return torch.where(row < own, numbers, 0.0)

    def _uniforms(self, stream: int, positions: Tensor, used: Tensor) -> Tensor:
        """The numbers at places of the holders' streams, two words each, and ``used`` go by.

        Args:
            stream: which.
            positions: [H, ...], counted from where the streams are.
            used: [H, 1, 1] numbers.

        Returns:
            [H, ...] float64.
        """
        high = (2 * positions).flatten(start_dim=1)
        words = self._words(stream, high) << 32
        words |= self._words(stream, high + 1) & LOW
        self._counters[stream] += 2 * used.view(-1, 1)
        return unit_interval(words).view(positions.shape)

    def _words(self, stream: int, positions: Tensor) -> Tensor:
        """The words at places of the holders' streams: [H, n] of positions [n] or [H, n]."""
        return squares(self._counters[stream] + positions, self._keys[stream])

    def _integers(self, values: Sequence[int]) -> Tensor:
        """[H, 1, 1] int64 on the device. From pinned memory, as only such a copy waits for none."""
        integers = torch.tensor(values, dtype=torch.int64).view(-1, 1, 1)
        if self._device.type != "cuda":
            return integers.to(self._device)
        return integers.pin_memory().to(self._device, non_blocking=True)


def block_randomness(keys: Sequence[bytes], device: torch.device) -> Streams:
    """The randomness of a block of holders for where it is trained.

    Args:
        keys: one per holder, see :func:`~common.privacy.noise.simulation_key`.
        device: where the numbers will be used.
    """
    if device.type == "cpu":
        return BlockRandomness(keys)
    return DeviceRandomness(keys, device)


def squares(counters: Tensor, keys: Tensor) -> Tensor:
    """A word of 32 random bits per counter, by four rounds of squaring.

    Widynski 2020, "Squares: a fast counter-based RNG", arXiv:2004.06278, ``squares32``. Products
    and sums are modulo 2^64, which torch's int64 keeps to on CPUs and GPUs.

    Args:
        counters: int64, read as unsigned.
        keys: int64, odd and irregular; broadcast against the counters.

    Returns:
        int64 of the broadcast shape, each word as a signed one: in [−2^31, 2^31).
    """
    y = counters * keys
    z = y + keys
    x = y
    for addend in (y, z, y):
        x = _halves_swapped(torch.addcmul(addend, x, x))
    return torch.addcmul(z, x, x).bitwise_right_shift_(32)


def _halves_swapped(x: Tensor) -> Tensor:
    """Each int64 turned by 32 bits, in place."""
    high = (x >> 32).bitwise_and_(LOW)  # torch shifts the sign in
    return x.bitwise_left_shift_(32).bitwise_or_(high)


def _present(sizes: Sequence[int]) -> Tensor:
    """Which of the columns up to the greatest size are a holder's own: [H, max(sizes)] bool."""
    return torch.arange(max(sizes, default=0)) < torch.tensor(sizes, dtype=torch.int64)[:, None]


def _padded(numbers: Tensor, present: Tensor, padding: float) -> Tensor:
    """``numbers`` where ``present``, in order, and ``padding`` elsewhere."""
    if len(numbers) == present.numel():
        return numbers.view(present.shape)
    return torch.full(present.shape, padding, dtype=numbers.dtype).masked_scatter_(present, numbers)
