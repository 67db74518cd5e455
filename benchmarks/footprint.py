"""What a process holds: memory, file descriptors and threads, as Linux counts them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Footprint"]

_POOL = "event_engine"  # what gRPC calls the threads of its pool


@dataclass(frozen=True)
class Footprint:
    """A process at one moment.

    Args:
        resident: bytes of memory, shared pages and mapped files included.
        anonymous: bytes of it that are no file's: heap and stacks.
        private: bytes that no other process has and that were written to.
        descriptors: files, pipes and sockets that are open.
        threads: of the process, without gRPC's own pool.
        pooled: threads of that pool, which takes one more when its work is held up.
    """

    resident: int
    anonymous: int
    private: int
    descriptors: int
    threads: int
    pooled: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        """Look at a process.

        Raises:
            OSError: it has ended, or belongs to somebody else.
        """
        process = Path(f"/proc/{pid}")
        # /proc/PID/status counts memory in batches of each thread; this one counts pages.
        memory = _fields(process / "smaps_rollup")
        names = [_name(thread) for thread in (process / "task").iterdir()]
        pooled = names.count(_POOL)
        return cls(
            resident=memory["Rss"],
            anonymous=memory["Anonymous"],
            private=memory["Private_Dirty"],
            descriptors=sum(1 for _ in (process / "fd").iterdir()),
            threads=len(names) - pooled,
            pooled=pooled,
        )

    @staticmethod
    def peak(pid: int) -> int:
        """Bytes of the most memory that a process ever held.

        Raises:
            OSError: it has ended, or belongs to somebody else.
        """
        return _fields(Path(f"/proc/{pid}/status"))["VmHWM"]


def _name(thread: Path) -> str:
    """Of a thread; empty if it has ended since it was listed."""
    try:
        return (thread / "comm").read_text().rstrip()
    except OSError:
        return ""


def _fields(path: Path) -> dict[str, int]:
    """The fields of a file of /proc that count kilobytes, in bytes."""
    words = [line.split() for line in path.read_text().splitlines()]
    return {found[0].rstrip(":"): 1024 * int(found[1]) for found in words if found[-1] == "kB"}
