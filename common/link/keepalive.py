"""How long an end of the link is silent before it is asked whether it is still there."""

from __future__ import annotations

from typing import Final

from common.errors import ConfigurationError

__all__ = ["KEEPALIVE", "LONGEST_KEEPALIVE", "SHORTEST_KEEPALIVE", "check_keepalive"]

KEEPALIVE: Final = 20.0
"""Seconds of silence after which each end asks, unless it is told otherwise."""

SHORTEST_KEEPALIVE: Final = 1.0
LONGEST_KEEPALIVE: Final = 3600.0


def check_keepalive(seconds: float) -> float:
    """Return ``seconds`` if keep-alive may be set to it.

    Raises:
        ConfigurationError: it is out of range.
    """
    if not SHORTEST_KEEPALIVE <= seconds <= LONGEST_KEEPALIVE:
        raise ConfigurationError(
            f"keepalive must be {SHORTEST_KEEPALIVE:g} to {LONGEST_KEEPALIVE:g} seconds, got "
            f"{seconds:g}; take less than the shortest idle time-out on the way"
        )
    return seconds
