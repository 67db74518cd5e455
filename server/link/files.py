"""How many files, and so how many connections, this process may have open."""

from __future__ import annotations

import sys

__all__ = ["room_for_files"]

_WITHOUT_LIMIT = 1 << 20
_OTHERS = 1024  # files that are no connections


def room_for_files(wanted: int) -> int:
    """Ask the system for as many open files, and some besides; say how many there may be.

    A process that has used up its descriptors can write no checkpoint; so connections are limited
    to less than that.
    """
    if sys.platform == "win32":
        return _WITHOUT_LIMIT
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _WITHOUT_LIMIT
    enough = wanted + _OTHERS
    if hard != resource.RLIM_INFINITY:
        enough = min(enough, hard)
    if soft < enough:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
        except (OSError, ValueError):  # macOS allows less than it says
            return soft
    return max(soft, enough)
