"""Every flag is a key, every mistake is a sentence, and its kind is the exit code."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import sotto as api
from common.errors import ConfigurationError
from common.plan import TrainingPlan
from common.settings import SETTINGS
from common.tasks import load, task_names
from server.runs import RunFolder
from sotto.options import _PLAN, _SHARED, Settings
from tests.commands import sotto

TASK = "medical-diagnosis"
ANYWHERE = ("--insecure", "--listen", "127.0.0.1:0")
"""A coordinator on whatever port is free."""


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# -- flags and keys -------------------------------------------------------------------------------

VALUES: dict[type, Sequence[object]] = {
    bool: (True, "yes"),
    int: (3, "three"),
    float: (0.5, "half"),
    str: ("word", ["a", "list"]),
    Path: ("somewhere", 2.5),
}
"""Type of a flag → a value of that type, and one that is not."""


def kind_of(name: str) -> type:
    kinds = {kind for kind in _SHARED[name].__origin__.__args__ if kind is not type(None)}
    (kind,) = kinds
    return kind


def settings_of(path: Path, **values: object) -> Settings:
    """What a TOML file with ``values`` sets, where no flag is given."""
    path.write_text(tomli_w.dumps(values))
    return Settings.merged({**dict.fromkeys(_SHARED), "config": path})


def as_set(settings: Settings, name: str) -> object:
    if name in _PLAN:
        return settings.plan[name]
    return getattr(settings.output if name in ("json", "out", "quiet") else settings, name)


@pytest.mark.parametrize("name", sorted(set(_SHARED) - {"config"}))
def test_every_shared_flag_is_a_key_of_the_toml(name: str, tmp_path: Path) -> None:
    value, wrong = VALUES[kind_of(name)]
    expected = Path(str(value)) if kind_of(name) is Path else value
    for key in (name, name.replace("_", "-")):
        assert as_set(settings_of(tmp_path / "plan.toml", **{key: value}), name) == expected
    with pytest.raises(ConfigurationError, match=rf"plan\.toml: {name} must be of type"):
        settings_of(tmp_path / "plan.toml", **{name: wrong})


@pytest.mark.parametrize("command", ["simulate", "sweep", "serve", "demo"])
def test_every_shared_flag_is_on_every_command_that_trains(command: str) -> None:
    said = sotto(command, "--no-such-flag")
    assert said.code == 2
    listed = said.err.partition("There are: ")[2].split(", ")
    assert {flag(name) for name in _SHARED} <= set(listed)


def test_every_setting_of_a_plan_has_a_flag() -> None:
    assert set(_PLAN) == set(SETTINGS)


def test_a_whole_number_and_a_word_may_both_be_a_batch_size(tmp_path: Path) -> None:
    assert settings_of(tmp_path / "a.toml", batch_size=32).plan == {"batch_size": "32"}
    assert settings_of(tmp_path / "a.toml", batch_size="full").plan == {"batch_size": "full"}


def test_true_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="rounds must be of type int, got True"):
        settings_of(tmp_path / "plan.toml", rounds=True)


def test_a_wrong_key_says_which_was_meant_and_which_there_are(tmp_path: Path) -> None:
    config = tmp_path / "plan.toml"
    config.write_text("rouns = 3")
    said = sotto("simulate", TASK, "--config", config)
    assert said.code == 2
    assert "there is no key 'rouns'. Did you mean 'rounds'? There are: " in said.err
    listed = said.err.partition("There are: ")[2].split(", ")
    assert set(listed) == {name.replace("_", "-") for name in _SHARED} - {"config"}


def test_a_config_that_is_not_there_or_not_toml_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "plan.toml"
    assert "No such file" in sotto("simulate", TASK, "--config", config).err
    config.write_text("rounds = [")
    said = sotto("simulate", TASK, "--config", config)
    assert said.code == 2
    assert "is not TOML" in said.err


def simulated(tmp_path: Path, *flags: object) -> TrainingPlan:
    out = tmp_path / "run"
    said = sotto("simulate", TASK, "--evaluate", "never", "--quiet", "--out", out, *flags)
    assert said.code == 0, said.err
    return RunFolder(out).plan


def test_flags_beat_the_file_and_the_file_beats_what_the_task_recommends(tmp_path: Path) -> None:
    config = tmp_path / "plan.toml"
    config.write_text("rounds = 2\nlearning-rate = 0.25\nepsilon = 4")
    plan = simulated(tmp_path, "--config", config, "--rounds", 1)
    recommended = load(TASK).recommended(4.0)
    assert plan.rounds == 1  # the flag
    assert plan.learning_rate == 0.25 != recommended["learning_rate"]  # the file
    assert plan.privacy.epsilon == 4.0
    assert plan.strategy.name == recommended["strategy"]  # nobody said otherwise


# -- sentences ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["simulat"], "No such command 'simulat'"),
        (
            ["simulat"],
            "There are: audit, data, demo, join, keys, ledger, policy, serve, simulate, stats, "
            "status, sweep, tasks, tune",
        ),
        (["keys", "sign"], "There are: approve, install, list, request"),
        (["simulate"], "Missing argument 'TASK'"),
        (["simulate", TASK, "--rouns", "3"], "No such option '--rouns'"),
        (["simulate", TASK, "--rounds", "many"], "'many' is not a valid integer"),
        (["simulate", TASK, "--rounds", "0"], "rounds: input should be greater than or equal"),
        (["simulate", TASK, "--seeds", "0"], "seeds must be at least 1, got 0"),
        (["simulate", TASK, "--holders", "0"], "holders must be at least 1, got 0"),
        (["simulate", TASK, "--epsilon", "-1"], "epsilon must be positive, got -1"),
        (["simulate", TASK, "--epsilon", "1", "--no-dp"], "contradict each other"),
        (["simulate", TASK, "--device", "gpu"], "device must be auto, cpu or cuda:N, got 'gpu'"),
        (["simulate", TASK, "--device", "cuda:99"], "device 'cuda:99' is not there"),
        (["simulate", "medical-diagnoses"], "Did you mean 'medical-diagnosis'?"),
        (["simulate", TASK, "--source", "mine"], "it has breast-cancer, heart-disease"),
        (["simulate", TASK, "--preprocessing", "mine"], "it has default"),
        (["simulate", TASK, "--strategy", "mine"], "there are fedavg, "),
        (["simulate", TASK, "--engine", "mine"], "there is no engine 'mine'; there are batched"),
        (["simulate", TASK, "--strategy", "krum", "--malicious", "1"], "needs at least 5 holders"),
        (["simulate", TASK, "--json", "no/such/folder.json"], "must be a file in a folder"),
        (["serve", TASK, "--state", "s", *ANYWHERE, "--strategy", "mine"], "there are fedavg, "),
        (["serve", TASK, "--state", "s", "--listen", "here", "--insecure"], "use HOST:PORT"),
        (["demo", "--seeds", "2"], "a demo is one run, got seeds=2; use 'sotto simulate'"),
        (["demo", "--unit", "holder"], "where holders are the unit nothing about one holder can"),
    ],
)
def test_a_mistake_is_a_sentence_and_leaves_nothing_behind(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = sotto(*words)
    assert said.code == 2
    assert said.err.startswith("sotto: ")
    assert says in said.err
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left <= {"lock"}  # which means nothing by being there


def test_a_run_with_a_strategy_that_cannot_work_does_not_block_the_next(tmp_path: Path) -> None:
    serve = ("serve", TASK, "--state", tmp_path, "--insecure", "--listen", "127.0.0.1:0")
    assert sotto(*serve, "--strategy", "krum").code == 2
    assert not list(tmp_path.glob("runs/*"))


def test_no_words_show_the_help() -> None:
    said = sotto()
    assert "Usage:" in said.out
    assert said.err == ""


def test_the_tasks_are_listed_with_unit_and_sources() -> None:
    said = sotto("tasks")
    assert said.code == 0
    for name in task_names():
        assert name in said.out
    assert "record" in said.out
    assert "movielens-100k" in said.out


def test_json_on_standard_output_is_alone_there(tmp_path: Path) -> None:
    said = sotto("simulate", TASK, "--rounds", 1, "--json", "-", "--out", tmp_path / "run")
    assert said.code == 0
    assert json.loads(said.out)["rounds"] == 1
    assert "Simulating medical-diagnosis" in said.err


def test_json_in_a_file_leaves_the_words_where_they_were(tmp_path: Path) -> None:
    said = sotto(
        "simulate", TASK, "--rounds", 1, "--json", tmp_path / "r.json", "--out", tmp_path / "run"
    )
    assert said.code == 0
    assert json.loads((tmp_path / "r.json").read_text())["rounds"] == 1
    assert "Simulating medical-diagnosis" in said.out


# -- joining --------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Any:
    """A coordinator's address at which every attempt to connect would be seen."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0)
        yield listening


