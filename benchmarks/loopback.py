"""Holder processes on this machine, with certificates, for whatever they are to run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.link.keys import CoordinatorKeys, HolderKeys
from tests.integration.processes import Process, process

__all__ = ["HOLDERS", "Loopback"]

ROOT = Path(__file__).resolve().parents[1]
HOLDERS = ("holder-1", "holder-2")
"""Unless a benchmark asks for others."""


@dataclass(frozen=True)
class Loopback:
    """A coordinator's state folder and its holders', whose keys know each other.

    Args:
        folder: of everything.
        keys: the coordinator's.
        names: the holders'.
    """

    folder: Path
    keys: CoordinatorKeys
    names: tuple[str, ...]

    @classmethod
    def under(cls, folder: Path, names: Sequence[str] = HOLDERS) -> Loopback:
        """Make the folders and do what people do with ``sotto keys``."""
        keys = CoordinatorKeys.create_or_load(folder / "coordinator", ["127.0.0.1"])
        for name in names:
            request = HolderKeys.request(folder / name, name)
            HolderKeys.install(folder / name, keys.approve(request))
        return cls(folder, keys, tuple(names))

    @property
    def coordinator(self) -> Path:
        """The coordinator's state folder."""
        return self.folder / "coordinator"

    @contextmanager
    def holders(self, module: str, port: int, *arguments: str) -> Iterator[list[Process]]:
        """Run ``python -m module`` for each holder until the block ends.

        Args:
            module: takes ``HOST:PORT``, a state folder and ``arguments``.
            port: of the coordinator.
            arguments: the rest of the command.
        """
        with ExitStack() as stack:
            yield [
                stack.enter_context(
                    process(
                        name,
                        [
                            sys.executable, "-m", module,
                            f"127.0.0.1:{port}", self.folder / name, *arguments,
                        ],
                        self.folder,
                        working=ROOT,
                    )
                )
                for name in self.names
            ]  # fmt: skip
