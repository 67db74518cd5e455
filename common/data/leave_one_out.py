"""Leave-one-out evaluation: hold out one item of each user, among items the user never took.

The protocol of He et al. (Neural Collaborative Filtering, 2017): the latest item of each user is
held out and competes with 99 items drawn from those that the user never took.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from common.data.schema import Column
from common.tasks.base import HolderTables

__all__ = ["CANDIDATES", "NEGATIVES", "catalogue_of", "leave_one_out"]

NEGATIVES = 99
"""Items that a held-out one competes with."""

CANDIDATES = 1 + NEGATIVES
"""Test rows of one user."""


def catalogue_of(item: Column) -> tuple[int, int]:
    """Number of the first item and how many there are, from the bounds of the item column."""
    assert item.low is not None
    assert item.high is not None
    return int(item.low), int(item.high) - int(item.low) + 1


def leave_one_out(table: pd.DataFrame, item: Column, rng: np.random.Generator) -> HolderTables:
    """Split a checked table of ``user``, ``item`` and ``time``.

    The latest item of a user is held out. Ties for the latest time, common where many ratings
    came in one sitting, are broken at random, and where a user's times are not all known, any
    item may be held out. An item taken twice counts once, with its last time. Users with a single
    item, or with fewer than 99 items that they never took, are trained on and not tested.

    Args:
        table: rows of one holder.
        item: the schema's column of items; its bounds are the catalogue.
        rng: of the ties and of the negatives.

    Returns:
        Training rows, and 100 test rows for each tested user, the held-out item first: columns
        ``user``, ``item`` and ``held_out`` (True, then 99 times False).
    """
    user, item_of, time = _in_order_of_time(table, rng)
    taken = _taken(user, item_of, item)
    users, first, count = np.unique(user, return_index=True, return_counts=True)
    testable = (count >= 2) & ((~taken).sum(1) >= NEGATIVES)
    latest = (first + count - 1)[testable]
    negatives = _sample_others(taken[testable], NEGATIVES, rng) + catalogue_of(item)[0]
    test = pd.DataFrame(
        {
            "user": np.repeat(users[testable], CANDIDATES),
            "item": np.column_stack([item_of[latest], negatives]).ravel(),
            "held_out": np.tile(np.arange(CANDIDATES) == 0, len(latest)),
        }
    )
    kept = np.ones(len(user), dtype=bool)
    kept[latest] = False
    train = pd.DataFrame({"user": user[kept], "item": item_of[kept], "time": time[kept]})
    return HolderTables(train=train, test=test)


def _in_order_of_time(
    table: pd.DataFrame, rng: np.random.Generator
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], npt.NDArray[Any]]:
    """User, item and time of distinct (user, item) rows; ties, and unknown times, shuffled.

    In numpy, because a fleet of one-user holders calls it thousands of times.
    """
    user, item, time = (table[name].to_numpy() for name in ("user", "item", "time"))
    users, code = np.unique(user, return_inverse=True)
    moment = time.astype(np.float64)
    unknown = np.bincount(code, weights=np.isnan(moment), minlength=len(users)) > 0
    order = np.lexsort((rng.random(len(user)), np.where(unknown[code], 0.0, moment), code))
    pair = (code * (item.max(initial=0) + 1) + item)[order]
    # Of rows that say the same of a user and an item, the last one counts.
    _, from_the_end = np.unique(pair[::-1], return_index=True)
    rows = order[np.sort(len(pair) - 1 - from_the_end)]
    return user[rows], item[rows], time[rows]


def _taken(
    user: npt.NDArray[Any], item_of: npt.NDArray[np.int64], item: Column
) -> npt.NDArray[np.bool_]:
    """Who took what: [users in ascending order, catalogue]."""
    first, size = catalogue_of(item)
    users, code = np.unique(user, return_inverse=True)
    taken = np.zeros((len(users), size), dtype=bool)
    taken[code, item_of - first] = True
    return taken


def _sample_others(
    taken: npt.NDArray[np.bool_], number: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """``number`` distinct columns of each row that are not taken: [U, N] → [U, number]."""
    keys = np.where(taken, np.inf, rng.random(taken.shape))
    return np.argpartition(keys, number - 1, axis=1)[:, :number]
