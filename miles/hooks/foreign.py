"""Plug-ins that import slime: where it is not installed, `import slime.x` gives `miles.x`, which has the same layout.

    slime.utils.types                   miles.utils.types, the very same module object
    slime.backends.megatron_utils.loss  miles.backends.training_utils.loss

A slime that is installed wins. Names that miles does not have fail as missing modules do, under their slime name.
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

FOREIGN = "slime"

# Longest first: the first that is a prefix decides.
ALIASES = (
    ("slime.backends.megatron_utils.cp_utils", "miles.backends.training_utils.cp_utils"),
    ("slime.backends.megatron_utils.loss", "miles.backends.training_utils.loss"),
    ("slime.backends.megatron_utils", "miles.backends.training_utils"),
    ("slime", "miles"),
)


def stand_in() -> None:
    """From now on, imports of slime are answered. Called before a plug-in is loaded; later calls change nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # In front, so that miles' files are never loaded a second time under another name.
        sys.meta_path.insert(0, _Finder())


def adapter_of(obj: Any) -> str | None:
    """What `miles check` says of a plug-in whose file imports slime while miles answers for it; None for all others.

    Example: `imports of slime answered by miles`.
    """
    module = sys.modules.get(getattr(obj, "__module__", None) or "")
    if module is None or not _answered():
        return None
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):
        return None
    for node in ast.walk(tree):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if any(name.split(".")[0] == FOREIGN for name in names):
            return f"imports of {FOREIGN} answered by miles"
    return None


def _answered() -> bool:
    """Whether `slime` is miles in this process."""
    return FOREIGN in sys.modules and sys.modules[FOREIGN] is sys.modules.get("miles")


def _own_name(fullname: str) -> str:
    theirs, ours = next(pair for pair in ALIASES if fullname == pair[0] or fullname.startswith(pair[0] + "."))
    return ours + fullname.removeprefix(theirs)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == FOREIGN:
            installed = PathFinder.find_spec(FOREIGN)
            return None if installed is not None and installed.loader is not None else self._spec(fullname)
        return self._spec(fullname) if fullname.startswith(FOREIGN + ".") and _answered() else None

    def _spec(self, fullname: str) -> ModuleSpec | None:
        own = _own_name(fullname)
        try:
            if importlib.util.find_spec(own) is None:
                raise ModuleNotFoundError
        except ModuleNotFoundError:
            # No other finder may look: it would find miles' files under the name of slime.
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
