import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from common.errors import ConfigurationError
from common.privacy.noise import OsRandomness, SeededRandomness
from common.privacy.step import (
    check_model,
    clip_factors,
    clipped_sum,
    clipped_updates,
    noisy_mean,
    rounded_to_grid,
)

C = 0.7

# Ordinary, zero, tiny, huge and broken numbers.
numbers = st.one_of(
    st.floats(-10, 10),
    st.sampled_from([0.0, 1e-300, 1e-30, 1e30, -1e200, math.inf, -math.inf, math.nan]),
)


@st.composite
def gradients(draw: st.DrawFn) -> list[Tensor]:
    """Two parameters' gradients, [B, 2, 2] and [B], of 1 to 5 units, in float64."""
    units = draw(st.integers(1, 5))
    values = draw(st.lists(numbers, min_size=5 * units, max_size=5 * units))
    flat = torch.tensor(values, dtype=torch.float64).view(units, 5)
    return [flat[:, :4].reshape(units, 2, 2), flat[:, 4]]


def flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


@given(gradients(), st.integers(0, 4))
def test_one_unit_moves_the_clipped_sum_by_at_most_c(grads: list[Tensor], unit: int) -> None:
    unit %= len(grads[0])
    without = [torch.cat([grad[:unit], grad[unit + 1 :]]) for grad in grads]
    moved = flat(clipped_sum(grads, C)) - flat(clipped_sum(without, C))
    assert float(moved.norm()) <= C * (1 + 1e-9)  # NaN fails


def test_the_bound_is_reached_and_no_clipping_passes_it() -> None:
    """Negative control of the property above."""
    grads = [torch.tensor([[3.0, 4.0]], dtype=torch.float64)]
    assert float(flat(clipped_sum(grads, C)).norm()) == pytest.approx(C)
    assert float(flat(clipped_sum(grads, 100.0)).norm()) == pytest.approx(5.0)


def test_units_are_clipped_each_before_the_sum_and_over_all_parameters() -> None:
    grads = [torch.tensor([[3.0], [0.3]]), torch.tensor([4.0, 0.4])]  # norms 5 and 0.5
    weight, bias = clipped_sum(grads, 1.0)
    assert weight.tolist() == pytest.approx([3 / 5 + 0.3])
    assert bias.tolist() == pytest.approx(4 / 5 + 0.4)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_unit_with_a_broken_gradient_adds_exactly_zero(broken: float) -> None:
    good = [torch.randn(3, 2, 2), torch.randn(3)]
    bad = [torch.cat([good[0], torch.full((1, 2, 2), 5.0)]), torch.cat([good[1], torch.zeros(1)])]
    bad[0][3, 1, 0] = broken
    for with_bad, without in zip(clipped_sum(bad, C), clipped_sum(good, C), strict=True):
        torch.testing.assert_close(with_bad, without)


def test_float32_gradients_whose_squares_overflow_stay_bounded() -> None:
    grads = [torch.tensor([[1e30, 1e30], [0.1, 0.0]])]
    assert float(flat(clipped_sum(grads, C)).norm()) <= C + 0.1
    assert flat(clipped_sum(grads, C)).isfinite().all()


def test_an_empty_batch_sums_to_zero() -> None:
    sums = clipped_sum([torch.zeros(0, 3, 2), torch.zeros(0)], C)
    assert [total.shape for total in sums] == [(3, 2), ()]
    assert not flat(sums).any()


def test_clip_factors() -> None:
    norms = torch.tensor([0.0, C / 2, C, 2 * C, math.inf, math.nan])
    assert clip_factors(norms, C).tolist() == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.0, 0.0])
    assert clip_factors(torch.zeros(0), C).shape == (0,)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan])
def test_a_clip_norm_that_is_not_positive_is_refused(clip_norm: float) -> None:
    with pytest.raises(ConfigurationError, match="clip_norm must be positive, got"):
        clip_factors(torch.ones(1), clip_norm)


# -- noise -----------------------------------------------------------------------------------


def noise_of(noise_multiplier: float, clip_norm: float, batch: float) -> Tensor:
    (mean,) = noisy_mean(
        [torch.zeros(30_000)],
        noise_multiplier=noise_multiplier,
        clip_norm=clip_norm,
        expected_batch_size=batch,
        randomness=SeededRandomness("step"),
    )
    return mean


def test_noise_is_scaled_by_the_clip_norm_and_divided_with_the_sum() -> None:
    sigma, batch = 1.3, 50.0
    draws = noise_of(sigma, C, batch).double().numpy()
    expected = sigma * C / batch
    assert stats.kstest(draws, "norm", args=(0, expected)).pvalue > 1e-3
    for wrong in (expected * 2 / 3, expected * 3 / 2, sigma / batch, sigma * C):
        assert stats.kstest(draws, "norm", args=(0, wrong)).pvalue < 1e-9


