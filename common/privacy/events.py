"""What was released, in the terms an accountant needs: events, and multisets of them.

An event says what a mechanism did, never what it cost: ε is derived from events
(:mod:`common.privacy.accounting`), so a better accountant improves every old account.

Every event here is stated for

* the *unit* of its data set, one record or one user: whatever one clipped gradient stands for;
* neighbouring data sets that differ by *adding or removing* one unit;
* an *adversary* who sees every release in the clear and may have chosen each one's inputs (the
  model's parameters) after seeing those before. Composition is adaptive; nothing is claimed from
  hiding which holder was asked, or when.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from typing import Any, ClassVar, Protocol, Self

from common.errors import ConfigurationError
from common.texts import read_json

__all__ = [
    "FINEST_SHARE",
    "Composition",
    "DiscreteGaussian",
    "DistributedGaussian",
    "Event",
    "Selection",
    "SubsampledGaussian",
    "Unprotected",
    "event_from_dict",
    "gaussian",
]


FINEST_SHARE = 64.0
"""Standard deviation, in whole numbers, that each share of distributed noise has at least."""


class Event(Protocol):
    """A mechanism, and how often it ran. Hashable, and ordered among its own kind.

    The kinds are those of this module, and an accountant refuses any other. There is no Laplace
    event: nothing here adds Laplace noise.
    """

    @property
    def count(self) -> int:
        """How often the mechanism ran, at least 1."""
        ...

    def times(self, count: int) -> Self:
        """The same mechanism, run ``count`` times in all."""
        ...

    def to_dict(self) -> dict[str, object]:
        """As JSON has it: the name of the mechanism, and its fields."""
        ...

    def __hash__(self) -> int: ...

    def __lt__(self, other: Any, /) -> bool:
        """A fixed order, so that a composition has one form."""
        ...


@dataclass(frozen=True, slots=True, order=True)
class SubsampledGaussian:
    """Steps of the Poisson-subsampled Gaussian mechanism: DP-SGD's steps.

    In each step every unit is taken independently with probability q, the taken units' vectors
    of norm at most C are summed, and N(0, (σC)²) is added to each coordinate of the sum (Abadi
    et al. 2016, algorithm 1; Mironov, Talwar & Zhang 2019, section 2.3). The sensitivity to one
    unit is C, the clip norm. q = 1 is the plain Gaussian mechanism.

    Args:
        sampling_rate: q, in (0, 1].
        noise_multiplier: σ, the noise's standard deviation in units of C; positive.
        steps: how many such steps; at least 1.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        _check_rate(self.sampling_rate)
        _check_noise(self.noise_multiplier)
        _check_count("steps", self.steps)
        # One spelling for equal numbers (1 and 1.0, numpy's and Python's), so that equal events
        # merge and have the same JSON.
        object.__setattr__(self, "sampling_rate", float(self.sampling_rate))
        object.__setattr__(self, "noise_multiplier", float(self.noise_multiplier))

    @property
    def count(self) -> int:
        """How many steps."""
        return self.steps

    def times(self, count: int) -> Self:
        """``count`` such steps."""
        return replace(self, steps=count)

    def to_dict(self) -> dict[str, object]:
        """As JSON has it."""
        return {"mechanism": "subsampled-gaussian", **asdict(self)}


def gaussian(noise_multiplier: float, releases: int) -> SubsampledGaussian:
    """Releases of a vector with Gaussian noise, all units taken: steps with q = 1.

    Args:
        noise_multiplier: σ, the noise's standard deviation over the L2 norm by which one unit
            moves the vector at most.
        releases: how many such vectors; at least 1.
    """
    return SubsampledGaussian(1.0, noise_multiplier, releases)


