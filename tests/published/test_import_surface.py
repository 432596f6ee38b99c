"""Every published import path leads to an object that can be called as plug-ins written for it call it.

`surface.txt` is the table. Ours may take more parameters than the published signature, if they have defaults.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import pytest

HAS_DEFAULT = ...  # `name=...` in the table


@dataclass(frozen=True)
class Entry:
    """One line: `where` is a module, or a class in it; `signature` is None for what is only a name."""

    module: str
    owner: str | None
    name: str
    signature: Signature | None
    is_async: bool


def read_entry(module: str, owner: str | None, line: str) -> Entry:
    is_async = line.startswith("async ")
    text = line.removeprefix("async ").removeprefix("class ")
    name, bracket, _ = text.partition("(")
    return Entry(module, owner, name, read_signature(text) if bracket else None, is_async)


def read_signature(text: str) -> Signature:
    function = ast.parse(f"def {text}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    namespace: dict[str, Any] = {}
    exec(compile(ast.Module([function], []), "surface", "exec"), namespace)
    return inspect.signature(namespace[function.name])


def entries() -> Iterator[Entry]:
    module, owner = "", None
    for line in (Path(__file__).parent / "surface.txt").read_text().splitlines():
        depth = len(line) - len(line.lstrip())
        if line.startswith("#"):
            continue
        if depth == 0:
            module = line
        elif depth == 2:
            owner = line.split()[1] if line.startswith("  class ") else None
            yield read_entry(module, None, line.strip())
        else:
            yield read_entry(module, owner, line.strip())


TABLE = list(entries())
MODULES = list(dict.fromkeys(entry.module for entry in TABLE))


def differences(published: Signature, ours: Signature) -> Iterator[str]:
    """What a call that fits `published` could not do with `ours`."""
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    theirs = list(published.parameters.values())
    takes = {p.kind for p in ours.parameters.values()}
    slots = [p.name for p in ours.parameters.values() if p.kind in positional]
    for place, parameter in enumerate(theirs):
        if parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
            if parameter.kind not in takes:
                yield f"takes no {parameter}"
            continue
        mine = ours.parameters.get(parameter.name)
        if mine is None:
            yield f"has no parameter {parameter.name}"
            continue
        if parameter.kind in positional and (place >= len(slots) or slots[place] != parameter.name):
            yield f"parameter {parameter.name} does not stand in place {place + 1}"
        if parameter.default is HAS_DEFAULT and mine.default is Parameter.empty:
            yield f"parameter {parameter.name} has no default"
        elif parameter.default not in (HAS_DEFAULT, Parameter.empty, mine.default):
            yield f"the default of {parameter.name} is {mine.default!r}, published {parameter.default!r}"
    for mine in ours.parameters.values():
        known = mine.name in published.parameters or mine.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        if not known and mine.default is Parameter.empty:
            yield f"needs a parameter {mine.name} that is not published"


def problems(entry: Entry) -> Iterator[str]:
    holder = importlib.import_module(entry.module)
    if entry.owner is not None:
        holder = getattr(holder, entry.owner, None)
    if holder is None or not hasattr(holder, entry.name):
        # A field without a default is no attribute of its class.
        yield "is missing"
        return
    obj = getattr(holder, entry.name)
    if entry.signature is None:
        return
    published, ours = entry.signature, inspect.signature(obj)
    if inspect.ismethod(obj):
        published = published.replace(parameters=list(published.parameters.values())[1:])
    yield from differences(published, ours)
    if entry.is_async and not (inspect.iscoroutinefunction(obj) or inspect.isasyncgenfunction(obj)):
        yield "is no coroutine function"


@pytest.mark.parametrize("module", MODULES)
def test_a_published_path_offers_its_names(module: str) -> None:
    found = [
        f"{'.'.join(filter(None, [entry.owner, entry.name]))} {problem}"
        for entry in TABLE
        if entry.module == module
        for problem in problems(entry)
    ]
    assert not found, "\n".join([module, *found])


def test_the_check_sees_differences() -> None:
    published = read_signature("f(a, b=1, *, c, d=..., **kwargs)")
    assert not list(differences(published, read_signature("f(a, b=1, more=None, *, c, d=2, **kwargs)")))
    assert list(differences(published, read_signature("f(b, a=1, *, c, d, e)"))) == [
        "parameter a does not stand in place 1",
        "parameter b does not stand in place 2",
        "the default of b is <class 'inspect._empty'>, published 1",
        "parameter d has no default",
        "takes no **kwargs",
        "needs a parameter e that is not published",
    ]
