"""`miles new`: every plug-in that it writes passes its own test and `miles check`, however its place is named."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import miles
from miles.__main__ import main
from miles.errors import FlagError, UsageError
from miles.hooks import CATALOG
from miles.hooks.new import new_main, target_of
from miles.hooks.skeletons import SKELETONS

ROOT = Path(miles.__file__).parents[1]
RM = CATALOG["custom_rm"]


SPELLINGS = ("", "files/of_{}.py:mine", "package.of.{}s.mine")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], list[str]]]:
    """Each plug point under its default name, as a file in a folder, as a module path: what was printed."""
    folder, before = tmp_path_factory.mktemp("new"), Path.cwd()
    os.chdir(folder)
    (folder / "examples").symlink_to(ROOT / "examples")
    printed = {}
    try:
        for name, point in CATALOG.items():
            for plug_point, spelling in zip((point.key, name, point.flag), SPELLINGS, strict=True):
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    assert main(["new", plug_point, *filter(None, [spelling.format(name)])]) == 0
                printed[name, spelling] = out.getvalue().splitlines()
        yield printed
    finally:
        os.chdir(before)


Written = dict[tuple[str, str], list[str]]


def test_all_their_tests_pass(written: Written) -> None:
    files = [Path(line) for lines in written.values() for line in lines[:2]]
    assert len(set(files)) == 6 * len(CATALOG)
    for file in files:
        ast.parse(file.read_text())
    tests = [lines[1] for lines in written.values()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{3 * 2 * len(SKELETONS)} passed" in done.stdout


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", CATALOG)
def test_the_next_two_commands(
    name: str, spelling: str, written: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    file, test, empty, title, pytest_line, check = written[name, spelling]
    assert Path(test).name == f"test_{Path(file).name}" and (empty, title) == ("", "next:")
    assert pytest_line == f"  pytest {test}"
    program, command, *flags = check.split()
    assert (program, command) == ("miles", "check")
    assert main([command, *flags]) == 0
    shown = capsys.readouterr().out
    assert CATALOG[name].flag in shown and flags[-1] in shown


def test_without_the_quickstart_the_flags_are_the_readers_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert new_main(["custom-tis-function", "weights.py"]) == 0
    last = capsys.readouterr().out.splitlines()[-1].strip()
    flag = "--custom-tis-function-path weights.py:my_tis_function"
    assert last == f"miles check FLAGS OF YOUR RUN --use-tis {flag}"


@pytest.mark.parametrize(
    ("given", "file", "name", "path"),
    [
        (None, "my_rm.py", "my_rm", "my_rm.py:my_rm"),
        ("grade.py", "grade.py", "my_rm", "grade.py:my_rm"),
        ("my/grade.py", "my/grade.py", "my_rm", "my/grade.py:my_rm"),
        ("my/grade.py:score", "my/grade.py", "score", "my/grade.py:score"),
        ("/tmp/a/grade.py:score", "/tmp/a/grade.py", "score", "/tmp/a/grade.py:score"),
        ("score", "score.py", "score", "score.py:score"),
        ("my.rewards.score", "my/rewards.py", "score", "my.rewards.score"),
        ("my.rewards:score", "my/rewards.py", "score", "my.rewards:score"),
    ],
)
def test_what_a_name_stands_for(given: str | None, file: str, name: str, path: str) -> None:
    target = target_of(given, RM)
    assert (target.file, target.name, target.path) == (Path(file), name, path)
    assert target.test == Path(file).with_name(f"test_{Path(file).name}")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("my/grade.txt", "expected the name of a Python file, such as my/grade.py"),
        ("my.rewards.class", "'class' cannot be the name of a plug-in"),
        ("my.rewards.", "'' cannot be the name of a plug-in"),
        ("my.2nd.score", "a module path"),
        ("..score", "a module path"),
        ("", "a module path"),
        ("grade.py:", "'' cannot be"),
        ("grade.py:Sample", "'Sample' cannot be"),
        ("grade.py:a b", "'a b' cannot be"),
        ("json.py", "would hide a module"),
        ("torch.reward", "would hide a module"),
        ("my/it's.py", "cannot be imported by its test"),
    ],
)
def test_what_no_name_is(given: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as refused:
        new_main(["custom-rm", given])
    assert says in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "grade.py"
    assert new_main(["custom_rm", str(file)]) == 0
    before = file.read_text()
    with pytest.raises(UsageError, match="nothing is overwritten"):
        new_main(["custom-rm", str(file)])
    assert file.read_text() == before
    file.unlink()
    with pytest.raises(UsageError, match=r"test_grade\.py: there already"):
        new_main(["custom-rm", str(file)])
    assert not file.exists()


def test_an_unknown_plug_point_is_answered() -> None:
    with pytest.raises(FlagError, match="Did you mean buffer-filter"):
        new_main(["bufferfilter"])


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UsageError, match="cannot be written"):
        new_main(["custom-rm", str(tmp_path / "taken" / "grade.py")])
