"""The JSON document of an experiment; its field names are a contract."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from common.aggregation import Masked
from common.guarantees import CentralPrivacy, DistributedPrivacy, NonPrivate, Privacy
from common.plan import TrainingPlan
from common.privacy.distributed import against_coalitions
from server.runs import RunResult
from server.summaries import RoundSummary

if TYPE_CHECKING:  # it needs Opacus, which a coordinator that writes a document does not
    from simulations.experiment import ExperimentResult
    from simulations.faults import Faults, RoundFaults
    from simulations.sweep import Finished, Setting, SweepResult

__all__ = [
    "Metrics",
    "aggregation_document",
    "document",
    "mean_over_holders",
    "privacy_document",
    "run_document",
    "summarise",
    "sweep_document",
]

Metrics = Mapping[str, float]
"""Name → value; NaN where undefined."""


def document(result: ExperimentResult) -> dict[str, Any]:
    """The document that ``--json`` writes about an experiment."""
    experiment = result.experiment
    baselines = {}
    if result.baselines is not None:
        baselines = {
            "baselines": {
                "local": _means(result.baselines.local),
                "pooled": _means(result.baselines.pooled),
            }
        }
    faults = {}
    if experiment.faults is not None:
        faults = {"faults": _faults_document(experiment.faults, result.faults)}
    return {
        **_about(
            experiment.plan,
            len(result.holders),
            str(experiment.device),
            experiment.seeds,
            experiment.engine,
        ),
        **_lost_document(result.runs),
        "metrics": summarise(result.finals),
        **_evaluation_document([run.final for run in result.runs]),
        **baselines,
        **faults,
        **_clock_document(result.clocks),
        "seconds": {
            "total": round(result.seconds, 3),
            "round_median": float(np.median([run.round_median for run in result.runs])),
        },
    }


def sweep_document(
    result: SweepResult, *, engine: str = "batched", device: str = "cpu"
) -> dict[str, Any]:
    """The document that ``sotto sweep`` writes, with a point for each setting.

    Args:
        result: of the sweep.
        engine: that computed it.
        device: on which.
    """
    sweep = result.sweep
    return {
        "task": sweep.task.name,
        "source": sweep.task.source.name,
        "preprocessing": sweep.task.preprocessing,
        "holders": len(result.holders),
        "engine": engine,
        "device": device,
        "seeds": list(sweep.seeds),
        "swept": {name: [_json(each) for each in values] for name, values in sweep.swept.items()},
        "headline": sweep.task.headline,
        "points": [
            _point(result, place, setting, engine) for place, setting in enumerate(sweep.settings)
        ],
        "seconds": {"total": round(result.seconds, 3)},
    }


def _point(result: SweepResult, place: int, setting: Setting, engine: str) -> dict[str, Any]:
    kinds = ("federation", "local", "pooled") if result.sweep.baselines else ("federation",)
    runs = {kind: result.of(place, kind) for kind in kinds}
    summaries = {kind: summarise([_judged(run) for run in own]) for kind, own in runs.items()}
    metrics = summaries.pop("federation")
    return {
        "settings": {name: _json(value) for name, value in setting.values.items()},
        "rounds": setting.plan.rounds,
        "strategy": setting.plan.strategy.name,
        "privacy": privacy_document(setting.plan.privacy),
        "aggregation": aggregation_document(setting.plan, engine),
        "metrics": metrics,
        **({"baselines": summaries} if summaries else {}),
        "failed": [
            {"seed": run.seed, "kind": kind, "why": run.failed}
            for kind, own in runs.items()
            for run in own
            if run.failed
        ],
    }


def _judged(run: Finished) -> Mapping[str, Metrics]:
    """What a run counts for: nothing if it, or one of the holders alone, failed.

    The mean over the others would be that of those to whom it happened to go well.
    """
    return {} if run.failed else run.metrics


def _json(value: Any) -> Any:
    """A setting as JSON has it: an infinite ε, which is no privacy, is null."""
    return None if isinstance(value, float) and math.isinf(value) else value


def run_document(result: RunResult, device: str) -> dict[str, Any]:
    """The same of one deployed run: metrics as far as holders share them, nothing to compare."""
    shared = result.final.metrics
    return {
        **_about(
            result.plan, len(result.final.accepted), device, [result.plan.seed], engine="opacus"
        ),
        **_lost_document([result]),
        "metrics": summarise([shared]) if shared else {},
        **_evaluation_document([result.final]),
        "seconds": {
            "total": round(sum(summary.seconds for summary in result.history), 3),
            "round_median": result.round_median,
        },
    }


def _about(
    plan: TrainingPlan, holders: int, device: str, seeds: Sequence[int], engine: str
) -> dict[str, Any]:
    return {
        "task": plan.task,
        "source": plan.source,
        "preprocessing": plan.preprocessing,
        "holders": holders,
        "rounds": plan.rounds,
        "engine": engine,
        "device": device,
        "strategy": plan.strategy.name,
        "seeds": list(seeds),
        "privacy": privacy_document(plan.privacy),
        "aggregation": aggregation_document(plan, engine),
        **_price_document(plan),
    }


def _price_document(plan: TrainingPlan) -> dict[str, Any]:
    """What evaluations cost, where they have a price."""
    price = plan.evaluation
    if price.kind != "histogram":
        return {}
    figures = price.model_dump(mode="json", exclude={"kind"})
    return {"evaluation_price": {**figures, "evaluations": plan.evaluations}}


def _evaluation_document(finals: Sequence[RoundSummary]) -> dict[str, Any]:
    """Metrics from noised histograms, where there are any: the first seed's, with error bars.

    Args:
        finals: the last round of every seed.
    """
    first = finals[0].evaluation
    if not first:
        return {}
    estimates: dict[str, dict[str, Any]] = {
        name: {key: _number(number) for key, number in asdict(estimate).items()}
        for name, estimate in first.items()
    }
    if len(finals) > 1:
        for name, estimate in estimates.items():
            estimate["per_seed"] = [_number(final.evaluation[name].value) for final in finals]
    return {"evaluation": estimates}


def privacy_document(
    privacy: Privacy | DistributedPrivacy | NonPrivate | CentralPrivacy,
) -> dict[str, Any]:
    """The guarantee's figures; null where there is none."""
    fields = ("epsilon", "delta", "unit", "adversary", "noise_multiplier", "clip_norm")
    figures = {field: getattr(privacy, field, None) for field in fields}
    return {"kind": privacy.kind, **figures}


