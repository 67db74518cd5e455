"""ε against published figures and two other accountants, and calibration against ε."""

import math
import threading
import tracemalloc
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import ConfigurationError
from common.privacy.accounting import (
    affordable,
    crosscheck,
    distributed_noise,
    epsilon,
    noise_multiplier,
    release_noise,
)
from common.privacy.bounds import coarsen, prv_bound, quick_bound
from common.privacy.events import (
    Composition,
    DiscreteGaussian,
    DistributedGaussian,
    Event,
    Selection,
    SubsampledGaussian,
    Unprotected,
    gaussian,
)
from common.privacy.gaussian import gaussian_delta, gaussian_epsilon, gaussian_mu
from tests.common.privacy.points import (
    GRID,
    MIXTURES,
    fine_interval,
    in_order,
    mixture,
    pld,
    pld_epsilon,
)

S, D, DG = SubsampledGaussian, DiscreteGaussian, DistributedGaussian

POINTS = [
    # what is composed, δ
    ([S(0.01, 1.1, 1000)], 1e-5),
    ([S(0.1, 20.0, 1500)], 1e-4),
    ([S(0.1, 1.0, 30)], 1e-4),
    ([S(0.01, 0.5, 100)], 1e-5),
    ([S(0.3, 30.0, 40)], 1e-4),
    ([S(0.04, 1.5, 2250)], 1e-5),
    ([S(0.5, 8.0, 100)], 1e-5),
    ([S(0.01, 1.0, 1000)], 1e-7),
    ([S(0.1, 1.0, 1)], 1e-5),
    ([S(1.0, 5.0, 30), S(0.1, 1.0, 30)], 1e-5),
    ([S(0.02, 1.3, 300), S(1.0, 8.0, 20), S(0.2, 4.0, 50)], 1e-5),
]


pytest.importorskip("dp_accounting")  # of tests/common/privacy/points.py


# -- published figures -----------------------------------------------------------------------


def test_opacus_documented_figures() -> None:
    """Opacus' own tests: σ=1.5, q=0.04, 90 epochs cost 6.7774 by PRV, 7.3291 by RDP."""
    run = Composition.of(S(0.04, 1.5, 2250))
    # Opacus adds an absolute error of 0.01, we a relative one of 0.002.
    assert prv_bound(run, 1e-5) == pytest.approx(6.777395712150674, abs=0.01)
    assert quick_bound(run, 1e-5) == pytest.approx(7.32911117143, rel=2e-3)


def test_opacus_documented_calibration() -> None:
    """Opacus' own tests: ε=8, q=0.04, 2,000 steps need σ=1.2915."""
    assert noise_multiplier(0.04, 2000, 8.0, 1e-5) == pytest.approx(1.2915, rel=1e-3)


def test_dp_accounting_documented_figures() -> None:
    """Google's own tests: three steps of σ=√3 are (1, 0.126936), of q=0.2, σ=0.5 (1, 0.15594)."""
    assert epsilon(Composition.of(S(1.0, math.sqrt(3), 3)), 0.126936) == pytest.approx(1, abs=1e-4)
    assert epsilon(Composition.of(S(0.2, 0.5, 3)), 0.15594) == pytest.approx(1, abs=5e-3)


def test_abadi_published_figure() -> None:
    """Abadi et al. 2016, section 3.2: q=0.01, σ=4, 10,000 steps: 1.26 by moments at δ=1e-5."""
    run = Composition.of(S(0.01, 4.0, 10_000))
    assert epsilon(run, 1e-5) < quick_bound(run, 1e-5) <= 1.26


def test_dp_accounting_documented_calibration() -> None:
    """Google's own RDP tests: σ=4.530877117 is "chosen to obtain exactly (1, 1e-6)-DP" by RDP."""
    found = crosscheck(Composition.of(gaussian(4.530877117, 1)), 1e-6)
    # Their orders are every thousandth, ours whole numbers.
    assert found.renyi + 1e-7 >= 1
    assert found.renyi == pytest.approx(1, rel=1e-3)
    assert found.gaussian < 0.95


# -- agreement -------------------------------------------------------------------------------


