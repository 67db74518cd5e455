import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigurationError
from common.privacy.events import (
    Composition,
    DiscreteGaussian,
    DistributedGaussian,
    Event,
    Selection,
    SubsampledGaussian,
    Unprotected,
    event_from_dict,
    gaussian,
)

# Few distinct mechanisms, so that merging happens.
gaussians = st.builds(
    SubsampledGaussian,
    sampling_rate=st.sampled_from([0.01, 0.5, 1.0]),
    noise_multiplier=st.sampled_from([0.7, 1.1, 20.0]),
    steps=st.integers(1, 50),
)
discrete = st.builds(
    DiscreteGaussian,
    noise_multiplier=st.sampled_from([0.7, 1.1, 20.0]),
    releases=st.integers(1, 50),
)
distributed = st.builds(
    DistributedGaussian,
    noise_multiplier=st.sampled_from([0.7, 1.1, 20.0]),
    releases=st.integers(1, 50),
)
runs = st.lists(st.one_of(gaussians, discrete, distributed), max_size=2).map(
    lambda found: Composition(tuple(found))
)
selections = st.builds(
    Selection,
    candidates=st.lists(runs, min_size=1, max_size=2).map(tuple),
    expected_runs=st.sampled_from([1.0, 10.0]),
    shape=st.sampled_from([0.0, 1.0]),
    selections=st.integers(1, 5),
)
protected: st.SearchStrategy[Event] = st.one_of(gaussians, discrete, distributed, selections)
events: st.SearchStrategy[Event] = st.one_of(protected, st.just(Unprotected()))
compositions = st.lists(events, max_size=6).map(lambda found: Composition(tuple(found)))
rounds = st.integers(0, 9)


@given(compositions, compositions, compositions)
def test_addition_is_that_of_multisets(a: Composition, b: Composition, c: Composition) -> None:
    assert a + b == b + a
    assert (a + b) + c == a + (b + c)
    assert a + Composition() == a
    assert Composition.sum([a, b, c]) == a + b + c


@given(compositions, rounds, rounds)
def test_rounds_multiply(a: Composition, m: int, n: int) -> None:
    assert a * m + a * n == a * (m + n)
    assert (a * m) * n == a * (m * n)
    assert a * 0 == Composition()


@given(compositions, compositions)
def test_covers_is_the_order_of_multisets(a: Composition, b: Composition) -> None:
    assert a.covers(a)
    assert (a + b).covers(a)
    assert (a.covers(b) and b.covers(a)) == (a == b)


@given(compositions, protected)
def test_once_more_is_not_covered(a: Composition, event: Event) -> None:
    assert not a.covers(a + Composition.of(event))


@given(compositions, compositions, compositions)
def test_join_is_the_least_that_covers_both(a: Composition, b: Composition, c: Composition) -> None:
    join = a.join(b)
    assert join == b.join(a)
    assert join.covers(a)
    assert join.covers(b)
    assert (c.covers(a) and c.covers(b)) == c.covers(join)
    assert (a + b).covers(join)


@given(compositions, compositions)
def test_what_is_beyond_another_is_what_joining_adds_to_it(a: Composition, b: Composition) -> None:
    assert a + b.beyond(a) == a.join(b)
    assert b.covers(b.beyond(a))
    assert not b.beyond(b)


@given(compositions)
def test_json_round_trip_is_exact(a: Composition) -> None:
    assert Composition.from_json(a.to_json()) == a


@given(st.floats(min_value=1e-300, max_value=1e300), st.floats(min_value=1e-300, max_value=1.0))
def test_json_keeps_every_bit(sigma: float, rate: float) -> None:
    a = Composition.of(SubsampledGaussian(rate, sigma, 3))
    assert Composition.from_json(a.to_json()) == a


def test_equal_mechanisms_merge_and_others_do_not() -> None:
    one, two = SubsampledGaussian(0.1, 1.0, 3), SubsampledGaussian(0.1, 1.1, 3)
    merged = Composition.of(one, two, one)
    assert merged.events == (SubsampledGaussian(0.1, 1.0, 6), two)


def test_every_kind_has_its_own_json() -> None:
    run = Composition.of(gaussian(5.0, 3))
    kinds = {
        "subsampled-gaussian": SubsampledGaussian(0.1, 2.0, 5),
        "discrete-gaussian": DiscreteGaussian(8.0, 4),
        "distributed-gaussian": DistributedGaussian(9.0, 3),
        "selection": Selection((run, run * 2), 10.0, 0.0, 2),
        "unprotected": Unprotected(),
    }
    for mechanism, event in kinds.items():
        assert event.to_dict()["mechanism"] == mechanism
        assert event_from_dict(event.to_dict()) == event
    assert Composition(tuple(kinds.values())).to_json() == (
        '[{"mechanism": "discrete-gaussian", "noise_multiplier": 8.0, "releases": 4}, '
        '{"mechanism": "distributed-gaussian", "noise_multiplier": 9.0, "releases": 3}, '
        '{"candidates": [[{"mechanism": "subsampled-gaussian", "noise_multiplier": 5.0, '
        '"sampling_rate": 1.0, "steps": 3}], [{"mechanism": "subsampled-gaussian", '
        '"noise_multiplier": 5.0, "sampling_rate": 1.0, "steps": 6}]], "expected_runs": 10.0, '
        '"mechanism": "selection", "selections": 2, "shape": 0.0}, '
        '{"mechanism": "subsampled-gaussian", "noise_multiplier": 2.0, "sampling_rate": 0.1, '
        '"steps": 5}, {"mechanism": "unprotected"}]'
    )


