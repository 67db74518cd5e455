"""What every script of this folder prints; it needs nothing but the standard library."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any


def result(seconds: Sequence[float], **settings: Any) -> dict[str, Any]:
    """One series of rounds, the warm-up left out, beside what it was run with."""
    return {
        **settings,
        "median": round(statistics.median(seconds), 4),
        "fastest": round(min(seconds), 4),
        "rounds": [round(value, 4) for value in seconds],
    }


def write(
    peer: str,
    packages: Sequence[str],
    case: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
) -> None:
    """One JSON object, the last line of standard output."""
    machine = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    versions = {"python": platform.python_version()}
    versions |= {name: version(name) for name in packages}
    document = {"peer": peer, "machine": machine, "versions": versions, "case": case}
    print(json.dumps(document | {"results": results}))
