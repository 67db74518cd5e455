"""What has gone over a link, as plain counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

__all__ = ["Counts", "Traffic"]

Counts = Counter[str]
"""Field of :class:`Traffic` → count. Each field is counted on one thread only."""


@dataclass(frozen=True)
class Traffic:
    """Counts since the start of one end of the link.

    Args:
        bytes_sent: of messages' payloads that the connection took; headers, TLS and what was sent
            again after a break are little beside it, or counted as often as they were sent.
        bytes_received: the same of payloads that came in.
        requests: on the coordinator those that were posted, on a holder those that came completely.
        replies: that counted; on a holder, that were sent.
        replies_dropped: that came too late, twice or from the wrong holder; 0 on a holder.
        connections: holders' streams that were admitted; on a holder, its own.
        refused: streams that were not admitted; on a holder, attempts that did not get through.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    requests: int = 0
    replies: int = 0
    replies_dropped: int = 0
    connections: int = 0
    refused: int = 0

    @classmethod
    def of(cls, counts: Counts) -> Traffic:
        """The counts as they are now."""
        return cls(**counts)