def join(server: socket.socket, tmp_path: Path, *words: object) -> str:
    """The sentence with which `sotto join` gives up, before it has connected to anything."""
    address = f"127.0.0.1:{server.getsockname()[1]}"
    said = sotto(
        "join", "--server", address, "--state", tmp_path / "holder", "--task", TASK,
        "--insecure", "--name", "clinic-1", *words,
    )  # fmt: skip
    assert said.code == 2, said
    with pytest.raises(BlockingIOError):
        server.accept()
    return said.err


def test_a_holder_without_a_budget_is_told_what_to_do(
    server: socket.socket, tmp_path: Path
) -> None:
    said = join(server, tmp_path, "--part", "clinic-1")
    assert "set --budget EPS, the ε that may ever be released about this data" in said
    assert "--allow-no-dp" in said


def test_a_holder_brings_one_kind_of_data(server: socket.socket, tmp_path: Path) -> None:
    both = ("--data", tmp_path / "own.csv", "--part", "clinic-1")
    for words in ((), both):
        said = join(server, tmp_path, "--budget", 1, *words)
        assert "give either --data FILE or --part NAME, and not both" in said


def test_a_part_that_the_source_does_not_have_is_refused(
    server: socket.socket, tmp_path: Path
) -> None:
    said = join(server, tmp_path, "--budget", 1, "--part", "clinic-9")
    assert "has no part 'clinic-9'; it has clinic-1, clinic-2, clinic-3, clinic-4" in said


