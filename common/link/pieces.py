"""Cutting buffers into chunks and reading them back, copying each byte once each way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from common.errors import WireError

__all__ = ["Reader", "after", "regroup"]


class Reader:
    """Reads consecutive bytes out of the pieces they came in, copying each byte once."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = [memoryview(piece) for piece in reversed(tuple(pieces))]
        self.left = sum(map(len, self._pieces))

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        if count > self.left:
            raise WireError(f"the payload ends {count - self.left} bytes too early")
        self.left -= count
        taken: list[memoryview] = []
        while count:
            piece = self._pieces.pop()
            if len(piece) > count:
                self._pieces.append(piece[count:])
                piece = piece[:count]
            taken.append(piece)
            count -= len(piece)
        return b"".join(taken)


def after(parts: Iterable[bytes], count: int) -> Iterator[memoryview]:
    """The concatenation of ``parts`` without its first ``count`` bytes, uncopied."""
    for part in parts:
        yield memoryview(part)[count:]
        count = max(0, count - len(part))


def regroup(parts: Iterable[bytes | memoryview], size: int) -> Iterator[bytes]:
    """The concatenation of ``parts`` in pieces of ``size`` bytes, the last one shorter."""
    waiting: list[memoryview] = []
    room = size
    for part in parts:
        rest = memoryview(part)
        while len(rest) >= room:
            yield b"".join((*waiting, rest[:room]))
            rest, waiting, room = rest[room:], [], size
        if rest:
            waiting.append(rest)
            room -= len(rest)
    if waiting:
        yield b"".join(waiting)
