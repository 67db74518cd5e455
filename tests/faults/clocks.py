"""Clocks that are wrong, or jump."""

from __future__ import annotations

import datetime
import sys
import time
import types
from dataclasses import dataclass

__all__ = ["WrongClock"]

_HOUSES = ("common.", "client.", "server.", "simulations.", "sotto.", "flwr.")


@dataclass(frozen=True)
class WrongClock:
    """A fault: what the process reads as the time of day is off; the monotonic clock goes on.

    Our code and Flower's sees it. gRPC does not: it compares Python's time with that of the system,
    which one process cannot set for itself, and on a machine with a wrong clock the two agree.

    Args:
        off: seconds that it is ahead.
        jump: seconds that it jumps ahead in between.
        after: seconds from the process's start, of the jump.
    """

    off: float
    jump: float = 0.0
    after: float = 0.0

    def __call__(self) -> None:
        """Set it."""
        began, real, real_ns = time.monotonic(), time.time, time.time_ns

        def off() -> float:
            return self.off + (self.jump if time.monotonic() - began > self.after else 0.0)

        class Wrong(datetime.datetime):
            @classmethod
            def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
                return datetime.datetime.fromtimestamp(real() + off(), tz)

        wrong = types.ModuleType("time")
        wrong.__dict__.update(vars(time))
        wrong.__dict__.update(
            time=lambda: real() + off(), time_ns=lambda: real_ns() + int(off() * 1e9)
        )
        for name, module in list(sys.modules.items()):
            if name.startswith(_HOUSES):
                for own, instead in (("datetime", Wrong), ("time", wrong)):
                    if getattr(module, own, None) in (datetime.datetime, time):
                        setattr(module, own, instead)
