"""From what a user set, and what the task recommends for the rest, to a calibrated plan."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from common.aggregation import masking
from common.errors import ConfigurationError
from common.frozen import validated
from common.plan import TrainingPlan
from common.tasks.base import Task, no_histogram
from common.tasks.parameters import dimension_of
from common.tasks.scaling import check_scaling, read_scaling

__all__ = ["DEFAULT_EPSILON", "SETTINGS", "plan_for"]

DEFAULT_EPSILON = 5.0

SETTINGS: Mapping[str, str] = {
    "rounds": "exchanges with the holders",
    "cohort": "holders asked each round; all if left out",
    "over_selection": "share of the cohort asked besides; the first updates count",
    "min_holders": "a round with fewer accepted updates fails",
    "local_steps": "optimizer steps between download and upload",
    "batch_size": "expected units in a step, or 'full'",
    "learning_rate": "of the local optimizer",
    "optimizer": "sgd or adam",
    "momentum": "of local SGD",
    "clip_norm": "L2 bound of one unit's gradient, or of a holder's update",
    "epsilon": "privacy target of the whole run",
    "delta": "below 1/n of the unit",
    "no_dp": "train without differential privacy",
    "unit": "whose privacy is counted: the task's own, or holder (then the coordinator is trusted)",
    "clipping": "of holders' updates: fixed or adaptive",
    "mechanism": "of the coordinator's noise: gaussian or banded",
    "bands": "rounds after which a holder is asked again, with banded noise",
    "strategy": "how updates are combined",
    "server_learning_rate": "the coordinator's learning rate",
    "server_momentum": "of fedavgm",
    "proximal_mu": "of fedprox",
    "trim": "of fedtrimmedavg",
    "malicious": "holders that krum must withstand",
    "buffer": "updates that make a model, with fedbuff",
    "max_staleness": "of an update that counts, in models since the one it is of, with fedbuff",
    "weighting": "equal or size",
    "holder_size": "public nominal number of units of one holder",
    "average_from": "fraction of rounds after which models are averaged",
    "evaluate": "when holders judge the model: never, every N, or final",
    "evaluation_epsilon": "price of all evaluations; holders keep their figures if left out",
    "scaling": "file of shifts and scales of the inputs, as 'sotto stats --scaling' writes it",
    "aggregation": "what the coordinator sees: plain, secure or secure-sum",
    "dropouts": "share of the cohort that a masked sum may lose; below a third",
    "coalition": "holders that may help the coordinator, with secure-sum",
    "round_deadline": "seconds until a silent holder misses the round",
    "deadline_extensions": "deadlines more that a holder may take while it makes progress",
    "max_update_norm": "bound on updates of a plan without DP",
    "seed": "of the initial parameters and cohorts",
}
"""Everything a user may set about a plan: flag (with dashes), TOML key, and meaning."""

_STRATEGY_SETTINGS = {
    "strategy": "name",
    "server_learning_rate": "learning_rate",
    "server_momentum": "momentum",
    "proximal_mu": "proximal_mu",
    "trim": "trim",
    "malicious": "malicious",
    "buffer": "buffer",
    "max_staleness": "max_staleness",
}
_BUFFERED = "fedbuff"
_CENTRAL_SETTINGS = ("clipping", "mechanism", "bands")
_AGGREGATION_SETTINGS = ("dropouts", "coalition")
_PRIVACY_SETTINGS = ("epsilon", "delta", "no_dp", "clip_norm", "unit", *_CENTRAL_SETTINGS)
_EVERY = re.compile(r"every[ :=]([1-9][0-9]*)")


def plan_for(
    task: Task, settings: Mapping[str, Any], *, holders: int | None = None
) -> TrainingPlan:
    """A calibrated plan from what the user set and what the task recommends for the rest.

    Args:
        task: on its source.
        settings: any of :data:`SETTINGS`; None counts as not set.
        holders: into how many the source is cut; None for its own number.

    Raises:
        ConfigurationError: an unknown key, a value out of bounds, or an ε out of reach.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    _refuse_unknown(given)
    if given.get("no_dp") and "epsilon" in given:
        raise ConfigurationError("epsilon and no_dp contradict each other; give one of them")
    epsilon = None if given.get("no_dp") else float(given.get("epsilon", DEFAULT_EPSILON))
    chosen = {**_recommended(task, given, epsilon), **given}
    _refuse_unknown(chosen)
    _buffer(chosen, holders or task.source.own_holders)
    aggregation = _aggregation(chosen, task, holders or task.source.own_holders)

    holder_size = chosen.pop("holder_size", task.source.nominal_size(holders))
    rate = _sampling_rate(chosen.pop("batch_size", "full"), holder_size)
    privacy = _privacy(
        chosen, task, epsilon, holders or task.source.own_holders, aggregation["kind"]
    )
    evaluation = _evaluation(chosen, task)
    scaling = _scaling(chosen)
    strategy = {
        field: chosen.pop(key) for key, field in _STRATEGY_SETTINGS.items() if key in chosen
    }
    rest = {key: value for key, value in chosen.items() if key not in _PRIVACY_SETTINGS}
    plan = validated(
        TrainingPlan,
        {
            "task": task.name,
            "source": task.source.name,
            "preprocessing": task.preprocessing,
            "holder_size": holder_size,
            "sampling_rate": rate,
            "expected_batch_size": rate * holder_size,
            "privacy": privacy,
            "aggregation": aggregation,
            "strategy": strategy,
            **evaluation,
            **scaling,
            **rest,
        },
    )
    check_scaling(plan.scaling, task)
    return plan.calibrated()


