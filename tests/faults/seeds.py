"""The seed of a session's random faults: fresh every time, printed, and settable to play it again.

``SOTTO_FAULTS_SEED=1234 pytest tests/faults`` plays what the session that printed 1234 played.
"""

from __future__ import annotations

import os
import random
import secrets
from functools import cache

from common.tasks.base import derived_seed

__all__ = ["VARIABLE", "chance", "seed"]

VARIABLE = "SOTTO_FAULTS_SEED"


@cache
def seed() -> int:
    """Of this session."""
    return int(os.environ.get(VARIABLE) or secrets.randbelow(10**6))


def chance(*parts: object) -> random.Random:
    """A stream of the session's, by name; no other draws move it."""
    return random.Random(derived_seed("faults", seed(), *parts))
