"""``sotto policy``: what a holder allows, and what it would say to a plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import ConfigurationError
from sotto.options import Output
from sotto.policy_flags import DEFAULT_DATA_SET, UNPINNED
from sotto.show import Screen, figure, write_json

if TYPE_CHECKING:  # they need torch
    from client.policy import Finding, Policy
    from client.policy_file import PolicyFile
    from common.plan import TrainingPlan
    from common.privacy.ledger import Ledger
    from common.tasks.base import Task

__all__ = ["app"]

app = typer.Typer(
    help="What this holder allows: write it, show it, and hold a plan against it.",
    no_args_is_help=True,
)

EXIT_REFUSED = 3

_State = Annotated[Path, typer.Option("--state", help="The holder's state folder.")]
_File = Annotated[Path | None, typer.Option("--policy", help="policy.toml in --state.")]
_Json = Annotated[str | None, typer.Option("--json", help="Write JSON; - for standard output.")]


@app.command()
def init(
    state: _State,
    budget: Annotated[
        float | None, typer.Option(help="ε of all releases, ever; without it none are made.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="δ of the budget, below 1/n.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="A task that may be learned; may be repeated.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Of the first task; δ is its own unless --delta is given.")
    ] = None,
    data_set: Annotated[str, typer.Option(help="That the rules are for.")] = DEFAULT_DATA_SET,
    epsilon_per_run: Annotated[
        float | None, typer.Option(help="The most one run may cost.")
    ] = None,
    min_noise_multiplier: Annotated[float | None, typer.Option(help="The least σ.")] = None,
    max_clip_norm: Annotated[float | None, typer.Option(help="The largest C.")] = None,
    max_rounds_per_day: Annotated[int | None, typer.Option(help="Rounds in a day, UTC.")] = None,
    min_cohort: Annotated[int | None, typer.Option(help="The fewest holders of a plan.")] = None,
    size_class: Annotated[
        int | None, typer.Option(help="Public, rough number of training units.")
    ] = None,
    evaluation: Annotated[str | None, typer.Option(help="never, histogram or exact.")] = None,
    statistics: Annotated[
        bool | None, typer.Option("--statistics", help="Let noised statistics leave.")
    ] = None,
    unprotected: Annotated[
        bool | None, typer.Option("--unprotected", help="The data are public or synthetic.")
    ] = None,
    aggregation: Annotated[
        list[str] | None,
        typer.Option(
            help="A level that is allowed, plain, secure or secure-sum; may be repeated. The first "
            "two, unless given."
        ),
    ] = None,
    coalition: Annotated[
        int | None, typer.Option(help="Colluding holders that secure-sum's ε must withstand.")
    ] = None,
    coordinator: Annotated[
        list[str] | None,
        typer.Option(
            help="Fingerprint of an authority that may ask; may be repeated. The one whose keys "
            "are installed, unless given."
        ),
    ] = None,
    holder: Annotated[
        list[str] | None,
        typer.Option(
            help="Fingerprint of another holder's signing key, which may take part in a masked "
            "round; may be repeated. Whoever the authority has signed, unless given."
        ),
    ] = None,
    policy: _File = None,
) -> None:
    """Write a first policy.toml, or add a data set's rules to the one that is there."""
    from client.policy import Policy
    from client.policy_file import add_policy, policy_path
    from common.frozen import validated

    path = policy or policy_path(state)
    rules = {
        "data_set": data_set,
        "budget": _budget(budget, delta, task, source),
        "epsilon_per_run": epsilon_per_run,
        "min_noise_multiplier": min_noise_multiplier,
        "max_clip_norm": max_clip_norm,
        "max_rounds_per_day": max_rounds_per_day,
        "min_cohort": min_cohort,
        "size_class": size_class,
        "evaluation": evaluation,
        "statistics": statistics,
        "unprotected": unprotected,
        "aggregation": aggregation,
        "coalition": coalition,
        "tasks": task,
        "coordinators": coordinator or _installed_authority(state),
        "holders": holder,
    }
    if path.exists() and (task or coordinator or holder):
        raise ConfigurationError(
            f"{path} is there, and has tasks, coordinators and holders for all its data sets; "
            "leave --task, --coordinator and --holder out, or edit the file"
        )
    given = {key: value for key, value in rules.items() if value is not None}
    add_policy(path, validated(Policy, given))
    print(f"Wrote the rules for data set {data_set!r} to {path}.")
    if budget is None and not unprotected:
        print("No budget is set, so nothing is released; add one with 'sotto ledger budget set'.")
    if "secure-sum" in (aggregation or ()):
        _warn_unless_pinned(path, data_set)
    print(f"Read it, and sign it off; 'sotto policy show --state {state}' says it in a table.")


