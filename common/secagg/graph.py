"""Who shares keys with whom: everybody with everybody, or each holder with its neighbours.

In Bonawitz et al. 2017 every pair of holders agrees on a mask, which costs each of n holders n - 1
agreements and as many shares of each secret. Bell et al. 2020, "Secure single-server aggregation
with (poly)logarithmic overhead", section 3, gives each holder k neighbours only: a Harary graph, a
ring on which everybody is joined to the k/2 next on either side, over a random order of the
holders. Where nobody can choose the order, few of any holder's neighbours are corrupted, and few
fail.

What is the same as there: the graph, and what it must fulfil (section 3: not too many corrupted
neighbours, enough neighbours that survive, honest survivors connected). What is different:

* **The order is a public coin.** It is a hash over the session and the signed advertisements of
  the whole roster, in which every holder's fresh keys are, so that all compute the same graph and
  no honest holder needs to trust the coordinator's dice. Whoever speaks last can try out keys and
  rosters until it likes the result; the bound below leaves 2^64 tries for that.
* **One list of survivors for all.** The consistency check stays that of 2017, over the whole list
  of survivors and with ``threshold`` signatures, not that of Bell et al., section 4, among
  neighbours. A holder checks n signatures instead of k (0.07 ms each) and gets more: one sum of at
  least ``threshold`` inputs, where there the coordinator may split the holders into several sums.
* **The survivors are checked, not only bounded.** Every holder computes of the list that it signs
  that each survivor keeps enough surviving neighbours. So a coordinator that chooses who "fails"
  cannot cut the ring either; see :func:`graph_for`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from functools import cached_property, lru_cache

from common.errors import ConfigurationError

__all__ = [
    "CORRUPT",
    "CUT_BITS",
    "FAILURE_BITS",
    "Graph",
    "GraphPlan",
    "graph_for",
    "least_share_threshold",
]

CORRUPT = 0.1
"""The fraction of a cohort that every neighbour graph must bear on the coordinator's side."""


FAILURE_BITS = 30
"""A round fails for want of a neighbour's shares with probability at most 2^-30."""

CUT_BITS = 40 + 64
"""The corrupted are placed badly with probability at most 2^-40, after 2^64 tries of theirs."""


@dataclass(frozen=True)
class Graph:
    """Neighbourhoods of a roster.

    Args:
        ring: the names, in the order in which they stand on the ring.
        neighbours: k; None where all are neighbours of all.
    """

    ring: tuple[str, ...]
    neighbours: int | None = None

    @classmethod
    def of(cls, names: Iterable[str], neighbours: int | None, coin: bytes) -> Graph:
        """The graph of a roster.

        Args:
            names: of the roster.
            neighbours: k; None for the complete graph.
            coin: 32 bytes that nobody chose alone.
        """
        if neighbours is None:
            return cls(tuple(sorted(names)))
        # Hashes of distinct names under a common coin are in a random order, without bias.
        return cls(
            tuple(sorted(names, key=lambda name: hashlib.sha256(coin + name.encode()).digest())),
            neighbours,
        )

    def neighbourhood(self, name: str) -> tuple[str, ...]:
        """A holder and its neighbours, as they stand on the ring.

        The place in this tuple, from 1, is where a share of the holder's secrets is a value of the
        polynomial.
        """
        if self.neighbours is None:
            return self.ring
        middle, half = self._position[name], self.neighbours // 2
        around = range(middle - half, middle + half + 1)
        return tuple(self.ring[position % len(self.ring)] for position in around)

    def peers(self, name: str) -> tuple[str, ...]:
        """A holder's neighbours, without itself."""
        return tuple(other for other in self.neighbourhood(name) if other != name)

    def poorest(self, survivors: Set[str]) -> int:
        """The fewest survivors in any survivor's neighbourhood, itself among them."""
        if self.neighbours is None:
            return len(survivors)
        alive = [name in survivors for name in self.ring]
        half = self.neighbours // 2
        # Sums over windows of the ring, which is continued by half a neighbourhood at both ends.
        line = alive[-half:] + alive + alive[:half]
        count = sum(line[: 2 * half])
        fewest = len(survivors)
        for middle, here in enumerate(alive):
            count += line[middle + 2 * half]
            if here:
                fewest = min(fewest, count)
            count -= line[middle]
        return fewest

    @cached_property
    def _position(self) -> dict[str, int]:
        return {name: position for position, name in enumerate(self.ring)}


@dataclass(frozen=True)
class GraphPlan:
    """The parameters of a neighbour graph, for the plan of a run.

    Args:
        neighbours: k, even.
        share_threshold: t, how many of a holder and its neighbours give back its secrets.
    """

    neighbours: int
    share_threshold: int


