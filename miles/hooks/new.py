"""`miles new PLUGPOINT [FILE]`: a typed plug-in that works, and a passing test next to it."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from miles.errors import UsageError
from miles.hooks.check import known_point
from miles.hooks.point import Form, PlugPoint
from miles.hooks.skeletons import SKELETONS, Skeleton

# Where the names in signatures come from. Those in the second table are for type checkers only.
_IMPORTS = {
    "asyncio": "import asyncio",
    "Namespace": "from argparse import Namespace",
    "Callable": "from collections.abc import Callable",
    "Any": "from typing import Any",
    "DynamicFilterOutput": "from miles.types import DynamicFilterOutput",
    "RolloutFnEvalOutput": "from miles.types import RolloutFnEvalOutput",
    "RolloutFnTrainOutput": "from miles.types import RolloutFnTrainOutput",
    "Sample": "from miles.types import Sample",
}
_TYPING_IMPORTS = {
    "torch": "import torch",
    "DataSource": "from miles.rollout.data_source import DataSource",
    "ParallelState": "from miles.backends.training_utils.parallel import ParallelState",
    "GPTModel": "from megatron.core.models.gpt import GPTModel",
    "ASGIApp": "from starlette.types import ASGIApp",
    "MilesRouter": "from miles.router.router import MilesRouter",
}


def new_main(argv: Sequence[str]) -> int:
    """Write FILE (by default named after the plug point) and `test_<FILE>`. Never overwrites."""
    parser = argparse.ArgumentParser(prog="miles new", description="Write a plug-in skeleton and a test for it.")
    parser.add_argument("plug_point", help="e.g. custom-rm; `miles hooks` lists them")
    parser.add_argument("file", nargs="?", type=Path, help="a Python file, by default named after the plug point")
    given = parser.parse_args(argv)
    point = known_point(given.plug_point)
    file: Path = given.file or Path(f"{_short_name(point)}.py")
    test = file.with_name(f"test_{file.stem}.py")
    if file.suffix != ".py":
        raise UsageError(f"{file}: expected the name of a Python file, such as {file.with_suffix('.py')}.")
    taken = [str(path) for path in (file, test) if path.exists()]
    if taken:
        raise UsageError(f"{' and '.join(taken)}: there already, and nothing is overwritten. Name another file.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(plugin_source(point, file), encoding="utf-8")
        test.write_text(test_source(point, file), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror}). Name another file.") from error
    used = shlex.quote(f"{file}:{defined_name(point)}")
    print(f"{file}\n{test}\n\ntry    pytest {shlex.quote(str(test))}\nuse    {point.flag} {used}")
    return 0


def _short_name(point: PlugPoint) -> str:
    return "my_" + point.name.removeprefix("custom_")


def defined_name(point: PlugPoint) -> str:
    """What the skeleton defines: a function, class or value."""
    skeleton = SKELETONS[point.name]
    if not skeleton.whole:
        return _short_name(point)
    found = re.match(r"(?:class )?(\w+)", skeleton.body)
    assert found is not None
    return found.group(1)


def plugin_source(point: PlugPoint, file: Path) -> str:
    """The plug-in's file."""
    skeleton = SKELETONS[point.name]
    form = point.form(skeleton.form)
    assert form is not None, skeleton.form
    definition = skeleton.body if skeleton.whole else _function(point, form, skeleton)
    title = point.help.removeprefix("Plug-in: ")
    head = f'"""{title[0].upper()}{title[1:]}\n\nUse it with {point.flag} {file}:{defined_name(point)}\n"""\n'
    parts = [head, "from __future__ import annotations\n", _import_block(definition), skeleton.constants]
    return "\n".join(p for p in parts if p) + "\n\n" + definition


def _function(point: PlugPoint, form: Form, skeleton: Skeleton) -> str:
    word = "async def" if point.awaited else "def"
    docstring = f'"""{point.when}\n\n{point.contract}\n"""'
    signature = f"{word} {_short_name(point)}{form.signature}:"
    if len(signature) > 100:
        signature = _wrapped(signature)
    return signature + "\n" + textwrap.indent(f"{docstring}\n{skeleton.body}", "    ")


def _wrapped(signature: str) -> str:
    """One parameter per line."""
    head, _, rest = signature.partition("(")
    parameters, arrow, result = rest.rpartition(") ->")
    pieces, depth = [""], 0
    for character in parameters:
        depth += character in "[("
        depth -= character in "])"
        if character == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    lines = "".join(f"    {piece.strip()},\n" for piece in pieces if piece.strip())
    return f"{head}(\n{lines}{arrow}{result}"


def _import_block(source: str, *more: str, for_types: bool = True) -> str:
    """The imports that `source` needs, and `more`, as a linter would sort them."""
    code = re.sub(r'""".*?"""', "", source, flags=re.DOTALL)
    names = set(re.findall(r"\b[A-Za-z_]\w*\b", code))
    typing_lines = [line for name, line in _TYPING_IMPORTS.items() if name in names and for_types]
    plain = [*more, *(line for name, line in _IMPORTS.items() if name in names)]
    if not typing_lines:
        return _sorted_imports(plain)
    block = textwrap.indent(_sorted_imports(typing_lines), "    ")
    return _sorted_imports([*plain, "from typing import TYPE_CHECKING"]) + f"\nif TYPE_CHECKING:\n{block}"


def _sorted_imports(lines: Sequence[str]) -> str:
    """Imports of one module on one line; first Python's own, then other packages, then miles."""
    names: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("from "):
            module, _, name = line.removeprefix("from ").partition(" import ")
            names.setdefault(module, []).append(name)
    merged = [line for line in lines if line.startswith("import ")]
    for module, found in sorted(names.items()):
        merged.append(f"from {module} import {', '.join(sorted(found, key=lambda n: (not n.isupper(), n)))}")
    groups: list[list[str]] = [[], [], []]
    for line in merged:
        top = line.split()[1].partition(".")[0]
        groups[2 if top == "miles" else 0 if top in sys.stdlib_module_names else 1].append(line)
    return "\n\n".join("\n".join(group) for group in groups if group) + "\n"


def test_source(point: PlugPoint, file: Path) -> str:
    """The test's file: the plug-in binds, and does what the skeleton says."""
    skeleton = SKELETONS[point.name]
    bound = f"hooks.{point.name}[0]" if point.plural else f"hooks.{point.name}"
    given = "[PLUG_IN]" if point.plural else "PLUG_IN"
    checks = skeleton.test
    ours = ("from pathlib import Path", "from miles.hooks import Hook", "from miles.hooks import bind")
    imports = _import_block(f"{checks} Namespace", *ours, for_types=False)
    lines = [
        f'"""Tests of {file.name}, a plug-in for {point.flag}."""\n',
        imports,
        f"PLUG_IN = f\"{{Path(__file__).parent / '{file.name}'}}:{defined_name(point)}\"\n\n",
        f"def bound() -> Hook:\n    hooks = bind(Namespace({point.dest}={given}))\n    return {bound}\n\n",
        "def test_it_is_accepted() -> None:\n" + textwrap.indent(f'assert bound().form == "{skeleton.form}"\n', "    "),
    ]
    if checks:
        call = textwrap.indent(f"hook = bound()\n{checks}", "    ")
        lines.append("\ndef test_it_does_its_work() -> None:\n" + call)
    return "\n".join(lines)
