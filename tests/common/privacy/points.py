"""Compositions to compare accountants on, and Google's accountant: for tests and benchmarks."""

import itertools
from typing import Any

import numpy as np

from common.privacy.events import (
    Composition,
    DiscreteGaussian,
    Event,
    SubsampledGaussian,
    gaussian,
)

GRID = [
    SubsampledGaussian(rate, sigma, steps)
    for rate, sigmas, several in [
        (0.001, (0.6, 0.8, 1.2, 2.0), (100, 10_000)),
        (0.01, (0.7, 1.1, 2.0, 4.0), (100, 3_000)),
        (0.1, (1.0, 2.0, 5.0, 20.0), (10, 300)),
        (0.5, (2.0, 5.0, 15.0, 60.0), (5, 100)),
        (1.0, (5.0, 10.0, 30.0, 100.0), (1, 50)),
    ]
    for sigma, steps in itertools.product(sigmas, several)
]
"""40 points; at δ = 10⁻⁵ they cost from 0.01 to 15."""

MIXTURES = [(seed, (1e-6, 1e-5, 1e-4)[seed % 3]) for seed in range(20)]
"""Seeds of :func:`mixture`, each with a δ."""


def mixture(seed: int) -> Composition:
    """A holder's history: one to three trainings, one or two histograms, perhaps statistics."""
    draw = np.random.default_rng(seed)
    events: list[Event] = [
        SubsampledGaussian(
            float(draw.uniform(0.01, 0.5)), float(draw.uniform(2, 10)), int(draw.integers(1, 100))
        )
        for _ in range(draw.integers(1, 4))
    ]
    events += [
        DiscreteGaussian(float(draw.uniform(3, 60)), int(draw.integers(1, 20)))
        for _ in range(draw.integers(1, 3))
    ]
    if seed % 2:
        events.append(gaussian(float(draw.uniform(5, 30)), int(draw.integers(1, 5))))
    return Composition(tuple(events))


def pld(composition: Composition, interval: float) -> Any:
    """The privacy loss distribution of dp-accounting, both directions."""
    from dp_accounting.pld import privacy_loss_distribution as google

    composed = google.identity(interval)
    for event in composition:
        if isinstance(event, DiscreteGaussian):
            loss = google.from_discrete_gaussian_mechanism(
                event.noise_multiplier, value_discretization_interval=interval
            )
        elif isinstance(event, SubsampledGaussian):
            loss = google.from_gaussian_mechanism(
                event.noise_multiplier,
                sampling_prob=event.sampling_rate,
                value_discretization_interval=interval,
            )
        else:
            raise TypeError(f"dp-accounting has no privacy loss distribution of {event!r}")
        composed = composed.compose(loss.self_compose(event.count))
    return composed


def pld_epsilon(composition: Composition, delta: float, interval: float = 1e-4) -> float:
    """ε by dp-accounting, the worse of adding and removing: a third, independent accountant."""
    return float(pld(composition, interval).get_epsilon_for_delta(delta))


def fine_interval(composition: Composition, cost: float) -> float:
    """An interval at which PLD's own rounding is below 0.1 % of ``cost``.

    It rounds a discrete loss up by as much as the interval, and others by far less.
    """
    discrete = any(isinstance(event, DiscreteGaussian) for event in composition)
    return min(1e-3, max(1e-6, cost / (50_000 if discrete else 2_000)))


def in_order(rdp: float, ours: float, truth: float) -> bool:
    """RDP ≥ ours ≈ PLD: not below it by more than PLD may have rounded up, nor 2 % above."""
    return rdp >= ours and truth * 0.9995 <= ours <= truth * 1.02