@dataclass(frozen=True, slots=True, order=True)
class _NoisedIntegers:
    """Releases of an integer vector with noise: what its kinds have in common.

    Args:
        noise_multiplier: σ; positive. Each kind says of what, and over what.
        releases: how many such vectors; at least 1.
    """

    MECHANISM: ClassVar[str]

    noise_multiplier: float
    releases: int

    def __post_init__(self) -> None:
        _check_noise(self.noise_multiplier)
        _check_count("releases", self.releases)
        object.__setattr__(self, "noise_multiplier", float(self.noise_multiplier))

    @property
    def count(self) -> int:
        """How many releases."""
        return self.releases

    def times(self, count: int) -> Self:
        """``count`` such releases."""
        return replace(self, releases=count)

    def to_dict(self) -> dict[str, object]:
        """As JSON has it."""
        return {"mechanism": self.MECHANISM, **asdict(self)}


@dataclass(frozen=True, slots=True, order=True)
class DiscreteGaussian(_NoisedIntegers):
    """Releases of an integer vector with discrete Gaussian noise in each coordinate.

    The noise is N_Z(0, σ²), which takes the integer x with probability proportional to
    exp(−x²/2σ²) (Canonne, Kamath & Steinke 2020, "The discrete Gaussian for differential
    privacy", definition 1). One unit moves the vector by an L2 norm of at most 1. Being of
    integers, that is one coordinate by one: a histogram in which one unit is in one cell.

    Args:
        noise_multiplier: σ; positive. The noise's standard deviation is at most that, and for σ
            above 1 practically that.
        releases: how many such vectors; at least 1.
    """

    MECHANISM: ClassVar[str] = "discrete-gaussian"


@dataclass(frozen=True, slots=True, order=True)
class DistributedGaussian(_NoisedIntegers):
    """Releases of a sum over parties, each of which added a share of discrete Gaussian noise.

    Every party has an integer vector and adds independent noise of N_Z(0, σ_s²) to each of its
    coordinates; only the sum is seen (Kairouz, Liu & Steinke 2021, "The distributed discrete
    Gaussian mechanism for federated learning with secure aggregation", algorithms 1 and 2). One
    unit is at one party and moves any number of coordinates of its vector. The adversary may know
    the noise of some parties; theirs does not count here. What it knows nothing of are at least
    one share, each of σ_s of at least :data:`FINEST_SHARE`, drawn by parties that follow the
    protocol; further shares only help, being noise that is added to a release.

    Args:
        noise_multiplier: σ, the standard deviation of the shares that count, summed (variances
            add), over the L2 norm by which one unit moves the integer vector at most; positive.
        releases: how many such sums; at least 1.
    """

    MECHANISM: ClassVar[str] = "distributed-gaussian"


@dataclass(frozen=True, slots=True, order=True)
class Selection:
    """The best of a random number of runs, where nothing but the winner is released.

    K is drawn from the truncated negative binomial distribution with the given mean and shape
    (Papernot & Steinke 2022, "Hyperparameter tuning with Rényi differential privacy", definition
    1; :mod:`common.privacy.selection` draws it). Each of K runs draws one of the candidates, all
    alike likely, and executes it; that costs its composition. The released winner is the best by
    an order of the outputs that the data have no part in beyond the outputs: if runs are compared
    by a score, the score is an output, and its price is in the candidate's composition.

    The adversary sees the winner: not K, not how long the search took, not the other runs. A
    coordinator that sees each run's updates is not kept from them, so there it is each run that
    counts, with no Selection around it.

    Args:
        candidates: what each candidate's run costs by itself; at least one, each with a guarantee.
        expected_runs: E[K], from 1 to a million.
        shape: η of the distribution, from 0 to 10: 1 for the geometric, 0 for the logarithmic.
        selections: how many such searches; at least 1.
    """

    candidates: tuple[Composition, ...]
    expected_runs: float
    shape: float = 1.0
    selections: int = 1

    def __post_init__(self) -> None:
        _check_candidates(self.candidates)
        _check_range("expected_runs", self.expected_runs, 1.0, 1e6)
        _check_range("shape", self.shape, 0.0, 10.0)
        _check_count("selections", self.selections)
        # Which of them are repeated or come first makes no difference to the bound.
        object.__setattr__(self, "candidates", tuple(sorted(set(self.candidates))))
        object.__setattr__(self, "expected_runs", float(self.expected_runs))
        object.__setattr__(self, "shape", float(self.shape))

    @property
    def count(self) -> int:
        """How many searches."""
        return self.selections

    def times(self, count: int) -> Self:
        """``count`` such searches."""
        return replace(self, selections=count)

    def to_dict(self) -> dict[str, object]:
        """As JSON has it."""
        return {
            "mechanism": "selection",
            "candidates": [candidate.to_list() for candidate in self.candidates],
            "expected_runs": self.expected_runs,
            "shape": self.shape,
            "selections": self.selections,
        }


