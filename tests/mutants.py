"""Ways to get privacy wrong, each switched on by ``pytest --mutant NAME``, and who notices.

A mutant replaces a function of the real code by one that a hurried programmer might have written.
``tests/test_mutants.py`` runs the named tests under each of them, where every one must fail;
docs/privacy.md shows the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from client import holder, trainer
from client.holder import Holder
from client.state import Stored
from common import guarantees
from common.guarantees import DistributedPrivacy, Privacy
from common.privacy import distributed, step
from common.privacy.account import Account
from common.privacy.ledger import Ledger
from common.privacy.noise import Randomness, SeededRandomness
from common.privacy.releases import Release, Reservation
from server.journal import RoundJournal

__all__ = ["MUTANTS", "Mutant"]


@dataclass(frozen=True)
class Mutant:
    """A mistake.

    Args:
        what: is done wrong.
        apply: does it wrong from now on.
        caught_by: node ids of tests, each of which fails under it.
    """

    what: str
    apply: Callable[[pytest.MonkeyPatch], None]
    caught_by: Sequence[str]


def _everywhere(patch: pytest.MonkeyPatch, name: str, mutant: object) -> None:
    """Replace a function of the step where it is defined and where it is used."""
    for module in (step, trainer):
        if hasattr(module, name):
            patch.setattr(module, name, mutant)


def _noise_times(scale: float) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        real = step.noisy_mean

        def quieter(sums: Sequence[Tensor], *, noise_multiplier: float, **rest: Any) -> object:
            return real(sums, noise_multiplier=scale * noise_multiplier, **rest)

        _everywhere(patch, "noisy_mean", quieter)

    return apply


def _no_clipping(patch: pytest.MonkeyPatch) -> None:
    _everywhere(patch, "clip_factors", lambda norms, clip_norm: torch.ones_like(norms))


def _nan_passes(patch: pytest.MonkeyPatch) -> None:
    _everywhere(patch, "clip_factors", lambda norms, clip_norm: (clip_norm / norms).clamp(max=1.0))


def _clip_after_the_mean(patch: pytest.MonkeyPatch) -> None:
    def clipped(grads: Sequence[Tensor], clip_norm: float) -> list[Tensor]:
        units = max(1, len(grads[0]))
        means = [grad.sum(0) / units for grad in grads]
        norm = torch.linalg.vector_norm(torch.cat([mean.flatten() for mean in means]))
        return [units * mean * min(1.0, clip_norm / max(float(norm), 1e-12)) for mean in means]

    _everywhere(patch, "clipped_sum", clipped)


def _mean_over_the_actual_batch(patch: pytest.MonkeyPatch) -> None:
    real_sum, real_mean = step.clipped_sum, step.noisy_mean
    last: list[int] = []

    def clipped(grads: Sequence[Tensor], clip_norm: float) -> list[Tensor]:
        last.append(max(1, len(grads[0])))
        return real_sum(grads, clip_norm)

    def mean(sums: Sequence[Tensor], *, expected_batch_size: float, **rest: Any) -> object:
        return real_mean(sums, expected_batch_size=last[-1], **rest)

    _everywhere(patch, "clipped_sum", clipped)
    _everywhere(patch, "noisy_mean", mean)


def _a_round_is_a_run(patch: pytest.MonkeyPatch) -> None:
    real = Privacy.calibrated
    patch.setattr(
        Privacy,
        "calibrated",
        lambda self, plan: real(self, plan.model_copy(update={"rounds": 1})),
    )


def _each_run_anew(patch: pytest.MonkeyPatch) -> None:
    real = Account.check
    patch.setattr(Account, "check", lambda self, *args, **rest: real(Account(), *args, **rest))


def _a_share_of_everybody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(guarantees, "_honest", lambda plan: plan.cohort)


def _a_share_for_the_coalition(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(guarantees, "_honest", lambda plan: plan.min_holders)


def _rounding_for_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DistributedPrivacy, "longest_step", lambda self, plan: self.share(plan) / 64)


def _noise_without_its_steps(patch: pytest.MonkeyPatch) -> None:
    """A share's deviation in the units of a gradient, where it should be in steps."""
    real = distributed.discrete_gaussian
    patch.setattr(
        distributed,
        "discrete_gaussian",
        lambda n, sigma, randomness: real(n, min(sigma, 1.0), randomness),
    )


def _one_seed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(holder, "OsRandomness", lambda: SeededRandomness(0))


def _shuffled_batches(patch: pytest.MonkeyPatch) -> None:
    def batch(n: int, sampling_rate: float, randomness: Randomness) -> Tensor:
        order = torch.argsort(randomness.uniform(n))
        return order[: round(sampling_rate * n)].sort().values

    patch.setattr(trainer, "poisson_sample", batch)


def _sent_before_it_is_charged(patch: pytest.MonkeyPatch) -> None:
    def answered(self: Holder, *_: object, **arguments: Any) -> Stored:
        compute = next(
            value for value in (*_, *arguments.values()) if callable(value)
        )  # the ledger is written some time later: for these tests, never
        answer: Stored = compute()
        return answer

    patch.setattr(Holder, "_answered_once", answered)