def _warn_unless_pinned(path: Path, data_set: str) -> None:
    from client.policy_file import PolicyFile

    if not PolicyFile.load(path).policies[data_set].holders:
        print(UNPINNED)


def _budget(
    epsilon: float | None, delta: float | None, tasks: list[str] | None, source: str | None
) -> dict[str, float] | None:
    """The budget's table; δ is the source's own unless it is given."""
    if epsilon is None:
        return None
    if delta is None and not tasks:
        raise ConfigurationError(
            "a budget has a δ, below 1/n for n people or records: give --delta, or --task (and "
            "--source) to take the source's own"
        )
    if delta is None:
        from common.tasks import load

        delta = load((tasks or [""])[0], source, None).source.delta
    return {"epsilon": epsilon, "delta": delta}


def _installed_authority(state: Path) -> list[str] | None:
    """The fingerprint of the authority whose keys are in the folder, if there are any."""
    from common.errors import SottoError
    from common.link.certificates import fingerprint
    from common.link.keys import HolderKeys

    try:
        return [f"sha256:{fingerprint(HolderKeys.load(state).authority)}"]
    except SottoError:
        return None


@app.command()
def show(state: _State, policy: _File = None, json: _Json = None) -> None:
    """Every rule, whether it is written down or the default, and what is spent."""
    from client.policy_file import PolicyFile, policy_path

    file = PolicyFile.load(policy or policy_path(state))
    screen = Screen(Output(json=json))
    with _ledger(state) as ledger:
        for rules in file.policies.values():
            _show_rules(screen, rules, ledger)
    if not file.policies:
        screen.say(f"{file.path} has rules for no data set, so everything is refused.")
    write_json(json, {name: _document(rules) for name, rules in file.policies.items()})


def _document(policy: Policy) -> dict[str, Any]:
    written = policy.model_dump(mode="json", exclude={"data_set"})
    return written if "size_class" in policy.model_fields_set else {**written, "size_class": None}


def _show_rules(screen: Screen, policy: Policy, ledger: Ledger) -> None:
    from client.policy_file import DATA_SET_KEYS, HOLDER_KEYS

    rows = [
        [key, _value(policy, key), "" if key in policy.model_fields_set else "default"]
        for key in (*HOLDER_KEYS, *DATA_SET_KEYS)
    ]
    screen.table(f"Data set {policy.data_set!r}", ["rule", "value", ""], rows)
    if policy.budget is not None:
        spent = ledger.epsilon(policy.data_set, policy.budget.delta)
        screen.say(
            f"Spent: ε {figure(spent)} of {policy.budget.epsilon:g} (δ={policy.budget.delta:g})."
        )


def _value(policy: Policy, key: str) -> str:
    value = getattr(policy, key)
    if key == "budget" and value is not None:
        return f"ε {value.epsilon:g}, δ {value.delta:g}"
    if key == "size_class" and key not in policy.model_fields_set:
        return "the source's"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key in ("coordinators", "holders"):
        anyone = {"coordinators": "the installed one", "holders": "whoever the authority signed"}
        return ", ".join(f"{each[:30]}…" for each in value) or anyone[key]
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    if value is None:
        return {"tasks": "the one joined with", "budget": "none", "epsilon_per_run": "the budget"}[
            key
        ]
    return f"{value:g}" if isinstance(value, float) else str(value)


