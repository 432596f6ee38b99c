"""`load_function`: dotted paths, colons, files, registered names; one execution per file."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles.hooks import FunctionRegistry, function_registry, load_function


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a package, a plain folder and a file; forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    path, modules = sys.path[:], set(sys.modules)
    (tmp_path / "loadpkg").mkdir()
    (tmp_path / "loadpkg" / "__init__.py").write_text("")
    (tmp_path / "loadpkg" / "shared.py").write_text("VALUE = 'shared'\n")
    (tmp_path / "loadpkg" / "rel.py").write_text("from .shared import VALUE\n\ndef fn():\n    return VALUE\n")
    (tmp_path / "some-task").mkdir()
    (tmp_path / "some-task" / "sibling_of_task.py").write_text("WORD = 'sibling'\n")
    (tmp_path / "some-task" / "loadtask.py").write_text(
        "from sibling_of_task import WORD\nRUNS = []\nRUNS.append(1)\n\n\n"
        "class Judge:\n    def grade(self):\n        return WORD\n\n\n"
        "def fn():\n    import lazy_sibling\n    return lazy_sibling.__name__\n"
    )
    (tmp_path / "some-task" / "lazy_sibling.py").write_text("")
    (tmp_path / "json.py").write_text("def fn():\n    return 'mine'\n")
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def test_none_and_the_published_form(folder: Path) -> None:
    assert load_function(None) is None
    assert load_function("json.loads") is sys.modules["json"].loads
    assert load_function("os.path.join") is sys.modules["os.path"].join
    assert load_function("loadpkg.shared.VALUE") == "shared"


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("no_such_module_here.fn", ModuleNotFoundError),
        ("nodot", ValueError),
        ("json.no_such_name", AttributeError),
        ("nofile.py:fn", FileNotFoundError),
    ],
)
def test_errors_propagate(folder: Path, path: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        load_function(path)


def test_other_spellings(folder: Path) -> None:
    assert load_function("loadpkg.rel:fn")() == "shared"
    assert load_function("loadpkg/rel.py:fn")() == "shared"
    assert load_function("some-task/loadtask.py:Judge.grade")(None) == "sibling"
    assert load_function("some-task/loadtask.py.fn")() == "lazy_sibling"
    assert load_function(str(folder / "some-task" / "loadtask.py") + ":fn")() == "lazy_sibling"


def test_a_file_runs_once_however_it_is_named(folder: Path) -> None:
    first = load_function("some-task/loadtask.py:RUNS")
    again = load_function(f"{folder}/some-task/../some-task/loadtask.py:RUNS")
    assert again is first == [1]
    assert load_function("loadpkg/rel.py:fn") is load_function("loadpkg.rel.fn")


def test_objects_of_a_file_can_be_pickled(folder: Path) -> None:
    judge = load_function("some-task/loadtask.py:Judge")
    assert type(pickle.loads(pickle.dumps(judge()))) is judge


def test_a_file_named_like_a_library_hides_nothing(folder: Path) -> None:
    assert load_function("json.py:fn")() == "mine"
    import json

    assert json.loads("1") == 1


def test_a_file_that_failed_is_tried_again(folder: Path) -> None:
    file = folder / "loadflaky.py"
    file.write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        load_function("loadflaky.py:fn")
    file.write_text("def fn():\n    return 'mended'\n")
    assert load_function("loadflaky.py:fn")() == "mended"


def test_registered_names_win() -> None:
    def fn() -> None: ...

    with function_registry.temporary("json.loads", fn), function_registry.temporary("test:fn", 3):
        assert load_function("json.loads") is fn and load_function("test:fn") == 3
        with pytest.raises(AssertionError), function_registry.temporary("test:fn", fn):
            pass
    assert function_registry.get("test:fn") is None
    assert FunctionRegistry().get("json.loads") is None


def test_an_import_that_takes_long_is_told_with_its_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("miles.hooks.patience.PATIENCE_S", 0.1)
    (folder / "slow_import.py").write_text("import time\ntime.sleep(0.4)\n\ndef fn(): ...\n")
    load_function("slow_import.fn")
    (told,) = caplog.messages
    assert told == "importing slow_import.fn has taken 0.1 s, still at slow_import.py:2: time.sleep(0.4)"
