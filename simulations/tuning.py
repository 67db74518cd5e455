"""Choosing settings on a holder's own data, at a price.

A setting that was found by trying it on private data tells something about them, so the choice is
a release. Here it is one release with one price: a random number of runs is made, each of a
candidate drawn at random, each private by itself, its score included, and nothing but the best of
them leaves (Papernot & Steinke 2022, "Hyperparameter tuning with Rényi differential privacy"; the
price is that of :class:`common.privacy.events.Selection`).

Unit and neighbouring relation are those of the task. The *adversary* is whoever gets what leaves:
the winner's settings, its model and its score. It does not see how many runs there were, how the
others did, or how long it took; who publishes these too has no guarantee.

A coordinator that sees the updates of every run is another adversary, before whom runs simply add
up, as each holder's ledger has them. So this is for one holder by itself.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch

from client.holder import Holder
from client.policy import Policy
from client.state import HolderState
from common.errors import ConfigurationError, RunError
from common.flower import quiet_flower
from common.plan import TrainingPlan, fits_size_class
from common.privacy.accounting import epsilon, run_epsilon
from common.privacy.events import Composition, Selection
from common.privacy.noise import Randomness
from common.privacy.selection import draw_candidates, draw_runs
from common.settings import plan_for
from common.tasks.base import HolderData, Task
from common.tasks.histograms import Estimate
from common.wire import Vector
from server.app import federate
from simulations.baselines import solo_plan
from simulations.grid import InProcessGrid

__all__ = ["Candidate", "Trial", "Tuning"]

SCORING = 0.2
"""Share of a run's ε that pays for its score; the rest trains."""


@dataclass(frozen=True)
class Candidate:
    """One combination of settings that is in the draw.

    Args:
        values: setting → value, those that differ between candidates.
        plan: of a run of it, by one holder alone; calibrated to a run's price.
    """

    values: Mapping[str, Any]
    plan: TrainingPlan


@dataclass(frozen=True)
class Trial:
    """One run, and how it did by its own noised figures.

    Args:
        candidate: that was drawn.
        score: the task's headline metric, with its error bar.
        parameters: of the model, [D] float32.
    """

    candidate: Candidate
    score: Estimate
    parameters: Vector

    @property
    def rank(self) -> float:
        """What runs are compared by: the lower end of the error bar.

        So a score that is mostly noise, as of a model that gives everybody one score, does not win
        by chance. One that noise left undefined loses.
        """
        return self.score.low if math.isfinite(self.score.low) else -math.inf


