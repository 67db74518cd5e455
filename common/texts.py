"""Reading JSON and TOML that somebody else may have written: one kind of error, ``ValueError``.

The parsers of the standard library raise others as well where a text is nested deeper than the
interpreter's stack allows, or where a whole number has thousands of digits.
"""

from __future__ import annotations

import json
import tomllib
from typing import Any

__all__ = ["read_json", "read_toml"]

_TOO_DEEP = "it is nested too deeply"


def read_json(text: str) -> Any:
    """What ``json.loads`` gives.

    Raises:
        ValueError: it is not JSON, or nothing that can be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def read_toml(text: str) -> dict[str, Any]:
    """What ``tomllib.loads`` gives.

    Raises:
        ValueError: it is not TOML, or nothing that can be read.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
