"""What the coordinator gets to see of a round: three levels of trust, each a part of the plan.

============  ==============================  =====================  ===========================
level         a holder sends                  the coordinator sees   ε holds against
============  ==============================  =====================  ===========================
plain         its update, with full noise     every update           the coordinator
secure        the same, masked                their weighted sum     the coordinator
secure-sum    a clipped gradient sum with a   the sum, with full     the coordinator, if no more
              share of the noise, masked      noise                  than ``coalition`` holders
                                                                     help it
============  ==============================  =====================  ===========================

Masked vectors are integers (:mod:`common.secagg.ring`). How finely they count, and in how wide a
ring, is calibrated with the noise and written into the plan, which checks that no sum can overflow.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field

from common.errors import ConfigurationError
from common.frozen import Frozen
from common.guarantees import DistributedPrivacy, Privacy
from common.secagg.graph import graph_for
from common.secagg.ring import Encoding
from common.secagg.session import Session

if TYPE_CHECKING:
    from common.plan import TrainingPlan

__all__ = ["Masked", "Plain", "Ring", "Secure", "SecureSum", "fewest_survivors", "masking"]

MOST_COMPLETE = 128
"""Up to so many holders everybody shares masks with everybody; more have neighbours."""

FINE = 64
"""A step is at most the deviation of one holder's noise over this, so that rounding adds less than
a ten-thousandth to its variance."""

FINE_WITHOUT_NOISE = 2.0**-20
"""A step where there is no noise to compare with."""


class Ring(Frozen):
    """How a masked vector counts.

    Args:
        width: bits of one number.
        step: what 1 stands for; a power of two.
        largest: the most steps that one holder may send, above or below 0.
    """

    width: Literal[32, 64]
    step: float = Field(gt=0)
    largest: int = Field(ge=1)

    @classmethod
    def fine(cls, step: float, bound: float, holders: int) -> Self:
        """The narrowest ring that counts numbers up to ``bound`` in steps no longer than asked.

        Args:
            step: the longest step that will do.
            bound: no holder's number is beyond it.
            holders: the most that are summed.

        Raises:
            ConfigurationError: no ring is wide enough.
        """
        step = math.ldexp(1.0, math.frexp(step)[1] - 1)  # a power of two, at or below
        largest = math.ceil(bound / step) + 1
        for width in (32, 64):
            if holders * largest <= Encoding.most(width):
                return cls(width=width, step=step, largest=largest)
        raise ConfigurationError(
            f"a sum of {holders} holders' numbers up to {bound:.3g} in steps of {step:.3g} does "
            "not fit 64 bits; lower max_update_norm, holder_size or clip_norm"
        )


class Plain(Frozen):
    """Every update reaches the coordinator."""

    kind: Literal["plain"] = "plain"

    def calibrated(self, plan: TrainingPlan) -> Plain:
        """Itself: there is nothing to calibrate."""
        del plan
        return self

    def check(self, plan: TrainingPlan) -> None:
        """Any plan will do, unless its noise is a share of a sum's."""
        if plan.privacy.kind == "distributed":
            raise ValueError("aggregation must be 'secure-sum' where the noise is in the sum only")


