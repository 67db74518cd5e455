"""The ``sotto`` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, NoReturn

import click
import typer

from common.errors import RunError, SottoError, StorageError

__all__ = ["EXIT_CODES", "OWN_EXIT_CODES", "main"]

# Flower reports usage and looks for updates unless told not to; a data holder's machine does
# neither on Sotto's behalf.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
# gRPC writes a line for every stranger that does not get through TLS, as fast as they come. What
# matters is in our own log, which is rationed. gRPC reads this when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

EXIT_DEFECT, EXIT_USAGE, EXIT_RUN_FAILED, EXIT_INTERRUPTED = 1, 2, 3, 130

EXIT_CODES: Mapping[int, str] = {
    0: "success; a holder, or a `--watch`, that was stopped",
    EXIT_DEFECT: "a defect of Sotto or of a task: there is a traceback",
    EXIT_USAGE: "a flag, file, key, address or table that cannot work; again changes nothing",
    EXIT_RUN_FAILED: "a run, or a disk, that cannot go on; again goes on where it stopped",
    EXIT_INTERRUPTED: "interrupted, by Ctrl-C or by SIGTERM",
}
"""What every exit code means, unless :data:`OWN_EXIT_CODES` says otherwise."""

OWN_EXIT_CODES: Mapping[str, Mapping[int, str]] = {
    "keys": {1: "cannot do what was asked"},
    "audit": {3: "the audit found more than the guarantee allows"},
    "policy check": {3: "the policy declines the plan"},
    "status": {3: "no coordinator runs with that state folder"},
}
"""What a code means on commands where it says more."""

_ENDS = {EXIT_USAGE: "unusable", EXIT_RUN_FAILED: "run_failed", EXIT_INTERRUPTED: "interrupted"}
"""Code → event in the log."""


def _application() -> typer.Typer:
    from sotto.audit import audit
    from sotto.data_commands import app as data
    from sotto.demo import demo
    from sotto.join import join
    from sotto.keys_commands import app as keys
    from sotto.ledger_commands import app as ledger
    from sotto.policy_commands import app as policy
    from sotto.serve import serve
    from sotto.simulate import simulate
    from sotto.stats import stats
    from sotto.status import status
    from sotto.sweep import sweep
    from sotto.tune import tune

    app = typer.Typer(
        name="sotto",
        help="Federated, privacy-preserving learning on data that stays where it is.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    app.callback()(_common)
    app.command()(demo)
    app.command()(simulate)
    app.command()(sweep)
    app.command()(tune)
    app.command()(audit)
    app.command()(stats)
    app.command()(serve)
    app.command()(join)
    app.command()(status)
    app.command()(tasks)
    app.add_typer(keys, name="keys", help="Certificates: request, approve, rotate, revoke, list.")
    app.add_typer(policy, name="policy", help="What a holder allows: init, show, check a plan.")
    app.add_typer(ledger, name="ledger", help="A holder's account: show, verify, export, budgets.")
    app.add_typer(data, name="data", help="Data sets: list, get, check a file of your own.")
    return app


def _common(
    verbose: Annotated[bool, typer.Option("--verbose", help="Log what happens.")] = False,
) -> None:
    from sotto.logs import set_up

    set_up(verbose=verbose)


def tasks() -> None:
    """List the tasks, Sotto's own and those of installed packages."""
    from common.tasks import task_class, task_names
    from sotto.options import Output
    from sotto.show import Screen

    rows = []
    for name in task_names():
        kind = task_class(name)
        rows.append([name, kind.unit, kind.headline, ", ".join(kind.sources)])
    Screen(Output()).table("Tasks", ["task", "unit", "headline", "sources"], rows)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; every error is a sentence, and its kind is the exit code.

    See :data:`EXIT_CODES`.

    Args:
        arguments: what follows ``sotto``; None for this process's own.
    """
    try:
        result = _application()(arguments, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError:
        sys.exit(EXIT_USAGE)  # the help has been shown
    except click.exceptions.NoSuchCommand as error:
        commands = getattr(error.ctx.command if error.ctx else None, "commands", {})
        _fail(f"{error.format_message()} There are: {', '.join(sorted(commands))}", EXIT_USAGE)
    except click.exceptions.NoSuchOption as error:
        options = sorted(name for parameter in _parameters(error.ctx) for name in parameter.opts)
        _fail(f"{error.format_message()} There are: {', '.join(options)}", EXIT_USAGE)
    except click.ClickException as error:
        _fail(error.format_message(), EXIT_USAGE)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _fail("interrupted", EXIT_INTERRUPTED)
    except (RunError, StorageError) as error:
        _fail(str(error), EXIT_RUN_FAILED)
    except SottoError as error:
        _fail(str(error), EXIT_USAGE)
    if result == EXIT_INTERRUPTED:  # typer makes an exit code of Ctrl-C
        _fail("interrupted", EXIT_INTERRUPTED)
    sys.exit(result if isinstance(result, int) else 0)


def _parameters(context: click.Context | None) -> list[click.Option]:
    command = context.command if context else None
    return [item for item in getattr(command, "params", []) if isinstance(item, click.Option)]


def _fail(sentence: str, code: int) -> NoReturn:
    from sotto.logs import in_json, report

    if in_json():
        report(sentence, _ENDS[code], code)
    else:
        print(f"sotto: {sentence}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