def test_the_sum_is_divided_by_the_expected_batch_size() -> None:
    (mean,) = noisy_mean(
        [torch.tensor([10.0])],
        noise_multiplier=0.0,
        clip_norm=C,
        expected_batch_size=4.0,
        randomness=SeededRandomness(0),
    )
    assert mean.tolist() == [2.5]


def test_parameters_have_independent_noise() -> None:
    first, second = noisy_mean(
        [torch.zeros(100), torch.zeros(100)],
        noise_multiplier=1.0,
        clip_norm=C,
        expected_batch_size=1.0,
        randomness=SeededRandomness(0),
    )
    assert not torch.equal(first, second)


def test_noise_is_one_vector_over_all_parameters_in_order() -> None:
    shapes = [(3, 2), (), (0, 4), (5,)]
    parts = noisy_mean(
        [torch.zeros(shape) for shape in shapes],
        noise_multiplier=2.0,
        clip_norm=C,
        expected_batch_size=4.0,
        randomness=SeededRandomness("flat"),
    )
    assert [part.shape for part in parts] == shapes
    vector = SeededRandomness("flat").normal((12,), std=2.0 * C) / 4.0
    assert torch.equal(flat(parts), vector)


def test_noise_has_each_sums_type() -> None:
    parts = noisy_mean(
        [torch.zeros(2), torch.zeros(2, dtype=torch.float64)],
        noise_multiplier=1.0,
        clip_norm=C,
        expected_batch_size=1.0,
        randomness=OsRandomness(),
    )
    assert [part.dtype for part in parts] == [torch.float32, torch.float64]
    assert not torch.equal(parts[1], parts[1].float().double())  # drawn in the wider type


def finer_than(spacing: float, noised: Tensor) -> int:
    """How many of the numbers are not a multiple."""
    multiples = noised.double() / spacing
    return int((multiples != multiples.round()).sum())


def test_low_bits_do_not_show_how_small_a_sum_was() -> None:
    """A float32 sum of 1 and noise is a multiple of 2^-25, one of 0 and noise not always.

    About 1 % of either are no multiples, if the size of the sum does not show. Unseeded: the counts
    are compared at a level of 1e-9, and two counts of 1 % differ by less than √(2 · 1 % · n).
    """
    n, sigma, spacing = 200_000, 8.5, 2.0**-25

    def noised(total: float) -> Tensor:
        (mean,) = noisy_mean(
            [torch.full((n,), total)],
            noise_multiplier=sigma / C,
            clip_norm=C,
            expected_batch_size=1.0,
            randomness=OsRandomness(),
        )
        return mean

    small, large = (finer_than(spacing, noised(total)) for total in (0.0, 1.0))
    assert small > 0
    assert abs(small - large) < stats.norm.isf(1e-9 / 2) * math.sqrt(small + large)
    noise = OsRandomness().normal((n,), std=sigma)
    assert finer_than(spacing, noise + 1.0) == 0  # as it is without care
    assert finer_than(spacing, noise) > 0.005 * n


@pytest.mark.parametrize("batch", [0.0, -1.0, math.nan])
def test_a_batch_size_that_is_not_positive_is_refused(batch: float) -> None:
    with pytest.raises(ConfigurationError, match="expected_batch_size must be positive, got"):
        noise_of(1.0, C, batch)


# -- models ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4),
        nn.SyncBatchNorm(4),
        nn.LazyBatchNorm1d(),
        nn.InstanceNorm1d(4, track_running_stats=True),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_mix_examples_are_refused_by_name(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), layer))
    with pytest.raises(ConfigurationError, match=rf"'1\.1' is {type(layer).__name__}.*GroupNorm"):
        check_model(model)


def test_other_layers_pass() -> None:
    check_model(
        nn.Sequential(
            nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.InstanceNorm1d(4), nn.Tanh()
        )
    )


# -- whole holders ---------------------------------------------------------------------------


@given(gradients())
def test_no_clipped_update_is_longer_than_c_and_one_within_it_is_as_it_was(
    grads: list[Tensor],
) -> None:
    updates = torch.cat([grads[0].flatten(start_dim=1), grads[1].unsqueeze(1)], dim=1)
    clipped, within = clipped_updates(updates, C)
    assert bool((torch.linalg.vector_norm(clipped, dim=1) <= C * (1 + 1e-9)).all())  # NaN fails
    torch.testing.assert_close(clipped[within], updates[within], rtol=0, atol=0)
    broken = ~updates.isfinite().all(dim=1)
    assert not clipped[broken].any()
    assert not within[broken].any()


def test_what_is_rounded_lies_on_a_grid_far_below_the_noise() -> None:
    noised = SeededRandomness("grid").normal((1000,), std=3.0, dtype=torch.float64)
    found = rounded_to_grid(noised.clone(), 3.0)
    grid = 2.0 ** (1 - 30)  # 2 is the power of two below 3
    assert torch.equal(found / grid, (found / grid).round())
    assert float((found - noised).abs().max()) <= grid / 2
    assert not torch.equal(noised / grid, (noised / grid).round()), "negative control"
    assert torch.equal(rounded_to_grid(noised.clone(), 0.0), noised)