def check_order(run: Composition, delta: float) -> None:
    found = crosscheck(run, delta)
    truth = pld_epsilon(run, delta, fine_interval(run, found.chosen))
    assert in_order(found.renyi, found.chosen, truth)
    assert found.chosen == min(found.prv, found.gaussian) == epsilon(run, delta)


@pytest.mark.parametrize("step", GRID, ids=str)
def test_accountants_agree_in_order_on_a_grid(step: SubsampledGaussian) -> None:
    check_order(Composition.of(step), 1e-5)


@pytest.mark.parametrize(("seed", "delta"), MIXTURES)
def test_accountants_agree_in_order_on_mixed_compositions(seed: int, delta: float) -> None:
    check_order(mixture(seed), delta)


@pytest.mark.parametrize(("events", "delta"), POINTS)
def test_accountants_agree_in_order(events: list[SubsampledGaussian], delta: float) -> None:
    check_order(Composition(tuple(events)), delta)


def test_the_order_is_missed_if_a_release_is_left_out() -> None:
    """Negative control: what costs a tenth is more than the tolerances."""
    run = Composition.of(S(0.1, 5.0, 300), D(10.0, 3))
    part = Composition.of(S(0.1, 5.0, 300))
    assert not in_order(math.inf, epsilon(part, 1e-5), pld_epsilon(run, 1e-5))


# Few steps, large δ and rates near a half are where adding a unit could cost more than removing
# one (Lebeda et al. 2024). Opacus follows removal only.
@pytest.mark.parametrize(
    "step",
    [
        S(rate, sigma, steps)
        for rate, sigma in [(0.01, 0.5), (0.3, 0.7), (0.5, 1.5), (0.9, 3.0)]
        for steps in (1, 3, 20)
    ],
    ids=str,
)
def test_neither_direction_is_understated(step: SubsampledGaussian) -> None:
    loss = pld(Composition.of(step), 1e-4)
    for delta in (1e-6, 1e-3, 0.1, 0.4):
        cost = epsilon(Composition.of(step), delta)
        # PLD rounds the loss of each step up, by at most its interval.
        most = cost * 1.0005 + step.steps * 1e-4
        assert loss._pmf_add.get_epsilon_for_delta(delta) <= most
        assert loss._pmf_remove.get_epsilon_for_delta(delta) <= most