MOST_COALITIONS = 12
"""Sizes of a coalition for which ε is given, at most."""


def aggregation_document(plan: TrainingPlan, engine: str) -> dict[str, Any]:
    """What the coordinator gets to see of a round, and how sums are masked if they are.

    Args:
        plan: calibrated.
        engine: that computed the run; only ``opacus`` goes through the whole protocol.
    """
    aggregation = plan.aggregation
    if not isinstance(aggregation, Masked):
        return {"kind": aggregation.kind}
    encoding, session = aggregation.encoding(plan), aggregation.session(plan, "run", 1)
    about = {
        "kind": aggregation.kind,
        "cohort": session.cohort,
        "threshold": session.threshold,
        "tolerated_dropouts": session.cohort - session.threshold,
        "tolerated_helpers": aggregation.tolerated_helpers(plan),
        "neighbours": aggregation.neighbours,
        "ring_bits": encoding.width,
        "bytes_per_parameter": encoding.width // 8,
        "masks_computed": engine == "opacus",
    }
    if aggregation.kind != "secure-sum":
        return about
    found = against_coalitions(plan)
    shown = {round(place) for place in np.linspace(0, len(found) - 1, MOST_COALITIONS)}
    coalitions = [asdict(each) for place, each in enumerate(found) if place in shown]
    return {**about, "coalition": aggregation.coalition, "coalitions": coalitions}


def _lost_document(runs: Sequence[RunResult]) -> dict[str, Any]:
    """Rounds of which nothing came, where masked sums have a threshold."""
    if runs[0].plan.aggregation.kind == "plain":
        return {}
    lost = [
        {"seed": run.plan.seed, "round": summary.round, "why": summary.lost}
        for run in runs
        for summary in run.history
        if summary.lost
    ]
    return {"lost_rounds": lost}


def _clock_document(clocks: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Simulated time, where any passes: of a whole run on average, and of a round."""
    if not any(clock[-1] > 0 for clock in clocks):
        return {}
    rounds = np.concatenate([np.diff(clock, prepend=0.0) for clock in clocks])
    return {
        "simulated_seconds": {
            "total": float(np.mean([clock[-1] for clock in clocks])),
            "round_median": float(np.median(rounds)),
        }
    }


def _faults_document(faults: Faults, happened: Sequence[RoundFaults]) -> dict[str, Any]:
    """What was to go wrong, and what did in all rounds of all seeds together."""
    straggle, byzantine, pace = faults.straggle, faults.byzantine, faults.pace
    return {
        "dropout": faults.dropout,
        "straggle": None if straggle is None else asdict(straggle),
        "byzantine": None if byzantine is None else asdict(byzantine),
        "pace": None if pace is None else asdict(pace),
        "dropped": sum(each.dropped for each in happened),
        "late": sum(each.late for each in happened),
        "attacked": sum(each.attacked for each in happened),
        "spare": sum(each.spare for each in happened),
        "waited_median": float(np.median([each.waited for each in happened])),
    }


def summarise(seeds: Sequence[Mapping[str, Metrics]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of the mean over holders, for every metric.

    Args:
        seeds: for every seed, holder → metrics.
    """
    summary = {}
    for name in _names(seeds):
        per_seed = [mean_over_holders(metrics, name) for metrics in seeds]
        per_holder = {
            holder: _number(
                _nanmean([metrics.get(holder, {}).get(name, math.nan) for metrics in seeds])
            )
            for holder in _union(seeds)
        }
        defined = [value for value in per_seed if math.isfinite(value)]
        summary[name] = {
            "mean": _number(_nanmean(per_seed)),
            "sd": float(np.std(defined, ddof=1)) if len(defined) > 1 else 0.0,
            "per_seed": [_number(value) for value in per_seed],
            "per_holder": per_holder,
        }
    return summary


def mean_over_holders(metrics: Mapping[str, Metrics], name: str) -> float:
    """Mean over the holders where the metric is defined; NaN if it is nowhere."""
    values = np.array([figures.get(name, np.nan) for figures in metrics.values()])
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def _means(seeds: Sequence[Mapping[str, Metrics]]) -> dict[str, float | None]:
    return {
        name: _number(_nanmean([mean_over_holders(metrics, name) for metrics in seeds]))
        for name in _names(seeds)
    }


def _names(seeds: Sequence[Mapping[str, Metrics]]) -> list[str]:
    return _union([figures for metrics in seeds for figures in metrics.values()])


def _union(mappings: Sequence[Mapping[str, object]]) -> list[str]:
    """The keys of all, in the order of their first appearance."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _nanmean(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
