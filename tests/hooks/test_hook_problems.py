"""What `bind` says about plug-ins that cannot be used: flag, what was found and where, what to do; all at once."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles.errors import HookReport
from miles.hooks import bind, extend_parser, function_registry


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory that is importable, and forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    path, modules = sys.path[:], set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def problems_of(**paths: object) -> list[str]:
    with pytest.raises(HookReport) as caught:
        bind(Namespace(**paths))
    return caught.value.problems


def only_problem(**paths: object) -> str:
    (text,) = problems_of(**paths)
    return text


GOOD = "async def grade(args, sample):\n    return 1.0\n\n\ndef grade_all(args, samples):\n    return [1.0]\n"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("no_such_package.rewards.grade", ["no module named 'no_such_package'", "PYTHONPATH"]),
        ("tasks.reward.grade", ["package 'tasks'", "has no module 'reward'", "did you mean tasks.rewards?"]),
        (
            "tasks.rewards.grad",
            [
                "tasks.rewards (tasks/rewards.py) has no 'grad'",
                "did you mean tasks.rewards.grade (tasks/rewards.py:1)?",
            ],
        ),
        ("tasks.rewards:gradeall", ["did you mean tasks.rewards:grade_all (tasks/rewards.py:5)?"]),
        ("tasks/rewards.py:grad", ["did you mean tasks/rewards.py:grade"]),
        (
            "tasks.rewards.zzz",
            ["it defines grade (tasks/rewards.py:1), grade_all (tasks/rewards.py:5)", "name one of these"],
        ),
        ("tasks.rewards.deep.grade", ["'tasks.rewards' is a module (tasks/rewards.py), not a package"]),
        ("tasks/reward.py:grade", ["no file tasks/reward.py", "did you mean tasks/rewards.py?"]),
        ("task/rewards.py:grade", ["no folder task"]),
        ("tasks/rewards.py", ["names no function", "tasks/rewards.py:function"]),
        ("grade", ["names no function"]),
        ("prize.py", ["names no function", "add the function's name: prize.py:function"]),
        ("prize.py:", ["names no function", "add the function's name: prize.py:function"]),
        ("prize", ["names no function", "give the file and the function: prize.py:function"]),
        ("prizes.grade", ["no module named 'prizes'"]),
    ],
)
def test_paths_that_lead_nowhere(folder: Path, path: str, says: list[str]) -> None:
    (folder / "tasks").mkdir()
    (folder / "tasks" / "__init__.py").touch()
    (folder / "tasks" / "rewards.py").write_text(GOOD)
    (folder / "prize.py").write_text(GOOD)
    text = only_problem(custom_rm_path=path)
    assert text.startswith(f"--custom-rm-path {path}\n")
    for part in says:
        assert part in text


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def grade(args, sample)\n    return 1\n", ["SyntaxError at mine.py:1", "def grade(args, sample)"]),
        ("def grade(args):\n  x = 1\n   y = 2\n", ["IndentationError at mine.py:3"]),
        ("import math\n\nlimit = 1 / 0\n", ["ZeroDivisionError: division by zero at mine.py:3: limit = 1 / 0"]),
        ("import no_such_library\n", ["No module named 'no_such_library' at mine.py:1", "install no_such_library"]),
        ("import json\n\ndata = json.loads('{')\n", ["JSONDecodeError", "at mine.py:3: data = json.loads"]),
        ("x = None\nx.y\n", ["AttributeError: 'NoneType' object has no attribute 'y' at mine.py:2"]),
        ("import sys\nsys.exit(3)\n", ["SystemExit: 3 at mine.py:2: sys.exit(3)"]),
        ("from json import no_such_name\n", ["ImportError", "at mine.py:1"]),
    ],
)
@pytest.mark.parametrize("path", ["mine.grade", "mine.py:grade"])
def test_files_that_cannot_be_imported(folder: Path, source: str, says: list[str], path: str) -> None:
    (folder / "mine.py").write_text(source)
    text = only_problem(custom_rm_path=path)
    for part in says:
        assert part in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("async def grade(sample): ...", ["async grade(sample) at mine.py:1", "too many positional arguments"]),
        (
            "def grade(args, sample, extra): ...",
            ["grade(args, sample, extra) at mine.py:1", "missing a required argument: 'extra'"],
        ),
        ("grade = 3", ["grade, an int, not a function or class", "name a function"]),
        (
            "class grade:\n    def __init__(self, model): ...",
            ["class grade(model) at mine.py:1", "cannot be made without arguments"],
        ),
        (
            "class grade:\n    def __init__(self):\n        open('missing')",
            ["making an object of the class raised FileNotFoundError", "mine.py:3: open('missing')"],
        ),
        ("class grade:\n    pass", ["name a function"]),
        (
            "class grade:\n    def state_dict(self): ...\n    def __call__(self, args, sample): ...",
            ["without load_state_dict"],
        ),
    ],
)
def test_signatures_that_do_not_fit(folder: Path, source: str, says: list[str]) -> None:
    (folder / "mine.py").write_text(source + "\n")
    text = only_problem(custom_rm_path="mine.py:grade")
    for part in says:
        assert part in text, text
    if "open(" not in source:
        assert "expected" in text and "remedy" in text


def test_everything_is_reported_at_once(folder: Path) -> None:
    (folder / "mine.py").write_text(GOOD + "\n\nasync def keep(args, group):\n    return True\n")
    (folder / "bad.py").write_text("1 / 0\n")
    with pytest.raises(HookReport) as caught:
        bind(
            Namespace(
                rollout_function_path="mine.grade_all",
                custom_rm_path="mine.grad",
                custom_generate_function_path="bad.generate",
                dynamic_sampling_filter_path="mine.keep",
                buffer_filter_path="nowhere.filter",
                miles_router_middleware_paths=["mine.grade", "mine.nothing"],
            ),
            policies={"custom-rmm": "drop", "custom-tis-function": "drop"},
            forms={"custom-rm": "list"},
        )
    problems = caught.value.problems
    heads = [p.splitlines()[0].split()[0] for p in problems]
    assert heads == [
        "--hook-policy",
        "--hook-policy",
        "--rollout-function-path",
        "--custom-generate-function-path",
        "--custom-rm-path",
        "--dynamic-sampling-filter-path",
        "--buffer-filter-path",
        "--miles-router-middleware-paths",
        "--miles-router-middleware-paths",
    ]
    assert "did you mean custom-rm?" in problems[0]
    assert "got 'drop', expected raise" in problems[1]
    assert str(caught.value).startswith("9 plug-in problems, found before anything was started:")


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("raise", True),
        ("drop", True),
        ("mask", True),
        ("retry:1", True),
        ("retry:3,drop", True),
        ("retry:2, mask", True),
        ("retry", False),
        ("retry:0", False),
        ("retry:x", False),
        ("ignore", False),
        ("drop,mask", False),
        ("raise,drop", False),
        ("", False),
    ],
)
def test_policies(text: str, accepted: bool) -> None:
    async def grade(args: Namespace, sample: object) -> float:
        return 0.0

    with function_registry.temporary("test:grade", grade):
        args = Namespace(custom_rm_path="test:grade")
        if accepted:
            hook = bind(args, policies={"--custom-rm-path": text}).custom_rm
            assert hook is not None and str(hook.policy) == text.replace(" ", "")
        else:
            with pytest.raises(HookReport, match="expected raise, drop, mask, retry:N, retry:N,drop or retry:N,mask"):
                bind(args, policies={"custom_rm": text})


def test_plug_ins_add_flags_and_broken_ones_are_left_to_bind(folder: Path) -> None:
    (folder / "mine.py").write_text(
        "def grade(args, sample): ...\n\n\ndef add(parser):\n"
        "    parser.add_argument('--strictness', type=int, default=3)\n\n\ngrade.add_arguments = add\n\n\n"
        "class Generate:\n    @staticmethod\n    def add_arguments(parser):\n"
        "        parser.add_argument('--turns', type=int, default=2)\n"
    )
    paths = {
        "custom_rm_path": "mine.grade",
        "custom_generate_function_path": "mine.Generate",
        "buffer_filter_path": "no.such",
    }
    for _ in range(2):
        parser = ArgumentParser()
        extend_parser(parser, paths)
        assert vars(parser.parse_args(["--turns", "5"])) == {"strictness": 3, "turns": 5}


def test_a_failing_add_arguments_is_told_with_its_line(folder: Path) -> None:
    (folder / "mine.py").write_text(
        "def grade(args, sample): ...\n\n\n"
        "def add(parser):\n    parser.add_argument('--help')\n\n\ngrade.add_arguments = add\n"
    )
    with pytest.raises(HookReport, match=r"add_arguments raised ArgumentError(.|\n)*mine.py:5"):
        extend_parser(ArgumentParser(), Namespace(custom_rm_path="mine.grade"))


def test_the_same_object_adds_its_flags_once() -> None:
    def rollout(args: Namespace, rollout_id: int, data_source: object, evaluation: bool = False) -> None: ...

    rollout.add_arguments = lambda parser: parser.add_argument("--once")  # type: ignore[attr-defined]
    with function_registry.temporary("test:rollout", rollout):
        parser = ArgumentParser()
        extend_parser(parser, {"rollout_function_path": "test:rollout", "eval_function_path": "test:rollout"})
        assert parser.parse_args([]).once is None