class Masked(Frozen):
    """The coordinator learns a sum (:mod:`common.secagg`): what both levels have in common.

    The most holders of a round are the plan's ``cohort``; the fewest that a sum is of, the
    threshold, are its ``min_holders``. A round in which fewer remain gives nothing, and the run
    goes on.

    Args:
        dimension: D, of the shared parameters.
        neighbours: how many others each holder shares masks with; None for all of them.
        share_threshold: how many of these it takes to undo a mask; None for ``min_holders``.
        ring: how vectors count; None until calibrated.
    """

    dimension: int = Field(ge=1)
    neighbours: int | None = Field(default=None, ge=2)
    share_threshold: int | None = Field(default=None, ge=2)
    ring: Ring | None = None

    def calibrated(self, plan: TrainingPlan) -> Self:
        """The same with the ring that the plan's bounds and noise ask for."""
        ring = Ring.fine(self._step(plan), self._bound(plan), holders_of(plan))
        return self.model_copy(update={"ring": ring})

    def check(self, plan: TrainingPlan) -> None:
        """Refuse a plan that this cannot protect.

        Raises:
            ValueError: says what it should be.
        """
        self._check_privacy(plan)
        if plan.cohort is None:
            raise ValueError("cohort must be set where updates are masked: a round's most holders")
        if self.neighbours is None:
            fewest = fewest_survivors(plan.cohort)
            if plan.min_holders < fewest:
                raise ValueError(
                    f"min_holders must be at least {fewest}, more than two thirds of "
                    f"cohort={plan.cohort}, where updates are masked, got {plan.min_holders}: with "
                    "fewer, a coordinator could undo the masks of one holder"
                )
        self.session(plan, "run", 1)
        if self.ring is not None:
            self._check_ring(plan, self.ring)

    def session(self, plan: TrainingPlan, run_id: str, number: int) -> Session:
        """What everything that is said in a round of a run is bound to."""
        return Session(
            run_id=run_id,
            plan_digest=plan.digest,
            round=number,
            threshold=plan.min_holders,
            cohort=holders_of(plan),
            neighbours=self.neighbours,
            share_threshold=self.share_threshold,
        )

    def tolerated_helpers(self, plan: TrainingPlan) -> int:
        """The most holders that may help a coordinator that lies, and it still sees sums only.

        Where all share with all, c < 2t − n of them (Bonawitz et al. 2017, theorem 6.5); in a
        graph, the tenth of the cohort that :func:`~common.secagg.graph.graph_for` allows for.
        """
        if self.neighbours is None:
            return 2 * plan.min_holders - holders_of(plan) - 1
        return math.ceil(0.1 * holders_of(plan))

    def encoding(self, plan: TrainingPlan) -> Encoding:
        """How a holder's vector is encoded.

        Raises:
            ConfigurationError: the plan is not calibrated.
        """
        ring = self.ring
        if ring is None:
            raise ConfigurationError("this plan is not calibrated: build it with plan_for")
        return Encoding(ring.width, ring.step, ring.largest, holders_of(plan))

    # -- inside ------------------------------------------------------------------------------

    @abstractmethod
    def _check_privacy(self, plan: TrainingPlan) -> None:
        """Refuse a kind of privacy that this level does not go with."""

    @abstractmethod
    def _bound(self, plan: TrainingPlan) -> float:
        """What no number of a holder exceeds."""

    @abstractmethod
    def _step(self, plan: TrainingPlan) -> float:
        """The longest step of the ring that loses nothing."""

    def _check_ring(self, plan: TrainingPlan, ring: Ring) -> None:
        """Overflow is impossible: n·L fits, and no honest number is beyond L."""
        encoding = self.encoding(plan)
        if ring.largest * encoding.step < self._bound(plan):
            raise ValueError(
                f"ring.largest must be at least {self._bound(plan) / ring.step:.0f}, the plan's "
                f"bound in steps, got {ring.largest}"
            )


class Secure(Masked):
    """Updates are masked; each holder's own noise is in its update."""

    kind: Literal["secure"] = "secure"

    def _check_privacy(self, plan: TrainingPlan) -> None:
        if plan.privacy.kind in ("central", "distributed"):
            wanted = "plain" if plan.privacy.kind == "central" else "secure-sum"
            raise ValueError(
                f"aggregation must be {wanted!r} with privacy {plan.privacy.kind!r}, got 'secure'"
            )

    def _bound(self, plan: TrainingPlan) -> float:
        """What no coordinate of a holder's weighted update exceeds."""
        return plan.largest_weight * plan.largest_update_norm(self.dimension)

    def _step(self, plan: TrainingPlan) -> float:
        """The longest step that loses nothing next to the noise."""
        if not isinstance(plan.privacy, Privacy) or plan.optimizer == "adam":
            return FINE_WITHOUT_NOISE
        sigma = plan.privacy.noise_multiplier or math.inf
        noise = sigma * plan.privacy.clip_norm * plan.learning_rate / plan.expected_batch_size
        return min(FINE_WITHOUT_NOISE * 2**10, noise / FINE)