# -- a plan before the rules ---------------------------------------------------------------------


@app.command()
def check(
    plan: Annotated[Path, typer.Argument(help="A run's plan.toml.", exists=True, dir_okay=False)],
    state: _State,
    task: Annotated[
        str | None, typer.Option(help="That this holder joins with; the plan's own.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Likewise.")] = None,
    preprocessing: Annotated[str | None, typer.Option(help="Likewise.")] = None,
    data_set: Annotated[
        str | None, typer.Option(help="That it would be charged to; the policy's only one.")
    ] = None,
    policy: _File = None,
    json: _Json = None,
) -> int:
    """Say what of a plan this holder would refuse, and why; ends with 3 if it would anything."""
    from client.policy_file import PolicyFile, policy_path
    from common.tasks import load
    from sotto.ledger_commands import read_plan

    asked = read_plan(plan, "PLAN")
    served = (
        load(task, source, preprocessing)
        if task
        else load(asked.task, source or asked.source, preprocessing or asked.preprocessing)
    )
    file = PolicyFile.load(policy or policy_path(state))
    rules = file.policy(data_set or _only(file), size_class=served.source.nominal_size(None))
    with _ledger(state) as ledger:
        judged = _judge(rules, asked, served, ledger, _authority(state))
    screen = Screen(Output(json=json))
    judged.show(screen)
    write_json(json, judged.document())
    return EXIT_REFUSED if judged.refused else 0


def _only(file: PolicyFile) -> str:
    return next(iter(file.policies)) if len(file.policies) == 1 else DEFAULT_DATA_SET


def _authority(state: Path) -> str:
    return (_installed_authority(state) or [""])[0]


@contextmanager
def _ledger(state: Path) -> Iterator[Ledger]:
    """The holder's account; an empty one where it has not begun."""
    from common.privacy.ledger import Ledger

    path = state / "ledger.sqlite"
    with Ledger.open(path if path.exists() else ":memory:") as ledger:
        yield ledger


@dataclass(frozen=True)
class _Cost:
    """ε on the data set, at the budget's δ; None where there is no budget to measure it by.

    Args:
        plan: the whole plan by itself.
        spent: so far.
        after: with the whole plan on top.
        budget: of everything.
        delta: at which all of them are measured.
    """

    plan: float
    spent: float
    after: float
    budget: float | None
    delta: float

    def sentence(self) -> str:
        """For people."""
        by_itself = f"The whole plan costs ε {figure(self.plan)} (δ={self.delta:g}) by itself."
        if self.budget is None:
            return by_itself
        left = max(0.0, self.budget - self.spent)
        return (
            f"{by_itself} Spent so far: {figure(self.spent)} of {self.budget:g}, {figure(left)} "
            f"left; with this plan: {figure(self.after)}."
        )


@dataclass(frozen=True)
class _Judged:
    """A plan and everything that this holder's rules say of it.

    Args:
        plan: that was judged.
        data_set: that it would be charged to.
        findings: one for each rule.
        cost: in ε.
    """

    plan: TrainingPlan
    data_set: str
    findings: list[Finding]
    cost: _Cost

    @property
    def refused(self) -> list[Finding]:
        """The rules that are broken."""
        return [finding for finding in self.findings if finding.refusal]

    def show(self, screen: Screen) -> None:
        """A table of all rules, and a sentence for each that is broken."""
        rows = [
            [each.rule, each.asked, each.allowed, "REFUSED" if each.refusal else "ok"]
            for each in self.findings
        ]
        screen.table(
            f"{self.plan.task} on data set {self.data_set!r}",
            ["rule", "the plan", "this holder", ""],
            rows,
        )
        for each in self.refused:
            screen.say(f"{each.rule}: {each.refusal}.")
        screen.say(self.cost.sentence())
        screen.say("Refused." if self.refused else "Allowed.")

    def document(self) -> dict[str, Any]:
        """For programs."""
        cost = {
            name: None if value == float("inf") else value
            for name, value in asdict(self.cost).items()
        }
        return {
            "allowed": not self.refused,
            "plan": self.plan.digest,
            "data_set": self.data_set,
            "rules": [asdict(each) for each in self.findings],
            "epsilon": cost,
        }


