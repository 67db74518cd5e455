"""Ranking metrics from seven noised counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common.tasks.rank_histogram import (
    CELLS,
    CUTOFF,
    TIERS,
    drawn_from,
    rank_cells,
    rank_estimates,
)
from common.tasks.ranking import Position, hit_rate, ndcg

CATALOGUE, SAMPLE = 1000, 99


def standings(users: int, seed: int = 0) -> tuple[Position, Position]:
    """Positions among a sample and among all, without ties, of users whose items do rather well."""
    chance = torch.Generator().manual_seed(seed)
    at = (torch.rand(users, generator=chance, dtype=torch.float64) ** 4 * CATALOGUE).long()
    share = torch.full((users,), SAMPLE / (CATALOGUE - 1), dtype=torch.float64)
    in_sample = torch.binomial(at.double(), share, generator=chance).long()
    nobody = torch.zeros(users, dtype=torch.int64)
    return Position(in_sample, nobody), Position(at, nobody)


def counted(sampled: Position, full: Position) -> Tensor:
    cells = rank_cells(sampled, full, torch.zeros(len(full.better), dtype=torch.float64))
    return torch.bincount(cells, minlength=CELLS)


def exact(sampled: Position, full: Position) -> dict[str, float]:
    return {
        f"{name}@{CUTOFF}{ranked}": float(gain(at, CUTOFF).mean())
        for at, ranked in ((sampled, ""), (full, "-full"))
        for name, gain in (("hr", hit_rate), ("ndcg", ndcg))
    }


@given(
    st.integers(0, 200), st.integers(0, 50), st.integers(0, 30), st.integers(0, 30), st.floats(0, 1)
)
def test_a_user_has_one_cell_and_hits_are_hits(
    better: int, tied: int, more_better: int, more_tied: int, chance: float
) -> None:
    """Whoever is among the first ten of the catalogue is so in the sample, ties or not."""
    lot = torch.tensor([min(chance, 1 - 2.0**-53)], dtype=torch.float64)
    sampled = Position(torch.tensor([better]), torch.tensor([tied]))
    full = Position(torch.tensor([better + more_better]), torch.tensor([tied + more_tied]))
    (cell,) = rank_cells(sampled, full, lot).tolist()
    tiers = len(TIERS) - 1
    assert 0 <= cell < CELLS
    in_sample, in_all = (
        int(at.better + (lot * (at.tied + 1)).long()) < CUTOFF for at in (sampled, full)
    )
    assert (cell < tiers) == in_all
    assert (cell < 2 * tiers) == in_sample


def test_positions_fall_into_their_tiers() -> None:
    at = torch.arange(CUTOFF + 1)
    nobody = torch.zeros(len(at), dtype=torch.int64)
    cells = rank_cells(Position(at, nobody), Position(at, nobody), torch.zeros(len(at)))
    assert cells.tolist() == [0, 1, 1, *[2] * 7, CELLS - 1]


def test_ties_are_settled_evenly_and_by_the_users_own_entries() -> None:
    """A constant model has the hit rate of a guess: 10 of 100, to 4 deviations of 5,000 lots."""
    users = 5_000
    items = torch.randint(0, 10**6, (users, 4), generator=torch.Generator().manual_seed(0))
    lots = drawn_from(items[:, 0], items[:, 1:])
    assert bool(((lots >= 0) & (lots < 1)).all())
    nobody = torch.zeros(users, dtype=torch.int64)
    alike = Position(nobody, nobody + SAMPLE)
    cells = rank_cells(alike, alike, lots)
    hits = float((cells < CELLS - 1).double().mean())
    assert abs(hits - 0.1) < 4 * math.sqrt(0.09 / users)
    some = torch.arange(100, 200)
    assert torch.equal(drawn_from(items[some, 0], items[some, 1:]), lots[some])


def test_hit_rates_are_exact_without_noise_and_ndcg_is_within_its_bar() -> None:
    sampled, full = standings(20_000)
    found = rank_estimates(counted(sampled, full).double().numpy(), 1e-12, SAMPLE / (CATALOGUE - 1))
    for name, value in exact(sampled, full).items():
        assert found[name].low - 1e-9 <= value <= found[name].high + 1e-9, name
        assert found[name].value == pytest.approx(value, abs=1e-6 if name[:2] == "hr" else 0.01)


@pytest.mark.parametrize("told", [1.0, 0.5])
def test_error_bars_cover_as_often_as_they_say(told: float) -> None:
    """And for half the noise, as a control, they do not: ±0.98σ covers two in three."""
    sampled, full = standings(2_000)
    truth, counts = exact(sampled, full), counted(sampled, full).double().numpy()
    sigma, draws = 22.0, 300
    rng = np.random.default_rng(0)
    held = dict.fromkeys(truth, 0)
    for _ in range(draws):
        noisy = counts + np.rint(rng.normal(scale=sigma, size=CELLS))
        found = rank_estimates(noisy, (told * sigma) ** 2, SAMPLE / (CATALOGUE - 1))
        for name, value in truth.items():
            held[name] += found[name].low <= value <= found[name].high
    least = 0.95 - 3.3 * math.sqrt(0.95 * 0.05 / draws)
    for name in truth:
        if told == 1.0:
            assert held[name] / draws >= least, name
        elif name.startswith("hr"):
            assert held[name] / draws < 0.8, name
