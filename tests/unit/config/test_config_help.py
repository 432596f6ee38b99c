"""--help and --help-all, and what config may import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from miles.config import parse
from miles.config.help import render
from miles.config.sections import FLAGS, SECTIONS


@pytest.mark.parametrize("option", ["--help", "-h", "--help-all"])
def test_help_is_printed_whatever_else_is_given(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--nonsense", option])
    assert caught.value.code == 0
    assert "--rollout-batch-size N" in capsys.readouterr().out


def test_short_help_has_the_required_flags_and_says_where_the_rest_is() -> None:
    text = render(everything=False, width=100)
    assert "--hf-checkpoint" in text and "[required]" in text and "--help-all" in text
    assert "--megatron-to-hf-mode" not in text
    assert len(text.splitlines()) < 120


def test_long_help_has_every_flag_under_its_section() -> None:
    text = render(everything=True, width=200)
    for name in SECTIONS:
        assert f"{name.replace('_', ' ')}:\n" in text
    for flag in FLAGS.values():
        assert f"    {flag.option}" in text


def test_help_says_what_is_not_built() -> None:
    text = render(everything=True, width=200)
    lines = text.splitlines()
    (launcher,) = [line for line in lines if line.strip().startswith("--launcher")]
    assert "{auto,local}" in launcher
    assert "not built yet: ray" in " ".join(text.split())
    (offload,) = [line for line in lines if line.strip().startswith("--offload-train")]
    assert "[no meaning here]" in offload


@pytest.mark.parametrize("width", [80, 100, 120])
def test_lines_fit_the_terminal(width: int) -> None:
    assert all(len(line) <= width for line in render(everything=True, width=width).splitlines())


def test_a_list_of_choices_that_is_too_long_breaks_after_a_comma() -> None:
    choices = next(flag for flag in FLAGS.values() if flag.name == "advantage_estimator").choices
    text = render(everything=True, width=80).partition("--advantage-estimator ")[2].partition("}")[0]
    assert len(text.splitlines()) > 1
    assert "".join(text.split()) == "{" + ",".join(choices)


HEAVY = ("torch", "numpy", "transformers", "ray", "sglang", "megatron", "pyarrow", "fastapi", "yaml")


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom miles.config import parse\n"
        "try:\n    parse(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print('loaded', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded []"
