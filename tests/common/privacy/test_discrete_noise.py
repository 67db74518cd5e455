"""The discrete Gaussian against its exact probabilities, each with a negative control.

Seeded. What must be accepted is tested at a level of 1e-4, and what must be rejected falls below
1e-12: the controls were chosen so that their distance is far above the noise of these sample sizes.
"""

import itertools
import math
from collections.abc import Sequence
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from common.errors import ConfigurationError
from common.privacy import discrete_noise
from common.privacy.discrete_noise import LARGEST_SIGMA, discrete_gaussian, integers
from common.privacy.noise import OsRandomness, SeededRandomness

ACCEPTED, REJECTED = 1e-4, 1e-12
DRAWS = 100_000
SIGMAS = [0.5, 1.0, 7.8, 100.0]

Draws = npt.NDArray[np.int64]


class Fixed(SeededRandomness):
    """A source whose words are these, as often as asked."""

    def __init__(self, words: Sequence[int]) -> None:
        super().__init__()
        self._fixed = itertools.cycle(words)

    def words(self, n: int) -> torch.Tensor:
        unsigned = np.array(list(itertools.islice(self._fixed, n)), dtype=np.uint64)
        return torch.from_numpy(unsigned.view(np.int64))


def probabilities(sigma: float) -> tuple[Draws, npt.NDArray[np.float64]]:
    """All integers within 12σ + 2 and P(x) ∝ exp(−x²/(2σ²)); what is beyond has less than 1e-30."""
    most = math.ceil(12 * sigma) + 2
    values = np.arange(-most, most + 1)
    weights = np.exp(-(values**2) / (2 * sigma**2))
    return values, weights / weights.sum()


def pvalue(draws: Draws, sigma: float) -> float:
    """χ² of the draws against N_Z(0, σ²); all numbers that expect less than ten draws are one."""
    values, exact = probabilities(sigma)
    expected = exact * len(draws)
    single = np.flatnonzero(expected >= 10)[1:]  # the first joins the rest, so that it is not small
    observed = np.array([(draws == value).sum() for value in values[single]])
    return float(
        stats.chisquare(
            np.append(observed, len(draws) - observed.sum()),
            np.append(expected[single], len(draws) - expected[single].sum()),
        ).pvalue
    )


def drawn(sigma: float, n: int = DRAWS, name: str = "discrete") -> Draws:
    return np.asarray(discrete_gaussian(n, sigma, SeededRandomness(name, repr(sigma))).numpy())


@pytest.mark.parametrize("sigma", SIGMAS)
def test_draws_have_their_exact_probabilities_and_no_others(sigma: float) -> None:
    draws = drawn(sigma)
    assert draws.dtype == np.int64
    assert pvalue(draws, sigma) > ACCEPTED
    # With 10 % more noise the variance is 20 % more, and its estimate is good to √(2/n) ≈ 0.4 %. A
    # mean moved by σ/10 is moved by over thirty of its standard errors.
    assert pvalue(draws, sigma * 1.1) < REJECTED
    assert pvalue(draws, sigma / 1.1) < REJECTED
    assert pvalue(draws + math.ceil(sigma / 10), sigma) < REJECTED


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_a_rounded_gaussian_would_be_noticed(sigma: float) -> None:
    """Its variance is 1/12 more, and at σ = 1 that moves 8 % of the variance."""
    rounded = np.random.default_rng(0).normal(0, sigma, DRAWS).round().astype(np.int64)
    assert pvalue(rounded, sigma) < REJECTED


def test_one_call_or_many_the_probabilities_are_the_same() -> None:
    """Rejection draws again what is missing; a call of one is the shortest."""
    randomness = SeededRandomness("one by one")
    draws = [int(discrete_gaussian(1, 1.0, randomness)) for _ in range(2000)]
    assert pvalue(np.array(draws), 1.0) > ACCEPTED


@pytest.mark.parametrize("n", [0, 1, 17])
def test_there_are_as_many_draws_as_asked(n: int) -> None:
    draws = discrete_gaussian(n, 3.0, OsRandomness())
    assert draws.shape == (n,)
    assert draws.dtype == torch.int64


