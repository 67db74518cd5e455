"""``sotto sweep``: many settings and seeds of an experiment at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import ConfigurationError
from sotto.options import Settings, list_options
from sotto.show import Screen, Share, sweep_rows, write_json

if TYPE_CHECKING:  # it needs torch
    from simulations.sweep import MakeWorkers, Sweep, SweepResult

__all__ = ["sweep"]


@list_options
def sweep(
    settings: Settings,
    task: Annotated[str, typer.Argument(help="Name of the task; see 'sotto tasks'.")],
    data: Annotated[
        Path | None, typer.Option(help="A file of your own, CSV or Parquet, to divide.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --data: the file is public or synthetic.")
    ] = False,
    engine: Annotated[
        str, typer.Option(help="How local training is computed: batched or ray.")
    ] = "batched",
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster, as ray://…; a local one if left out.")
    ] = None,
) -> None:
    """Simulate every combination of settings, with several seeds and baselines, all at once.

    Settings of the plan take lists: --epsilon 0.5,1,2,inf --strategy fedavg,fedadam
    """
    _check_engine(engine)
    _check_public(data, public=public)
    # torch takes seconds to import; flags are checked, and help is shown, without it.
    from client.trainer import pick_device
    from common.data.own_file import OwnFile
    from common.tasks import load
    from simulations.engines import workers_for
    from simulations.results import sweep_document
    from simulations.sweep import Sweep
    from sotto.sweep_report import SEARCH, findings, guarantees, write_sweep

    screen = Screen(settings.output)
    device = pick_device(settings.device)
    loaded = load(task, settings.source, settings.preprocessing)
    if data is not None:
        loaded.source = OwnFile(data, loaded.source)
    first = settings.plan.get("seed", 0)
    asked = Sweep.over(
        loaded,
        settings.plan,
        range(first, first + settings.seeds),
        holders=settings.holders,
        baselines=settings.baselines,
    )
    folder = settings.output.folder_for(task)
    folder.mkdir(parents=True, exist_ok=True)
    screen.say(
        f"Sweeping {task} on {loaded.source.name} ({loaded.preprocessing}): "
        f"{len(asked.settings)} setting(s), {settings.seeds} seed(s)."
    )
    result = _run(
        asked, lambda data: workers_for(engine, loaded, data, device, address), folder, screen
    )
    written = sweep_document(result, engine=engine, device=str(device))
    report = write_sweep(folder, asked, written)
    screen.table(f"{task} on {loaded.source.name}: {written['headline']}", *sweep_rows(written))
    for sentence in (*_failures(written), *findings(written), guarantees(asked), SEARCH):
        screen.say(sentence)
    screen.say(f"Figure, tables and plans: {report}")
    write_json(settings.output.json, written)


def _check_engine(engine: str) -> None:
    """Before anything is loaded: who stacks holders can sweep."""
    if engine == "opacus":
        raise ConfigurationError(
            "--engine opacus trains one holder at a time and cannot sweep; use batched or ray, or "
            "'sotto simulate --engine opacus' for each setting"
        )
    if engine not in ("batched", "ray"):
        raise ConfigurationError(f"there is no engine {engine!r} to sweep with; use batched or ray")


def _check_public(data: Path | None, *, public: bool) -> None:
    """A sweep tells exactly how every setting did, which no price covers."""
    if data is not None and not public:
        raise ConfigurationError(
            "a sweep shows exact figures of every setting, and choosing by them tells of the "
            "people in the file: 'sotto tune' chooses at a price, from the holder's ledger; if "
            "the file is public or synthetic, say --public"
        )


def _run(asked: Sweep, make_workers: MakeWorkers, folder: Path, screen: Screen) -> SweepResult:
    """What the folder does not hold yet, with a bar."""
    from simulations.sweep import run_sweep

    def begin(found: int, total: int) -> None:
        if found:
            screen.say(f"{found} of {total} runs were found finished in {folder}.")

    try:
        with Share(screen) as progress:
            return run_sweep(asked, make_workers, folder, progress.reached, begin)
    except KeyboardInterrupt:
        screen.say(
            f"Interrupted. Finished runs are kept; the same command with --out {folder} goes on "
            "from there."
        )
        raise


def _failures(written: Mapping[str, Any]) -> list[str]:
    failed = [one for point in written["points"] for one in point["failed"]]
    if not failed:
        return []
    return [
        f"{len(failed)} run(s) failed and count nothing; the first: seed {failed[0]['seed']}, "
        f"{failed[0]['kind']}: {failed[0]['why']}."
    ]
