"""A mapping whose values are made when they are asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Lock
from typing import TypeVar

__all__ = ["OnDemand"]

_Value = TypeVar("_Value")


class OnDemand(Mapping[str, _Value]):
    """Names now, values later: a hundred thousand holders need not be built to ask a thousand.

    Threads may share it. Two that ask for the same value at once may both make it; ``build`` gives
    the same value each time. A copy, as another process gets one, makes its own values.

    Args:
        names: the keys, in order.
        build: name → value.
        keep: how many values to remember, the least recently used go first; None for all.
    """

    def __init__(
        self, names: Sequence[str], build: Callable[[str], _Value], keep: int | None = None
    ) -> None:
        self._names = dict.fromkeys(names)
        self._build, self._keep = build, keep
        self._made: OrderedDict[str, _Value] = OrderedDict()
        self._lock = Lock()

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (list(self._names), self._build, self._keep)

    def __getitem__(self, name: str) -> _Value:
        with self._lock:
            if name in self._made:
                self._made.move_to_end(name)
                return self._made[name]
        if name not in self._names:
            raise KeyError(name)
        value = self._build(name)
        with self._lock:
            self._made[name] = value
            while self._keep is not None and len(self._made) > self._keep:
                self._made.popitem(last=False)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names
