"""One round of secure aggregation, as both sides derive it from the plan and the request."""

from __future__ import annotations

import hashlib
import math
from dataclasses import astuple, dataclass
from enum import StrEnum
from functools import cached_property

from common.errors import ConfigurationError
from common.secagg.graph import CORRUPT, least_share_threshold

__all__ = ["Session", "Stage"]

_DOMAIN = b"sotto secure aggregation 1\0"
_LENGTH_BYTES = 4
_LARGEST_COHORT = 2**16 - 1


class Stage(StrEnum):
    """The rounds of Bonawitz et al. 2017, figure 4, by their names there."""

    ADVERTISE_KEYS = "AdvertiseKeys"
    SHARE_KEYS = "ShareKeys"
    MASKED_INPUT = "MaskedInputCollection"
    CONSISTENCY_CHECK = "ConsistencyCheck"
    UNMASKING = "Unmasking"


@dataclass(frozen=True)
class Session:
    """What is public about one aggregation, and enters every key and signature made for it.

    With ``threshold`` t and ``cohort`` n, 3t > 2n. Bonawitz et al. 2017, theorem 6.5, proves
    privacy against a coordinator that lies and has n_C holders on its side where 2t > n + n_C: two
    different lists of survivors would need t signatures each, honest holders sign one list, and
    two times t - n_C honest signatures are more than there are. t ≥ ⌊2n/3⌋ + 1 gives this for every
    n_C ≤ ⌈n/3⌉ - 1, and n - t holders, up to a third, may fail. With a neighbour graph, n_C is a
    tenth of n, and its own threshold must be one that :func:`~common.secagg.graph.graph_for` gives
    or more: both sides check, so a coordinator cannot ask for less in a plan.

    Args:
        run_id: names the run.
        plan_digest: of the plan that the holder agreed to.
        round: number of the round.
        threshold: holders that must remain at every stage; t of the paper.
        cohort: the most holders that may take part; n of the paper.
        neighbours: with how many others each holder shares keys, even; None for all, which is
            the protocol of 2017. See :func:`~common.secagg.graph.graph_for`.
        share_threshold: of a holder and its neighbours, how many shares give a secret back; None
            for ``threshold``, where there is no graph.

    Raises:
        ConfigurationError: a number that would not keep the promise above.
    """

    run_id: str
    plan_digest: str
    round: int
    threshold: int
    cohort: int
    neighbours: int | None = None
    share_threshold: int | None = None

    def __post_init__(self) -> None:
        if self.cohort > _LARGEST_COHORT:
            raise ConfigurationError(
                f"cohort must be at most {_LARGEST_COHORT} for secure aggregation, got "
                f"{self.cohort}"
            )
        if not (2 <= self.threshold <= self.cohort and 3 * self.threshold > 2 * self.cohort):
            raise ConfigurationError(
                f"threshold must be at least {max(2, 2 * self.cohort // 3 + 1)} and at most "
                f"{self.cohort} for a cohort of {self.cohort}, got {self.threshold}; with fewer, a "
                "coordinator could show two halves of the cohort different lists of survivors"
            )
        if (self.neighbours is None) != (self.share_threshold is None):
            raise ConfigurationError(
                "neighbours and share_threshold belong together: give both, or neither, got "
                f"{self.neighbours} and {self.share_threshold}"
            )
        if self.neighbours is not None and self.share_threshold is not None:
            self._check_graph(self.neighbours, self.share_threshold)

    def _check_graph(self, neighbours: int, share_threshold: int) -> None:
        if neighbours % 2 or not 4 <= neighbours < self.threshold:
            raise ConfigurationError(
                "neighbours must be even, at least 4 and below the threshold of "
                f"{self.threshold}, got {neighbours}; leave it out to have all share with all"
            )
        corrupted = math.ceil(CORRUPT * self.cohort)
        least = least_share_threshold(self.threshold, corrupted, neighbours)
        if not least <= share_threshold <= neighbours:
            raise ConfigurationError(
                f"share_threshold must be at least {least} and at most {neighbours} for "
                f"{neighbours} neighbours, got {share_threshold}; with fewer, a coordinator with "
                f"{corrupted} of {self.cohort} holders on its side could cut the ring of neighbours"
            )

    @property
    def shares_needed(self) -> int:
        """How many shares give a secret back."""
        return self.threshold if self.share_threshold is None else self.share_threshold

    @cached_property
    def digest(self) -> bytes:
        """Names this session: 32 bytes that differ where any field differs."""
        fields = ("" if field is None else field for field in astuple(self))
        return hashlib.sha256(_DOMAIN + _joined(*fields)).digest()

    def context(self, label: str, *parts: bytes | str | int) -> bytes:
        """What binds a key, signature or ciphertext to this session and to one purpose.

        No two calls that differ in session, label or parts give the same bytes, so that nothing
        made for one purpose or round can be shown for another.

        Args:
            label: the purpose.
            *parts: what else it is about, such as names in an order that matters.
        """
        return _DOMAIN + self.digest + _joined(label, *parts)


def _joined(*parts: bytes | str | int) -> bytes:
    """Parts with their kinds and lengths, so that none can be taken for another's beginning."""
    return b"".join(map(_tagged, parts))


def _tagged(part: bytes | str | int) -> bytes:
    match part:
        case bytes():
            kind, data = b"b", part
        case str():
            kind, data = b"s", part.encode()
        case int():
            kind, data = b"i", str(part).encode()
    return kind + len(data).to_bytes(_LENGTH_BYTES, "big") + data
