"""Stacked optimizers are ``torch.optim``'s, for each holder by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from simulations.optimizers import Adam, Optimizer, Sgd

HOLDERS, SIZE, STEPS = 4, 6, 12
RATES = (0.1, 0.01, 0.3, 1.0)
MOMENTA = (0.0, 0.5, 0.9, 0.99)


def column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).unsqueeze(1)


def drawn(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Where the holders start, and their gradients at each step: [H, D], [k, H, D]."""
    chance = torch.Generator().manual_seed(seed)
    return (
        torch.randn(HOLDERS, SIZE, generator=chance),
        torch.randn(STEPS, HOLDERS, SIZE, generator=chance),
    )


def schedule(seed: int = 1) -> Tensor:
    """Who takes each step, [k, H]; nobody takes the fourth, holder 0 none at all."""
    active = torch.rand(STEPS, HOLDERS, generator=torch.Generator().manual_seed(seed)) < 0.6
    active[3], active[:, 0] = False, False
    return active


def stacked(optimizer: Optimizer, active: Tensor | None, gradients: Tensor | None = None) -> Tensor:
    parameters, usual = drawn()
    for step, each in enumerate(usual if gradients is None else gradients):
        who = None if active is None else active[step].unsqueeze(1)
        optimizer.step(parameters, each.clone(), who)
    return parameters


def one_by_one(make: Callable[[int, Tensor], torch.optim.Optimizer], active: Tensor) -> Tensor:
    start, gradients = drawn()
    for holder in range(HOLDERS):
        own = start[holder].clone().requires_grad_()
        optimizer = make(holder, own)
        for step in range(STEPS):
            if active[step, holder]:
                own.grad = gradients[step, holder].clone()
                optimizer.step()
        start[holder] = own.detach()
    return start


def torch_sgd(holder: int, parameters: Tensor) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameters], lr=RATES[holder], momentum=MOMENTA[holder])


def torch_plain(holder: int, parameters: Tensor) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameters], lr=RATES[holder])


def torch_adam(holder: int, parameters: Tensor) -> torch.optim.Optimizer:
    return torch.optim.Adam([parameters], lr=RATES[holder])


CASES = {
    "sgd": (lambda: Sgd(column(RATES), None), torch_plain),
    "momentum": (lambda: Sgd(column(RATES), column(MOMENTA)), torch_sgd),
    "adam": (lambda: Adam(column(RATES)), torch_adam),
}


@pytest.mark.parametrize("name", CASES)
def test_each_holder_gets_torchs_steps_with_its_own_settings(name: str) -> None:
    ours, theirs = CASES[name]
    expected = one_by_one(theirs, torch.ones(STEPS, HOLDERS, dtype=torch.bool))
    torch.testing.assert_close(stacked(ours(), None), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_step_that_is_not_a_holders_changes_nothing_of_it(name: str) -> None:
    """Neither parameters nor velocity, moments or the count of steps: as if it had not been."""
    ours, theirs = CASES[name]
    active = schedule()
    found = stacked(ours(), active)
    torch.testing.assert_close(found, one_by_one(theirs, active), rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0], drawn()[0][0]), "holder 0 took no step"
    everyone = stacked(ours(), None)
    assert not torch.allclose(found[1:], everyone[1:], atol=1e-3), "the schedule shows"


@pytest.mark.parametrize("name", CASES)
def test_everybody_active_is_the_same_as_no_mask(name: str) -> None:
    ours, _ = CASES[name]
    whole = stacked(ours(), torch.ones(STEPS, HOLDERS, dtype=torch.bool))
    assert torch.equal(whole, stacked(ours(), None))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_of_a_step_that_is_not_taken_is_not_looked_at(name: str, value: float) -> None:
    ours, _ = CASES[name]
    active, (_, gradients) = schedule(), drawn()
    spoiled = torch.where(active.unsqueeze(2), gradients, value)
    assert torch.equal(stacked(ours(), active, spoiled), stacked(ours(), active))


@pytest.mark.parametrize("name", CASES)
def test_what_one_holder_does_is_nothing_to_another(name: str) -> None:
    ours, _ = CASES[name]
    _, gradients = drawn()
    other = gradients.clone()
    other[:, 2] = 1e6
    first, second = stacked(ours(), None, gradients), stacked(ours(), None, other)
    rest = [0, 1, 3]
    assert torch.equal(first[rest], second[rest])
    assert not torch.equal(first[2], second[2])
