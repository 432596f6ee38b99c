"""Plug-ins that import what is not installed, and what miles has under another name.

    slime.utils.types                   miles.utils.types, the very same module object
    slime.backends.megatron_utils.loss  miles.backends.training_utils.loss
    megatron.training                   miles.backends.megatron_utils.training: megatron-core comes without it

What is installed wins. Names that miles does not have fail as missing modules do, under their own name.
Signatures that differ are the business of `adapt`: forms of a plug point, not of its imports.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

FOREIGN = ("slime", "megatron.training")

# Longest first: the first that is a prefix decides.
ALIASES = (
    ("megatron.training", "miles.backends.megatron_utils.training"),
    ("slime.backends.megatron_utils.cp_utils", "miles.backends.training_utils.cp_utils"),
    ("slime.backends.megatron_utils.loss", "miles.backends.training_utils.loss"),
    ("slime.backends.megatron_utils", "miles.backends.training_utils"),
    ("slime", "miles"),
)


def stand_in() -> None:
    """From now on, such imports are answered. Called before a plug-in is loaded; later calls change nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # In front, so that miles' files are never loaded a second time under another name.
        sys.meta_path.insert(0, _Finder())


def adapter_of(obj: Any) -> str | None:
    """What `miles check` says of a plug-in whose file imports what miles answers for; None for all others.

    Example: `imports of slime answered by miles`.
    """
    module = sys.modules.get(getattr(obj, "__module__", None) or "")
    answered = [name for name in FOREIGN if _is_answered(name)]
    if module is None or not answered:
        return None
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):
        return None
    imported: list[str] = []
    for node in ast.walk(tree):
        imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    used = [name for name in answered if any(_belongs(other, name) for other in imported)]
    return f"imports of {' and '.join(used)} answered by miles" if used else None


def _belongs(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _is_answered(name: str) -> bool:
    """Whether a foreign package is miles in this process."""
    return name in sys.modules and sys.modules[name] is sys.modules.get(_own_name(name))


def _own_name(fullname: str) -> str:
    theirs, ours = next(pair for pair in ALIASES if _belongs(fullname, pair[0]))
    return ours + fullname.removeprefix(theirs)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in FOREIGN:
            installed = PathFinder.find_spec(fullname, path)
            return None if installed is not None and installed.loader is not None else self._spec(fullname)
        package = next((name for name in FOREIGN if _belongs(fullname, name)), None)
        return self._spec(fullname) if package is not None and _is_answered(package) else None

    def _spec(self, fullname: str) -> ModuleSpec | None:
        own = _own_name(fullname)
        try:
            if importlib.util.find_spec(own) is None:
                raise ModuleNotFoundError
        except ModuleNotFoundError:
            # No other finder may look: it would find miles' files under a foreign name.
            raise ModuleNotFoundError(f"No module named {fullname!r}: miles has no {own}", name=fullname) from None
        return ModuleSpec(fullname, _Loader(own), is_package=True)


class _Loader(Loader):
    """Gives out the module of miles as it is, its own name and spec included."""

    def __init__(self, own: str) -> None:
        self.own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.own)
        self.own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.own_spec
