"""Ranks of held-out items in fixed cells, and ranking metrics from their noised counts.

A user is in one cell: by where the held-out item stands among the whole catalogue if it is within
the first ten there, else by where it stands among the sampled items if within the first ten of
those, else in the last. So one histogram of seven cells shows both kinds of ranking: whoever is
within the first ten of the catalogue is so among any sample of it. Positions within the first ten
are put together, the first by itself, the second and third, and the others, because the gain of
NDCG differs most between the first ones and each cell adds its noise to every metric.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from common.tasks.histograms import Estimate, Values, estimated, known
from common.tasks.ranking import Position

__all__ = ["CELLS", "CUTOFF", "drawn_from", "rank_cells", "rank_estimates"]

CUTOFF = 10
"""The k of HR@k and NDCG@k."""

TIERS = (0, 1, 3, CUTOFF)
"""Where tiers of positions, counted from 0, begin, and where the last one ends."""

CELLS = 2 * (len(TIERS) - 1) + 1
"""Tiers of the position in the catalogue, tiers of that among the sample, and everybody else."""


def rank_cells(sampled: Position, full: Position, chance: Tensor) -> Tensor:
    """The cell of each user: [U] int64 from 0 to :data:`CELLS` − 1.

    Args:
        sampled: of the held-out item among the sampled ones.
        full: among all that compete, the sampled ones included.
        chance: [U] in [0, 1), settles which of the positions an item has that ties with others;
            the same for both rankings, so that it is not further ahead among more items.
    """
    inner = torch.tensor(TIERS[1:], device=chance.device)
    in_full, in_sample = (
        torch.bucketize(at.better + (chance * (at.tied + 1)).long(), inner, right=True)
        for at in (full, sampled)
    )
    tiers = len(TIERS) - 1
    return torch.where(in_full < tiers, in_full, tiers + in_sample)


def drawn_from(*own: Tensor) -> Tensor:
    """A number in [0, 1) that follows from a user's own entries: [U] float64.

    By multiplicative hashing (Knuth, "The art of computer programming" 3, section 6.4): the same
    for the same user in whatever company, so that it moves nobody else and can be asked again.

    Args:
        *own: [U] or [U, n] int64.
    """
    mixed = torch.zeros(len(own[0]), dtype=torch.int64, device=own[0].device)
    for entry in own:
        for column in entry.view(len(entry), math.prod(entry.shape[1:])).unbind(1):
            mixed = (mixed + column + 1) * _ODD  # modulo 2^64
    return (mixed >> 11).bitwise_and(2**53 - 1).double() * 2.0**-53


_ODD = 0x9E3779B97F4A7C15 - 2**64  # 2^64 over the golden ratio, as a signed number


def rank_estimates(
    histogram: Values, variance: float, chance_sampled: float
) -> dict[str, Estimate]:
    """HR@10 and NDCG@10 among the sample and in the catalogue, with error bars.

    Args:
        histogram: [:data:`CELLS`] noised counts.
        variance: of the noise in each.
        chance_sampled: share of the competing items that are in a user's sample.
    """
    tiers = len(TIERS) - 1
    full, sampled = np.zeros(CELLS), np.zeros(CELLS)
    full[:tiers], sampled[: 2 * tiers] = 1.0, 1.0
    gain, spread = _gains(1.0)
    near, near_spread = _gains(chance_sampled)
    means = {
        f"hr@{CUTOFF}": (sampled, np.zeros(CELLS)),
        f"ndcg@{CUTOFF}": (np.array([*near, *gain, 0.0]), np.array([*near_spread, *spread, 0.0])),
        f"hr@{CUTOFF}-full": (full, np.zeros(CELLS)),
        f"ndcg@{CUTOFF}-full": (
            np.array([*gain, *np.zeros(tiers + 1)]),
            np.array([*spread, *np.zeros(tiers + 1)]),
        ),
    }
    return {
        name: _mean(histogram, variance, weights, spreads)
        for name, (weights, spreads) in means.items()
    }


def _mean(histogram: Values, variance: float, weights: Values, spreads: Values) -> Estimate:
    """Mean over users of what each cell weighs.

    Args:
        histogram: [CELLS].
        variance: of the noise in each.
        weights: [CELLS].
        spreads: [CELLS] standard uncertainty of each weight.
    """

    def users(histograms: Values) -> Values:
        return known(histograms.sum(1), CELLS * variance)

    return estimated(
        histogram,
        variance,
        lambda histograms: np.asarray(histograms @ weights / users(histograms)),
        cells=lambda histograms: np.asarray(
            np.sqrt(np.maximum(histograms, 0) ** 2 @ spreads**2) / users(histograms)
        ),
    )


def _gains(chance: float) -> tuple[list[float], list[float]]:
    """Mean gain of each tier, and its standard uncertainty.

    Args:
        chance: with which an item that is ahead is among those that count.

    Returns:
        The mean over the tier's positions. The uncertainty is that of a number that may be anything
        between the tier's least and greatest gain: their distance over √12.
    """
    gain = [_expected_gain(position, chance) for position in range(CUTOFF)]
    tiers = [gain[first:end] for first, end in pairwise(TIERS)]
    return (
        [sum(tier) / len(tier) for tier in tiers],
        [(max(tier) - min(tier)) / math.sqrt(12) for tier in tiers],
    )


def _expected_gain(ahead: int, chance: float) -> float:
    """Mean of 1 / log2(2 + k) over k, a binomial number of the items that are ahead."""
    return sum(
        math.comb(ahead, k) * chance**k * (1 - chance) ** (ahead - k) / math.log2(2 + k)
        for k in range(ahead + 1)
    )
