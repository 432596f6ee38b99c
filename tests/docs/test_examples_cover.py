"""Every plug point is used by an example, and every example is run by a test.

What an example uses is read from its files as they are executed: keys of YAML files, flags of the commands on its page,
flags of the commands at the head of plug-in files.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import shlex
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from docs_pages import ROOT, blocks

from miles.hooks import CATALOG, PlugPoint, load_function, plug_point_named

EXAMPLES = ROOT / "examples"
TESTS = [*(ROOT / "tests").rglob("*.py")]


@dataclass(frozen=True)
class Use:
    """Example: `Use(examples/DAPO/dapo.yaml, "custom_rm", "examples/quickstart/carry.py:reward")`"""

    where: Path
    name: str
    path: str

    def __str__(self) -> str:
        return f"{self.where.relative_to(EXAMPLES)} {self.name}"

    @property
    def is_of_an_example(self) -> bool:
        """Whether what is plugged in is an example itself, not a part of miles."""
        return self.path.startswith(("examples.", "examples/"))


def uses() -> Iterator[Use]:
    for file in sorted(EXAMPLES.rglob("*.yaml")):
        for key, value in yaml.safe_load(file.read_text()).items():
            if point := point_of(f"--{key}"):
                yield from (Use(file, point.name, path) for path in ([value] if isinstance(value, str) else value))
    for file, words in commands():
        for word, following in itertools.pairwise(words):
            if point := point_of(word):
                yield Use(file, point.name, following)


def point_of(option: str) -> PlugPoint | None:
    point = plug_point_named(option)
    return point if point is not None and point.flag == option else None


def commands() -> Iterator[tuple[Path, list[str]]]:
    """Of bash blocks on the examples' pages, and the indented ones in docstrings of modules."""
    for block in blocks("bash"):
        if EXAMPLES in block.page.parents:
            yield from ((block.page, shlex.split(line, comments=True)) for line in block.text.splitlines())
    for file in sorted(EXAMPLES.rglob("*.py")):
        for line in (ast.get_docstring(ast.parse(file.read_text())) or "").splitlines():
            if line.startswith("    miles "):
                yield file, shlex.split(line)


ALL = list(dict.fromkeys(uses()))


def test_every_plug_point_is_used() -> None:
    by_name: defaultdict[str, set[Path]] = defaultdict(set)
    for use in ALL:
        if use.is_of_an_example:
            by_name[use.name].add(use.where.parent)
    assert set(by_name) == set(CATALOG)
    # Those that the guide shows by an example of their own.
    for name, folder in {
        "rollout_function": "multi_agent",
        "custom_generate_function": "search-r1",
        "custom_tis_function": "train_infer_mismatch_helper",
        "custom_pg_loss_reducer_function": "DrGRPO",
    }.items():
        assert EXAMPLES / folder in by_name[name]


@pytest.mark.parametrize("use", ALL, ids=str)
def test_what_is_used_is_there(use: Use) -> None:
    with contextlib.chdir(ROOT):
        assert load_function(use.path) is not None


def run_files() -> list[Path]:
    """YAML files of flags that name a model: what `miles train --config` takes."""
    return [f for f in sorted(EXAMPLES.rglob("*.yaml")) if "hf-checkpoint" in yaml.safe_load(f.read_text())]


def texts_of_tests() -> set[str]:
    """Every string in the tests' code (docstrings and comments are none)."""
    found: set[str] = set()
    for file in TESTS:
        tree = ast.parse(file.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found |= {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
        }
    return found


def test_every_run_of_an_example_is_made_by_a_test() -> None:
    texts = texts_of_tests()
    assert [str(file.relative_to(ROOT)) for file in run_files() if str(file.relative_to(ROOT)) not in texts] == []


def test_every_run_of_an_example_is_on_its_page() -> None:
    """The page of a folder shows a command for each of its runs, so that nobody looks for how to start it."""
    shown = {word for _, words in commands() for word in words}
    shown |= {word for block in blocks("bash") for line in block.text.splitlines() for word in line.split()}
    by_hand = {"sft.yaml"}  # read by make_base.py, which its page names
    for file in run_files():
        assert file.name in by_hand or str(file.relative_to(ROOT)) in shown, file
