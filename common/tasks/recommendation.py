"""Recommendation: shops learn which items go together; who bought what stays in each shop.

A matrix factorisation with implicit feedback. The items' vectors and the scoring layer are
shared; the users' vectors are private parameters of their holder, trained where the users are.
The privacy unit is a user: one row of a batch is everything one person contributes to a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from common.data.interactions import SyntheticInteractions
from common.data.leave_one_out import CANDIDATES, NEGATIVES, catalogue_of, leave_one_out
from common.data.movielens import MovieLens1M, MovieLens100K
from common.errors import DataError
from common.tasks.base import Examples, HolderData, HolderTables, Source, Task, Unit, generator
from common.tasks.histograms import Estimate, Values
from common.tasks.rank_histogram import CELLS, CUTOFF, drawn_from, rank_cells, rank_estimates
from common.tasks.ranking import Position, hit_rate, ndcg, position

__all__ = ["Recommendation", "Recommender"]

GAINS = (hit_rate, ndcg)

_NAMES = tuple(f"{gain}@{CUTOFF}{ranked}" for ranked in ("", "-full") for gain in ("hr", "ndcg"))
"""The metrics: both gains among the sample, then both in the whole catalogue."""

_SCHEDULES = {"synthetic": (10, 5), "movielens-100k": (60, 10), "movielens-1m": (30, 10)}
"""Rounds and local steps without privacy, by source."""


class Recommender(nn.Module):
    """Generalised matrix factorisation: ``score = w · (user * item) + bias of the item``.

    Item parameters are stored divided by :attr:`GAIN`. A step moves an item's row only where that
    item was drawn, so averaged over a shop's users its gradient is a small fraction of the
    scoring layer's; the gain multiplies the item rows' effective step by its square and lets one
    learning rate serve both.

    Args:
        users: rows of the private user embedding.
        items: size of the catalogue.
        dimensions: of the latent vectors.
    """

    GAIN: ClassVar[float] = 30.0
    SCALE: ClassVar[float] = 0.1
    """Standard deviation of latent coordinates at the start."""

    def __init__(self, users: int, items: int, dimensions: int) -> None:
        super().__init__()
        self.items = nn.Embedding(items, dimensions)
        nn.init.normal_(self.items.weight, std=self.SCALE / self.GAIN)
        self.bias = nn.Embedding(items, 1)
        nn.init.zeros_(self.bias.weight)
        self.weight = nn.Linear(dimensions, 1, bias=False)
        nn.init.ones_(self.weight.weight)
        # Last, so that a seed gives the same shared parameters for any number of users.
        self.users = nn.Embedding(users, dimensions)
        nn.init.normal_(self.users.weight, std=self.SCALE)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Scores of items for users.

        Args:
            user: [B] int64 rows of the private embedding.
            item: [B, L] int64 catalogue positions from 0.

        Returns:
            [B, L] float32.
        """
        product = self.users(user).unsqueeze(1) * self.items(item) * self.GAIN
        scores: Tensor = self.weight(product).squeeze(-1) + self.bias(item).squeeze(-1) * self.GAIN
        return scores


