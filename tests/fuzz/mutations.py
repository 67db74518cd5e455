"""Hostile inputs out of honest ones: seeded, so that a failure can be had again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

__all__ = ["inputs"]

MOST_BYTES = 1 << 16

TOKENS: tuple[bytes, ...] = (
    b"", b"\x00", b"\xff" * 9 + b"\x01", b"\x80" * 10, b"\x7f", b"\n", b"\x1b[2J", "é☃".encode(),
    b"\xed\xa0\x80", b"NaN", b"-Infinity", b"1e999", b"-0", b"9" * 30, b"9" * 5000, b"null",
    b"true", b'"', b"{}", b"[]", b"[" * 2000, b'{"a":' * 2000, b"(" * 300, b"../", b"\\ud800",
    b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----", b"\x93NUMPY", b"\x1f\x8b",
    b"cos\nsystem\n(S'true'\ntR.", b"\x80\x04\x95",
)  # fmt: skip
"""What decoders of text, numbers, nested things and other formats stumble over."""

Mutation = Callable[[random.Random, bytearray, Sequence[bytes]], None]


def inputs(seeds: Sequence[bytes], count: int, seed: int) -> Iterator[bytes]:
    """``count`` inputs: the seeds themselves, then mutations of them, of at most 64 KiB.

    Args:
        seeds: honest inputs.
        count: how many to make.
        seed: of the mutations.
    """
    chance = random.Random(seed)
    for number in range(count):
        yield seeds[number] if number < len(seeds) else _mutated(chance, seeds)


def _mutated(chance: random.Random, seeds: Sequence[bytes]) -> bytes:
    data = bytearray(chance.choice(seeds))
    for _ in range(1 << chance.randrange(4)):
        chance.choice(MUTATIONS)(chance, data, seeds)
    return bytes(data[:MOST_BYTES])


def _place(chance: random.Random, data: bytearray) -> int:
    return chance.randrange(len(data) + 1)


def _span(chance: random.Random, data: Sequence[int]) -> slice:
    start = chance.randrange(len(data) + 1)
    return slice(start, start + chance.choice((1, 2, 4, 8, 64, len(data))))


def _flip(chance: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _set(chance: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    if data:
        data[chance.randrange(len(data))] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, 0x2D, 0x39))


def _step(chance: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    if data:
        place = chance.randrange(len(data))
        data[place] = (data[place] + chance.choice((-1, 1))) % 256


def _cut(chance: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    del data[_span(chance, data)]


def _truncate(chance: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    del data[_place(chance, data) :]


def _repeat(chance: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    part = bytes(data[_span(chance, data)])
    place = _place(chance, data)
    data[place:place] = part * chance.choice((1, 2, 16))


def _insert(chance: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    place = _place(chance, data)
    data[place:place] = chance.choice(TOKENS)


def _overwrite(chance: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    data[_span(chance, data)] = chance.choice(TOKENS)


def _splice(chance: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    other = chance.choice(seeds)
    data[_place(chance, data) :] = other[chance.randrange(len(other) + 1) :]


def _noise(chance: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    place = _place(chance, data)
    data[place:place] = chance.randbytes(chance.choice((1, 4, 16)))


MUTATIONS: tuple[Mutation, ...] = (
    *(_flip, _set, _step, _cut, _truncate, _repeat, _insert, _overwrite, _splice, _noise),
)
