"""What an audit leaves in its folder: audit.json and report.html; and what it says in words."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from common.durable import write_bytes
from simulations.audit import THRESHOLD, AuditResult
from simulations.membership import allowed, roc
from sotto.page import INK, MUTED, page, svg, table, tidy
from sotto.show import figure, write_json

__all__ = ["attack_rows", "bound_rows", "draw", "verdict", "write_audit"]

_CANARY, _LIMIT = "#d55e00", "#a8763e"
_ATTACKS = {"loss": "#009e73", "lira": "#4b3f8f"}

_LOWEST_RATE = 1e-3
"""Of false positives, in the figure: a thousand canaries tell nothing about lower ones."""

_METHODS = {
    "one-run": "one run, (ε, δ)",
    "f-dp": "one run, f-DP",
    "gdp": "error rates, GDP",
}
_ATTACK_NAMES = {"loss": "loss of each unit", "lira": "likelihood ratio (LiRA)"}

_WHAT_IT_IS = (
    "Canaries are units whose gradient lies in a coordinate of their own and is cut to the clip "
    "norm, so that the coordinator sees the mechanism itself. Each was there by a fair coin. A "
    "bound says what ε the run cannot be below, judging by how many coins were guessed right; all "
    "hold together at the stated confidence. One above the claim shows that the claim is false; "
    "one below does not prove it."
)
_CAPTION = (
    "Left: a canary moves its coordinate by 1 on average if it was there and by 0 if not; guesses "
    "change at the dashed line, which was fixed beforehand. Right: at the smallest rates a few "
    "canaries decide, and a curve may pass the limit by chance; the bounds allow for that."
)
_MEMBERSHIP = (
    "Sixteen models were trained on random halves of the holder's units; each is attacked with the "
    "others as shadow models. This is what a reader of the released model finds out about who was "
    "in the data. ± is one standard error over the models. It is an attack, not a bound."
)


def write_audit(folder: Path, result: AuditResult, written: Mapping[str, Any]) -> Path:
    """Write the document and the page.

    Args:
        folder: made if it is not there.
        result: for scores and plan.
        written: the JSON document.

    Returns:
        The page's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(str(folder / "audit.json"), written)
    path = folder / "report.html"
    write_bytes(path, page(f"audit of {written['task']}", _sections(result, written)).encode())
    return path


def verdict(written: Mapping[str, Any]) -> str:
    """What the audit says about the claim, in a sentence or two."""
    best = max(written["bounds"], key=lambda bound: bound["epsilon"])
    claim, sure = written["claim"]["epsilon"], f"{written['confidence']:.4g}"
    where = f"by {_METHODS[best['method']]}, at confidence {sure} and δ = {_delta(written)}"
    if written["contradicted"]:
        return (
            f"the claim is contradicted: ε = {claim:g} is claimed and the run gives away at least "
            f"{best['epsilon']:.3g} ({where}); noise, clipping or accounting are not what the plan "
            "says, so release nothing with it until the cause is found"
        )
    return (
        f"Nothing contradicts the claim: ε is at least {best['epsilon']:.3g} ({where}), and "
        f"{claim:g} is claimed. That does not prove the claim."
    )


