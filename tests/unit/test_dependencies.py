"""Imports run one way, heavy libraries have one owner, and the command line answers without them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "miles"

# Layer by layer, lowest first; a module may import its own layer and those below.
LAYERS = [
    ("miles.types", "miles.errors", "miles.tasks"),
    ("miles.config", "miles.hooks"),
    ("miles.engine.protocol", "miles.engine.guard", "miles.engine.calls", "miles.engine.client")
    + ("miles.router.session.session_types",),
    ("miles.batch", "miles.exact", "miles.loss", "miles.rollout", "miles.rope"),
    ("miles.engine", "miles.router", "miles.weights", "miles.trainer", "miles.observe", "miles.trial"),
    ("miles.run",),
    ("miles.__main__",),
]

# Library -> where it may be imported.
OWNERS = {
    "ray": ("miles.run",),
    "sglang": ("miles.engine.sglang", "miles.rollout.generate_utils.sglang_parsers"),
    "megatron": ("miles.trainer.megatron",),
}

# Published import paths: they re-export the core, and the core never imports them.
SHIMS = ("miles.utils", "miles.backends")

WITHOUT_TORCH_AT_MODULE_LEVEL = ("miles.types", "miles.errors", "miles.config", "miles.hooks")
HEAVY = ("torch", "transformers", "numpy", "fastapi", "httpx", "pyarrow", "ray", "rich", "matplotlib")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for p in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path, *, anywhere: bool) -> Iterator[str]:
    """Full names that a file imports; imports under TYPE_CHECKING do not count. `anywhere` includes functions."""

    def walk(nodes: list[ast.stmt]) -> Iterator[str]:
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield from (
                    f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in MODULES else node.module
                    for a in node.names
                )
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                yield from walk(node.orelse)
            elif anywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for field in ("body", "orelse", "finalbody"):
                    yield from walk(getattr(node, field, []))
                for handler in getattr(node, "handlers", []):
                    yield from walk(handler.body)

    yield from walk(ast.parse(path.read_text()).body)


def belongs(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layer(name: str) -> int:
    """The layer of the longest entry that `name` belongs to."""
    found = [(len(p), i) for i, packages in enumerate(LAYERS) for p in packages if belongs(name, p)]
    assert found, f"{name} is in no layer: add its package to LAYERS"
    return max(found)[1]


CORE = [n for n in MODULES if n != "miles" and not any(belongs(n, s) for s in SHIMS)]


@pytest.mark.parametrize("name", CORE)
def test_imports_only_what_lies_below(name: str) -> None:
    for imported in imports(MODULES[name], anywhere=True):
        if not belongs(imported, "miles") or imported == "miles":
            continue
        assert not any(belongs(imported, s) for s in SHIMS), f"{name} imports the published path {imported}"
        assert layer(imported) <= layer(name), f"{name} imports {imported}, which lies above it"


@pytest.mark.parametrize("name", list(MODULES))
def test_heavy_libraries_have_one_owner(name: str) -> None:
    for imported in imports(MODULES[name], anywhere=True):
        for library, owners in OWNERS.items():
            if belongs(imported, library):
                assert any(belongs(name, o) for o in owners), f"{name} imports {library}"


@pytest.mark.parametrize("name", [n for n in CORE if any(belongs(n, p) for p in WITHOUT_TORCH_AT_MODULE_LEVEL)])
def test_light_packages_import_nothing_heavy_at_module_level(name: str) -> None:
    for imported in imports(MODULES[name], anywhere=False):
        assert imported.split(".")[0] not in HEAVY, f"{name} imports {imported} at module level"


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["hooks"]])
def test_answers_without_heavy_imports(command: list[str]) -> None:
    code = (
        "import sys\nfrom miles.__main__ import main\n"
        f"try:\n    status = main({command!r})\nexcept SystemExit as e:\n    status = e.code or 0\n"
        "assert status == 0, status\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"