class Recommendation(Task):
    """Which item will this user take next?

    Evaluation leaves one item of each user out: the latest one, or one at random where times are
    not known. The model ranks it among 99 sampled items that the user never took (``hr@10``,
    ``ndcg@10``) and among all items that the user did not take in training (``hr@10-full``,
    ``ndcg@10-full``).

    Training examples: ``user`` [U] row of the private embedding; ``items`` [U, T] the user's
    positives in ascending order, padded with the size of the catalogue; ``count`` [U] how many.
    Test examples have these too, and ``held_out`` [U] and ``negatives`` [U, 99].
    """

    name: ClassVar[str] = "recommendation"
    unit: ClassVar[Unit] = "user"
    headline: ClassVar[str] = "hr@10"
    sources: ClassVar[Mapping[str, type[Source]]] = {
        source.name: source for source in (SyntheticInteractions, MovieLens100K, MovieLens1M)
    }
    usual_ranges = MappingProxyType({"time": (788_918_400.0, 1_893_456_000.0)})
    """From 1995 to 2030."""
    private_parameters: ClassVar[frozenset[str]] = frozenset({"users.weight"})
    private_learning_rate: ClassVar[float] = 2.0

    POSITIVES: ClassVar[int] = 32
    """Positives drawn for each user and step, with replacement."""
    NEGATIVES: ClassVar[int] = 128
    """Negatives drawn for each user and step; each is compared with every positive."""
    DIMENSIONS: ClassVar[int] = 16
    PENALTY: ClassVar[float] = 0.005
    """Of the squared length of a user's private vector."""

    draws: ClassVar[int] = POSITIVES + NEGATIVES
    units_at_a_time: ClassVar[int] = 64  # each is scored against the whole catalogue
    cells: ClassVar[int] = CELLS

    def __init__(self, source: str | None = None, preprocessing: str | None = None) -> None:
        self.source = self.sources[source or next(iter(self.sources))]()
        self.schema = self.source.schema
        self.preprocessing = preprocessing or "default"
        self._first_item, self._catalogue = catalogue_of(self.schema["item"])
        self.padding = {"items": self._catalogue}

    def model(self, units: int) -> Recommender:
        """A new model with private vectors for ``units`` users."""
        return Recommender(units, self._catalogue, self.DIMENSIONS)

    def batch(self, units: Examples, draws: Tensor) -> Examples:
        """Pairs to learn from for the users that were sampled.

        Returns:
            ``user`` [B], ``positives`` [B, 32] and ``negatives`` [B, 128] catalogue positions.
            Negatives are uniform over everything that is not a training positive of the user.
        """
        for_positives, for_negatives = draws.tensor_split([self.POSITIVES], dim=1)
        return Examples(
            {
                "user": units["user"],
                "positives": _draw_positives(units, for_positives),
                "negatives": _draw_negatives(units, self._catalogue, for_negatives),
            }
        )

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        """Bayesian personalised ranking (Rendle et al., 2009), one value per user: [B].

        The mean of ``-log σ(positive - negative)`` over all pairs drawn for that user, and a
        penalty on the length of the user's own vector, which touches nothing that is shared.
        """
        positives, negatives = batch["positives"], batch["negatives"]
        scores = model(batch["user"], torch.cat([positives, negatives], dim=1))
        liked, other = scores.tensor_split([positives.shape[1]], dim=1)
        pairs = F.softplus(other.unsqueeze(1) - liked.unsqueeze(2)).mean(dim=(1, 2))
        own: Tensor = model.users(batch["user"])  # type: ignore[operator]
        return pairs + 0.5 * self.PENALTY * own.square().sum(1)

    def examples(self, table: pd.DataFrame) -> Examples:
        """Everything of each user in one row; rows of the embedding follow the users' numbers.

        Raises:
            DataError: a user took the whole catalogue, so that nothing is left to compare with.
        """
        users, code = np.unique(table["user"].to_numpy(), return_inverse=True)
        place = table["item"].to_numpy() - self._first_item
        pairs = np.unique(code * self._catalogue + place)  # ascending, by user and then item
        user, taken = np.divmod(pairs, self._catalogue)
        count = np.bincount(user, minlength=len(users))
        if count.max() >= self._catalogue:
            raise DataError(
                f"a user took all {self._catalogue} items of the catalogue; a user must leave at "
                "least one, or there is nothing to prefer the others to. Leave this user out."
            )
        starts = np.cumsum(count) - count
        items = np.full((len(count), int(count.max())), self._catalogue, dtype=np.int64)
        items[user, np.arange(len(user)) - starts[user]] = taken
        return Examples(
            {
                "user": torch.arange(len(count)),
                "items": torch.from_numpy(items),
                "count": torch.from_numpy(count.astype(np.int64)),
            }
        )

    def split(self, table: pd.DataFrame, *, holder: str, seed: int) -> HolderTables:
        """One item of each user is held out: see :func:`leave_one_out`."""
        return leave_one_out(table, self.schema["item"], generator("leave one out", holder, seed))

    def split_own(self, table: pd.DataFrame, *, seed: int) -> HolderTables:
        """The same with draws of each user's own: no user moves another's held-out item."""
        parts = [
            leave_one_out(rows, self.schema["item"], generator("leave one out", seed, str(user)))
            for user, rows in table.groupby("user")
        ]
        return HolderTables(
            *(
                pd.concat([getattr(part, half) for part in parts], ignore_index=True)
                for half in ("train", "test")
            )
        )

    def prepare(self, tables: HolderTables) -> HolderData:
        """Encode both halves; test users keep the training half's rows of the embedding."""
        train = self.examples(tables.train)
        users = np.unique(tables.train["user"])
        candidates = tables.test["item"].to_numpy().reshape(-1, CANDIDATES)
        tested = tables.test.loc[tables.test["held_out"], "user"].to_numpy()
        known = train.take(torch.from_numpy(np.searchsorted(users, tested)))
        encoded = torch.from_numpy(candidates - self._first_item)
        return HolderData(
            train=train,
            test=Examples(
                {**known.tensors, "held_out": encoded[:, 0], "negatives": encoded[:, 1:]}
            ),
        )

    def predict(self, model: nn.Module, units: Examples) -> Tensor:
        """Where each user's held-out item stands: [B, 4] int64.

        How many items are better, and how many tie, among the sampled ones and among all.
        """
        catalogue = torch.arange(self._catalogue, device=units["user"].device)
        scores = model(units["user"], catalogue.expand(len(units), -1))
        own = scores.gather(1, units["held_out"].unsqueeze(1)).squeeze(1)
        sampled = position(own, scores.gather(1, units["negatives"]))
        full = position(own, scores, counted=~self._out_of_competition(units))
        return torch.stack([sampled.better, sampled.tied, full.better, full.tied], dim=1)

    def metrics(self, predictions: Tensor, test: Examples) -> dict[str, float]:
        """Mean HR@10 and NDCG@10 over users, sampled and full; NaN where nobody is tested."""
        return self.metrics_by_holder(predictions, test, [len(test)])[0]

    def metrics_by_holder(
        self, predictions: Tensor, test: Examples, sizes: Sequence[int]
    ) -> list[dict[str, float]]:
        """The same of every holder, computed for all of them at once."""
        del test
        users = torch.tensor(sizes, dtype=torch.int64)
        holder = torch.arange(len(users)).repeat_interleave(users)
        sums = torch.zeros(len(users), len(_NAMES), dtype=torch.float64)
        gains = [gain(at, CUTOFF) for at in _standings(predictions.cpu()) for gain in GAINS]
        means = sums.index_add_(0, holder, torch.stack(gains, dim=1)) / users.unsqueeze(1)
        return [dict(zip(_NAMES, row, strict=True)) for row in means.tolist()]

    def cells_of(self, predictions: Tensor, test: Examples) -> Tensor:
        """By rank, ties settled by lot: see :mod:`common.tasks.rank_histogram`."""
        # Not by the row of the embedding, which depends on which other users there are.
        return rank_cells(*_standings(predictions), drawn_from(test["held_out"], test["negatives"]))

    def metrics_of(self, histogram: Values, variance: float) -> dict[str, Estimate]:
        """HR@10 and NDCG@10, sampled and full."""
        return rank_estimates(histogram, variance, min(1.0, NEGATIVES / (self._catalogue - 1)))

    def _out_of_competition(self, test: Examples) -> Tensor:
        """Items that the held-out one is not ranked against: [U, catalogue] bool.

        These are the user's training positives and the held-out item itself.
        """
        padded = torch.cat([test["items"], test["held_out"].unsqueeze(1)], dim=1)
        marks = torch.zeros(len(test), self._catalogue + 1, dtype=torch.bool, device=padded.device)
        return marks.scatter_(1, padded, True)[:, :-1]  # the last column collects the padding

    def recommended(self, epsilon: float | None) -> dict[str, object]:
        """Without privacy many steps; with it a few full-batch ones.

        A shop has too few users to hide one in the noise of a whole catalogue's vectors, so what
        a private run learns is little more than popularity, and ten steps are enough for that.
        """
        rounds, local_steps = _SCHEDULES[self.source.name]
        settings: dict[str, object] = {
            "strategy": "fedavg",
            "server_learning_rate": 1.0,
            "weighting": "equal",
            "optimizer": "sgd",
            "momentum": 0.0,
            "batch_size": "full",
        }
        if epsilon is None:
            schedule = {"rounds": rounds, "local_steps": local_steps, "learning_rate": 0.1}
        else:
            schedule = {"rounds": 10, "local_steps": 1, "learning_rate": 0.4, "clip_norm": 1.0}
        return settings | schedule