@pytest.mark.parametrize("sigma", [0.0, 5e-324, 1e-200, 0.05])
def test_a_tiny_sigma_gives_zeros(sigma: float) -> None:
    """At σ = 0.05 another number has a probability of e^-200."""
    assert not discrete_gaussian(200, sigma, SeededRandomness("tiny")).any()


@pytest.mark.parametrize("sigma", [1e6, float(LARGEST_SIGMA)])
def test_a_large_sigma_is_the_continuous_gaussian(sigma: float) -> None:
    """In distribution: the two differ by less than 1/σ."""
    draws = discrete_gaussian(20_000, sigma, SeededRandomness("large")).double().numpy()
    assert stats.kstest(draws / sigma, "norm").pvalue > ACCEPTED
    assert stats.kstest(draws / sigma * 1.2, "norm").pvalue < REJECTED


@pytest.mark.parametrize("sigma", [-1.0, math.nan, math.inf, LARGEST_SIGMA * 1.01])
def test_a_sigma_out_of_range_is_refused(sigma: float) -> None:
    with pytest.raises(ConfigurationError, match="sigma must be at least 0 and at most 2\\^40"):
        discrete_gaussian(3, sigma, SeededRandomness(0))


def test_holders_draw_independently_and_repeat_only_with_their_seed() -> None:
    one, again, other = (drawn(100.0, 20_000, name) for name in ("a", "a", "b"))
    assert np.array_equal(one, again)
    bound = float(stats.norm.isf(ACCEPTED / 2)) / np.sqrt(20_000)
    assert abs(np.corrcoef(one, other)[0, 1]) < bound
    assert np.corrcoef(one, again)[0, 1] > bound
    first, second = (discrete_gaussian(100, 100.0, OsRandomness()) for _ in range(2))
    assert not torch.equal(first, second)


def test_draws_are_independent_of_their_neighbours() -> None:
    draws = drawn(100.0).astype(float)
    for lag in (1, 2, 7):
        correlation = (draws[:-lag] * draws[lag:]).mean() / 100.0**2 * np.sqrt(DRAWS)
        assert abs(correlation) < stats.norm.isf(ACCEPTED / 2)


def test_nothing_but_fair_bits_is_asked_for() -> None:
    """Uniform or normal floats are never drawn, so none can enter."""

    class OnlyBits(SeededRandomness):
        normal = uniform = draws = None  # type: ignore[assignment]

    assert discrete_gaussian(10, 7.8, OnlyBits("bits")).dtype == torch.int64


# -- the parts, exactly ----------------------------------------------------------------------


@given(st.integers(1, 40))
def test_every_number_below_the_bound_comes_equally_often(bound: int) -> None:
    """All patterns of a word's upper six bits, once each: no remainder favours small numbers."""
    source = Fixed([pattern << 58 for pattern in range(64)])
    numbers = discrete_noise._of_bits(64, (bound - 1).bit_length(), source)
    counts = np.bincount(numbers[numbers < bound], minlength=bound)
    assert (counts == counts[0]).all()
    assert counts.sum() >= 32


@given(st.integers(0, 200), st.lists(st.integers(0, 2**64 - 1), min_size=4, max_size=4))
def test_bits_are_the_upper_ones_of_whole_words(bits: int, words: list[int]) -> None:
    n = max(1, -(-bits // 64))
    number = sum(word << (64 * (n - 1 - i)) for i, word in enumerate(words[:n]))
    (drawn,) = discrete_noise._of_bits(1, bits, Fixed(words[:n]))
    assert drawn == number >> (64 * n - bits)


@pytest.mark.parametrize("bound", [1, 2, 3, 2**63 - 1, 2**63, 2**64, 3**50])
def test_integers_are_below_any_bound_and_fill_it(bound: int) -> None:
    numbers = integers(2000, bound, SeededRandomness("integers"))
    assert len(numbers) == 2000
    assert all(0 <= number < bound for number in numbers.tolist())
    if bound > 3:
        parts = [int(number) * 8 // bound for number in numbers]
        assert stats.chisquare(np.bincount(parts, minlength=8)).pvalue > ACCEPTED


@given(
    st.floats(1e-6, 1e6),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2**40)), min_size=1, max_size=5),
)
def test_the_acceptance_probability_is_exact(
    sigma: float, candidates: list[tuple[int, int]]
) -> None:
    """As a fraction, of the very number that the float is."""
    scale, variance = int(sigma) + 1, Fraction(sigma) ** 2
    for whole, rest in candidates:
        size, rest = whole * scale + rest % scale, rest % scale
        exact = Fraction(rest, scale) + (size - variance / scale) ** 2 / (2 * variance)
        found = discrete_noise._exponent(whole, rest, scale, sigma)
        assert found == exact
        in_floats = rest / scale + (size / sigma - sigma / scale) ** 2 / 2
        # Where floats decide, they are right to a hundredth of what counts as unsure.
        assert abs(math.exp(-found) - math.exp(-in_floats)) < discrete_noise._UNSURE / 100


