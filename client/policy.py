"""What a holder allows. Enforced by the holder, before any work, whatever the coordinator asks.

Every rule is a function from a request's terms to a :class:`Finding`; :data:`RULES` lists them in
the order in which they are asked. A rule looks at the policy and at what was asked and at nothing
else, so that a coordinator that varies its requests learns nothing about the data. Two rules need
the account of earlier releases, ε per run and rounds per day: the policy states them
(:meth:`Policy.limits`) and the ledger keeps them, in the transaction that reserves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from client.requests import Level, Terms
from common.errors import ConfigurationError, Refusal
from common.frozen import Frozen
from common.link.identity import bare_fingerprint, same_fingerprint, short_fingerprint
from common.plan import LARGEST_SIZE_CLASS, TrainingPlan, fits_size_class
from common.privacy.limits import Limits
from common.privacy.releases import Budget
from common.tasks.base import Task

__all__ = ["RULES", "Finding", "Policy", "same_fingerprint"]

_SHOWN_BY = {"coordinators": "sotto keys install", "holders": "sotto keys list"}
"""Key of fingerprints → the command that tells them."""


class Policy(Frozen):
    """A holder's rules for one data set. What is left out is not allowed.

    Args:
        data_set: the name that budgets attach to; it spans runs, tasks and restarts.
        budget: ε and δ of everything ever released about the data set. Without one nothing
            private is released; only ``unprotected`` data need none.
        epsilon_per_run: ε that one run may cost, at the budget's δ; None for the whole budget.
        min_noise_multiplier: the least σ of whatever noise a request names.
        max_clip_norm: the largest C of one unit's gradient; None for any.
        max_rounds_per_day: rounds of any run that are answered between two midnights UTC; None for
            any number.
        min_cohort: the fewest holders that must take part (``min_holders`` of a plan).
        size_class: how many training units the holder says it has, roughly: public, chosen by
            people. What depends on size is decided by this number, never by the count.
        evaluation: what of an evaluation leaves: nothing, a noised histogram at a price, or exact
            figures. Exact figures are outside every guarantee, and need ``unprotected``.
        statistics: whether noised figures of the data leave, at a price.
        unprotected: whether the data are public or synthetic, so that releases without a
            guarantee are allowed. A budget, where there is one, still holds for every request
            with privacy.
        aggregation: the levels that are allowed. ``secure-sum`` is never implied: its ε rests on
            the noise and the honesty of other holders.
        coalition: with ``secure-sum``, the fewest holders in league with the coordinator that a
            plan's ε must withstand.
        coordinators: fingerprints of the federations' authorities that may ask; empty for whoever
            the link has authenticated.
        holders: fingerprints of the signing keys of the other holders that may take part in a
            masked round with this one; empty for whomever the federation's authority has signed.
            The coordinator holds that authority's key, so a dishonest one can add holders of its
            own where nothing is pinned.
        tasks: that may be learned; None for the one that the holder joined with.
        dry_run: check and log, compute and send nothing.
    """

    model_config = ConfigDict(strict=True)

    data_set: str = Field(min_length=1)
    budget: Budget | None = None
    epsilon_per_run: float | None = Field(default=None, gt=0)
    min_noise_multiplier: float = Field(default=0.5, ge=0)
    max_clip_norm: float | None = Field(default=10.0, gt=0)
    max_rounds_per_day: int | None = Field(default=1000, ge=1)
    min_cohort: int = Field(default=2, ge=1)
    size_class: int = Field(default=1, ge=1)
    evaluation: Literal["never", "histogram", "exact"] = "never"
    statistics: bool = False
    unprotected: bool = False
    aggregation: tuple[Level, ...] = ("plain", "secure")
    coalition: int = Field(default=0, ge=0)
    coordinators: tuple[str, ...] = ()
    holders: tuple[str, ...] = ()
    tasks: tuple[str, ...] | None = None
    dry_run: bool = False

    @field_validator("budget", mode="before")
    @classmethod
    def _budget_of_table(cls, value: object) -> object:
        if value is None or isinstance(value, Budget):
            return value
        if not isinstance(value, dict):
            raise ValueError("a budget is { epsilon = EPS, delta = DELTA }")
        if set(value) != {"epsilon", "delta"}:
            raise ValueError("a budget is { epsilon = EPS, delta = DELTA }")
        for name, number in value.items():
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise ValueError(f"{name} must be a number")
        return Budget(float(value["epsilon"]), float(value["delta"]))

    @field_validator("coordinators", "holders", "tasks", "aggregation", mode="before")
    @classmethod
    def _is_list(cls, value: object) -> object:
        if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
            return tuple(value)
        if value is None:
            return value
        raise ValueError("input should be a list of strings")

    @field_validator("coordinators", "holders")
    @classmethod
    def _are_fingerprints(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        for entry in value:
            if not bare_fingerprint(entry):
                raise ValueError(
                    f"{entry!r} is no fingerprint; write 'sha256:' and 64 hexadecimal digits, as "
                    f"'{_SHOWN_BY[str(info.field_name)]}' shows it"
                )
        return value

    @field_validator("aggregation")
    @classmethod
    def _allows_a_level(cls, value: tuple[Level, ...]) -> tuple[Level, ...]:
        if not value:
            raise ValueError(
                "without a level no plan could be answered; name 'plain', 'secure' or "
                "'secure-sum', or leave the key out for 'plain' and 'secure'"
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.evaluation == "exact" and not self.unprotected:
            raise ValueError(
                "evaluation 'exact' sends figures that no budget covers, so it needs unprotected = "
                "true, which says that the data are public or synthetic; for other data use "
                "'histogram' or 'never'"
            )
        if self.epsilon_per_run is not None and self.budget is None:
            raise ValueError("epsilon_per_run needs a budget")
        return self

    @classmethod
    def of_experiment(cls, data_set: str, budget: Budget | None, size_class: int) -> Self:
        """Rules for data that the experimenter holds anyway: public, and figures are exact.

        A budget still holds for every plan with privacy.

        Args:
            data_set: its name.
            budget: of its releases; None for none.
            size_class: how many training units it has.
        """
        return cls(
            data_set=data_set,
            budget=budget,
            min_noise_multiplier=0.0,
            max_clip_norm=None,
            max_rounds_per_day=None,
            min_cohort=1,
            size_class=size_class,
            evaluation="exact",
            statistics=True,
            unprotected=True,
            aggregation=("plain", "secure", "secure-sum"),
        )

    # -- at home -----------------------------------------------------------------------------

    def check_data(self, units: int) -> None:
        """Refuse to serve data that the rules do not fit; said to the holder, not sent.

        Args:
            units: how many training units the holder has.

        Raises:
            ConfigurationError: the declared size is far too small, or δ is not below 1/n.
        """
        if not fits_size_class(units, self.size_class):
            raise ConfigurationError(
                f"data set {self.data_set!r} has {units} training units and the declared size is "
                f"{self.size_class}; declare a public number nearer to it with --size-class, or "
                "size_class in policy.toml"
            )
        if self.budget is not None and self.budget.delta * units >= 1:
            raise ConfigurationError(
                f"δ={self.budget.delta:g} must be below 1/n, and data set {self.data_set!r} has "
                f"{units} training units; set a smaller delta of the budget"
            )

    def allows_coordinator(self, coordinator: str) -> bool:
        """Whether whoever has this fingerprint may ask."""
        return not self.coordinators or any(
            same_fingerprint(coordinator, allowed) for allowed in self.coordinators
        )

    @property
    def limits(self) -> Limits:
        """What the ledger keeps besides the budget."""
        run = None
        if self.budget is not None and self.epsilon_per_run is not None:
            run = Budget(self.epsilon_per_run, self.budget.delta)
        return Limits(run, self.max_rounds_per_day)

    # -- what is asked -----------------------------------------------------------------------

    @property
    def share_metrics(self) -> bool:
        """Whether exact evaluation metrics leave the holder."""
        return self.evaluation == "exact"

    def check(self, plan: TrainingPlan, task: Task, coordinator: str = "") -> None:
        """Refuse a plan that the rules do not allow.

        Args:
            plan: as the coordinator sent it.
            task: what this holder has data for.
            coordinator: who asks: the fingerprint of the federation's authority.

        Raises:
            Refusal: with the name of the first rule that is broken.
        """
        self.check_terms(Terms.of_plan(plan), task, coordinator)

    def check_statistics(self, terms: Terms, task: Task, coordinator: str = "") -> None:
        """Refuse a request for statistics that the rules do not allow.

        Args:
            terms: of the request, with ``statistics=True``.
            task: what this holder has data for.
            coordinator: who asks.

        Raises:
            Refusal: with the name of the first rule that is broken.
        """
        if not terms.statistics:
            raise ConfigurationError("the terms of a request for statistics say statistics=True")
        self.check_terms(terms, task, coordinator)

    def check_terms(self, terms: Terms, task: Task, coordinator: str = "") -> None:
        """Refuse any kind of request that the rules do not allow."""
        for finding in self.findings(terms, task, coordinator):
            if finding.refusal:
                raise Refusal(finding.rule, finding.refusal)

    def findings(self, terms: Terms, task: Task, coordinator: str = "") -> Iterator[Finding]:
        """What every rule that has something to say about the request says."""
        asked = _Asked(self, terms, task, coordinator)
        for rule in RULES:
            if (finding := rule(asked)) is not None:
                yield finding


@dataclass(frozen=True)
class Finding:
    """What one rule says of a request.

    Args:
        rule: its name, the code of the refusal.
        asked: by the request, for a table.
        allowed: by the policy, for a table.
        refusal: the sentence of the refusal; empty where the rule allows it.
    """

    rule: str
    asked: str
    allowed: str
    refusal: str = ""


@dataclass(frozen=True)
class _Asked:
    """A request before a holder's rules."""

    policy: Policy
    terms: Terms
    task: Task
    coordinator: str