@dataclass(frozen=True, slots=True, order=True)
class Unprotected:
    """A release without any guarantee: ε = ∞, once or many times."""

    @property
    def count(self) -> int:
        """Once: more often is as bad."""
        return 1

    def times(self, count: int) -> Self:  # noqa: ARG002  # see `count`
        """The same."""
        return self

    def to_dict(self) -> dict[str, object]:
        """As JSON has it."""
        return {"mechanism": "unprotected"}


_MECHANISMS: Mapping[
    str,
    type[SubsampledGaussian | DiscreteGaussian | DistributedGaussian | Selection | Unprotected],
] = {
    "discrete-gaussian": DiscreteGaussian,
    "distributed-gaussian": DistributedGaussian,
    "selection": Selection,
    "subsampled-gaussian": SubsampledGaussian,
    "unprotected": Unprotected,
}


def event_from_dict(values: Mapping[str, object]) -> Event:
    """The event that :meth:`to_dict` wrote.

    Raises:
        ConfigurationError: unknown mechanism, or fields that are not the mechanism's.
    """
    found = dict(values)
    mechanism = found.pop("mechanism", None)
    kind = _MECHANISMS.get(str(mechanism))
    if kind is None:
        raise ConfigurationError(
            f"mechanism must be one of {sorted(_MECHANISMS)}, got {mechanism!r}"
        )
    expected = sorted(field.name for field in fields(kind))
    if sorted(found) != expected:
        raise ConfigurationError(f"a {mechanism} event has fields {expected}, got {sorted(found)}")
    if "candidates" in found:
        found["candidates"] = _candidates(found["candidates"])
    return kind(**found)  # type: ignore[arg-type]  # checked at construction


def _candidates(values: object) -> tuple[Composition, ...]:
    if not isinstance(values, list):
        raise ConfigurationError(f"candidates must be a JSON list of compositions, got {values!r}")
    return tuple(Composition.from_list(value) for value in values)