def _recommended(
    task: Task, given: Mapping[str, Any], epsilon: float | None
) -> Mapping[str, object]:
    """What the task recommends; where holders are the unit, their steps are without privacy."""
    if given.get("aggregation") == "secure-sum" and epsilon is not None:
        return task.recommended_for_sum(epsilon)
    if given.get("unit") != "holder":
        return task.recommended(epsilon)
    settings = task.recommended(None)
    # Of one unit's gradient; a whole update has another norm.
    return {name: value for name, value in settings.items() if name != "clip_norm"}


USUAL_BUFFER = 10
"""K that Nguyen et al. 2022 (section 5) find good for federations of any size that is larger."""


def _buffer(chosen: dict[str, Any], holders: int) -> None:
    """Fill in how many updates make a model, and that so many holders must be there.

    Everybody is asked once for a model, so fewer could not make one. Half of those who are at work
    leaves the other half time. An evaluation waits for everybody, which is what this strategy is
    there to avoid, so there is one at the end, unless more are asked for.
    """
    own = [name for name in ("buffer", "max_staleness") if name in chosen]
    if chosen.get("strategy") != _BUFFERED:
        if own:
            raise ConfigurationError(
                f"{', '.join(own)} is for updates that are combined as they come: give strategy "
                f"{_BUFFERED!r}, or leave it out"
            )
        return
    half = math.ceil(min(holders, chosen.get("cohort", holders)) / 2)
    chosen.setdefault("buffer", min(USUAL_BUFFER, chosen.get("min_holders", half)))
    if chosen.get("aggregation", "plain") == "plain":  # with which it is refused otherwise
        chosen.setdefault("min_holders", chosen["buffer"])
    chosen.setdefault("evaluate", "final")


def _aggregation(chosen: dict[str, Any], task: Task, holders: int) -> dict[str, Any]:
    """The plan's aggregation, not yet calibrated; fills in who takes part in a masked round."""
    kind = chosen.pop("aggregation", "plain")
    own = {name: chosen.pop(name) for name in _AGGREGATION_SETTINGS if name in chosen}
    if kind not in ("plain", "secure", "secure-sum"):
        raise ConfigurationError(
            f"aggregation must be 'plain', 'secure' or 'secure-sum', got {kind!r}"
        )
    if kind != "secure-sum" and "coalition" in own:
        raise ConfigurationError(
            "coalition is for noise that is in the sum only: give aggregation 'secure-sum', or "
            "leave it out"
        )
    if kind == "plain":
        if own:
            raise ConfigurationError(
                f"{', '.join(own)} is for masked sums: give aggregation 'secure' or 'secure-sum', "
                "or leave it out"
            )
        return {"kind": kind}
    if "dropouts" in own and "min_holders" in chosen:
        raise ConfigurationError(
            "dropouts and min_holders both say how many of a round must remain; give one of them"
        )
    cohort = chosen.setdefault("cohort", holders)
    fields = {**masking(cohort, own.pop("dropouts", None)), **own}
    chosen.setdefault("min_holders", fields.pop("min_holders"))
    return {"kind": kind, "dimension": dimension_of(task), **fields}