def _finding(rule: str, asked: object, allowed: object, ok: bool, refusal: str) -> Finding:
    return Finding(rule, _text(asked), _text(allowed), "" if ok else refusal)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


# -- the rules -----------------------------------------------------------------------------------


def _coordinator(asked: _Asked) -> Finding | None:
    if not asked.policy.coordinators:
        return None
    return _finding(
        "coordinator",
        short_fingerprint(asked.coordinator),
        ", ".join(map(short_fingerprint, asked.policy.coordinators)),
        asked.policy.allows_coordinator(asked.coordinator),
        "this coordinator's authority is not among those that the holder's policy allows "
        "(coordinators)",
    )


def _task(asked: _Asked) -> Finding:
    terms, task, allowed = asked.terms, asked.task, asked.policy.tasks
    wanted = (terms.task, terms.source, terms.preprocessing)
    have = (task.name, task.source.name, task.preprocessing)
    if wanted == have and allowed is not None and task.name not in allowed:
        refusal = f"the holder's policy allows the tasks {', '.join(allowed)}, not {task.name}"
    else:
        refusal = (
            f"the {terms.what} is for task {wanted[0]} on schema {wanted[1]} ({wanted[2]}), this "
            f"holder serves {have[0]} on {have[1]} ({have[2]}); join with --task, --source and "
            "--preprocessing to match"
        )
    ok = wanted == have and (allowed is None or task.name in allowed)
    return _finding("task", " / ".join(wanted), " / ".join(have), ok, refusal)