@pytest.mark.parametrize(("events", "delta"), POINTS)
def test_prv_is_what_opacus_own_accountant_says(
    events: list[SubsampledGaussian], delta: float
) -> None:
    """We build it from Opacus' parts; the errors that either adds on top are taken off."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(e.noise_multiplier, e.sampling_rate, e.steps) for e in events]
    ours = prv_bound(Composition(tuple(events)), delta)
    error = 0.01 * ours
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")
        theirs = accountant.get_epsilon(delta, eps_error=error)
    assert theirs - error == pytest.approx(ours, rel=5e-3)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 5.0, 40.0, 1000.0])
@pytest.mark.parametrize("delta", [1e-10, 1e-5, 1e-2])
@pytest.mark.parametrize("steps", [1, 100])
def test_plain_gaussian_is_exact(sigma: float, delta: float, steps: int) -> None:
    dp = pytest.importorskip("dp_accounting")
    ours = epsilon(Composition.of(S(1.0, sigma, steps)), delta)
    theirs = dp.get_epsilon_gaussian(sigma / math.sqrt(steps), delta)
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9)
    assert ours >= theirs - 1e-9


@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.0, 3.0, 50.0])
@pytest.mark.parametrize("delta", [1e-7, 1e-5, 1e-2])
def test_discrete_gaussian_is_the_exact_curve(sigma: float, delta: float) -> None:
    """Canonne, Kamath & Steinke 2020, theorem 7: δ(ε) = P(X > εσ² − ½) − e^ε P(X > εσ² + ½)."""
    outcomes = np.arange(-3000, 3001)
    weights = np.exp(-(outcomes**2) / (2 * sigma**2))

    def curve(cost: float) -> float:
        above = [
            math.fsum(weights[outcomes > cost * sigma**2 + side]) / math.fsum(weights)
            for side in (-0.5, 0.5)
        ]
        return above[0] - math.exp(cost) * above[1]

    cost = epsilon(Composition.of(D(sigma, 1)), delta)
    assert curve(cost) <= delta
    if curve(0.0) > delta:
        assert curve(cost * 0.99) > delta


def test_a_discrete_gaussian_of_large_noise_costs_what_a_gaussian_does() -> None:
    for sigma, releases in [(3.0, 4), (40.0, 10), (2500.0, 1000)]:
        discrete = epsilon(Composition.of(D(sigma, releases)), 1e-5)
        assert discrete == pytest.approx(
            epsilon(Composition.of(gaussian(sigma, releases)), 1e-5), rel=5e-3
        )


def test_many_kinds_of_discrete_noise_have_a_bound() -> None:
    """More than the PRV bound takes; Rényi divergences add up whatever their number."""
    run = Composition(tuple(D(20.0 + i, 1) for i in range(30)))
    assert prv_bound(run, 1e-5) == math.inf
    assert pld_epsilon(run, 1e-5) < epsilon(run, 1e-5) < 1.15 * pld_epsilon(run, 1e-5)


@pytest.mark.parametrize("sigma", [0.7, 5.0, 40.0])
@pytest.mark.parametrize("beside", [[], [D(20.0, 3)], [S(0.1, 3.0, 50)], [S(1.0, 9.0, 2)]])
def test_noise_in_shares_costs_a_little_more_than_a_gaussian_beside_anything(
    sigma: float, beside: list[Event]
) -> None:
    """Never less; and by every bound, of which the Rényi bound has a proof of its own."""
    shares = crosscheck(Composition.of(DG(sigma, 5), *beside), 1e-5)
    gaussians = crosscheck(Composition.of(gaussian(sigma, 5), *beside), 1e-5)
    assert gaussians.chosen <= shares.chosen <= gaussians.chosen * 1.005
    assert shares.renyi == pytest.approx(gaussians.renyi, rel=1e-9)
    assert shares.chosen < shares.renyi * 0.98
    assert shares.chosen < math.inf


def test_noise_in_shares_is_priced_as_a_candidate_too() -> None:
    """Where only the Rényi bound has a say."""
    search = Composition.of(Selection((Composition.of(DG(20.0, 5)),), 10.0))
    same = Composition.of(Selection((Composition.of(gaussian(20.0, 5)),), 10.0))
    assert epsilon(search, 1e-5) == pytest.approx(epsilon(same, 1e-5), rel=1e-9)


def test_plain_gaussians_of_different_noise_compose_exactly() -> None:
    together = Composition.of(S(1.0, 3.0, 9), S(1.0, 4.0, 16))
    assert epsilon(together, 1e-5) == pytest.approx(gaussian_epsilon(math.sqrt(2), 1e-5), rel=1e-12)


@given(st.floats(1e-3, 50.0), st.floats(1e-3, 30.0), st.sampled_from([1e-9, 1e-5, 1e-2]))
def test_gaussian_curve_and_its_inverses_agree(mu: float, target: float, delta: float) -> None:
    cost = gaussian_epsilon(mu, delta)
    assert gaussian_delta(mu, cost) <= delta
    if cost > 0:
        assert gaussian_delta(mu, cost * (1 - 1e-6)) > delta * (1 - 1e-3)
    most = gaussian_mu(target, delta)
    assert gaussian_delta(most, target) <= delta < gaussian_delta(most * 1.0001, target) * 1.001


# -- what must hold anywhere -----------------------------------------------------------------


def test_nothing_costs_nothing_and_unprotected_costs_everything() -> None:
    assert epsilon(Composition(), 1e-5) == 0.0
    assert epsilon(Composition.of(Unprotected()), 1e-5) == math.inf
    assert epsilon(Composition.of(S(0.1, 9.0, 1), Unprotected()), 1e-5) == math.inf


@dataclass(frozen=True, order=True)
class Shuffled:
    """An event that is not ours."""

    count: int = 1

    def times(self, count: int) -> "Shuffled":
        return replace(self, count=count)

    def to_dict(self) -> dict[str, object]:
        return {"mechanism": "shuffled"}


@pytest.mark.parametrize("beside", [(), (S(0.1, 3.0, 9),), (S(1.0, 3.0, 9),), (Unprotected(),)])
def test_an_event_that_no_accountant_knows_is_an_error(beside: tuple[Event, ...]) -> None:
    run = Composition.of(Shuffled(), *beside)
    for function in (epsilon, crosscheck):
        with pytest.raises(ConfigurationError, match=r"no accountant knows the event Shuffled"):
            function(run, 1e-5)
    with pytest.raises(ConfigurationError, match="no accountant knows"):
        affordable(run, math.inf, 1e-5)
    with pytest.raises(ConfigurationError, match="no accountant knows"):
        epsilon(Composition.of(Selection((run,), 5.0)) if not run.unprotected else run, 1e-5)


def test_kinds_mix_and_each_costs_something() -> None:
    train, score, stats = S(0.1, 5.0, 300), D(20.0, 3), gaussian(15.0, 1)
    tune = Selection((Composition.of(S(0.1, 20.0, 50)),), 10.0)
    whole = (train, score, stats, tune)
    total = epsilon(Composition(whole), 1e-5)
    assert math.isfinite(total)
    for index in range(4):
        part = Composition(whole[:index] + whole[index + 1 :])
        assert epsilon(part, 1e-5) < total
    assert epsilon(Composition((*whole, Unprotected())), 1e-5) == math.inf


rates = st.one_of(st.just(1.0), st.floats(1e-6, 1.0, exclude_max=True))


@settings(max_examples=20, deadline=None)
@given(rates, st.floats(0.02, 1e6), st.integers(1, 10**6), st.sampled_from([1e-12, 1e-7, 1e-4]))
@example(0.5, 1e-3, 10**6, 1e-5)
@example(1e-6, 1e6, 10**6, 1e-5)
@example(1.0 - 1e-16, 1.0, 10, 1e-5)
@example(0.5, 1e-200, 1, 1e-5)
@example(1e-300, 1e300, 1, 1e-5)
@example(1.0, 1e300, 1, 1e-5)
@example(1e-6, 1.0, 10**9, 1e-12)
@example(0.01, 1.0, 10**9, 1e-5)
@example(0.5, 1e6, 10**9, 1e-6)
@example(1e-6, 1e-3, 10, 1e-3)
def test_edges_give_a_bound_and_never_a_warning(
    rate: float, sigma: float, steps: int, delta: float
) -> None:
    """Warnings are errors in this suite. The bounds are compared with a cruder, certain one."""
    cost = epsilon(Composition.of(S(rate, sigma, steps)), delta)
    mu = math.sqrt(steps) / sigma
    assert 0.0 <= cost <= mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta)) * (1 + 1e-6)
    assert not math.isnan(cost)


@settings(max_examples=8, deadline=None)
@given(
    st.floats(0.02, 1e6),
    st.integers(1, 10**6),
    st.floats(0.02, 1e6),
    st.sampled_from([1e-12, 1e-7, 1e-4]),
)
@example(1e-3, 1, 1e-300, 1e-5)
@example(1e300, 10**9, 1e300, 1e-12)
@example(3276.0, 1, 3278.0, 1e-5)  # the largest table, and one too large
def test_edges_of_mixtures_give_a_bound_and_never_a_warning(
    sigma: float, count: int, other: float, delta: float
) -> None:
    parts = Composition.of(D(sigma, count)), Composition.of(S(0.1, other, count))
    costs = [epsilon(part, delta) for part in parts]
    together = epsilon(Composition.sum(parts), delta)
    assert not math.isnan(together)
    assert together >= max(costs) * 0.99  # two upper bounds with an error of 0.2 % each
    # Both are concentrated, if the sampling is ignored; to ε by Mironov 2017, proposition 3.
    rho = count / 2 / sigma / sigma + count / 2 / other / other
    crude = min(order * rho + math.log(1 / delta) / (order - 1) for order in range(2, 65))
    assert together <= crude * (1 + 1e-6)


def test_a_count_past_all_reason_has_no_bound() -> None:
    for event in (S(0.1, 1e300, 10**400), S(1.0, 1e300, 10**400), D(1e300, 10**400)):
        assert epsilon(Composition.of(event), 1e-5) == math.inf


@pytest.mark.parametrize(
    ("step", "delta"),
    [
        (S(0.5, 3000.0, 10), 1e-5),
        (S(0.001, 1.0, 1), 1e-6),
        (S(0.001, 20.0, 1000), 1e-5),
    ],
    ids=str,
)
def test_tiny_costs_are_tight(step: SubsampledGaussian, delta: float) -> None:
    run = Composition.of(step)
    cost = epsilon(run, delta)
    assert cost < 0.04
    assert cost == pytest.approx(pld_epsilon(run, delta, cost / 1000), rel=0.02)


@settings(max_examples=12, deadline=None)
@given(st.floats(1e-3, 0.9), st.floats(0.5, 30.0), st.integers(1, 2000), st.integers(1, 2000))
def test_more_steps_or_less_noise_never_cost_less(
    rate: float, sigma: float, steps: int, more: int
) -> None:
    def cost(sigma: float, steps: int) -> float:
        return epsilon(Composition.of(S(rate, sigma, steps)), 1e-5)

    # Two upper bounds with an error of 0.2 % each.
    assert cost(sigma, steps) <= cost(sigma, steps + more) * 1.01
    assert cost(sigma * 1.1, steps) <= cost(sigma, steps) * 1.01


def test_small_costs_are_not_drowned_by_the_accountants_error() -> None:
    run = Composition.of(S(0.5, 123.0, 100))
    assert 0.09 < pld_epsilon(run, 1e-4) <= epsilon(run, 1e-4) < 1.01 * pld_epsilon(run, 1e-4)


@pytest.mark.parametrize("limit", [0.5, 1.0, 1.6, 5.0])
def test_affordable_is_epsilon_at_most_the_limit(limit: float) -> None:
    run = Composition.of(S(0.01, 1.1, 1000))  # 1.52 tightly, 1.73 roughly
    assert affordable(run, limit, 1e-5) == (epsilon(run, 1e-5) <= limit)


def test_threads_get_the_same_figure() -> None:
    runs = [Composition.of(S(0.05, 1.0 + i / 7, 60)) for i in range(4)]
    found: dict[int, float] = {}

    def work(number: int) -> None:
        found[number] = prv_bound.__wrapped__(runs[number % 4], 1e-5)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: prv_bound(runs[number % 4], 1e-5) for number in range(8)}


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_out_of_range_is_refused(delta: float) -> None:
    with pytest.raises(ConfigurationError, match="delta must be above 0 and below 1, got"):
        epsilon(Composition(), delta)


# -- long histories --------------------------------------------------------------------------

several = st.lists(
    st.builds(S, st.floats(0.01, 0.5), st.floats(0.6, 20.0), st.integers(1, 200)),
    min_size=2,
    max_size=12,
    unique_by=lambda step: (step.sampling_rate, step.noise_multiplier),
)


@settings(deadline=None)
@given(several, st.integers(1, 6))
def test_coarse_steps_dominate_those_they_stand_for(
    steps: list[SubsampledGaussian], most: int
) -> None:
    coarse = coarsen(steps, most)
    assert len(coarse) <= most
    assert sum(step.steps for step in coarse) == sum(step.steps for step in steps)

    def at_least_as_costly(among: list[SubsampledGaussian], one: SubsampledGaussian) -> int:
        return sum(
            step.steps
            for step in among
            if step.sampling_rate >= one.sampling_rate
            and step.noise_multiplier <= one.noise_multiplier
        )

    for step in steps:
        assert at_least_as_costly(coarse, step) >= at_least_as_costly(steps, step)


@settings(max_examples=40, deadline=None)
@given(several, st.integers(1, 6), st.sampled_from([1e-7, 1e-5, 1e-3]))
def test_a_coarse_quick_bound_is_never_below_the_exact_one(
    steps: list[SubsampledGaussian], most: int, delta: float
) -> None:
    coarse = quick_bound(Composition(tuple(coarsen(steps, most))), delta)
    assert coarse >= quick_bound(Composition(tuple(steps)), delta) * (1 - 1e-9)


@settings(max_examples=10, deadline=None)
@given(several.filter(lambda steps: 2 < len(steps) <= 6), st.integers(1, 2))
def test_a_coarse_prv_bound_is_never_below_the_exact_one(
    steps: list[SubsampledGaussian], most: int
) -> None:
    exact = prv_bound(Composition(tuple(steps)), 1e-5)
    coarse = prv_bound(Composition(tuple(coarsen(steps, most))), 1e-5)
    assert exact == math.inf or coarse >= exact * 0.995  # an error of 0.2 % is added to each


def test_a_coarse_bound_holds_by_another_accountant_and_is_close() -> None:
    run = Composition(tuple(S(0.05, 2.0 + 0.05 * i, 20) for i in range(20)))
    truth = pld_epsilon(run, 1e-5)
    assert truth <= epsilon(run, 1e-5) < truth * 1.03 < quick_bound(run, 1e-5)


def test_coarsening_cuts_where_it_costs_least_and_leaves_few_alone() -> None:
    near, far = [S(0.1, 5.0, 10), S(0.1, 5.1, 10)], [S(0.1, 1.0, 3), S(0.001, 5.0, 7)]
    assert coarsen(near + far, 4) == near + far
    assert coarsen(near + far, 3) == [far[1], S(0.1, 1.0, 3), S(0.1, 5.0, 20)]
    assert coarsen(near + far, 1) == [S(0.1, 1.0, 30)]


@pytest.mark.parametrize("sigma", [1e-200, 1e-3, 1e299])
def test_coarsening_survives_any_number(sigma: float) -> None:
    steps = [S(1e-300 * 10 ** (25 * i), sigma * (1 + i / 9), 10**400) for i in range(9)]
    assert sum(step.steps for step in coarsen(steps, 3)) == 9 * 10**400


def test_memory_does_not_grow_with_a_history() -> None:
    """Each σ of its own took 25 MB: a coordinator could choose as many as it liked."""
    run = Composition(tuple(S(0.05, 30 + 0.01 * i, 1) for i in range(40)))
    epsilon(Composition.of(S(0.05, 30.0, 1)), 1e-5)  # imports
    tracemalloc.start()
    try:
        assert epsilon(run, 1e-5) < quick_bound(run, 1e-5)
        assert tracemalloc.get_traced_memory()[1] < 600e6
    finally:
        tracemalloc.stop()


def test_a_long_run_leaves_nothing_behind_but_its_last_prices() -> None:
    """A holder asks after every round. 4,096 prices of a kilobyte each used to be kept."""
    total = Composition()
    for _ in range(300):  # fills what is kept on purpose
        total += Composition.of(S(1.0, 20.0, 1))
        epsilon(total, 1e-5)
    tracemalloc.start()
    try:
        for _ in range(1000):
            total += Composition.of(S(1.0, 20.0, 1))
            epsilon(total, 1e-5)
        # Of the thousand, 256 compositions and their bounds; the prices alone would be 0.9 MB.
        assert tracemalloc.get_traced_memory()[0] < 500e3
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("most", [1, 8, 256])
def test_the_work_does_not_grow_with_a_history(most: int) -> None:
    """Each σ of its own took the accountant half a second; now only so many are looked at."""
    steps = [S(0.05, 60 + 0.01 * i, 1) for i in range(1500)]
    coarse = coarsen(steps, most)
    assert len(coarse) <= most
    assert sum(step.steps for step in coarse) == 1500


def test_asking_again_is_answered_from_memory() -> None:
    run = Composition(tuple(S(0.05, 3 + 0.1 * i, 1) for i in range(20)))
    first, before = epsilon(run, 1e-5), prv_bound.cache_info()
    assert epsilon(Composition(run.events), 1e-5) == first
    after = prv_bound.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


# -- calibration -----------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(
    rates.filter(lambda rate: rate > 1e-3),
    st.integers(1, 3000),
    st.floats(0.1, 20.0),
    st.sampled_from([1e-6, 1e-5, 1e-4]),
)
@example(1.0, 30, 1.0, 1e-4)
@example(0.5, 100, 0.1, 1e-4)
@example(0.00441641276484059, 100, 20.0, 1e-4)  # Rényi says 250 where PRV says 20
def test_calibration_meets_the_target_and_wastes_nothing(
    rate: float, steps: int, target: float, delta: float
) -> None:
    sigma = noise_multiplier(rate, steps, target, delta)
    cost = epsilon(Composition.of(S(rate, sigma, steps)), delta)
    assert 0.999 * target <= cost <= target


@pytest.mark.parametrize(
    ("releases", "target", "delta"),
    [(1, 0.5, 1e-5), (10, 0.5, 1e-5), (1, 5.0, 1e-6), (300, 0.05, 1e-5), (1, 20.0, 1e-3)],
)
def test_release_noise_meets_the_target_and_wastes_nothing(
    releases: int, target: float, delta: float
) -> None:
    sigma = release_noise(releases, target, delta)
    assert 0.998 * target <= epsilon(Composition.of(D(sigma, releases)), delta) <= target
    assert epsilon(Composition.of(D(sigma * 0.99, releases)), delta) > target
    if sigma > 1:
        assert sigma == pytest.approx(noise_multiplier(1.0, releases, target, delta), rel=0.01)


def test_release_noise_is_found_past_the_largest_table() -> None:
    sigma = release_noise(1, 1e-4, 1e-5)
    assert sigma > 3300
    assert epsilon(Composition.of(D(sigma, 1)), 1e-5) <= 1e-4


@pytest.mark.parametrize(
    ("releases", "target", "delta"),
    [(1, 0.5, 1e-5), (30, 1.0, 1e-4), (100, 0.05, 1e-5), (1, 20.0, 1e-3), (10_000, 1e-3, 1e-9)],
)
def test_distributed_noise_meets_the_target_and_wastes_nothing(
    releases: int, target: float, delta: float
) -> None:
    sigma = distributed_noise(releases, target, delta)
    assert 0.998 * target <= epsilon(Composition.of(DG(sigma, releases)), delta) <= target
    assert epsilon(Composition.of(DG(sigma * 0.99, releases)), delta) > target
    # Never less than central DP-SGD's on pooled data, and three thousandths more at most.
    central = noise_multiplier(1.0, releases, target, delta)
    assert central * 1.001 <= sigma <= central * 1.003


def test_distributed_noise_refuses_what_cannot_be() -> None:
    with pytest.raises(ConfigurationError, match="releases must be"):
        distributed_noise(0, 1.0, 1e-5)
    with pytest.raises(ConfigurationError, match="raise epsilon or delta, or take fewer"):
        distributed_noise(10**9, 1e-9, 1e-12)


def test_release_noise_refuses_what_cannot_be() -> None:
    with pytest.raises(ConfigurationError, match="releases must be"):
        release_noise(0, 1.0, 1e-5)
    with pytest.raises(ConfigurationError, match="raise epsilon or delta, or take fewer"):
        release_noise(10**9, 1e-9, 1e-12)


def test_a_calibrated_run_fits_its_own_budget_exactly() -> None:
    """The ledger composes rounds: the sum must be the very composition that was calibrated."""
    sigma = noise_multiplier(0.1, 15 * 20, 2.0, 1e-5)
    round_ = Composition.of(S(0.1, sigma, 20))
    assert affordable(round_ * 15, 2.0, 1e-5)
    assert not affordable(round_ * 16, 2.0, 1e-5)


@pytest.mark.parametrize(
    ("rate", "steps", "target", "delta", "message"),
    [
        (0.1, 10, 0.0, 1e-5, "epsilon must be positive and finite, got 0.0"),
        (0.1, 10, math.inf, 1e-5, "epsilon must be positive and finite, got inf"),
        (0.1, 10, 1.0, 1.0, "delta must be above 0"),
        (1.1, 10, 1.0, 1e-5, "sampling_rate must be"),
        (0.1, 0, 1.0, 1e-5, "steps must be"),
        (1.0, 10**9, 1e-7, 1e-12, "raise epsilon or delta, or take fewer steps"),
    ],
)
def test_unreachable_targets_are_refused(
    rate: float, steps: int, target: float, delta: float, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        noise_multiplier(rate, steps, target, delta)
