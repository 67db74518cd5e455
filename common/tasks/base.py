"""The Task contract: what is learned, from which columns, and whose privacy is counted."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from common.data.holders import hashed_split
from common.data.schema import Schema
from common.errors import ConfigurationError
from common.tasks.histograms import Estimate, Values

__all__ = [
    "Examples",
    "HolderData",
    "HolderTables",
    "Source",
    "Task",
    "Unit",
    "derived_seed",
    "generator",
    "no_histogram",
]

HELD_OUT = 0.2
"""Share of a holder's own rows that are kept for evaluation, on average."""

Unit = Literal["record", "user"]
"""Whose privacy a guarantee speaks of: one record, or one user (all records of one person)."""

_NO_PADDING: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Examples:
    """Encoded rows of one holder: named tensors with one entry per *unit* along dimension 0.

    For unit ``record`` an entry is a row; for unit ``user`` an entry is everything of one person,
    padded, so that one row of a batch is one clipped gradient.
    """

    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if len({tensor.shape[0] for tensor in self.tensors.values()}) != 1:
            sizes = {name: len(tensor) for name, tensor in self.tensors.items()}
            raise ValueError(f"every tensor needs the same number of units, got {sizes}")

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def take(self, index: Tensor) -> Examples:
        """The units at ``index`` ([B] int64), in that order."""
        # Several times faster than tensor[index], which is made for more than rows.
        taken = {name: tensor.index_select(0, index) for name, tensor in self.tensors.items()}
        return Examples(taken)

    def to(self, device: torch.device) -> Examples:
        """The same examples on ``device``."""
        return Examples({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def split(self, sizes: int | Sequence[int]) -> list[Examples]:
        """Consecutive parts of the given sizes, or of one size, the last part the smaller."""
        parts = [
            tensor.split(sizes if isinstance(sizes, int) else list(sizes))  # type: ignore[no-untyped-call]
            for tensor in self.tensors.values()
        ]
        return [
            Examples(dict(zip(self.tensors, part, strict=True)))
            for part in zip(*parts, strict=True)
        ]

    @staticmethod
    def concatenate(
        parts: Sequence[Examples], padding: Mapping[str, float] = _NO_PADDING
    ) -> Examples:
        """All units of ``parts``, in order.

        Args:
            parts: at least one.
            padding: as in :attr:`Task.padding`; fills a narrower tensor up to the widest.

        Raises:
            ConfigurationError: a tensor's width differs and there is no padding for it.
        """
        return Examples(
            {
                name: _joined(name, [part[name] for part in parts], padding.get(name))
                for name in parts[0].tensors
            }
        )


def _joined(name: str, parts: Sequence[Tensor], filler: float | None) -> Tensor:
    """Parts [Bᵢ, …] one after another, their trailing dimensions filled up to the largest."""
    shapes = {tuple(part.shape[1:]) for part in parts}
    if len(shapes) > 1:
        if filler is None or len({len(shape) for shape in shapes}) > 1:
            raise ConfigurationError(
                f"tensor {name!r} is {' or '.join(map(str, sorted(shapes)))} for each unit, "
                "depending on the holder; the task must make it the same everywhere or name in "
                "`padding` what fills it up"
            )
        widest = [max(lengths) for lengths in zip(*shapes, strict=True)]
        parts = [_filled_up(part, widest, filler) for part in parts]
    return torch.cat(list(parts))


def _filled_up(part: Tensor, widest: Sequence[int], filler: float) -> Tensor:
    missing = [want - have for want, have in zip(widest, part.shape[1:], strict=True)]
    # torch counts from the last dimension: (before, after) of each.
    return F.pad(part, [n for more in reversed(missing) for n in (0, more)], value=filler)


@dataclass(frozen=True)
class HolderTables:
    """One holder's rows, split: raw tables that follow the task's schema."""

    train: pd.DataFrame
    test: pd.DataFrame


@dataclass(frozen=True)
class HolderData:
    """One holder's encoded examples, split."""

    train: Examples
    test: Examples


class Source(ABC):
    """Where a task's rows come from, already divided among holders.

    Attributes:
        name: as in ``--source``.
        schema: the table it yields.
        own_holders: how many holders it has unless it is cut otherwise.
        holder_size: public, nominal number of units of one of these holders' *training* split; the
            expected batch size and the divisor of the clipped sum derive from it, never from
            the rows that a holder really has.
        delta: the δ that suits a holder of that size (below 1/n).
        licence: of the data.
        description: one line for people.
    """

    name: ClassVar[str]
    own_holders: ClassVar[int] = 1
    schema: Schema
    holder_size: int
    delta: float
    licence: str = ""
    description: str = ""

    @abstractmethod
    def tables(self, holders: int | None = None, *, seed: int = 0) -> Mapping[str, pd.DataFrame]:
        """Every holder's raw rows.

        Args:
            holders: how many holders to divide the rows among; None for the source's own number.
                A source whose holders are given (four hospitals) raises ConfigurationError for
                any other number.
            seed: of the division, where it is random. The division itself is documented in the
                class docstring.

        Returns:
            Holder name → table that satisfies :attr:`schema`, in a fixed order.

        Raises:
            DataError: the files are not there; the message says how to get them.
        """

    def nominal_size(self, holders: int | None = None) -> int:
        """:attr:`holder_size` where the source is cut into ``holders``; public like it."""
        return max(1, self.holder_size * self.own_holders // (holders or self.own_holders))


class Task(ABC):
    """What is learned. One instance is one task on one source with one preparation.

    Subclasses are registered under the entry-point group ``sotto.tasks`` and constructed by
    :func:`common.tasks.load`.

    Args:
        source: name of one of :attr:`sources`; None for the first, the embedded default.
        preprocessing: one of :attr:`preprocessings`; None for the first.
    """

    name: ClassVar[str]
    unit: ClassVar[Unit]
    headline: ClassVar[str]
    """The metric that tables and plots lead with."""
    sources: ClassVar[Mapping[str, type[Source]]]
    preprocessings: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Source name → the preparations it offers, the default first; absent: only ``default``."""
    private_parameters: ClassVar[frozenset[str]] = frozenset()
    """Names (as in ``model.named_parameters()``) that never leave the holder."""
    private_learning_rate: ClassVar[float] = 0.0
    """Of the plain SGD step that private parameters take."""
    draws: ClassVar[int] = 0
    """How many uniform numbers a unit needs for one batch: see :meth:`batch`."""
    units_at_a_time: ClassVar[int] = 4096
    """Held-out units that :meth:`evaluate` predicts at once; bounds the memory."""
    cells: ClassVar[int] = 0
    """Cells of the histogram that an evaluation may release; 0 where there is none. Public."""

    scalable: ClassVar[Mapping[str, float]] = MappingProxyType({})
    """Float inputs, [N, D] in :class:`Examples`, that a plan may shift and scale: name → the bound
    within which private statistics of them look. It is public; entries may lie beyond it."""
    usual_ranges: Mapping[str, tuple[float, float]] = MappingProxyType({})
    """Number column → the range in which private statistics look, where the schema allows far more
    than occurs: the narrower, the more exact. Public constants, like the schema's bounds."""

    padding: Mapping[str, float] = _NO_PADDING
    """What fills trailing entries of tensors whose width differs between holders, by name. It
    must leave losses, predictions and metrics as they are."""

    caveat: str = ""
    """A sentence that belongs beside every statement of the guarantee, or nothing: what the
    preparation does with a holder's rows outside the account."""

    source: Source
    schema: Schema
    preprocessing: str

    @abstractmethod
    def __init__(self, source: str | None = None, preprocessing: str | None = None) -> None: ...

    @abstractmethod
    def model(self, units: int) -> nn.Module:
        """A freshly initialised model (from torch's global generator, which the caller seeds).

        Args:
            units: how many units the holder has; sizes private per-user parameters and nothing
                that is shared.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        """Loss of each unit of ``batch``: [B] float32; entry i depends on unit i only.

        Parameters are reached by calling the layer that has them, as in ``model.users(rows)``,
        and never by name: a simulator swaps layers for ones that hold many holders' parameters.
        """

    @abstractmethod
    def examples(self, table: pd.DataFrame) -> Examples:
        """Encode a checked table with public constants only."""

    @abstractmethod
    def predict(self, model: nn.Module, units: Examples) -> Tensor:
        """What the metrics need to know of each held-out unit: [B, …].

        Entry i depends on unit i only. The model is called with all B rows, in order, and its
        parameters are reached as in :meth:`loss`, for the same reason: the rows may be those of
        many holders, each with parameters of its own. Called without gradients.
        """

    @abstractmethod
    def metrics(self, predictions: Tensor, test: Examples) -> dict[str, float]:
        """Metrics of one holder; NaN where undefined (AUC of a single class, nobody tested).

        Args:
            predictions: [B, …], of :meth:`predict`.
            test: [B], the holder's held-out units.
        """

    def metrics_by_holder(
        self, predictions: Tensor, test: Examples, sizes: Sequence[int]
    ) -> list[dict[str, float]]:
        """:meth:`metrics` of each of S holders; overridden where all at once is faster.

        Args:
            predictions: [B, …], holder by holder.
            test: [B], in the same order.
            sizes: [S] held-out units of each holder, B in sum; 0 is allowed.
        """
        parts = zip(predictions.split(list(sizes)), test.split(sizes), strict=True)  # type: ignore[no-untyped-call]
        return [self.metrics(part, units) for part, units in parts]

    @torch.no_grad()
    def predictions(self, model: nn.Module, test: Examples) -> Tensor:
        """:meth:`predict` of one holder's held-out units, which may be none: [B, …]."""
        return torch.cat([self.predict(model, part) for part in test.split(self.units_at_a_time)])

    def evaluate(self, model: nn.Module, test: Examples) -> dict[str, float]:
        """Metrics of ``model`` on one holder's held-out units, which may be none."""
        return self.metrics(self.predictions(model, test), test)

    def cells_of(self, predictions: Tensor, test: Examples) -> Tensor:
        """The one cell that each held-out unit falls into: [B] int64 from 0 to ``cells`` − 1.

        Entry i depends on unit i only and every unit has a cell, whatever the model says of it, so
        that adding or removing a unit changes one count of the histogram by one. That is the
        sensitivity which an evaluation's price rests on.

        Args:
            predictions: [B, …], of :meth:`predict`.
            test: [B], held-out units.
        """
        raise NotImplementedError(f"task {self.name!r} has cells and does not say which is whose")

    def metrics_of(self, histogram: Values, variance: float) -> dict[str, Estimate]:
        """Metrics with error bars from the sum of many holders' noised histograms.

        Args:
            histogram: [``cells``] float64; counts may be negative.
            variance: of the noise in each.
        """
        raise NotImplementedError(f"task {self.name!r} has cells and no metrics of them")

    def histogram(self, predictions: Tensor, test: Examples) -> Tensor:
        """How many held-out units fall into each cell: [``cells``] int64 on the CPU.

        It is exact, and stays where the units are.

        Raises:
            ConfigurationError: the task's cells do not keep what :meth:`cells_of` promises.
        """
        cells = self.cells_of(predictions, test).cpu()
        one_each = cells.shape == (len(test),) and cells.dtype == torch.int64
        if not one_each or bool(((cells < 0) | (cells >= self.cells)).any()):
            raise ConfigurationError(
                f"cells_of of task {self.name!r} must give each of {len(test)} units one whole "
                f"number from 0 to {self.cells - 1}"
            )
        return torch.bincount(cells, minlength=self.cells)

    @abstractmethod
    def split(self, table: pd.DataFrame, *, holder: str, seed: int) -> HolderTables:
        """Divide one holder's table into training and held-out rows."""

    def split_own(self, table: pd.DataFrame, *, seed: int) -> HolderTables:
        """Divide the rows of a holder's own file, each unit by itself.

        Unlike :meth:`split`, which follows the protocol of a public benchmark, where a unit goes
        must depend on that unit alone: the guarantee for the training half is then one for the
        file. This default is for unit ``record``.
        """
        train, test = hashed_split(table, HELD_OUT, seed)
        return HolderTables(
            table.iloc[train].reset_index(drop=True), table.iloc[test].reset_index(drop=True)
        )

    @abstractmethod
    def recommended(self, epsilon: float | None) -> dict[str, object]:
        """Plan settings known to work for this source, as keys of the TOML.

        Args:
            epsilon: the privacy target, or None without privacy. Few, full-batch steps win under
                DP, so a good setting depends on ε.
        """

    def recommended_for_sum(self, epsilon: float) -> dict[str, object]:
        """Plan settings for ``--aggregation secure-sum``, as keys of the TOML.

        There a round is one step on everybody's units, with about the noise of a single holder, so
        that as many steps are affordable as central DP-SGD on all data would take. The default
        takes the steps of :meth:`recommended` one a round, their momentum kept by the coordinator;
        tasks override it with settings that were tried.

        Args:
            epsilon: the privacy target.
        """
        usual = self.recommended(epsilon)
        strategy: dict[str, object] = {}
        if momentum := usual.get("momentum"):
            strategy = {
                "strategy": "fedavgm",
                "server_learning_rate": 1.0,
                "server_momentum": momentum,
            }
        return {
            **usual,
            **strategy,
            "rounds": math.prod(int(str(usual.get(name, 1))) for name in ("rounds", "local_steps")),
            "local_steps": 1,
            "optimizer": "sgd",
            "momentum": 0.0,
            "batch_size": "full",
            "weighting": "equal",
        }

    def prepare(self, tables: HolderTables) -> HolderData:
        """Encode both halves. Overridden where a preparation needs the training half's figures."""
        return HolderData(train=self.examples(tables.train), test=self.examples(tables.test))

    def measured(self, table: pd.DataFrame) -> pd.DataFrame:
        """The rows as statistics read them: NaN also where a value stands for "not measured".

        A row's result depends on that row only.
        """
        return table

    def batch(self, units: Examples, draws: Tensor) -> Examples:
        """What one step sees of the units that were sampled.

        A pure function, so that the batches of many holders can be made as one: entry i of the
        result depends on unit i and ``draws[i]`` only.

        Args:
            units: those that were sampled, [B]; possibly none.
            draws: [B, :attr:`draws`] float64 on the units' device, independent and uniform in
                [0, 1), for whatever the batch needs chance for (negatives, augmentation).
        """
        del draws
        return units

    def holder_data(
        self, holders: int | None = None, *, seed: int = 0, division: int = 0
    ) -> dict[str, HolderData]:
        """Every holder's data from the task's own source, split with ``seed``.

        Args:
            holders: as in :meth:`Source.tables`.
            seed: of the split into training and held-out rows.
            division: seed of the division of rows among holders.
        """
        tables = self.source.tables(holders, seed=division)
        return {
            holder: self.prepare(self.split(table, holder=holder, seed=seed))
            for holder, table in tables.items()
        }


def no_histogram(task: Task) -> str:
    """Why a task's evaluations cannot be released, in a sentence."""
    return (
        f"task {task.name!r} has no histogram that an evaluation could release (its cells are 0); "
        "leave out evaluation_epsilon, or give the task cells, cells_of and metrics_of"
    )


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from a tuple of ints and strings, the same on every machine.

    >>> derived_seed(0, "clinic-a") == derived_seed(0, "clinic-a")
    True
    >>> derived_seed(0, "clinic-a") == derived_seed(1, "clinic-a")
    False
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts: object) -> np.random.Generator:
    """A numpy generator seeded by :func:`derived_seed`."""
    return np.random.default_rng(derived_seed(*parts))
