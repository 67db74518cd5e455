"""``requirements.lock``: every package that Sotto needs, at the version that pip resolved.

``make lock`` installs Sotto into an empty environment and has this module, run in it, write down
what is there:

    python -m tools.lock > requirements.lock

The file is in pip's own format, one ``name==version`` a line, for ``pip install --constraint``.
Versions are public ones: a build of its own such as ``torch 2.13.0+cpu`` is written ``2.13.0``,
which by PEP 440 every build of that version satisfies, so that pip may take the one at hand. For
the same reason there are no hashes: one file's hash would shut out every other build.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata

from packaging.utils import canonicalize_name
from packaging.version import Version

__all__ = ["OURS", "installed", "lock_file", "pins"]

OURS = "sotto"
_PIN = re.compile(r"([a-z0-9]+(?:-[a-z0-9]+)*)==([a-z0-9.!]+)")
_HEADER = """\
# Everything that Sotto with the extra `ray` needs, as pip resolved it for Python {python} on
# {platform}. Written by `make lock`; docs/supply-chain.md says how to install from it.
"""


def installed(found: Iterable[metadata.Distribution] | None = None) -> dict[str, str]:
    """The packages of an environment beside Sotto itself.

    Args:
        found: its distributions; None for those of this process.

    Returns:
        Name → version, by name; names in the normal form of PEP 503, versions without local label.
    """
    versions: dict[str, str] = {
        canonicalize_name(one.name): Version(one.version).public
        for one in (metadata.distributions() if found is None else found)
    }
    versions.pop(OURS, None)
    return dict(sorted(versions.items()))


def lock_file(versions: Mapping[str, str], *, python: str, platform: str) -> str:
    """The text of a lock file.

    Args:
        versions: name → version.
        python: for which it was resolved, as ``3.11``.
        platform: for which it was resolved, as ``linux``.
    """
    lines = (f"{name}=={version}\n" for name, version in versions.items())
    return _HEADER.format(python=python, platform=platform) + "".join(lines)


def pins(text: str) -> dict[str, str]:
    """Inverse of :func:`lock_file`: name → version.

    Raises:
        ValueError: a line is neither a comment nor ``name==version``, or names a package again.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("#"):
            continue
        pin = _PIN.fullmatch(line)
        if pin is None or pin[1] in found:
            raise ValueError(
                f"line {number} of the lock file is {line!r}; each package has one line "
                "name==version: run `make lock`"
            )
        found[pin[1]] = pin[2]
    return found


if __name__ == "__main__":
    sys.stdout.write(
        lock_file(
            installed(),
            python=".".join(map(str, sys.version_info[:2])),
            platform=sys.platform,
        )
    )
