"""Sotto: one model, data that stays where it is, and an account of what was said about it.

The public Python API; everything else is importable from the package that owns it. Names are
imported when they are first used, so that ``sotto --help`` does not wait for torch.

>>> import sotto
>>> task = sotto.load("medical-diagnosis")
>>> plan = sotto.plan_for(task, {"epsilon": 3.0, "rounds": 2})
>>> plan.privacy.unit
'record'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.aggregation import Plain, Secure, SecureSum
    from common.errors import SottoError
    from common.guarantees import CentralPrivacy, DistributedPrivacy, NonPrivate, Privacy
    from common.plan import TrainingPlan
    from common.settings import plan_for
    from common.tasks import Examples, Source, Task, load
    from simulations.audit import Audit, audited
    from simulations.experiment import Experiment, ExperimentResult, run_experiment
    from simulations.results import document, sweep_document
    from simulations.sweep import Setting, Sweep, SweepResult, run_sweep
    from simulations.tuning import Tuning

__all__ = [
    "Audit",
    "CentralPrivacy",
    "DistributedPrivacy",
    "Examples",
    "Experiment",
    "ExperimentResult",
    "NonPrivate",
    "Plain",
    "Privacy",
    "Secure",
    "SecureSum",
    "Setting",
    "SottoError",
    "Source",
    "Sweep",
    "SweepResult",
    "Task",
    "TrainingPlan",
    "Tuning",
    "audited",
    "document",
    "load",
    "plan_for",
    "run_experiment",
    "run_sweep",
    "sweep_document",
]

_OWNERS = {
    "CentralPrivacy": "common.guarantees",
    "DistributedPrivacy": "common.guarantees",
    "Plain": "common.aggregation",
    "Secure": "common.aggregation",
    "SecureSum": "common.aggregation",
    "Tuning": "simulations.tuning",
    "audited": "simulations.audit",
    "Audit": "simulations.audit",
    "Examples": "common.tasks",
    "Experiment": "simulations.experiment",
    "ExperimentResult": "simulations.experiment",
    "NonPrivate": "common.guarantees",
    "Privacy": "common.guarantees",
    "Setting": "simulations.sweep",
    "SottoError": "common.errors",
    "Source": "common.tasks",
    "Sweep": "simulations.sweep",
    "SweepResult": "simulations.sweep",
    "Task": "common.tasks",
    "TrainingPlan": "common.plan",
    "document": "simulations.results",
    "load": "common.tasks",
    "plan_for": "common.settings",
    "run_experiment": "simulations.experiment",
    "run_sweep": "simulations.sweep",
    "sweep_document": "simulations.results",
}


def __getattr__(name: str) -> Any:
    """A public name, from the module that owns it (PEP 562)."""
    if name not in _OWNERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_OWNERS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