GAMMAS = [Fraction(0), Fraction(1, 3), Fraction(1), Fraction(7, 2), Fraction(10**9), Fraction(1e-9)]


@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_uniform_number_is_below_an_exponential_to_the_last_bit(gamma: Fraction) -> None:
    """The 53 bits on either side of the exponential decide by themselves, and between them more."""
    with localcontext(prec=60):
        exact = (-Decimal(gamma.numerator) / gamma.denominator).exp() * 2**53
    middle = min(int(exact), 2**53 - 1)
    below = [
        discrete_noise._Uniform(number << 11, Fixed([1])).below_exp(gamma)
        for number in (0, max(0, middle - 1))
    ]
    assert below[0] == (gamma < 10**6)
    assert below[1] == (middle > 0)
    if 0 < middle < 2**53 - 1:
        assert not discrete_noise._Uniform((middle + 1) << 11, Fixed([0])).below_exp(gamma)
        # What comes after the 53 bits: the exponential's own next 64, one less, and one more.
        with localcontext(prec=60):
            following = int((exact - middle) * 2**64)
        for word, expected in ((following - 1, True), (following + 1, False)):
            number = discrete_noise._Uniform(middle << 11, Fixed([word]))
            assert number.below_exp(gamma) is expected


@pytest.mark.parametrize("unsure", [0.0, 2.0])
def test_floats_and_digits_decide_alike(unsure: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the band of doubt at nothing floats decide everything, at 2 digits do: the same draws.

    Not one of these numbers is within 2^-53 of its exponential, so no further bits are drawn.
    """
    expected = discrete_gaussian(300, 7.8, SeededRandomness("alike"))
    monkeypatch.setattr(discrete_noise, "_UNSURE", unsure)
    assert torch.equal(discrete_gaussian(300, 7.8, SeededRandomness("alike")), expected)


def test_the_geometric_draws_have_their_probabilities() -> None:
    draws = discrete_noise._geometric(DRAWS, SeededRandomness("geometric"))
    values = np.arange(8)
    exact = np.append(np.exp(-values) * (1 - math.exp(-1)), math.exp(-8.0))
    observed = np.bincount(np.minimum(draws, 8), minlength=9)
    assert stats.chisquare(observed, DRAWS * exact).pvalue > ACCEPTED
    one_off = np.append(exact[-1], exact[:-1])
    assert stats.chisquare(observed, DRAWS * one_off / one_off.sum()).pvalue < REJECTED


def test_the_geometric_draws_look_further_where_a_float_does_not_say() -> None:
    """The first 53 bits of exp(−2): which side of it a number with these is on, the next decide."""
    with localcontext(prec=60):
        number = int(Decimal(-2).exp() * 2**53)
    for following, expected in ((0, 2), (2**64 - 1, 1)):
        fixed = Fixed([number << 11, following])
        assert discrete_noise._geometric(1, fixed).tolist() == [expected]


def test_zero_comes_once() -> None:
    """Its sign is drawn too: at σ = 0.5, kept with both signs it would come twice as often."""
    values, exact = probabilities(0.5)
    zero = np.mean(drawn(0.5) == 0)
    expected = float(exact[values == 0][0])
    error = math.sqrt(expected * (1 - expected) / DRAWS)
    assert abs(zero - expected) < float(stats.norm.isf(ACCEPTED / 2)) * error
    assert abs(zero - 2 * expected / (1 + expected)) > 30 * error
