"""A mapping that makes what is asked for, and nothing else."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest

from common.data.on_demand import OnDemand

NAMES = ["c", "a", "b", "d"]


def counted(keep: int | None = None) -> tuple[OnDemand[str], list[str]]:
    """The mapping, and a list of what was built, in order."""
    built: list[str] = []

    def build(name: str) -> str:
        built.append(name)
        return name.upper()

    return OnDemand(NAMES, build, keep), built


def test_only_what_is_asked_for_is_built_and_once() -> None:
    values, built = counted()
    assert built == []
    assert (values["b"], values["a"], values["b"]) == ("B", "A", "B")
    assert built == ["b", "a"]


@pytest.mark.parametrize(
    "look",
    [list, len, lambda values: "a" in values, lambda values: "z" in values, lambda v: v.keys()],
    ids=["names", "length", "inside", "outside", "keys"],
)
def test_looking_at_names_builds_nothing(look: Callable[[Mapping[str, str]], object]) -> None:
    values, built = counted()
    look(values)
    assert built == []


def test_it_is_a_mapping_in_the_order_of_its_names() -> None:
    values, _ = counted()
    assert isinstance(values, Mapping)
    assert list(values) == NAMES
    assert len(values) == len(NAMES)
    assert dict(values) == {name: name.upper() for name in NAMES}
    assert list(values.items()) == [(name, name.upper()) for name in NAMES]
    assert values == {name: name.upper() for name in NAMES}
    assert values.get("z") is None
    assert "a" in values
    assert "z" not in values
    assert 3 not in values


def test_an_unknown_name_is_an_error_and_is_not_built() -> None:
    values, built = counted()
    with pytest.raises(KeyError, match="z"):
        values["z"]
    assert built == []


def test_names_given_twice_are_one() -> None:
    assert list(OnDemand(["a", "b", "a"], str.upper)) == ["a", "b"]


def test_the_least_recently_used_go_first() -> None:
    values, built = counted(keep=2)
    values["a"], values["b"], values["a"], values["c"]  # b has not been used the longest
    assert built == ["a", "b", "c"]
    values["a"]
    assert built == ["a", "b", "c"]
    values["b"]
    assert built == ["a", "b", "c", "b"]


def test_nothing_is_kept_where_nothing_may_be() -> None:
    values, built = counted(keep=0)
    assert [values["a"], values["a"]] == ["A", "A"]
    assert built == ["a", "a"]


def test_a_value_that_could_not_be_built_is_tried_again() -> None:
    tries: list[str] = []

    def build(name: str) -> str:
        tries.append(name)
        if len(tries) == 1:
            raise OSError("not yet")
        return name

    values = OnDemand(["a"], build)
    with pytest.raises(OSError, match="not yet"):
        values["a"]
    assert values["a"] == "a"


def process_of(name: str) -> tuple[str, int]:
    return name, os.getpid()


def test_a_copy_has_the_names_and_makes_its_own_values() -> None:
    values = OnDemand(NAMES, process_of, keep=1)
    values["a"]
    copy: OnDemand[tuple[str, int]] = pickle.loads(pickle.dumps(values))  # noqa: S301
    assert list(copy) == NAMES
    assert copy["b"] == values["b"]
    copy["a"], copy["b"]
    assert len(copy._made) == 1, "it forgets as the original does"
    assert b"getpid" not in pickle.dumps(values)


def test_values_do_not_travel() -> None:
    """A hundred thousand of them may have been made here."""
    heavy = OnDemand(["a"], bytes_of)
    before = len(pickle.dumps(heavy))
    assert len(heavy["a"]) == 10**6
    assert len(pickle.dumps(heavy)) == before < 1000


def bytes_of(_: str) -> bytes:
    return bytes(10**6)


def test_threads_may_share_it() -> None:
    values, built = counted(keep=2)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda place: values[NAMES[place % 4]], range(400)))
    assert found == [NAMES[place % 4].upper() for place in range(400)]
    assert set(built) == set(NAMES)
    assert len(values._made) <= 2
