"""What runs whatever bytes say: found in source code, and made impossible in a process.

Pickle is a program, and so is everything that is built on it; `eval` and its kind are meant to run
programs. Only the standard library is imported here, because :func:`forbid` must come first.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NoReturn

__all__ = ["MODULES", "Names", "forbid", "offences", "reachable"]

MODULES = frozenset(
    ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal")
) | {"shelve", "torch.multiprocessing", "multiprocessing", "ray"}
"""Whoever imports one of these unpickles, or has it done."""

_NEVER = frozenset(
    (
        *(f"builtins.{name}" for name in ("eval", "exec", "compile", "__import__")),
        *(f"torch.{name}" for name in ("load", "save", "jit.load", "hub.load", "package")),
        *(f"pandas.{name}" for name in ("read_pickle", "to_pickle", "read_hdf", "eval")),
        *(f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load")),
        "concurrent.futures.ProcessPoolExecutor",
    )
)
_ONLY_WITHOUT_PICKLE = frozenset(
    f"numpy.{name}"
    for name in (
        *("load", "save", "savez", "savez_compressed"),
        *("lib.format.read_array", "lib.format.write_array"),
    )
)
_METHODS = frozenset(("read_pickle", "to_pickle"))


class Names:
    """What the names in a source stand for, as far as its imports tell.

    Args:
        tree: of a module or a part of one.
    """

    def __init__(self, tree: ast.AST) -> None:
        self._meaning: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    first = alias.name.partition(".")[0]
                    self._meaning[alias.asname or first] = alias.name if alias.asname else first
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    self._meaning[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def dotted(self, node: ast.AST) -> str | None:
        """``numpy.lib.format.read_magic`` for whatever stands for it, None for a local name."""
        if isinstance(node, ast.Name):
            own = f"builtins.{node.id}"
            return self._meaning.get(node.id, own if own in _NEVER else None)
        if isinstance(node, ast.Attribute) and (whole := self.dotted(node.value)):
            return f"{whole}.{node.attr}"
        return None


def offences(source: str) -> list[str]:
    """Everything in a source by which bytes could be run, each with its line.

    Args:
        source: of a module, or of a function with its indentation.
    """
    tree = ast.parse(textwrap.dedent(source))
    names = Names(tree)
    return [
        f"line {getattr(node, 'lineno', 0)}: {what}"
        for node in ast.walk(tree)
        for what in _offences_of(node, names)
    ]


def _offences_of(node: ast.AST, names: Names) -> Iterator[str]:
    match node:
        case ast.Import(names=imported):
            yield from (f"import {alias.name}" for alias in imported if _runs(alias.name))
        case ast.ImportFrom(module=str(module), level=0, names=imported):
            wholes = [f"{module}.{alias.name}" for alias in imported]
            yield from (whole for whole in wholes if _runs(whole) or whole in _NEVER)
        case ast.Name() | ast.Attribute():
            if (name := names.dotted(node)) in _NEVER:
                yield str(name)
            elif isinstance(node, ast.Attribute) and node.attr in _METHODS:
                yield f".{node.attr}"
        case ast.Call():
            yield from _offences_of_call(node, names)


def _offences_of_call(call: ast.Call, names: Names) -> Iterator[str]:
    name = names.dotted(call.func)
    if name in _ONLY_WITHOUT_PICKLE and not any(
        keyword.arg == "allow_pickle" and _is(keyword.value, False) for keyword in call.keywords
    ):
        yield f"{name} without allow_pickle=False"
    if name == "importlib.import_module" and any(
        isinstance(word, ast.Constant) and _runs(str(word.value)) for word in call.args
    ):
        yield f"{name} of {ast.unparse(call.args[0])}"
    # `model.eval()` is torch's; an expression to evaluate is an argument.
    if isinstance(call.func, ast.Attribute) and call.func.attr == "eval" and call.args:
        yield ".eval of an expression"


def _runs(module: str) -> bool:
    return any(module == one or module.startswith(f"{one}.") for one in MODULES)


def _is(node: ast.AST, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def reachable(function: Callable[..., Any]) -> list[FunctionType]:
    """A function and those of its module that it calls by name, and they, and so on."""
    found: list[FunctionType] = []
    ahead: list[object] = [function]
    while ahead:
        here = ahead.pop()
        if isinstance(here, FunctionType) and here not in found:
            found.append(here)
            # The module's own names; numpy tells of `__module__` where a function is public.
            home = here.__globals__
            ahead += [home[name] for name in here.__code__.co_names if _lives_in(home, name)]
    return found


def _lives_in(home: Mapping[str, object], name: str) -> bool:
    return getattr(home.get(name), "__globals__", None) is home


def forbid(log: Path) -> None:
    """Make unpickling impossible in this process from now on.

    Args:
        log: a line is added to it now, and one for every attempt.
    """
    import _pickle
    import pickle

    def note(text: str) -> None:
        with log.open("a") as file:
            file.write(f"{text}\n")

    def refuse(*_: object, **__: object) -> NoReturn:
        note("unpickled")
        raise RuntimeError("this process must not unpickle")

    def hook(event: str, _: object) -> None:
        if event == "pickle.find_class":  # raised by every unpickler, however it was come by
            refuse()

    modules: tuple[ModuleType, ...] = (pickle, _pickle)
    for module in modules:
        for name in ("load", "loads", "_load", "_loads"):
            setattr(module, name, refuse)
        for name in {"Unpickler", "_Unpickler"} & vars(module).keys():
            # Others derive from it when they are imported, which is no harm.
            setattr(module, name, type(name, (getattr(module, name),), {"__init__": refuse}))
    sys.addaudithook(hook)
    note("watched")