def _without_a_journal(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RoundJournal, "_read", lambda self: 0)  # as if there had been nothing in it


def _charged_again(patch: pytest.MonkeyPatch) -> None:
    real = Ledger.reserve

    def reserve(self: Ledger, release: Release, *terms: Any) -> Reservation:
        if self.find(release.request_id) is not None:
            release = replace(release, request_id=f"{release.request_id}-again")
        return real(self, release, *terms)

    patch.setattr(Ledger, "reserve", reserve)


_TRAINER, _STEP = "tests/client/test_trainer.py::", "tests/common/privacy/test_step.py::"
_SUM = "tests/common/privacy/test_distributed.py::"
_RECOVERY = "tests/faults/test_recovery.py::"
_APP, _PLAN = "tests/client/test_holder.py::", "tests/common/test_plan.py::"
_NOISE = _TRAINER + (
    "test_the_noise_is_gaussian_with_the_plans_deviation_and_empty_batches_get_it_too"
)

MUTANTS: Mapping[str, Mutant] = MappingProxyType(
    {
        "no-noise": Mutant("no noise is added", _noise_times(0.0), [_NOISE]),
        "half-the-noise": Mutant("σ is half of what the plan says", _noise_times(0.5), [_NOISE]),
        "no-clipping": Mutant(
            "gradients are summed as they are",
            _no_clipping,
            [_TRAINER + "test_one_record_moves_the_sum_by_at_most_the_clip_norm"],
        ),
        "clip-after-the-mean": Mutant(
            "the batch's mean gradient is clipped, not each unit's",
            _clip_after_the_mean,
            [_TRAINER + "test_one_step_is_the_clipped_sum_over_the_public_batch_size"],
        ),
        "per-round-accounting": Mutant(
            "noise is calibrated for one round of the run",
            _a_round_is_a_run,
            [_PLAN + "test_a_plan_costs_what_it_promises"],
        ),
        "per-run-accounting": Mutant(
            "the budget is checked against this release alone",
            _each_run_anew,
            [_APP + "test_three_runs_with_a_restart_add_up_and_the_next_is_refused_untrained"],
        ),
        "one-seed": Mutant(
            "every holder draws the same noise",
            _one_seed,
            [_APP + "test_noise_is_fresh_for_every_round_and_holder"],
        ),
        "shuffled-batches": Mutant(
            "batches of a fixed size are accounted as Poisson samples",
            _shuffled_batches,
            [_TRAINER + "test_sampling_is_poisson"],
        ),
        "mean-over-the-actual-batch": Mutant(
            "the sum is divided by the number of units that were sampled",
            _mean_over_the_actual_batch,
            [_TRAINER + "test_the_divisor_does_not_follow_the_data"],
        ),
        "nan-gradient": Mutant(
            "a NaN norm passes the clip",
            _nan_passes,
            [
                _TRAINER + "test_a_record_without_a_finite_gradient_counts_zero",
                _STEP + "test_a_unit_with_a_broken_gradient_adds_exactly_zero",
            ],
        ),
        "share-of-everybody": Mutant(
            "each holder's share of the noise is sized for all holders, not for the fewest",
            _a_share_of_everybody,
            [_SUM + "test_the_noise_of_the_fewest_honest_survivors_is_the_full_noise"],
        ),
        "share-of-the-coalition": Mutant(
            "noise that a coalition knows counts as noise",
            _a_share_for_the_coalition,
            [_SUM + "test_the_noise_of_the_fewest_honest_survivors_is_the_full_noise"],
        ),
        "rounding-for-nothing": Mutant(
            "steps of the ring are so long that rounding moves a sum by more than the margin",
            _rounding_for_nothing,
            [_SUM + "test_one_unit_moves_the_rounded_sum_by_no_more_than_the_noise_is_sized_for"],
        ),
        "share-in-the-wrong-unit": Mutant(
            "a share of the noise counts steps of the ring as if they were gradients",
            _noise_without_its_steps,
            [
                _SUM + "test_the_noise_of_the_fewest_honest_survivors_is_the_full_noise",
                _SUM + "test_parts_are_gaussian_about_the_sum_and_independent",
            ],
        ),
        "no-journal": Mutant(
            "a coordinator that comes back knows nothing of the round that it was in",
            _without_a_journal,
            [
                _RECOVERY + "test_a_coordinator_that_comes_back_asks_only_for_what_is_missing",
                _RECOVERY + "test_a_model_that_has_left_is_made_again_to_the_last_bit",
            ],
        ),
        "charged-again": Mutant(
            "a request that is made again is charged again",
            _charged_again,
            [_RECOVERY + "test_a_holder_killed_after_reserving_pays_once"],
        ),
        "ledger-after-sending": Mutant(
            "the reply leaves before the ledger knows of it",
            _sent_before_it_is_charged,
            [_APP + "test_an_answer_is_charged_and_committed_before_it_is_given"],
        ),
    }
)
