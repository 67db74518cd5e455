"""The lock file is what it says: pins that fit pyproject.toml, for every build, from nowhere."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.lock import installed, lock_file, pins

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = [
    Requirement(text)
    for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["ray"])
]


class Installed(metadata.Distribution):
    """An installed package, made up."""

    def __init__(self, name: str, version: str) -> None:
        self._text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"

    def read_text(self, filename: str) -> str | None:
        return self._text if filename == "METADATA" else None

    def locate_file(self, path: object) -> Path:
        raise NotImplementedError


def test_a_build_of_its_own_is_locked_as_the_version_that_every_build_satisfies() -> None:
    (version,) = installed([Installed("torch", "2.13.0+cpu")]).values()
    assert version == "2.13.0"
    assert Requirement(f"torch=={version}").specifier.contains("2.13.0+cpu")
    # And not the other way round: with its label, only that build could be installed.
    assert not Requirement("torch==2.13.0+cpu").specifier.contains("2.13.0")


def test_names_and_versions_are_as_an_index_writes_them() -> None:
    found = [Installed("Foo_bar.Baz", "2026.01.2"), Installed("A", "1"), Installed("Sotto", "0.1")]
    assert list(installed(found).items()) == [("a", "1"), ("foo-bar-baz", "2026.1.2")]


NAMES = st.from_regex(r"[a-z0-9]+(-[a-z0-9]+){0,2}", fullmatch=True)
VERSIONS = st.from_regex(r"[0-9]{1,3}(\.[0-9]{1,3}){0,3}((a|b|rc|\.post)[0-9])?", fullmatch=True)


@given(st.dictionaries(NAMES, VERSIONS))
def test_a_lock_file_says_what_went_in(versions: dict[str, str]) -> None:
    assert pins(lock_file(versions, python="3.11", platform="linux")) == versions


@pytest.mark.parametrize(
    "line",
    [
        "numpy>=2",
        "torch==2.13.0+cpu",
        "torch @ file:///wheels/torch.whl",
        "--index-url https://example.org/simple",
        "Jinja2==3.1.6",
        "",
        "numpy==1.0\nnumpy==2.0",
    ],
)
def test_a_line_that_is_no_plain_pin_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="make lock"):
        pins(f"# a comment\n{line}\nscipy==1.0\n")


@pytest.mark.parametrize("required", REQUIRED, ids=str)
def test_every_dependency_is_locked_at_a_version_that_its_range_allows(
    required: Requirement,
) -> None:
    version = pins(LOCK).get(canonicalize_name(required.name))
    assert version is not None, "run `make lock`"
    assert required.specifier.contains(version), "run `make lock`"


def test_the_lock_file_is_for_the_oldest_python_that_is_supported() -> None:
    # What a newer one gets is never too new for an older one.
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert LOCK.splitlines()[0].endswith(f"as pip resolved it for Python {oldest} on")
    assert lock_file(pins(LOCK), python=oldest, platform="linux") == LOCK