def _judge(
    policy: Policy, plan: TrainingPlan, task: Task, ledger: Ledger, coordinator: str
) -> _Judged:
    from client.requests import Terms

    findings = list(policy.findings(Terms.of_plan(plan), task, coordinator))
    cost = _cost(policy, plan, task, ledger)
    findings += _of_account(policy, plan, ledger, cost)
    return _Judged(plan, policy.data_set, findings, cost)


def _cost(policy: Policy, plan: TrainingPlan, task: Task, ledger: Ledger) -> _Cost:
    from common.privacy.accounting import epsilon

    delta = policy.budget.delta if policy.budget else task.source.delta
    planned, spent = plan.composition(), ledger.composition(policy.data_set)
    return _Cost(
        plan=epsilon(planned, delta),
        spent=epsilon(spent, delta),
        after=epsilon(spent + planned, delta),
        budget=policy.budget.epsilon if policy.budget else None,
        delta=delta,
    )


def _of_account(
    policy: Policy, plan: TrainingPlan, ledger: Ledger, cost: _Cost
) -> Iterator[Finding]:
    """The rules that need the ledger, which says what it would say to the first request."""
    from client.policy import Finding
    from client.requests import Terms

    budget = policy.budget if Terms.of_plan(plan).private else None
    said = {
        refusal.code: refusal.sentence
        for refusal in ledger.refusals(
            _first_release(policy, plan), budget, plan.composition(), policy.limits
        )
    }
    if budget is not None:
        left = max(0.0, budget.epsilon - cost.spent)
        yield Finding(
            "budget",
            f"ε {figure(cost.after - cost.spent)} more",
            f"ε {figure(left)} left of {budget.epsilon:g}",
            said.get("budget", ""),
        )
    if budget is not None and policy.epsilon_per_run is not None:
        allowed = f"at most ε {policy.epsilon_per_run:g}"
        yield Finding("run", f"ε {figure(cost.plan)}", allowed, said.get("run", ""))
    if policy.max_rounds_per_day is not None:
        yield _rounds(policy, plan, ledger, said.get("rounds", ""))
    if policy.dry_run:
        yield Finding("dry-run", "an answer", "none", "the holder is on a dry run")


def _rounds(policy: Policy, plan: TrainingPlan, ledger: Ledger, said: str) -> Finding:
    """Rounds per day, if the whole plan falls on today."""
    from client.policy import Finding

    most = policy.max_rounds_per_day or 0
    today = datetime.now(UTC).date().isoformat()
    left = max(0, most - ledger.rounds_since(policy.data_set, today))
    if not said and plan.rounds > left:
        said = (
            f"of the plan's {plan.rounds} rounds the holder answers {left} today and at most "
            f"{most} a day (max_rounds_per_day); a run that is faster than that fails"
        )
    return Finding("rounds", f"{plan.rounds}", f"{most} a day, {left} left today", said)


def _first_release(policy: Policy, plan: TrainingPlan) -> Any:
    from common.privacy.ledger import Release

    return Release(
        request_id=f"check/{plan.digest}",
        data_set=policy.data_set,
        task=plan.task,
        coordinator="",
        run_id="check",
        plan_digest=plan.digest,
        round=1,
        event=plan.round_event(),
    )
