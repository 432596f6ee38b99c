"""From a path on the command line to the object it names. Says nothing about signatures: that is `adapt`.

    pkg.module.fn            split at the last dot, as published
    pkg.module:fn            the same with a colon; `fn` may be dotted (Class.method)
    path/to/file.py:fn       a file, relative to the working directory; `path/to/file.py.fn` means the same
    any registered name      `function_registry` wins over all of these

What a plug-in imports may be slime's (`foreign`).

Errors propagate as Python raises them; `problems` turns them into sentences.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

from miles.hooks import foreign
from miles.hooks.patience import told_when_slow


class FunctionRegistry:
    """Objects under names that need no module, for tests and notebooks. Registered names win over modules.

    Example::

        with function_registry.temporary("test:reward", reward):
            load_function("test:reward") is reward
    """

    def __init__(self) -> None:
        self._entries: dict[str, object] = {}

    @contextmanager
    def temporary(self, name: str, fn: object) -> Iterator[None]:
        """Register for the length of the block. AssertionError where the name is taken."""
        assert name not in self._entries, f"{name!r} is registered already"
        self._entries[name] = fn
        try:
            yield
        finally:
            del self._entries[name]

    def get(self, name: str) -> object | None:
        return self._entries.get(name)


function_registry = FunctionRegistry()


@dataclass(frozen=True)
class Reference:
    """A path taken apart: a module name or a file, and the attribute in it.

    Examples: `Reference("my.rewards", None, "grade")`, `Reference("", Path("my/rewards.py"), "grade")`
    """

    module: str
    file: Path | None
    attribute: str


def parse_path(path: str) -> Reference:
    """Raises ValueError for a path that names no attribute."""
    left, colon, attribute = path.rpartition(":")
    if not colon:
        stem, py, attribute = path.rpartition(".py.")
        if py and Path(stem + ".py").is_file():
            return Reference("", Path(stem + ".py"), attribute)
        left, _, attribute = path.rpartition(".")
    is_only_file = attribute == "py" and not colon and (os.sep in path or Path(path).is_file())
    if not left or not attribute or is_only_file:
        raise ValueError(f"{path!r} names no function: expected pkg.module.fn, pkg.module:fn or path/to/file.py:fn")
    if left.endswith(".py"):
        return Reference("", Path(left), attribute)
    return Reference(left, None, attribute)


def load_function(path: str | None) -> Any:
    """The object that `path` names; None for None. Any object: functions, classes, lists.

    Raises ModuleNotFoundError, ValueError, AttributeError, FileNotFoundError, or whatever importing raises.
    """
    if path is None:
        return None
    registered = function_registry.get(path)
    if registered is not None:
        return registered
    reference = parse_path(path)
    foreign.stand_in()
    with told_when_slow(f"importing {path}"):
        if reference.file is not None:
            module = import_file(reference.file)
        else:
            make_importable(os.getcwd())
            module = importlib.import_module(reference.module)
    return reduce(getattr, reference.attribute.split("."), module)


def make_importable(folder: str) -> None:
    """Put `folder` at the end of the import path, so that it shadows nothing."""
    if folder not in sys.path and not (folder == os.getcwd() and "" in sys.path):
        sys.path.append(folder)


def import_file(file: Path) -> ModuleType:
    """The module of a file, executed once per process however it is named.

    A file inside a package is imported as that package's module, so that its relative imports work. Any other is
    imported under its own name where that name is free, and its folder comes first on the import path meanwhile and
    stays importable afterwards (for imports inside functions).
    """
    file = file.expanduser().resolve()
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    for module in list(sys.modules.values()):
        attributes = module.__dict__ if isinstance(module, ModuleType) else {}
        origin = attributes.get("__file__") or ""
        if origin.endswith(file.name) and attributes["__name__"] != "__main__" and Path(origin).resolve() == file:
            return module
    root, name = _package_root(file)
    with _first_on_path(str(root)):
        if "." in name:
            return importlib.import_module(name)
        return _execute(file, name)


def _package_root(file: Path) -> tuple[Path, str]:
    """The folder to import from and the module's name there; a package that another one hides counts as none."""
    parts, folder = [file.stem], file.parent
    while (folder / "__init__.py").is_file() and folder.name.isidentifier():
        parts.insert(0, folder.name)
        folder = folder.parent
    if len(parts) == 1:
        return file.parent, file.stem
    loaded = sys.modules.get(parts[0])
    if loaded is None or str(folder / parts[0]) in [str(Path(p).resolve()) for p in getattr(loaded, "__path__", [])]:
        return folder, ".".join(parts)
    return file.parent, file.stem


def _execute(file: Path, stem: str) -> ModuleType:
    name = stem if _is_free(stem, file) else f"{stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_free(name: str, file: Path) -> bool:
    """Whether `import name` means this file or nothing."""
    if name in sys.modules or not name.isidentifier():
        return False
    with _without(str(file.parent)):
        return importlib.util.find_spec(name) is None


@contextmanager
def _first_on_path(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        make_importable(folder)


@contextmanager
def _without(folder: str) -> Iterator[None]:
    kept = sys.path[:]
    sys.path[:] = [p for p in kept if os.path.realpath(p or os.getcwd()) != folder]
    try:
        yield
    finally:
        sys.path[:] = kept