@dataclass(frozen=True)
class Tuning:
    """A search over candidates, whose winner costs at most ``epsilon``.

    Args:
        task: what is learned.
        candidates: at least two.
        epsilon: the price of the winner, in nats.
        delta: δ of it.
        expected_runs: E[K], how many runs there are on average.
    """

    task: Task
    candidates: Sequence[Candidate]
    epsilon: float
    delta: float
    expected_runs: float

    @classmethod
    def over(
        cls,
        task: Task,
        settings: Mapping[str, Any],
        *,
        price: float,
        delta: float,
        expected_runs: float = 10.0,
    ) -> Tuning:
        """Every combination of the settings that are lists, at prices that make up the whole one.

        What is not set is what the task recommends at a run's own ε, a fraction of the whole.

        Args:
            task: what is learned.
            settings: as for ``plan_for``, but each may be a list of values.
            price: ε of the winner, in nats.
            delta: δ of it.
            expected_runs: E[K] ≥ 1.

        Raises:
            ConfigurationError: a setting is not one, there is nothing to choose from, or no run is
                cheap enough.
        """
        if fixed := sorted({"epsilon", "evaluation_epsilon", "no_dp"} & set(settings)):
            raise ConfigurationError(
                f"{', '.join(fixed)} cannot be tuned: the price of each run follows from the price "
                "of the whole; leave it out"
            )
        lists = {
            name: list(value) if isinstance(value, list | tuple) else [value]
            for name, value in settings.items()
        }
        combinations = [
            dict(zip(lists, values, strict=True)) for values in product(*lists.values())
        ]
        if len(combinations) < 2:
            raise ConfigurationError(
                "there is one candidate, so nothing to choose from; give a setting several values, "
                "as in --learning-rate 0.1,0.3,1"
            )

        def candidates(run: float) -> list[Candidate]:
            return [_candidate(task, lists, chosen, run, delta) for chosen in combinations]

        def releases(run: float) -> list[Composition]:
            return [candidate.plan.composition() for candidate in candidates(run)]

        run = run_epsilon(releases, expected_runs, price, delta)
        return cls(task, candidates(run), price, delta, expected_runs)

    @property
    def event(self) -> Selection:
        """The accountant's event of the whole search."""
        costs = tuple(candidate.plan.composition() for candidate in self.candidates)
        return Selection(costs, self.expected_runs)

    @property
    def cost(self) -> float:
        """ε of the winner at :attr:`delta`; at most :attr:`epsilon`."""
        return epsilon(Composition.of(self.event), self.delta)

    @property
    def digest(self) -> str:
        """Names what is searched, for the ledger."""
        plans = [candidate.plan.digest for candidate in self.candidates]
        return hashlib.sha256(json.dumps([plans, self.expected_runs]).encode()).hexdigest()

    def check_data(self, units: int) -> None:
        """Refuse data that the candidates' plans are not for, before anything is paid.

        Args:
            units: how many training units there are.

        Raises:
            ConfigurationError: far more than the plans' ``holder_size``.
        """
        size = min(candidate.plan.holder_size for candidate in self.candidates)
        if not fits_size_class(units, size):
            raise ConfigurationError(
                f"the data have {units} training units and the plan's holder_size is {size}; give "
                "--holder-size a public number nearer to it"
            )

    def run(
        self,
        data: HolderData,
        randomness: Callable[[], Randomness],
        device: torch.device,
        on_trial: Callable[[], None] = lambda: None,
    ) -> Trial:
        """Make the runs, and return the best.

        Args:
            data: the holder's own, split.
            randomness: a source of its own for each use; unpredictable, if the data are private.
            device: where models live.
            on_trial: called after each run; for the holder's own eyes.

        Raises:
            RunError: no run came to its end.
        """
        quiet_flower()
        own = randomness()
        runs = draw_runs(self.event, own)
        best: Trial | None = None
        for number in draw_candidates(len(self.candidates), runs, own):
            trial = self._trial(self.candidates[number], data, randomness, device)
            if trial is not None and (best is None or trial.rank > best.rank):
                best = trial
            on_trial()
        if best is None:
            raise RunError(
                "no run of the search came to its end, so there is nothing to choose; its price "
                "is spent. Leave out settings with which models diverge"
            )
        return best

    def _trial(
        self,
        candidate: Candidate,
        data: HolderData,
        randomness: Callable[[], Randomness],
        device: torch.device,
    ) -> Trial | None:
        """One run through the apps of a deployment: Opacus trains, a noised histogram scores.

        None if it came to no end: a model that diverged, say. It then loses against every other.
        """
        plan = candidate.plan
        # The whole search has been charged; this ledger is the run's own and goes with it.
        policy = Policy.of_experiment("trial", None, plan.holder_size)
        with HolderState.in_memory() as state:
            holder = Holder(
                "trial",
                self.task,
                data,
                policy,
                state,
                device,
                randomness=lambda _: randomness(),
                evaluation_randomness=lambda _: randomness(),
            )
            try:
                result = federate(InProcessGrid({"trial": holder}), plan, self.task)
            except RunError:
                return None
        score = result.final.evaluation[self.task.headline]
        return Trial(candidate, score, np.array(result.parameters))


def _candidate(
    task: Task, lists: Mapping[str, list[Any]], chosen: dict[str, Any], run: float, delta: float
) -> Candidate:
    """A combination as a plan whose training and score together cost about ``run``."""
    plan = plan_for(
        task,
        {
            **chosen,
            "epsilon": (1 - SCORING) * run,
            "evaluation_epsilon": SCORING * run,
            "evaluate": "final",
            "delta": delta,
        },
    )
    if plan.privacy.kind == "central":
        raise ConfigurationError(
            "tuning trains on the data of one holder, and where holders are the unit nothing about "
            "one holder can be learned; leave unit out"
        )
    values = {name: chosen[name] for name, several in lists.items() if len(several) > 1}
    return Candidate(values, solo_plan(plan))
