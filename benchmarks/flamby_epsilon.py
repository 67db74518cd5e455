"""The ε that FLamby's published differentially private curve really spends, hospital by hospital.

    python benchmarks/flamby_epsilon.py        # a Markdown table

The published run is `flamby/dp_example/create_fed_heart_disease_dp_results.py` of
https://github.com/owkin/FLamby, its figures `results_fed_heart_disease.csv` beside it: the version
with .713 without privacy, taken to be the one for inputs scaled per hospital. Read there:

- Batches of 4, so a hospital with n training rows has L = ⌈n/4⌉ of them in a pass.
- Opacus calibrates the noise for a sampling rate of 1/L and ``epochs=nrounds``: 15 passes, that is
  15·L steps. Every hospital then takes 15 rounds of 100 steps: 1,500.
- The Poisson loader that Opacus returns is not used; batches come from the shuffled one.
- Every hospital's noise generator has the same seed, that of the strategy.

Assumed: the noise is what Opacus' Rényi accountant asks for, the default when this was added in
August 2022. (The PRV accountant came with Opacus 1.3; with it there is less noise, and ε is about
an eighth higher.)
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# A script's own folder is on the path; the packages beside it are not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opacus.accountants.utils import get_noise_multiplier

from common.privacy.accounting import epsilon
from common.privacy.events import Composition, SubsampledGaussian
from common.privacy.gaussian import gaussian_epsilon

DELTA = 1e-4
BATCH = 4
ROUNDS, LOCAL_STEPS = 15, 100
TRAINING_ROWS: Mapping[str, int] = {"cleveland": 199, "hungary": 172, "switzerland": 30, "va": 85}


@dataclass(frozen=True)
class Published:
    """One point of FLamby's curve at δ = 1e-4: accuracy, mean over hospitals.

    Args:
        nominal: the ε it is published under; None is without privacy.
        accuracy: mean over five seeds of one split.
        spread: standard deviation over these seeds.
    """

    nominal: float | None
    accuracy: float
    spread: float


PUBLISHED = (
    Published(0.1, 0.606, 0.121),
    Published(1.0, 0.685, 0.055),
    Published(5.0, 0.704, 0.049),
    Published(10.0, 0.700, 0.055),
    Published(50.0, 0.702, 0.052),
    Published(None, 0.713, 0.024),
)


@dataclass(frozen=True)
class Spent:
    """What one hospital's 1,500 steps cost.

    Args:
        noise_multiplier: that Opacus chose for the nominal ε.
        if_poisson: ε, had every row entered every batch independently with probability 1/L.
        without_amplification: ε for batches as they were: a row is in one batch of every pass, so
            in ⌈1500/L⌉ sums, each with its own noise. Neighbours: one row's gradients are zero.
    """

    noise_multiplier: float
    if_poisson: float
    without_amplification: float


def spent(nominal: float, rows: int) -> Spent:
    """What a hospital with ``rows`` training rows spends under a nominal ε.

    Both figures are against someone who sees this hospital's updates and no other's.
    """
    batches, steps = math.ceil(rows / BATCH), ROUNDS * LOCAL_STEPS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order is the last of the list
        sigma = get_noise_multiplier(
            target_epsilon=nominal,
            target_delta=DELTA,
            sample_rate=1 / batches,
            epochs=ROUNDS,
            accountant="rdp",
        )
    taken = Composition((SubsampledGaussian(1 / batches, sigma, steps),))
    passes = math.ceil(steps / batches)
    return Spent(sigma, epsilon(taken, DELTA), gaussian_epsilon(math.sqrt(passes) / sigma, DELTA))


def spent_everywhere(nominal: float) -> dict[str, Spent]:
    """What each hospital spends under a nominal ε."""
    return {hospital: spent(nominal, rows) for hospital, rows in TRAINING_ROWS.items()}


def table() -> str:
    """Nominal and real ε, as Markdown."""
    head = [
        "nominal ε",
        *(f"{hospital} ({rows} rows)" for hospital, rows in TRAINING_ROWS.items()),
        "without amplification",
        "published accuracy",
    ]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    for point in PUBLISHED:
        if point.nominal is None:
            continue
        costs = spent_everywhere(point.nominal).values()
        bounds = [each.without_amplification for each in costs]
        cells = [
            f"{point.nominal:g}",
            *(f"{each.if_poisson:.3g}" for each in costs),
            f"{min(bounds):.3g}–{max(bounds):.3g}",
            f"{point.accuracy:.3f} ± {point.spread:.3f}".replace("0.", "."),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