class SecureSum(Masked):
    """Each round is one step of DP-SGD on everybody's data; only the sum carries the full noise.

    Args:
        coalition: c, how many holders may help the coordinator and the guarantee still holds: the
            shares of noise of any ``min_holders`` − c holders make the full noise.
    """

    kind: Literal["secure-sum"] = "secure-sum"
    coalition: int = Field(default=0, ge=0)

    def _check_privacy(self, plan: TrainingPlan) -> None:
        if not isinstance(plan.privacy, DistributedPrivacy):
            raise ValueError(
                "aggregation 'secure-sum' puts noise into the sum: it needs an epsilon, and the "
                "task's own unit"
            )
        wanted = {
            "local_steps": (plan.local_steps, 1),
            "optimizer": (plan.optimizer, "sgd"),
            "momentum": (plan.momentum, 0.0),
            "sampling_rate": (plan.sampling_rate, 1.0),
            "weighting": (plan.weighting, "equal"),
        }
        for name, (found, only) in wanted.items():
            if found != only:
                raise ValueError(
                    f"{name} must be {only!r} with aggregation 'secure-sum', where a round is one "
                    f"step over all units, got {found!r}; momentum and adaptive steps are the "
                    "strategy's (fedavgm, fedadam)"
                )
        # With t − 1 the noise of each holder is full, and masks need not hide it.
        bearable = self.tolerated_helpers(plan) if plan.cohort is not None else 0
        if not (self.coalition <= bearable or self.coalition == plan.min_holders - 1):
            raise ValueError(
                f"coalition must be at most {bearable}, beyond which masks do not hide a holder's "
                f"part, or {plan.min_holders - 1}, where each adds the full noise, got "
                f"{self.coalition}"
            )

    def _bound(self, plan: TrainingPlan) -> float:
        return self._privacy(plan).largest_number(plan)

    def _step(self, plan: TrainingPlan) -> float:
        return self._privacy(plan).longest_step(plan)

    def _check_ring(self, plan: TrainingPlan, ring: Ring) -> None:
        super()._check_ring(plan, ring)
        self._privacy(plan).check_step(ring.step, plan)

    @staticmethod
    def _privacy(plan: TrainingPlan) -> DistributedPrivacy:
        assert isinstance(plan.privacy, DistributedPrivacy)  # _check_privacy
        return plan.privacy


def masking(cohort: int, dropouts: float | None) -> dict[str, int]:
    """Threshold and graph of a cohort, as fields of a plan.

    Args:
        cohort: n, the most holders of a round.
        dropouts: share of them that a round may lose; if left out, just less than a third, or a
            tenth in cohorts of more than :data:`MOST_COMPLETE`, whose holders share masks with as
            few neighbours as it takes (:func:`common.secagg.graph.graph_for`).

    Returns:
        ``min_holders``, and in a graph ``neighbours`` and ``share_threshold``.

    Raises:
        ConfigurationError: more dropouts than can be borne, or a cohort of one.
    """
    if dropouts is not None and not 0 <= dropouts < 1 / 3:
        raise ConfigurationError(
            "dropouts must be from 0 to below a third, so that a coordinator that lies learns no "
            f"single update, got {dropouts:g}"
        )
    if cohort < 2:
        raise ConfigurationError(f"a sum needs at least 2 holders, and the cohort is {cohort}")
    if cohort <= MOST_COMPLETE:
        most = cohort - fewest_survivors(cohort)
        lost = most if dropouts is None else math.floor(dropouts * cohort)
        return {"min_holders": cohort - min(lost, most)}
    share = 0.1 if dropouts is None else dropouts
    graph = graph_for(cohort, dropped=share)
    return {
        "min_holders": cohort - math.ceil(share * cohort),
        "neighbours": graph.neighbours,
        "share_threshold": graph.share_threshold,
    }


def fewest_survivors(holders: int) -> int:
    """The least threshold that withstands an active coordinator: more than two thirds.

    Bonawitz et al. 2017, section 6.2: with a coordinator that lies and fewer than a third of the
    holders in league with it, t ≥ ⌊2n/3⌋ + 1 keeps it from getting both kinds of share of anybody.
    """
    return 2 * holders // 3 + 1


def holders_of(plan: TrainingPlan) -> int:
    """The most holders that take part in a round."""
    assert plan.cohort is not None  # checked with the plan
    return plan.cohort
