"""`miles new PLUGPOINT [NAME]`: a typed plug-in that works, and a passing test next to it.

The bodies are in `skeletons`; signatures, docstrings and flags come from the catalogue.
"""

from __future__ import annotations

import argparse
import keyword
import re
import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from miles.errors import UsageError
from miles.hooks.catalog import plug_point_named
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
    "GenerateFnInput": "from miles.types import GenerateFnInput",
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
# What plug-ins and their tests import beside Python's own modules: a file of that name would be in their place.
_NEEDED = ("httpx", "miles", "pytest", "torch", "megatron", "starlette")

QUICKSTART = Path("examples/quickstart/carry.yaml")


@dataclass(frozen=True)
class Target:
    """What is written, and how a flag names it.

    Example: `my.rewards.grade` is `Target(Path("my/rewards.py"), "grade", "my.rewards.grade")`
    """

    file: Path
    name: str
    path: str

    @property
    def test(self) -> Path:
        return self.file.with_name(f"test_{self.file.stem}.py")


def new_main(argv: Sequence[str]) -> int:
    """Write a plug-in and a test beside it. Never overwrites. Prints what to do next."""
    parser = argparse.ArgumentParser(prog="miles new", description="Write a plug-in that works, and a test for it.")
    parser.add_argument("plug_point", help="e.g. custom-rm; `miles hooks` lists them")
    parser.add_argument(
        "name",
        nargs="?",
        help="a file (my/rewards.py), one with the name of the function (my/rewards.py:grade) or a module path "
        "(my.rewards.grade); by default named after the plug point",
    )
    # `--custom-rm-path` would be read as an option of this command.
    given = parser.parse_args([word.lstrip("-") if plug_point_named(word) else word for word in argv])
    point = known_point(given.plug_point)
    target = target_of(given.name, point)
    taken = [str(path) for path in (target.file, target.test) if path.exists()]
    if taken:
        raise UsageError(f"{' and '.join(taken)}: there already, and nothing is overwritten. Name another file.")
    try:
        target.file.parent.mkdir(parents=True, exist_ok=True)
        target.file.write_text(plugin_source(point, target), encoding="utf-8")
        target.test.write_text(test_source(point, target), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{target.file}: cannot be written ({error.strerror}). Name another file.") from error
    print(f"{target.file}\n{target.test}\n\nnext:\n  pytest {shlex.quote(str(target.test))}\n  {try_it(point, target)}")
    return 0


def try_it(point: PlugPoint, target: Target) -> str:
    """The command that tries the plug-in without a run."""
    used = f"{point.flag} {shlex.quote(target.path)}"
    run = f"--config {QUICKSTART}" if QUICKSTART.is_file() else "FLAGS OF YOUR RUN"
    return " ".join(filter(None, ["miles check", run, SKELETONS[point.name].flags, used]))


def target_of(text: str | None, point: PlugPoint) -> Target:
    """What NAME stands for. Raises UsageError where it cannot be a Python file or a name in one."""
    default = _default_name(point)
    if text is None:
        file = Path(f"{_short_name(point)}.py")
        return Target(file, default, f"{file}:{default}")
    head, colon, name = text.rpartition(":")
    file = Path(head if colon else text)
    if "/" in str(file) or file.suffix == ".py":
        if file.suffix != ".py":
            raise UsageError(f"{file}: expected the name of a Python file, such as {file.with_suffix('.py')}.")
        target = Target(file, name if colon else default, f"{file}:{name if colon else default}")
    else:
        *modules, name = text.replace(":", ".").split(".")
        if not all(_is_name(module) for module in modules) or not text:
            raise UsageError(f"{text!r}: expected a file (my/rewards.py) or a module path (my.rewards.grade).")
        file = Path("/".join(modules or [name]) + ".py")
        target = Target(file, name, text if modules else f"{file}:{name}")
    if not _is_name(target.name) or target.name in {*_IMPORTS, *_TYPING_IMPORTS}:
        raise UsageError(f"{text}: {target.name!r} cannot be the name of a plug-in. Take another, such as {default}.")
    if not re.fullmatch(r"[\w-]+", file.stem) or file.stem in {*sys.stdlib_module_names, *_NEEDED}:
        raise UsageError(
            f"{text}: a file called {file.name} would hide a module of that name, or cannot be imported by its test. "
            f"Name it otherwise, such as {file.with_name(f'{_short_name(point)}.py')}."
        )
    return target


def _is_name(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


def _short_name(point: PlugPoint) -> str:
    return "my_" + point.name.removeprefix("custom_")


def _default_name(point: PlugPoint) -> str:
    """What the skeleton defines where no other name is given: a function, class or value."""
    skeleton = SKELETONS[point.name]
    if not skeleton.whole:
        return _short_name(point)
    found = re.match(r"(?:class |def )?(\w+)", skeleton.body)
    assert found is not None
    return found.group(1)


def plugin_source(point: PlugPoint, target: Target) -> str:
    """The plug-in's file."""
    skeleton = SKELETONS[point.name]
    form = point.form(skeleton.form)
    assert form is not None, skeleton.form
    if skeleton.whole:
        definition = re.sub(rf"\b{_default_name(point)}\b", target.name, skeleton.body)
    else:
        definition = _function(point, form, skeleton, target.name)
    title = point.help.removeprefix("Plug-in: ")
    used = target.path.replace("\\", "\\\\").replace('"', '\\"')
    head = f'"""{title[0].upper()}{title[1:]}\n\nUse it with {point.flag} {used}\n"""\n'
    parts = [head, "from __future__ import annotations\n", _import_block(definition), skeleton.constants]
    return "\n".join(p for p in parts if p) + "\n\n" + definition


def _function(point: PlugPoint, form: Form, skeleton: Skeleton, name: str) -> str:
    word = "async def" if point.awaited else "def"
    docstring = f'"""{point.when}\n\n{point.contract}\n"""'
    signature = f"{word} {name}{form.signature}:"
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


def test_source(point: PlugPoint, target: Target) -> str:
    """The test's file: the plug-in binds, and does what the skeleton says."""
    skeleton = SKELETONS[point.name]
    bound = f"hooks.{point.name}[0]" if point.plural else f"hooks.{point.name}"
    given = "[PLUG_IN]" if point.plural else "PLUG_IN"
    checks = skeleton.test
    ours = ["from pathlib import Path", "from miles.hooks import Hook", "from miles.hooks import bind"]
    patches = "monkeypatch" in checks
    imports = _import_block(f"{checks} Namespace", *ours, *(["import pytest"] if patches else []), for_types=False)
    lines = [
        f'"""Tests of {target.file.name}, a plug-in for {point.flag}."""\n',
        "from __future__ import annotations\n",
        imports,
        f'PLUG_IN = f"{{Path(__file__).with_name(\'{target.file.name}\')}}:{target.name}"\n\n',
        f"def bound() -> Hook:\n    hooks = bind(Namespace({point.dest}={given}))\n    return {bound}\n\n",
        "def test_it_is_accepted() -> None:\n" + textwrap.indent(f'assert bound().form == "{skeleton.form}"\n', "    "),
    ]
    fixture = "monkeypatch: pytest.MonkeyPatch" if patches else ""
    gap = "\n" if checks.startswith(("def ", "async def ")) else ""
    call = textwrap.indent(f"hook = bound()\n{gap}{checks}", "    ")
    lines.append(f"\ndef test_it_does_its_work({fixture}) -> None:\n{call}")
    return "\n".join(lines)
