"""``sotto join``: the resident process of a data holder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.link.keepalive import KEEPALIVE
from sotto.logs import LogFormat, LogFormatOption, screen_for
from sotto.options import Output
from sotto.pages import KeepaliveOption, MetricsOption
from sotto.policy_flags import UNPINNED, Wanted, require_fitting
from sotto.resident import stay
from sotto.show import Screen, figure

if TYPE_CHECKING:
    from client.holder import Holder
    from common.link.keys import HolderKeys
    from common.tasks.base import HolderData, HolderTables, Task

__all__ = ["join", "own_data", "own_tables"]


def join(
    server: Annotated[str, typer.Option(help="HOST:PORT of the coordinator.")],
    state: Annotated[Path, typer.Option(help="Folder of keys, ledger and answers.")],
    task: Annotated[str, typer.Option(help="Name of the task; see 'sotto tasks'.")],
    source: Annotated[str | None, typer.Option(help="Whose schema the data follow.")] = None,
    preprocessing: Annotated[str | None, typer.Option(help="Preparation of the source.")] = None,
    data: Annotated[Path | None, typer.Option(help="A file of your own, CSV or Parquet.")] = None,
    part: Annotated[
        str | None, typer.Option(help="Instead of --data: the holder in the source to play.")
    ] = None,
    holders: Annotated[int | None, typer.Option(help="With --part: how the source is cut.")] = None,
    policy: Annotated[
        Path | None, typer.Option(help="What is allowed; policy.toml in --state.")
    ] = None,
    data_set: Annotated[
        str | None,
        typer.Option(
            help="Name that the budget attaches to, over runs and restarts; the policy's only one, "
            "or 'default'."
        ),
    ] = None,
    budget: Annotated[float | None, typer.Option(help="ε of all releases, ever.")] = None,
    delta: Annotated[float | None, typer.Option(help="δ of the budget; the source's own.")] = None,
    allow_no_dp: Annotated[
        bool, typer.Option("--allow-no-dp", help="Answer plans without privacy, too.")
    ] = False,
    share_metrics: Annotated[
        bool,
        typer.Option("--share-metrics", help="Send exact metrics; public data, --allow-no-dp."),
    ] = False,
    size_class: Annotated[
        int | None,
        typer.Option(help="Public, rough number of training units to declare; the source's own."),
    ] = None,
    aggregation: Annotated[
        list[str] | None,
        typer.Option(
            help="A level that is allowed, plain, secure or secure-sum; may be repeated. The first "
            "two, unless given."
        ),
    ] = None,
    anchor: Annotated[
        list[Path] | None,
        typer.Option(
            help="A further file that knows the ledger's last entry; see 'sotto ledger anchor'."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the split into training and held-out rows.")] = 0,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Plain text, on loopback only.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="With --insecure: the holder's name.")] = None,
    metrics: MetricsOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say less.")] = False,
    keepalive: KeepaliveOption = KEEPALIVE,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> None:
    """Hold data and answer a coordinator, within a policy, until stopped.

    The policy is DIR/policy.toml. Where there is none, the flags about it make the first one;
    where there is one, it holds, and flags must say the same.
    """
    from client.holder import Holder
    from client.policy_file import add_policy, policy_path
    from client.state import HolderState
    from client.trainer import pick_device
    from common.durable import locked
    from common.errors import ConfigurationError
    from common.link.certificates import fingerprint
    from common.tasks import load
    from sotto.keys_report import expiry_warnings

    del log_format  # taken before any other flag
    rules = policy or policy_path(state)
    wanted = Wanted(
        data_set, budget, delta, allow_no_dp, share_metrics, size_class, tuple(aggregation or ())
    )
    is_first = policy is None and not rules.exists()
    if is_first:
        wanted.require_enough()
    if (data is None) == (part is None):
        raise ConfigurationError("give either --data FILE or --part NAME, and not both")
    screen = screen_for("join", Output(quiet=quiet))
    keys, own_name = _identity(state, name, insecure=insecure)
    for warning in expiry_warnings(keys) if keys else ():
        screen.say(warning, "certificate_expires")
    loaded = load(task, source, preprocessing)
    own = own_tables(loaded, data, part, holders, seed)
    size = loaded.source.nominal_size(holders)
    authority = fingerprint(keys.authority) if keys else None
    allowed = (
        wanted.policy(loaded.source.delta, size, authority)
        if is_first
        else wanted.agreed(rules, size)
    )
    require_fitting(rules, allowed, loaded.name, authority or server)
    with locked(state, "sotto join"), HolderState.at(state, anchor or ()) as memory:
        holder = Holder(
            own_name,
            loaded,
            loaded.prepare(own),
            allowed,
            memory,
            pick_device(device),
            coordinator=authority or server,
            rows=own.train,
        )
        holder.trainer.warm_up()
        if is_first:
            add_policy(rules, allowed)
            sentence = f"Wrote {rules} from the flags; from now on it is what holds."
            screen.say(sentence, "policy_written", file=str(rules))
        _greet(screen, holder)
        if "secure-sum" in allowed.aggregation and not allowed.holders:
            screen.say(f"{holder.name}: {UNPINNED}", "unpinned", holder=holder.name)
        stay(screen, holder, server, keys, metrics=metrics, keepalive=keepalive)


def _identity(state: Path, name: str | None, *, insecure: bool) -> tuple[HolderKeys | None, str]:
    """The holder's certificate and the name in it; a bare name where there is no TLS."""
    from common.errors import ConfigurationError
    from common.link.keys import HolderKeys

    if not insecure:
        keys = HolderKeys.load(state)
        return keys, keys.name
    if name is None:
        raise ConfigurationError("--insecure has no certificate to take a name from: give --name")
    return None, name


def own_tables(
    task: Task, path: Path | None, part: str | None, holders: int | None, seed: int
) -> HolderTables:
    """The holder's rows, checked against the schema before anything else happens, and split."""
    from common.data.tables import check_table, read_table
    from common.errors import ConfigurationError

    if path is not None:
        table = check_table(read_table(path), task.schema, file=str(path))
        return task.split_own(table, seed=seed)
    tables = task.source.tables(holders)
    if part is None or part not in tables:
        raise ConfigurationError(
            f"source {task.source.name!r} has no part {part!r}; it has {', '.join(tables)}"
        )
    return task.split(tables[part], holder=part, seed=seed)


def own_data(
    task: Task, path: Path | None, part: str | None, holders: int | None, seed: int
) -> HolderData:
    """The same, encoded."""
    return task.prepare(own_tables(task, path, part, holders, seed))


def _greet(screen: Screen, holder: Holder) -> None:
    """Ready, and what the account says."""
    policy = holder.policy
    fields: dict[str, object] = {
        "holder": holder.name,
        "data_set": policy.data_set,
        "dry_run": policy.dry_run,
    }
    if policy.budget is not None:
        spent, budget = holder.spent(), policy.budget
        account = (
            f"ε {figure(spent)} of {budget.epsilon:g} spent on data set {policy.data_set!r} "
            f"(δ={budget.delta:g})"
        )
        fields |= {"epsilon_spent": spent, "epsilon_budget": budget.epsilon, "delta": budget.delta}
    elif policy.unprotected:
        account = "no budget is set, releases are not protected"
    else:
        account = "no budget is set, so every request is refused"
    rehearsal = " A dry run: nothing is computed or sent." if policy.dry_run else ""
    screen.say(f"{holder.name}: ready; {account}.{rehearsal}", "ready", **fields)
