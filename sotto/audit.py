"""``sotto audit``: attack a plan as it runs, and fail if more comes out than it claims."""

from __future__ import annotations

from typing import Annotated

import typer

from common.errors import ConfigurationError, RunError
from sotto.options import Settings, shared_options
from sotto.show import Rounds, Screen, write_json

__all__ = ["audit"]


@shared_options
def audit(
    settings: Settings,
    task: Annotated[str, typer.Argument(help="Name of the task; see 'sotto tasks'.")],
    holder: Annotated[
        str | None, typer.Option(help="Whose units the canaries join; the first if left out.")
    ] = None,
    canaries: Annotated[int, typer.Option(help="Canaries in each run.")] = 1000,
    confidence: Annotated[
        float, typer.Option(help="With which all lower bounds hold together.")
    ] = 0.95,
    membership: Annotated[bool, typer.Option(help="Also attack the released model.")] = True,
) -> None:
    """Run a plan with canaries and attack it: lower bounds on ε beside the claim.

    A lower bound above the claim ends the command with exit code 3. Canaries of several --seeds
    count together.
    """
    # torch takes seconds to import; flags are checked, and help is shown, without it.
    from client.trainer import pick_device
    from common.settings import plan_for
    from common.tasks import load
    from simulations.audit import Audit, audit_document, audited
    from sotto.audit_report import attack_rows, bound_rows, verdict, write_audit

    if settings.baselines:
        raise ConfigurationError("--baselines: an audit compares with the claim; leave it out")
    screen = Screen(settings.output)
    loaded = load(task, settings.source, settings.preprocessing)
    plan = plan_for(loaded, settings.plan, holders=settings.holders)
    asked = Audit(
        loaded,
        plan,
        holder=holder,
        holders=settings.holders,
        canaries=canaries,
        runs=settings.seeds,
        confidence=confidence,
        device=pick_device(settings.device),
        membership=membership,
    )
    folder = settings.output.folder_for(task)
    screen.say(
        f"Auditing {task} on {plan.source} ({plan.preprocessing}): {plan.rounds} rounds, "
        f"{canaries} canaries, {settings.seeds} seed(s)."
    )
    with Rounds(screen, plan.rounds * (settings.seeds + membership)) as progress:
        result = audited(asked, progress.advance)
    written = audit_document(result)
    report = write_audit(folder, result, written)
    screen.table(f"Lower bounds on ε, {confidence:.4g} confidence", *bound_rows(written))
    if result.attacks:
        screen.table("Membership inference on the released model", *attack_rows(written))
    screen.say(f"Everything about this audit: {report}")
    write_json(settings.output.json, written)
    if result.contradicted:
        raise RunError(verdict(written))
    screen.say(verdict(written))