def _unprotected(asked: _Asked) -> Finding:
    return _finding(
        "unprotected",
        "private" if asked.terms.private else "exact updates",
        "anything" if asked.policy.unprotected else "private",
        asked.terms.private or asked.policy.unprotected,
        f"this {asked.terms.what} lets exact updates leave the holder, without differential "
        "privacy of their own, and the holder's policy asks for it; set an epsilon in the plan",
    )


def _no_budget(asked: _Asked) -> Finding | None:
    policy = asked.policy
    if policy.budget is not None or not asked.terms.private:
        return None
    return _finding(
        "budget",
        "a release",
        "no limit" if policy.unprotected else "no budget",
        policy.unprotected,
        f"the holder has set no budget for data set {policy.data_set!r}, so nothing about it may "
        "leave; the holder sets one with 'sotto policy init' or 'sotto ledger budget set'",
    )


def _unit(asked: _Asked) -> Finding | None:
    terms, task = asked.terms, asked.task
    if terms.unit is None:
        return None
    return _finding(
        "unit",
        terms.unit,
        task.unit,
        terms.unit == task.unit,
        f"the {terms.what} protects each {terms.unit}, task {task.name!r} is counted by "
        f"{task.unit}",
    )


def _delta(asked: _Asked) -> Finding | None:
    terms, budget = asked.terms, asked.policy.budget
    if terms.delta is None or budget is None:
        return None
    return _finding(
        "delta",
        terms.delta,
        f"at most {budget.delta:g}",
        terms.delta <= budget.delta,
        f"the {terms.what}'s δ={terms.delta:g} is above the holder's, {budget.delta:g}; lower "
        "delta in the plan",
    )


def _noise(asked: _Asked) -> Finding | None:
    terms, least = asked.terms, asked.policy.min_noise_multiplier
    sigma = terms.noise_multiplier
    if terms.delta is None:  # nothing in it is noised
        return None
    return _finding(
        "noise",
        "none" if sigma is None else sigma,
        f"at least {least:g}",
        sigma is not None and sigma >= least,
        f"the {terms.what}'s noise multiplier is "
        + ("missing" if sigma is None else f"{sigma:g}")
        + f", the holder asks for at least {least:g}; a lower epsilon in the plan raises it",
    )


