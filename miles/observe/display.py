"""What a person sees while a run goes: one live line on a terminal, one line per rollout elsewhere.

A display never ends a run: when its stream is gone (closed pipe, full disk behind a redirection) it falls silent.
rich is imported only on a terminal. Leaves the numbers to the run and log lines to `logging`.

    mode "bar"     notes and results scroll above one live line
    mode "plain"   aligned lines, ASCII only, one per rollout
    mode "none"    no lines per rollout; notes and results as in plain
    mode "auto"    bar on a terminal, plain otherwise
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import textwrap
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from miles.observe.plots import terminal_curve

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

MODES = ("auto", "bar", "plain", "none")
# Rollouts that the trend and the estimate of the remaining time look back on.
LOOK_BACK = 12
# Redraws of the live line per second; each takes well under a millisecond.
REFRESH_PER_SECOND = 4
_BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float]) -> str:
    """One block per value, from the lowest to the highest: `[0.2, 0.5, 0.9]` -> `▁▄█`."""
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[int((value - low) * scale)] for value in values)


def duration(seconds: float) -> str:
    """`75` -> `1:15`, `3700` -> `1:01:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass
class Progress:
    """How far the run is. `done` counts rollouts of the whole job, those before a resume included."""

    total: int
    done: int = 0
    reward: float | None = None
    seconds: float = 0.0
    tokens_per_s: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
    recent_rewards: deque[float] = field(default_factory=lambda: deque(maxlen=LOOK_BACK))
    recent_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=LOOK_BACK))

    @property
    def eta_s(self) -> float | None:
        """Mean seconds of the last rollouts times those that remain; None before the first."""
        if not self.recent_seconds:
            return None
        return sum(self.recent_seconds) / len(self.recent_seconds) * max(0, self.total - self.done)

    @property
    def reward_text(self) -> str:
        return "-" if self.reward is None else f"{self.reward:.3f}"

    @property
    def extra_text(self) -> str:
        return "  ".join(f"{name} {_value(value)}" for name, value in self.extra.items())

    def columns(self) -> str:
        """One aligned line for a log file."""
        eta = "-" if self.eta_s is None else duration(self.eta_s)
        width = len(str(self.total))
        counter = f"{self.done:>{width}}/{self.total}"
        line = f"{counter:>9}  {self.reward_text:>7}  {self.seconds:>8.2f}  {self.tokens_per_s:>9.0f}  {eta:>8}"
        return f"{line}  {self.extra_text}".rstrip()


COLUMN_TITLES = f"{'rollout':>9}  {'reward':>7}  {'seconds':>8}  {'tokens/s':>9}  {'eta':>8}"


def side_by_side(left: Sequence[str], right: Sequence[str], width: int) -> str:
    """Two blocks of text beside each other, lines wrapped to half of `width`."""
    half = max(20, (width - 3) // 2)

    def wrapped(lines: Sequence[str]) -> list[str]:
        pieces = []
        for line in lines:
            pieces += textwrap.wrap(line, half, drop_whitespace=False, replace_whitespace=False) or [""]
        return pieces

    columns = [wrapped(left), wrapped(right)]
    rows = max(map(len, columns))
    padded = [column + [""] * (rows - len(column)) for column in columns]
    return "\n".join(f"{a:<{half}} | {b}".rstrip() for a, b in zip(*padded))


@dataclass(frozen=True)
class Example:
    """One answered problem, to be shown beside the answer of another time."""

    title: str
    prompt: str | list[dict[str, Any]]
    response: str
    label: Any
    reward: Any

    def prompt_lines(self) -> list[str]:
        """The prompt as text; of a message list one paragraph per message."""
        if isinstance(self.prompt, str):
            return self.prompt.splitlines() or [""]
        texts = [(m.get("role", ""), m.get("content", "")) for m in self.prompt]
        return [f"{role}: {text if isinstance(text, str) else json.dumps(text)}" for role, text in texts]

    def answer_lines(self) -> list[str]:
        reward = _value(self.reward) if self.reward is not None else "-"
        return [f"{self.title} (reward {reward})", *self.response.splitlines()]


def render_examples(examples: Sequence[Example], width: int) -> str:
    """The problem once, then its answers: two beside each other, any other number below each other."""
    first = examples[0]
    head = ["held-out problem", *(f"  {line}" for line in first.prompt_lines())]
    if first.label is not None:
        head.append(f"  expected: {_value(first.label)}")
    if len(examples) == 2:
        return "\n".join([*head, "", side_by_side(first.answer_lines(), examples[1].answer_lines(), width)])
    answers = [line for example in examples for line in ["", *example.answer_lines()]]
    return "\n".join([*head, *answers])


# ---- where it is drawn -----------------------------------------------------------------------------------------


class Screen(Protocol):
    """How text and progress reach the person."""

    width: int

    def text(self, text: str) -> None: ...

    def progress(self, progress: Progress) -> None: ...

    def close(self) -> None: ...


class PlainScreen:
    """Lines on a stream."""

    def __init__(self, stream: TextIO, *, with_progress: bool = True) -> None:
        self.width = min(100, shutil.get_terminal_size((100, 24)).columns)
        self._stream = stream
        self._with_progress = with_progress
        self._titles_shown = False

    def text(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()

    def progress(self, progress: Progress) -> None:
        if not self._with_progress or progress.done == 0:
            return
        if not self._titles_shown:
            self._titles_shown = True
            self.text(COLUMN_TITLES)
        self.text(progress.columns())

    def close(self) -> None:
        pass


class LiveScreen:
    """A live line at the foot of a terminal; text scrolls above it, and so does what anybody prints."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._console = console
        self.width = console.width
        self._progress: Progress | None = None
        self._start = time.monotonic()
        self._live: Live | None = Live(
            get_renderable=self._render, console=console, refresh_per_second=REFRESH_PER_SECOND, transient=False
        )
        self._live.start()

    def _render(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        progress = self._progress
        elapsed = duration(time.monotonic() - self._start)
        if progress is None:
            return Text(f"starting  {elapsed}", style="dim")
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(f"rollout {progress.done} of {progress.total}", style="bold")
        if progress.recent_seconds:
            text.append(f"  reward {progress.reward_text} ", style="green")
            unicode = self._console.encoding.startswith("utf")
            text.append(sparkline(list(progress.recent_rewards)) if unicode else "", style="green")
            text.append(f"  {progress.seconds:.2f} s/rollout  {progress.tokens_per_s:,.0f} tokens/s")
        eta = f", {duration(progress.eta_s)} left" if progress.eta_s else ""
        text.append(f"  {elapsed}{eta}")
        text.append(f"  {progress.extra_text}".rstrip(), style="dim")
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=16)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        grid.add_row(ProgressBar(total=max(1, progress.total), completed=progress.done, width=16), text)
        return grid

    def text(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def progress(self, progress: Progress) -> None:
        self._progress = progress

    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream)


def resolve_mode(mode: str, stream: TextIO) -> str:
    """`auto` decided by the stream. Raises ValueError for an unknown mode."""
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode != "auto":
        return mode
    return "bar" if stream.isatty() and os.environ.get("TERM") != "dumb" else "plain"


# ---- what the run talks to -------------------------------------------------------------------------------------


class Display:
    """Shows a run of `total` rollouts. A context manager: the terminal is whole again after any exception or Ctrl-C.

    `done` is the number of rollouts that a resumed run had behind it. `quiet` shows nothing at all. `console` replaces
    the terminal in bar mode.

    Example::

        with Display(40, "auto") as display:
            display.notice("training on the CPU")
            display.evaluation("carry", {"greedy": 0.0, "sampled": 0.273})
            display.rollout(0, reward=0.27, seconds=0.35, tokens_per_s=5200)
    """

    def __init__(
        self,
        total: int,
        mode: str = "auto",
        *,
        done: int = 0,
        quiet: bool = False,
        stream: TextIO | None = None,
        console: Console | None = None,
    ) -> None:
        stream = stream or sys.stdout
        self._state = Progress(total, done)
        self._examples: list[Example] = []
        self._screen: Screen | None = None
        resolved = resolve_mode(mode, stream)
        if quiet:
            return
        if resolved == "bar":
            self._screen = LiveScreen(console or _console(stream))
            atexit.register(self._go_silent)  # without `with`, the terminal is given back all the same
        else:
            self._screen = PlainScreen(stream, with_progress=resolved == "plain")

    def _text(self, text: str) -> None:
        if self._screen is not None:
            try:
                self._screen.text(text)
            except (OSError, ValueError):  # ValueError: the stream was closed
                self._go_silent()

    def _go_silent(self) -> None:
        screen, self._screen = self._screen, None
        if screen is not None:
            atexit.unregister(self._go_silent)
            with suppress(OSError, ValueError):
                screen.close()

    def notice(self, text: str) -> None:
        """Something the person should know, once."""
        self._text(f"note: {text}")

    def rollout(self, rollout_id: int, reward: float | None, seconds: float, tokens_per_s: float, **extra: Any) -> None:
        """A rollout is done: its mean reward (None: there is none), wall seconds, generated tokens per second."""
        state = self._state
        state.done, state.reward, state.seconds = rollout_id + 1, reward, seconds
        state.tokens_per_s, state.extra = tokens_per_s, extra
        state.recent_seconds.append(seconds)
        if reward is not None:
            state.recent_rewards.append(reward)
        if self._screen is not None:
            try:
                self._screen.progress(state)
            except (OSError, ValueError):
                self._go_silent()

    def evaluation(self, name: str, metrics: Mapping[str, Any]) -> None:
        """The result of an evaluation, e.g. `("carry, before training", {"greedy": 0.0, "sampled": 0.273})`."""
        self._text(f"evaluation {name}: " + "  ".join(f"{key} {_value(value)}" for key, value in metrics.items()))

    def example(
        self, title: str, prompt: str | list[dict[str, Any]], response: str, label: Any = None, reward: Any = None
    ) -> None:
        """Keep an answered problem; the second one shows both side by side, `close` shows one that stayed alone."""
        self._examples.append(Example(title, prompt, response, label, reward))
        if len(self._examples) == 2:
            self._show_examples()

    def _show_examples(self) -> None:
        examples, self._examples = self._examples, []
        if examples and self._screen is not None:
            self._text("\n" + render_examples(examples, self._screen.width) + "\n")

    def curve(self, steps: Sequence[float], rewards: Sequence[float | None]) -> None:
        """The reward curve as text."""
        if self._screen is not None:
            plot = terminal_curve(steps, rewards, width=min(self._screen.width, 80))
            if plot:
                self._text(plot)

    def close(self) -> None:
        """Show what is left and give the terminal back; twice does no harm."""
        self._show_examples()
        self._go_silent()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self._go_silent()