def test_what_candidates_have_in_common_does_not_matter() -> None:
    one, two = (Composition.of(gaussian(sigma, 1)) for sigma in (5.0, 6.0))
    assert Selection((two, one, two), 3) == Selection((one, two), 3.0)


def test_noise_in_shares_merges_and_is_another_kind_than_noise_of_one_holder() -> None:
    a = Composition.of(DistributedGaussian(5.0, 1))
    assert a * 3 == Composition.of(DistributedGaussian(5, 3))
    assert not (a * 3).covers(Composition.of(gaussian(5.0, 1)))
    assert not (a * 3).covers(Composition.of(DiscreteGaussian(5.0, 1)))


def test_releases_of_discrete_noise_merge() -> None:
    assert Composition.of(DiscreteGaussian(5.0, 1)) * 3 == Composition.of(DiscreteGaussian(5, 3))
    assert Composition.of(DiscreteGaussian(5.0, 1)) != Composition.of(gaussian(5.0, 1))


def test_numbers_have_one_spelling() -> None:
    ours = SubsampledGaussian(np.float64(1), 2, 1)
    assert (
        Composition.of(ours).to_json() == Composition.of(SubsampledGaussian(1.0, 2.0, 1)).to_json()
    )


def test_unprotected_once_or_often_is_the_same() -> None:
    assert Composition.of(Unprotected(), Unprotected()) == Composition.of(Unprotected())
    assert Composition.of(Unprotected()).unprotected
    assert not Composition.of(SubsampledGaussian(1.0, 1.0, 1)).unprotected


@pytest.mark.parametrize(
    ("rate", "sigma", "steps", "message"),
    [
        (0.0, 1.0, 1, "sampling_rate must be above 0 and at most 1, got 0.0"),
        (1.5, 1.0, 1, "sampling_rate must be above 0 and at most 1, got 1.5"),
        (math.nan, 1.0, 1, "sampling_rate .* got nan"),
        (0.5, 0.0, 1, "noise_multiplier must be positive and finite, got 0.0; .* Unprotected"),
        (0.5, -1.0, 1, "noise_multiplier .* got -1.0"),
        (0.5, math.nan, 1, "noise_multiplier .* got nan"),
        (0.5, math.inf, 1, "noise_multiplier .* got inf"),
        (0.5, 1.0, 0, "steps must be a whole number of at least 1, got 0"),
        (0.5, 1.0, 2.0, "steps .* got 2.0"),
        (0.5, 1.0, True, "steps .* got True"),
        ("0.5", 1.0, 1, "sampling_rate .* got '0.5'"),
    ],
)
def test_a_bad_event_is_refused_by_field_and_value(
    rate: float, sigma: float, steps: int, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SubsampledGaussian(rate, sigma, steps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), 5.0), "at least one candidate"),
        (((Composition.of(Unprotected()),), 5.0), "every candidate .* Unprotected"),
        (((Composition(),), 0.9), "expected_runs must be from 1 to 1e\\+06, got 0.9"),
        (((Composition(),), math.nan), "expected_runs .* got nan"),
        (((Composition(),), 5.0, -0.1), "shape must be from 0 to 10, got -0.1"),
        (((Composition(),), 5.0, math.inf), "shape .* got inf"),
        (((Composition(),), 5.0, 1.0, 0), "selections must be a whole number of at least 1"),
    ],
)
def test_a_bad_selection_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Selection(*arguments)


@pytest.mark.parametrize("kind", [DiscreteGaussian, DistributedGaussian])
@pytest.mark.parametrize("arguments", [(0.0, 1), (math.nan, 1), (5.0, 0), (5.0, 1.5)])
def test_bad_discrete_noise_is_refused(arguments: tuple, kind: type) -> None:
    with pytest.raises(ConfigurationError, match=r"noise_multiplier|releases"):
        kind(*arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSON list of events"),
        ('{"mechanism": "unprotected"}', "JSON list of events"),
        ("[1]", "JSON list of events"),
        (
            '[{"mechanism": "magic"}]',
            r"one of \['discrete-gaussian', 'dist.*', 'selection', .* 'unprotected'\], got 'magic'",
        ),
        ('[{"mechanism": "subsampled-gaussian", "steps": 1}]', "has fields .*got \\['steps'\\]"),
        ('[{"mechanism": "unprotected", "steps": 1}]', "has fields"),
        (
            '[{"mechanism": "selection", "candidates": 3, "expected_runs": 2, "shape": 1, '
            '"selections": 1}]',
            "candidates must be a JSON list",
        ),
        (
            '[{"mechanism": "selection", "candidates": [3], "expected_runs": 2, "shape": 1, '
            '"selections": 1}]',
            "JSON list of events, got 3",
        ),
    ],
)
def test_json_that_is_no_composition_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Composition.from_json(text)