def test_a_bad_cell_is_named_before_any_connection_is_made(
    server: socket.socket, tmp_path: Path
) -> None:
    table = load(TASK).source.tables()["clinic-1"].astype({"mean texture": object})
    table.loc[2, "mean texture"] = "rough"
    own = tmp_path / "own.csv"
    table.to_csv(own, index=False)
    said = join(server, tmp_path, "--budget", 1, "--data", own)
    assert f"{own}: 1 cell does not fit the schema" in said
    assert "row 3" in said
    assert "'mean texture'" in said
    assert "'rough'" in said


def test_a_holder_without_a_certificate_is_told_how_to_get_one(tmp_path: Path) -> None:
    said = sotto(
        "join", "--server", "127.0.0.1:1", "--state", tmp_path, "--task", TASK,
        "--part", "clinic-1", "--budget", 1,
    )  # fmt: skip
    assert said.code == 2
    assert "sotto keys request" in said.err


@pytest.mark.parametrize("address", ["0.0.0.0:7443", "192.0.2.1:7443"])
def test_plain_text_is_refused_where_others_could_listen(address: str, tmp_path: Path) -> None:
    serve = sotto("serve", TASK, "--state", tmp_path / "c", "--listen", address, "--insecure")
    join = sotto(
        "join", "--server", address, "--state", tmp_path / "h", "--task", TASK,
        "--part", "clinic-1", "--budget", 1, "--insecure", "--name", "clinic-1",
    )  # fmt: skip
    for said in (serve, join):
        assert said.code == 2
        assert f"plain text is allowed on loopback only, and {address} is not" in said.err


# -- what help costs ------------------------------------------------------------------------------

HELP = [["--help"]] + [
    [name, "--help"] for name in ("simulate", "sweep", "serve", "demo", "join", "keys")
]


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys\n"
        "from sotto.cli import main\n"
        f"for words in {HELP!r}:\n"
        "    try:\n"
        "        main(words)\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0, words\n"
        "print('loaded:', sorted({'torch', 'flwr', 'opacus', 'grpc'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.count("Usage:") == len(HELP)
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_the_public_names_are_there_when_asked_for() -> None:
    for name in api.__all__:
        assert getattr(api, name).__name__ == name
    assert set(api.__all__) <= set(dir(api))
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = api.trian