def _standings(predictions: Tensor) -> tuple[Position, Position]:
    """Positions among the sampled items and among all, from :meth:`Recommendation.predict`."""
    better, tied, better_of_all, tied_of_all = predictions.unbind(1)
    return Position(better, tied), Position(better_of_all, tied_of_all)


def _draw_positives(users: Examples, draws: Tensor) -> Tensor:
    """Uniform over each user's training positives, with replacement: [B, n] → [B, n]."""
    return users["items"].gather(1, _uniform_below(users["count"], draws))


def _draw_negatives(users: Examples, catalogue: int, draws: Tensor) -> Tensor:
    """Uniform over what each user did not take, with replacement: [B, n] → [B, n].

    Nothing is rejected: the r-th item that is not a positive is r plus the number of positives
    before it. The j-th positive (from 0, ascending) has ``items[j] - j`` other items before it,
    which never decreases, so a binary search counts them.
    """
    items, count = users["items"], users["count"]
    place = torch.arange(items.shape[1], device=items.device)
    others_before = torch.where(place < count.unsqueeze(1), items - place, catalogue)
    r = _uniform_below(catalogue - count, draws)
    return r + torch.searchsorted(others_before, r, right=True)


def _uniform_below(limit: Tensor, draws: Tensor) -> Tensor:
    """Whole numbers from 0 to ``limit - 1`` ([B]) from uniform ones: [B, n] → [B, n] int64."""
    return (draws * limit.unsqueeze(1)).long()