def bound_rows(written: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of lower bounds, the claim first."""
    rows = [["claimed", figure(written["claim"]["epsilon"], 2), "", ""]]
    rows += [
        [
            _METHODS[bound["method"]],
            figure(bound["epsilon"], 2),
            f"{bound['correct']} of {bound['guesses']}",
            bound["assumes"],
        ]
        for bound in written["bounds"]
    ]
    return ["", "ε at least", "right guesses", "assumes"], rows


def attack_rows(written: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of membership attacks, what is allowed last."""
    rows = [
        [
            _ATTACK_NAMES[one["attack"]],
            _with_error(one["auc"]),
            *(_with_error(found) for found in one["tpr"]),
        ]
        for one in written["membership"]
    ]
    allows = written["claim"]["allows"]
    for kind, title in (("gaussian", "allowed, Gaussian curve"), ("any", "allowed, any curve")):
        limits = (allows[kind]["auc"], *(one["value"] for one in allows[kind]["tpr"]))
        rows.append([title, *(figure(limit) for limit in limits)])
    rates = [f"TPR at {one['fpr']:.4g} FPR" for one in allows["any"]["tpr"]]
    return ["attack", "AUC", *rates], rows


def _with_error(found: Mapping[str, float]) -> str:
    return f"{figure(found['value'])} ± {figure(found['error'])}"


def _delta(written: Mapping[str, Any]) -> str:
    return f"{written['claim']['delta']:g}"


# -- the figure -----------------------------------------------------------------------------------


def draw(result: AuditResult, written: Mapping[str, Any]) -> Figure:
    """Two panels: the canaries' scores, and every attack's ROC below what the claim allows."""
    drawing = Figure(figsize=(9.6, 3.6), layout="constrained")
    scores, rates = drawing.subplots(1, 2)
    _draw_scores(scores, result)
    _draw_rates(rates, result, written)
    return drawing


def _draw_scores(axis: Any, result: AuditResult) -> None:
    edges = np.linspace(result.scores.min(), result.scores.max(), 41)
    for inside, colour, name in ((False, MUTED, "not there"), (True, _CANARY, "there")):
        chosen = result.scores[result.included == inside]
        axis.hist(chosen, bins=edges, color=colour, alpha=0.6, label=f"canary {name}")
    axis.axvline(THRESHOLD, color=INK, linewidth=1, linestyle=(0, (4, 2)))
    axis.legend(frameon=False, fontsize=8, labelcolor=INK)
    _label(axis, "What the coordinator sees of each canary", "movement; 1 is one canary's share")


def _draw_rates(axis: Any, result: AuditResult, written: Mapping[str, Any]) -> None:
    claim = written["claim"]
    x = np.geomspace(_LOWEST_RATE, 1.0, 400)
    for mu, dashes, name in (
        (claim["mu"], (0, (5, 2)), "allowed, Gaussian curve"),
        (None, (0, (1, 1.4)), "allowed, any curve"),
    ):
        limit = allowed(x, claim["epsilon"], claim["delta"], mu)
        axis.plot(x, limit, color=_LIMIT, linewidth=1.4, linestyle=dashes, label=name)
    axis.step(*roc(result.scores, result.included), where="post", color=_CANARY, label="canaries")
    for one in result.attacks:
        rates = roc(one.scores.ravel(), one.member.ravel())
        title = _ATTACK_NAMES[one.name]
        axis.step(*rates, where="post", color=_ATTACKS[one.name], linewidth=1.2, label=title)
    axis.plot(x, x, color=MUTED, linewidth=0.8, label="guessing")
    axis.set_xscale("log")
    axis.set_xlim(_LOWEST_RATE, 1)
    axis.set_ylim(0, 1.02)
    axis.legend(
        frameon=False, fontsize=7.5, labelcolor=INK, loc="upper left", bbox_to_anchor=(0, 0.97)
    )
    _label(axis, "True positive rate of every attack", "false positive rate")


def _label(axis: Any, title: str, below: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.set_xlabel(below, color=MUTED, fontsize=9)
    tidy(axis)


# -- the page -------------------------------------------------------------------------------------


def _sections(result: AuditResult, written: Mapping[str, Any]) -> list[str]:
    said = verdict(written)
    sections = [
        _heading(written),
        f"<p class=finding>{escape(said[0].upper() + said[1:])}</p>",
        f"<figure style='margin:1.4rem 0'>{svg(draw(result, written))}"
        f"<p class=caption>{escape(_CAPTION)}</p></figure>",
        f"<h2>Lower bounds on ε</h2>{table(*bound_rows(written))}<p>{escape(_WHAT_IT_IS)}</p>",
    ]
    if written["membership"]:
        sections.append(
            f"<h2>Membership inference on the released model</h2>{table(*attack_rows(written))}"
            f"<p>{escape(_MEMBERSHIP)}</p>"
        )
    plan = result.audit.plan
    return [
        *sections,
        f"<h2>What is claimed</h2><blockquote>{escape(plan.privacy.guarantee())}</blockquote>",
        f"<h2>Plan</h2><pre>{escape(plan.to_toml())}</pre>",
    ]


def _heading(written: Mapping[str, Any]) -> str:
    canaries, seeds = written["canaries"], len(written["seeds"])
    return (
        f"<h1>Audit of {escape(written['task'])}</h1><p class=lead>{escape(written['source'])} "
        f"({escape(written['preprocessing'])}) · {escape(written['holder'])}, {written['units']} "
        f"units · {written['rounds']} rounds · {canaries['included']} of {canaries['planted']} "
        f"canaries were there · {seeds} seed{'s' * (seeds > 1)}</p>"
    )
