"""What a person sees, on a terminal and in a log file."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from miles.observe.display import (
    Display,
    Example,
    duration,
    render_examples,
    resolve_mode,
    side_by_side,
    sparkline,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(display: Display) -> None:
    with display:
        display.notice("no GPU here")
        display.evaluation("carry, before training", {"greedy": 0.0, "sampled": 0.273})
        display.rollout(0, reward=0.25, seconds=0.5, tokens_per_s=5200.4)
        display.rollout(1, reward=None, seconds=1.5, tokens_per_s=900, loss=0.123456)


def plain(mode: str = "plain", **options: Any) -> str:
    stream = io.StringIO()
    show(Display(3, mode, stream=stream, **options))
    return stream.getvalue()


def test_plain_lines_are_aligned() -> None:
    assert plain() == (
        "note: no GPU here\n"
        "evaluation carry, before training: greedy 0  sampled 0.273\n"
        "  rollout   reward   seconds   tokens/s       eta\n"
        "      1/3    0.250      0.50       5200      0:01\n"
        "      2/3        -      1.50        900      0:01  loss 0.1235\n"
    )


def test_auto_is_plain_in_a_log_file() -> None:
    assert plain("auto") == plain("plain")


def test_none_shows_results_but_no_progress() -> None:
    assert plain("none") == "\n".join(plain().splitlines()[:2]) + "\n"


def test_quiet_shows_nothing() -> None:
    assert plain(quiet=True) == ""


@pytest.mark.parametrize(
    ("mode", "stream", "term", "expected"),
    [
        ("auto", Terminal(), "xterm", "bar"),
        ("auto", Terminal(), "dumb", "plain"),
        ("auto", io.StringIO(), "xterm", "plain"),
        ("plain", Terminal(), "xterm", "plain"),
        ("bar", io.StringIO(), "xterm", "bar"),
    ],
)
def test_mode(monkeypatch: pytest.MonkeyPatch, mode: str, stream: Any, term: str, expected: str) -> None:
    monkeypatch.setenv("TERM", term)
    assert resolve_mode(mode, stream) == expected


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of auto, bar, plain, none, got 'fancy'"):
        Display(1, "fancy")


def test_the_live_line_says_it_all() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, record=True)
    show(Display(40, "bar", console=console))
    text = console.export_text()
    assert "note: no GPU here\n" in text
    assert "evaluation carry, before training: greedy 0  sampled 0.273\n" in text
    last = text.rstrip().splitlines()[-1]
    assert "rollout 2 of 40  reward -" in last
    assert "1.50 s/rollout  900 tokens/s  0:00, 0:38 left  loss 0.1235" in last


def test_a_resumed_run_counts_on() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, record=True)
    with Display(40, "bar", done=20, console=console) as display:
        display.rollout(20, 0.5, 1.0, 100.0)
    assert "rollout 21 of 40  reward 0.500" in console.export_text()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_cursor_comes_back_after_an_error(error: type[BaseException]) -> None:
    console = Console(file=(stream := io.StringIO()), force_terminal=True, width=100)
    before = sys.stdout, sys.stderr
    with pytest.raises(error), Display(3, "bar", console=console) as display:
        display.example("before", "1+1=?", "3", "2", 0.0)
        raise error
    written = stream.getvalue()
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l"), "shown after it was hidden"
    assert (sys.stdout, sys.stderr) == before
    assert "1+1=?" not in written, "results are for runs that end well"


TERMINAL_RUN = """
import logging, sys
from miles.observe.display import Display
from miles.observe.logging import configure_logger
configure_logger("driver")
display = Display(3)
display.rollout(0, 0.25, 0.5, 100.0)
print("a plug-in prints")
logging.getLogger("miles").info("a log line")
if sys.argv[1] == "raise":
    raise SystemExit("stopped")
"""


@pytest.mark.parametrize("how", ["end", "raise"])
def test_on_a_real_terminal_even_without_with(how: str) -> None:
    """Prints and log lines appear, and the terminal is whole at the end of the process."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL_RUN, how], stdout=theirs, stderr=theirs, stdin=theirs, env=environment
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        written += chunk
    os.close(ours)
    assert process.wait() == (1 if how == "raise" else 0)
    text = written.decode()
    assert "a plug-in prints" in text and "INFO: a log line" in text and "driver" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "rollout 1 of 3" in text


def test_a_closed_pipe_ends_the_display_not_the_run() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    show(Display(3, "plain", stream=Closed()))
    stream = io.StringIO()
    display = Display(3, "plain", stream=stream)
    stream.close()
    show(display)


def test_a_stream_that_cannot_spell_a_character() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with Display(3, "plain", stream=stream) as display:
        display.notice("größer")
        display.curve([0, 1, 2], [0.1, 0.5, 0.9])
    assert raw.getvalue().startswith(b"note: gr??er\n")


# ---- examples and the curve ------------------------------------------------------------------------------------


def test_before_and_after_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    stream = io.StringIO()
    with Display(3, "plain", stream=stream) as display:
        display.example("before training", "859+467=?", "<think>9+7=16</think>1216", "1326", 0.0)
        assert stream.getvalue() == ""
        display.example("after training", "859+467=?", "<think>9+7=16;5+6+1=12</think>1326", "1326", 1.0)
    lines = stream.getvalue().splitlines()
    assert lines[1:5] == ["held-out problem", "  859+467=?", "  expected: 1326", ""]
    before, after = zip(*(line.split(" | ") for line in lines[5:7]))
    assert [text.strip() for text in before] == ["before training (reward 0)", "<think>9+7=16</think>1216"]
    assert [text.strip() for text in after] == ["after training (reward 1)", "<think>9+7=16;5+6+1=12</think>1326"]


def test_a_single_example_is_shown_at_the_end() -> None:
    stream = io.StringIO()
    with Display(3, "plain", stream=stream) as display:
        display.example("before training", [{"role": "user", "content": "1+1=?"}], "3\nor 4")
    assert stream.getvalue().splitlines() == [
        "", "held-out problem", "  user: 1+1=?", "", "before training (reward -)", "3", "or 4", "",
    ]  # fmt: skip


def test_long_answers_are_wrapped_not_cut() -> None:
    words = [f"word{number}" for number in range(40)]
    text = render_examples([Example("a", "p", " ".join(words), None, 1), Example("b", "p", "x", None, 0)], 60)
    assert max(map(len, text.splitlines())) <= 60
    assert all(word in text for word in words)


def test_side_by_side_pads() -> None:
    assert side_by_side(["a", "b"], ["c"], 50) == f"{'a':<23} | c\n{'b':<23} |"


def test_the_curve_is_drawn() -> None:
    stream = io.StringIO()
    with Display(3, "plain", stream=stream) as display:
        display.curve([], [])
        assert stream.getvalue() == ""
        display.curve([0, 1, 2], [0.1, 0.5, 0.9])
    assert "reward" in stream.getvalue() and "rollout" in stream.getvalue()


@pytest.mark.parametrize(
    ("values", "expected"), [([], ""), ([0.5], "▁"), ([1, 1], "▁▁"), ([0, 7], "▁█"), ([0, 1, 2, 7], "▁▂▃█")]
)
def test_sparkline(values: list[float], expected: str) -> None:
    assert sparkline(values) == expected


@pytest.mark.parametrize(("seconds", "expected"), [(0, "0:00"), (75.4, "1:15"), (59.6, "1:00"), (3700, "1:01:40")])
def test_duration(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected
