"""A policy as the flags of ``sotto join`` and ``sotto policy init`` say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ConfigurationError

if TYPE_CHECKING:  # they need torch
    from client.policy import Policy

__all__ = ["UNPINNED", "Wanted", "require_fitting"]

DEFAULT_DATA_SET = "default"

UNPINNED = (
    "secure-sum is allowed and no holders are pinned: a dishonest coordinator could make up all "
    "the others, and see what this holder sends with a small share of the noise. Pin the others' "
    "signing keys (holders in policy.toml); 'sotto keys list' shows each, there."
)


@dataclass(frozen=True)
class Wanted:
    """What the flags of ``sotto join`` say about the policy; None or False where they say nothing.

    Args:
        data_set: its name.
        budget: ε of everything ever released.
        delta: δ of it.
        allow_no_dp: whether the data are public.
        share_metrics: whether exact metrics leave.
        size_class: the declared number of training units.
        aggregation: the levels that are allowed.
    """

    data_set: str | None = None
    budget: float | None = None
    delta: float | None = None
    allow_no_dp: bool = False
    share_metrics: bool = False
    size_class: int | None = None
    aggregation: tuple[str, ...] = ()

    def require_enough(self) -> None:
        """Refuse flags from which no first policy can be made.

        Raises:
            ConfigurationError: says which are missing.
        """
        if self.budget is None and not self.allow_no_dp:
            raise ConfigurationError(
                "set --budget EPS, the ε that may ever be released about this data; or, for public "
                "or synthetic data, --allow-no-dp"
            )
        if self.share_metrics and not self.allow_no_dp:
            raise ConfigurationError(
                "--share-metrics sends exact figures, which no budget covers: it is for public or "
                "synthetic data, so add --allow-no-dp, or leave it out"
            )

    def policy(self, delta: float, size_class: int, authority: str | None) -> Policy:
        """The first policy: what the flags say, and the most careful value for the rest.

        Args:
            delta: of the source.
            size_class: the source's nominal size.
            authority: fingerprint of the federation's authority; None without TLS.

        Raises:
            ConfigurationError: a value is out of bounds.
        """
        from client.policy import Policy
        from common.frozen import validated

        values: dict[str, Any] = {
            "data_set": self.data_set or DEFAULT_DATA_SET,
            "size_class": size_class if self.size_class is None else self.size_class,
            "unprotected": self.allow_no_dp,
            "evaluation": "exact" if self.share_metrics else "never",
            "coordinators": [f"sha256:{authority}"] if authority else [],
        }
        if self.budget is not None:
            own = delta if self.delta is None else self.delta
            values["budget"] = {"epsilon": self.budget, "delta": own}
        if self.aggregation:
            values["aggregation"] = self.aggregation
        return validated(Policy, values)

    def agreed(self, path: Path, size_class: int) -> Policy:
        """The policy in a file, if the flags do not contradict it.

        Args:
            path: of the file.
            size_class: the source's nominal size, where the file does not say.

        Raises:
            ConfigurationError: they do; it names both values and what changes the file.
        """
        from client.policy_file import PolicyFile

        file = PolicyFile.load(path)
        policy = file.policy(self._name_in(list(file.policies)), size_class=size_class)
        budget = policy.budget
        set_budget = "change it with 'sotto ledger budget set'"
        edit = "edit the file"
        pairs = [
            ("--budget", self.budget, "a budget of ε", budget and budget.epsilon, set_budget),
            ("--delta", self.delta, "a budget with δ", budget and budget.delta, set_budget),
            ("--size-class", self.size_class, "size_class", policy.size_class, edit),
            ("--allow-no-dp", self.allow_no_dp or None, "unprotected", policy.unprotected, edit),
            ("--share-metrics", "exact" if self.share_metrics else None, "evaluation",
             policy.evaluation, edit),
            ("--aggregation", _levels(self.aggregation) or None, "aggregation",
             _levels(policy.aggregation), edit),
        ]  # fmt: skip
        for flag, given, key, written, change in pairs:
            if given is not None and given != written:
                raise ConfigurationError(
                    f"{_said(flag, given)} contradicts {path}, which has {key} = "
                    f"{_text(written)} for data set {policy.data_set!r}; the file holds: {change}, "
                    f"or leave {flag} out"
                )
        return policy

    def _name_in(self, there: list[str]) -> str:
        if self.data_set is None and len(there) == 1:
            return there[0]
        return self.data_set or DEFAULT_DATA_SET


def require_fitting(path: Path, policy: Policy, task: str, coordinator: str) -> None:
    """Refuse to join where every request would be refused.

    Args:
        path: of the policy, for the message.
        policy: that holds.
        task: that the holder joins with.
        coordinator: fingerprint of the authority that it joins, or an address without TLS.

    Raises:
        ConfigurationError: the policy does not allow the task or the coordinator.
    """
    if policy.tasks is not None and task not in policy.tasks:
        raise ConfigurationError(
            f"{path} allows the tasks {', '.join(policy.tasks) or '(none)'}, not {task!r}; join "
            "with one of them, or edit the file"
        )
    if not policy.allows_coordinator(coordinator):
        raise ConfigurationError(
            f"{path} does not allow this federation's authority ({coordinator}): coordinators "
            f"names {', '.join(policy.coordinators)}. If the holder may answer it, add it to the "
            "file"
        )


def _levels(levels: Sequence[str]) -> list[str]:
    """Without repetitions, from the most that the coordinator sees to the least."""
    return sorted(set(levels))


def _said(flag: str, given: object) -> str:
    """What somebody typed; flags without a value have none to repeat."""
    if isinstance(given, list):
        return " ".join(f"{flag} {each}" for each in given)
    return flag if flag in ("--allow-no-dp", "--share-metrics") else f"{flag} {_text(given)}"


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else repr(value)