def _clip_norm(asked: _Asked) -> Finding | None:
    clip, largest = asked.terms.clip_norm, asked.policy.max_clip_norm
    if clip is None or largest is None:
        return None
    return _finding(
        "clip_norm",
        clip,
        f"at most {largest:g}",
        clip <= largest,
        f"the plan's clip_norm={clip:g} is above the holder's largest, {largest:g}; lower it",
    )


def _cohort(asked: _Asked) -> Finding:
    terms, least = asked.terms, asked.policy.min_cohort
    masked = terms.aggregation in ("secure", "secure-sum")
    where = f"in sums of {least} or more" if masked else f"where {least} or more do"
    return _finding(
        "cohort",
        f"{terms.min_holders} or more",
        f"at least {least}",
        terms.min_holders >= least,
        f"the {terms.what} has min_holders={terms.min_holders}, this holder takes part {where}; "
        "raise it",
    )


_WHAT_IS_SEEN: Mapping[Level, str] = {
    "plain": "the coordinator sees this holder's own update",
    "secure": "the coordinator sees the sum of all holders' updates",
    "secure-sum": "only the sum carries the full noise",
}


def _aggregation(asked: _Asked) -> Finding | None:
    level, allowed = asked.terms.aggregation, asked.policy.aggregation
    if level is None:
        return None
    return _finding(
        "aggregation",
        level,
        ", ".join(allowed),
        level in allowed,
        f"under the plan's aggregation, {level!r}, {_WHAT_IS_SEEN[level]}, and "
        f"the holder's policy allows {' and '.join(map(repr, allowed))}; plan with one that is "
        "allowed, or have the holder add it to aggregation",
    )


def _holders(asked: _Asked) -> Finding | None:
    terms, pins = asked.terms, asked.policy.holders
    if terms.aggregation not in ("secure", "secure-sum"):
        return None
    others = terms.min_holders - 1
    return _finding(
        "holders",
        f"{others} others or more",
        f"{len(pins)} pinned" if pins else "whoever the authority signed",
        not pins or len(pins) >= others,
        f"a sum is of at least {terms.min_holders} holders, and the holder's policy names only "
        f"{len(pins)} with whom it is masked (holders); it names more, or the plan asks for fewer",
    )


def _coalition(asked: _Asked) -> Finding | None:
    withstood, fewest = asked.terms.coalition, asked.policy.coalition
    if withstood is None:
        return None
    return _finding(
        "coalition",
        withstood,
        f"at least {fewest}",
        withstood >= fewest,
        f"the plan's ε withstands coalition={withstood} holders in league with the coordinator, "
        f"and the holder's policy asks for {fewest} or more; raise coalition in the plan",
    )


def _holder_size(asked: _Asked) -> Finding | None:
    size, declared = asked.terms.holder_size, asked.policy.size_class
    if size is None:
        return None
    return _finding(
        "holder_size",
        size,
        f"at least {declared / LARGEST_SIZE_CLASS:g}",
        declared <= LARGEST_SIZE_CLASS * size,
        f"the plan's holder_size={size} is too small for the holder's declared size, {declared}; "
        "raise it",
    )


def _evaluation(asked: _Asked) -> Finding | None:
    wanted, allowed = asked.terms.evaluation, asked.policy.evaluation
    if wanted is None:
        return None
    return _finding(
        "evaluation",
        wanted,
        {"never": "local", "histogram": "local, histogram", "exact": "any"}[allowed],
        wanted == "local" or allowed != "never",
        "the plan asks for a noised histogram of every evaluation, and the holder's policy lets no "
        'evaluation leave (evaluation = "never"); leave evaluation_epsilon out of the plan',
    )


def _statistics(asked: _Asked) -> Finding | None:
    if not asked.terms.statistics:
        return None
    return _finding(
        "statistics",
        "yes",
        asked.policy.statistics,
        asked.policy.statistics,
        f"the holder's policy lets no statistics of data set {asked.policy.data_set!r} leave",
    )


RULES: tuple[Callable[[_Asked], Finding | None], ...] = (
    _coordinator,
    _task,
    _unprotected,
    _statistics,
    _no_budget,
    _unit,
    _delta,
    _noise,
    _clip_norm,
    _cohort,
    _aggregation,
    _holders,
    _coalition,
    _evaluation,
    _holder_size,
)
"""Every rule that a request can be judged by without the ledger, in the order asked."""