@dataclass(frozen=True, slots=True)
class Composition:
    """A multiset of events, in canonical form: equal mechanisms merged, in a fixed order.

    Order is forgotten on purpose: the price of adaptive composition does not depend on it.

    >>> step = SubsampledGaussian(0.1, 1.0, steps=2)
    >>> Composition.of(step, step) == Composition.of(step) * 2
    True

    Args:
        events: in any order, with repetitions.
    """

    events: tuple[Event, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "events", _canonical(self.events))

    @classmethod
    def of(cls, *events: Event) -> Composition:
        """The composition of ``events``."""
        return cls(events)

    @classmethod
    def sum(cls, parts: Iterable[Composition]) -> Composition:
        """Everything in ``parts``, added up."""
        return cls(tuple(chain.from_iterable(part.events for part in parts)))

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __bool__(self) -> bool:
        return bool(self.events)

    def __add__(self, other: Composition) -> Composition:
        return Composition(self.events + other.events)

    def __lt__(self, other: Composition) -> bool:
        """A fixed order without a meaning; see :class:`Event`."""
        return [_sort_key(event) for event in self] < [_sort_key(event) for event in other]

    def __mul__(self, rounds: int) -> Composition:
        """This, ``rounds`` times over (≥ 0)."""
        _check_count("rounds", rounds, least=0)
        if rounds == 0:
            return Composition()
        return Composition(tuple(event.times(event.count * rounds) for event in self))

    def join(self, other: Composition) -> Composition:
        """The smallest composition that covers both: of each mechanism, the larger count."""
        mine, theirs = self._counts(), other._counts()
        return Composition(
            tuple(
                mechanism.times(max(mine.get(mechanism, 0), theirs.get(mechanism, 0)))
                for mechanism in mine | theirs
            )
        )

    def beyond(self, other: Composition) -> Composition:
        """What this has that ``other`` lacks: of each mechanism, by how much its count is larger.

        ``other + self.beyond(other) == other.join(self)``.
        """
        theirs = other._counts()
        more = {event.times(1): event.count - theirs.get(event.times(1), 0) for event in self}
        return Composition(
            tuple(mechanism.times(count) for mechanism, count in more.items() if count > 0)
        )

    def covers(self, other: Composition) -> bool:
        """Whether every event of ``other`` is here at least as often.

        A release that covers another contains it, so by post-processing it costs no less.
        """
        mine = self._counts()
        return all(mine.get(mechanism, 0) >= count for mechanism, count in other._counts().items())

    @property
    def unprotected(self) -> bool:
        """Whether anything in it has no guarantee."""
        return any(isinstance(event, Unprotected) for event in self)

    def to_list(self) -> list[dict[str, object]]:
        """As JSON has it: a list of events, in canonical order."""
        return [event.to_dict() for event in self]

    @classmethod
    def from_list(cls, values: object) -> Composition:
        """The composition that :meth:`to_list` wrote.

        Raises:
            ConfigurationError: it is not a list of events.
        """
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise ConfigurationError(
                f"a composition must be a JSON list of events, got {str(values)[:80]}"
            )
        return cls(tuple(event_from_dict(value) for value in values))

    def to_json(self) -> str:
        """Canonical JSON: a list of events."""
        return json.dumps(self.to_list(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Composition:
        """The composition that :meth:`to_json` wrote.

        Raises:
            ConfigurationError: the text is not a list of events.
        """
        try:
            values = read_json(text)
        except ValueError as error:
            raise ConfigurationError(
                f"a composition must be a JSON list of events: {error}"
            ) from None
        return cls.from_list(values)

    def _counts(self) -> dict[Event, int]:
        """Mechanism (an event that ran once) → how often it ran."""
        return {event.times(1): event.count for event in self}


def _canonical(events: Iterable[Event]) -> tuple[Event, ...]:
    counts: dict[Event, int] = {}
    for event in events:
        mechanism = event.times(1)
        counts[mechanism] = counts.get(mechanism, 0) + event.count
    return tuple(
        sorted((mechanism.times(count) for mechanism, count in counts.items()), key=_sort_key)
    )


def _sort_key(event: Event) -> tuple[str, Event]:
    # Events of one kind have an order; kinds are ordered by name.
    return type(event).__name__, event


def _check_rate(value: float) -> None:
    # Written so that NaN fails too.
    if not (_is_number(value) and 0.0 < value <= 1.0):
        raise ConfigurationError(f"sampling_rate must be above 0 and at most 1, got {value!r}")


def _check_noise(value: float) -> None:
    # The range keeps 1/σ a number; nothing in it comes near what trains a model or protects.
    if not (_is_number(value) and 1e-300 <= value <= 1e300):
        raise ConfigurationError(
            f"noise_multiplier must be positive and finite, got {value!r}; "
            "a release without noise is an Unprotected event"
        )


def _check_range(name: str, value: float, least: float, most: float) -> None:
    if not (_is_number(value) and least <= value <= most):
        raise ConfigurationError(f"{name} must be from {least:g} to {most:g}, got {value!r}")


def _check_candidates(candidates: tuple[Composition, ...]) -> None:
    if not candidates:
        raise ConfigurationError("a selection must have at least one candidate, got none")
    if any(candidate.unprotected for candidate in candidates):
        raise ConfigurationError(
            "every candidate of a selection must have a privacy guarantee, got an Unprotected "
            "event; the best of runs without one is an Unprotected event itself"
        )


def _check_count(name: str, value: int, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(
            f"{name} must be a whole number of at least {least}, got {value!r}"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