def _privacy(
    chosen: Mapping[str, Any],
    task: Task,
    epsilon: float | None,
    population: int,
    aggregation: str,
) -> dict[str, Any]:
    """The plan's privacy, not yet calibrated."""
    unit = chosen.get("unit", task.unit)
    if unit not in (task.unit, "holder"):
        raise ConfigurationError(
            f"unit must be {task.unit!r}, which task {task.name!r} is counted by, or 'holder', "
            f"got {unit!r}"
        )
    central = [name for name in _CENTRAL_SETTINGS if name in chosen]
    if central and (unit != "holder" or epsilon is None):
        raise ConfigurationError(
            f"{', '.join(central)} is for noise that a trusted coordinator adds: give unit "
            "'holder' and an epsilon, or leave it out"
        )
    if epsilon is None:
        return {"kind": "none"}
    common = {
        "epsilon": epsilon,
        "delta": chosen.get("delta", task.source.delta),
        "unit": unit,
        "clip_norm": chosen.get("clip_norm", 1.0),
    }
    if unit != "holder":
        return {"kind": "distributed" if aggregation == "secure-sum" else "dp", **common}
    own = {name: chosen[name] for name in central}
    return {"kind": "central", **common, "population": population, **own}


def _evaluation(chosen: dict[str, Any], task: Task) -> dict[str, Any]:
    """The plan's fields about evaluation; takes the settings about it out of ``chosen``."""
    fields: dict[str, Any] = {}
    price = chosen.pop("evaluation_epsilon", None)
    # Each evaluation that has a price makes the others noisier: one, unless more are asked for.
    when = chosen.pop("evaluate", None if price is None else "final")
    if when is not None:
        fields["evaluate_every"] = _rounds_between(str(when), chosen)
    if price is not None:
        if not task.cells:
            raise ConfigurationError(no_histogram(task))
        fields["evaluation"] = {
            "kind": "histogram",
            "epsilon": price,
            "delta": chosen.get("delta", task.source.delta),
        }
    return fields


def _scaling(chosen: dict[str, Any]) -> dict[str, Any]:
    """The plan's field about scaling; takes the setting, a file's name, out of ``chosen``."""
    path = chosen.pop("scaling", None)
    return {} if path is None else {"scaling": read_scaling(Path(str(path)))}


def _rounds_between(when: str, chosen: Mapping[str, Any]) -> int:
    """``evaluate`` as a number of rounds, 0 for never."""
    if when == "never":
        return 0
    if when == "final":
        return int(chosen.get("rounds", 1))
    if found := _EVERY.fullmatch(when):
        return int(found[1])
    raise ConfigurationError(
        f"evaluate must be 'never', 'every N' (N rounds) or 'final', got {when!r}"
    )


def _sampling_rate(batch_size: int | float | str, holder_size: int) -> float:
    if batch_size == "full":
        return 1.0
    try:
        size = float(batch_size)
    except ValueError:
        size = math.nan
    if not size > 0:
        raise ConfigurationError(
            f"batch_size must be a positive number or 'full', got {batch_size!r}"
        )
    return min(1.0, size / holder_size)


def _refuse_unknown(settings: Mapping[str, Any]) -> None:
    for key in settings:
        if key not in SETTINGS:
            close = get_close_matches(key, SETTINGS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigurationError(
                f"there is no setting {key!r}.{hint} There are: {', '.join(SETTINGS)}"
            )
