"""Problems with plug-ins as text: which flag, what was given, what was found, what is expected, what to do."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import os
from pathlib import Path
from typing import Any

from miles.hooks.blame import message_of, place_of
from miles.hooks.load import Reference, parse_path
from miles.hooks.point import PlugPoint, signature_text
from miles.hooks.source import own_place, shown, source_of
from miles.hooks.values import kind_of

# How many names a "there is ..." list shows: enough to find one's own, short enough to read.
_MAX_NAMES = 6


def problem(point: PlugPoint, path: object, found: str, *, expected: str = "", remedy: str = "") -> str:
    """One problem, as `miles check` prints it.

    Example::

        --custom-rm-path my.rewards.grad
          found     module my.rewards (my/rewards.py) has no `grad`; it defines grade (my/rewards.py:12)
          expected  (args: Namespace, sample: Sample) -> float | dict[str, Any]
          remedy    did you mean my.rewards.grade?
    """
    said = (("found", found), ("expected", expected), ("remedy", remedy))
    lines = [f"  {name:<10}{text.replace(chr(10), chr(10) + ' ' * 12)}" for name, text in said if text]
    return "\n".join([f"{point.flag} {path}", *lines])


def described(obj: Any, name: str) -> str:
    """An object with its place and signature: `grade(args, sample, extra) at my/rewards.py:12`."""
    kind = "class " if inspect.isclass(obj) else "async " if inspect.iscoroutinefunction(obj) else ""
    if not callable(obj):
        return f"{name}, {kind_of(obj)}, not a function or class"
    try:
        signature = signature_text(inspect.signature(obj))
    except (TypeError, ValueError):
        signature = "(...)"
    return f"{kind}{name}{signature} at {source_of(obj)}"


def expected_forms(point: PlugPoint) -> str:
    """All accepted signatures, one per line."""
    lines = [form_text(point, f.name) for f in point.forms]
    return "\nor ".join(dict.fromkeys(lines))


def form_text(point: PlugPoint, name: str) -> str:
    form = point.form(name)
    assert form is not None, name
    if form.target == "value":
        return "a value of type " + form.signature.removeprefix("() -> ")
    word = {"class": "class", "function": "async def" if point.awaited else "def"}[form.target]
    return f"{word} {form.signature}"


def load_problem(point: PlugPoint, path: str, error: BaseException) -> str:
    """What went wrong while `path` was loaded."""
    expected = expected_forms(point)
    try:
        reference = parse_path(path)
    except ValueError:
        return problem(
            point, path, "a path that names no function",
            expected="pkg.module.fn, pkg.module:fn or path/to/file.py:fn",
            remedy=_without_attribute(path),
        )  # fmt: skip
    if isinstance(error, SyntaxError) and error.filename is not None:
        line = (error.text or "").strip()
        return problem(
            point, path, f"{type(error).__name__} at {shown(error.filename)}:{error.lineno}: {error.msg}: {line}",
            remedy="mend that line",
        )  # fmt: skip
    if isinstance(error, FileNotFoundError) and reference.file is not None and not reference.file.is_file():
        found, remedy = _missing_file(reference.file)
        return problem(point, path, found, remedy=remedy)
    if isinstance(error, ModuleNotFoundError) and _is_part(error.name, reference.module):
        found, remedy = _missing_module(reference.module, str(error.name))
        return problem(point, path, found, remedy=remedy)
    if isinstance(error, AttributeError) and own_place(error.__traceback__, None) is None:
        found, remedy = _missing_attribute(reference, path, error)
        return problem(point, path, found, expected=expected, remedy=remedy)
    return problem(point, path, f"importing it raised {at_place(error)}", remedy=_import_remedy(error))


def at_place(error: BaseException, plugin_file: str | None = None) -> str:
    """`ZeroDivisionError: division by zero at my/rewards.py:3: x = 1 / 0`; a message of several lines stands alone."""
    text, place = message_of(error), place_of(error, plugin_file)
    if place is None:
        return text
    return f"{text}{chr(10) if chr(10) in text else ' '}at {place}: {place.text}"


def _is_part(missing: str | None, module: str) -> bool:
    return missing is not None and (module == missing or module.startswith(missing + "."))


def _without_attribute(path: str) -> str:
    given = path.rstrip(":")
    if given.endswith(".py") or given != path:
        return f"add the function's name: {given}:function"
    if Path(f"{given}.py").is_file():
        return f"give the file and the function: {given}.py:function"
    return f"{path!r} has no module part"


def _missing_file(file: Path) -> tuple[str, str]:
    folder = file.parent
    if not folder.is_dir():
        return f"no folder {folder} (paths are relative to {os.getcwd()})", "give the path of a Python file"
    names = sorted(p.name for p in folder.glob("*.py"))
    close = difflib.get_close_matches(file.name, names, n=1)
    listed = ", ".join(names[:_MAX_NAMES]) or "no Python files"
    remedy = f"did you mean {folder / close[0]}?" if close else f"{folder} has {listed}"
    return f"no file {file} (paths are relative to {os.getcwd()})", remedy


def _missing_module(module: str, missing: str) -> tuple[str, str]:
    parent, _, last = missing.rpartition(".")
    if not parent:
        as_file = Path(module.replace(".", os.sep) + ".py")
        remedy = (
            f"put its folder on PYTHONPATH, or give the file: path/to/{last}.py:function"
            if not as_file.is_file()
            else f"give the file: {as_file}:function"
        )
        return f"no module named {missing!r} on the import path (working directory: {os.getcwd()})", remedy
    spec = importlib.util.find_spec(parent)
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    if not places:
        where = shown(spec.origin) if spec is not None and spec.origin else parent
        return f"{parent!r} is a module ({where}), not a package: no {missing!r}", "check the middle of the path"
    names = sorted({p.stem for place in places for p in Path(place).glob("*.py") if p.stem != "__init__"})
    close = difflib.get_close_matches(last, names, n=1)
    listed = ", ".join(names[:_MAX_NAMES]) or "none"
    remedy = f"did you mean {parent}.{close[0]}?" if close else f"modules there: {listed}"
    return f"package {parent!r} ({shown(places[0])}) has no module {last!r}", remedy


def _missing_attribute(reference: Reference, path: str, error: AttributeError) -> tuple[str, str]:
    holder, missing = error.obj, error.name or reference.attribute
    holder_name = getattr(holder, "__name__", reference.module)
    file = inspect.getsourcefile(holder) if inspect.ismodule(holder) or inspect.isclass(holder) else None
    own = {n: o for n, o in vars(holder).items() if callable(o) and not n.startswith("_")} if file else {}
    here = {n: o for n, o in own.items() if source_of(o).file == file} or own
    close = difflib.get_close_matches(missing, list(own), n=1, cutoff=0.5)
    listed = ", ".join(f"{n} ({source_of(here[n])})" for n in list(here)[:_MAX_NAMES]) or "no functions"
    where = f" ({shown(file)})" if file else ""
    found = f"{holder_name}{where} has no {missing!r}; it defines {listed}"
    if not close:
        return found, "name one of these"
    prefix = path[: len(path) - len(reference.attribute)]
    return found, f"did you mean {prefix}{close[0]} ({source_of(own[close[0]])})?"


def _import_remedy(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"install {error.name}, or put its folder on PYTHONPATH"
    return "mend that line; the module must import by itself: python -c 'import ...'"