@lru_cache(maxsize=64)
def graph_for(cohort: int, dropped: float = 0.1, corrupt: float = CORRUPT) -> GraphPlan:
    """The neighbour graph with the fewest neighbours that keeps the promises below.

    The corrupted are chosen before the order of the ring is drawn; who fails may depend on it for
    privacy (2), and must not for the round to succeed (1). With k neighbours and threshold t:

    1. Fewer than t of some holder's neighbours survive with probability at most 2^-30: a union
       bound over all holders of the hypergeometric tail.
    2. More than w of the k/2 holders next to some holder on one side are corrupted with probability
       at most 2^-104: a union bound over the ring of the hypergeometric tail, at the smallest
       roster. t = k/2 + w + 2.

    Unless (2) fails, for every list of survivors that honest holders sign, each of whose members
    keeps t survivors in its neighbourhood (itself among them):

    * An honest survivor has at least t - 1 - k/2 > w survivors among the k/2 that follow it, since
      at most k/2 precede it. One of them is honest. So each honest survivor on the ring is a
      neighbour of the next: the honest survivors are connected, and the coordinator learns of
      their inputs nothing but the sum.
    * Whoever survives and never confirms may have been sent fewer boxes than its neighbours, so
      that a mask is on one side only. But its b takes t shares, of confirmers in its neighbourhood;
      and a set of t of those and the t that it was sent boxes of share an honest holder, as
      k_c ≤ 2w < 2t - k - 1: with that one it has a mask on both sides.
    * k_c ≤ 2w corrupted neighbours hold fewer than t shares, and 2t > k + k_c: they could not get
      a holder's both secrets out of its neighbours even if honest ones were told different lists.

    Args:
        cohort: n.
        dropped: the fraction of n that may fail; the plan's threshold is the others.
        corrupt: the fraction of n that may be on the coordinator's side; sessions ask for a tenth
            at least.

    Raises:
        ConfigurationError: no graph with fewer neighbours than the threshold does; leave it out.
    """
    if not (0.0 <= dropped < 1 / 3 and 0.0 <= corrupt < 1 / 3):
        raise ConfigurationError(
            "a neighbour graph is for fewer than a third that fail and fewer than a third that "
            f"are corrupted, got dropped={dropped} and corrupt={corrupt}"
        )
    lost, corrupted = math.ceil(dropped * cohort), math.ceil(corrupt * cohort)
    for neighbours in range(4, cohort - lost, 2):
        threshold = least_share_threshold(cohort - lost, corrupted, neighbours)
        if threshold <= neighbours and _survives(cohort, lost, neighbours, threshold):
            return GraphPlan(neighbours, threshold)
    raise ConfigurationError(
        f"no neighbour graph for a cohort of {cohort} of whom {lost} may fail and {corrupted} may "
        "be corrupted; leave out neighbours, so that all share with all, or tolerate fewer"
    )


@lru_cache(maxsize=1024)
def least_share_threshold(roster: int, corrupted: int, neighbours: int) -> int:
    """The least t that keeps promise (2) of :func:`graph_for`; it may be more than k.

    Args:
        roster: how few holders the roster may have.
        corrupted: how many of them may be on the coordinator's side.
        neighbours: k, even.
    """
    half = neighbours // 2
    worst = _where_tail_exceeds(
        _Drawn(roster - 1, corrupted, half), lambda tail: tail * roster << CUT_BITS
    )
    return half + worst + 2


def _survives(cohort: int, lost: int, neighbours: int, threshold: int) -> bool:
    """Whether (1) holds."""
    worst = _where_tail_exceeds(
        _Drawn(cohort - 1, lost, neighbours), lambda tail: tail * cohort << FAILURE_BITS
    )
    return worst <= neighbours - threshold


@dataclass(frozen=True)
class _Drawn:
    """How many of ``marked`` are among ``drawn`` of a ``population``: hypergeometric, exact."""

    population: int
    marked: int
    drawn: int

    @property
    def ways(self) -> int:
        return math.comb(self.population, self.drawn)

    def tails(self) -> Iterator[tuple[int, int]]:
        """Each possible number x, from the most down, and in how many ways it is x or more."""
        unmarked, most = self.population - self.marked, min(self.marked, self.drawn)
        term = math.comb(self.marked, most) * math.comb(unmarked, self.drawn - most)
        tail = 0
        for x in range(most, -1, -1):
            tail += term
            yield x, tail
            term = term * x * (unmarked - self.drawn + x)
            term //= (self.marked - x + 1) * (self.drawn - x + 1)


def _where_tail_exceeds(number: _Drawn, scaled: Callable[[int], int]) -> int:
    """The most that a number may be so that more has a probability that is small enough."""
    ways = number.ways
    return next((x for x, tail in number.tails() if scaled(tail) > ways), 0)
