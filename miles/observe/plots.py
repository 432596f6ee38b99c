"""The reward curve: as text for the terminal (plotext) and as a picture (matplotlib without a screen).

Both libraries are imported on first use. Leaves where a curve is shown to `display` and `run`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from miles.observe.files import replacing

# Marks on the x axis of the terminal curve.
MAX_TICKS = 6


def _finite_points(xs: Sequence[float], ys: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """The points that can be drawn: neither None (no reward) nor NaN nor infinite."""
    if len(xs) != len(ys):
        raise ValueError(f"expected as many ys as xs, got {len(xs)} xs and {len(ys)} ys")
    points = [(x, float(y)) for x, y in zip(xs, ys) if y is not None and math.isfinite(y)]
    return [x for x, _ in points], [y for _, y in points]


def terminal_curve(
    xs: Sequence[float],
    ys: Sequence[float | None],
    width: int = 72,
    height: int = 14,
    *,
    title: str = "reward",
    x_label: str = "rollout",
) -> str:
    """The curve as `height` lines of at most `width` characters, without colours; "" when no point can be drawn."""
    xs, finite_ys = _finite_points(xs, ys)
    if not xs:
        return ""
    import plotext

    figure = plotext.figure
    figure.clear()
    try:
        figure.plot_size(width, height)
        figure.theme("colorless")
        figure.title(title)
        figure.label(x_label)
        curve = figure.signal(xs, finite_ys, marker="braille").lines()
        count = min(MAX_TICKS, len(xs))
        ticks = [xs[round(i * (len(xs) - 1) / max(1, count - 1))] for i in range(count)]
        figure.ruler(0).ticks(ticks, [f"{tick:g}" for tick in ticks])
        figure.draw(curve)
        lines = str(figure.build().string(True)).splitlines()
    finally:
        figure.clear()  # the figure belongs to the process
    return "\n".join(line.rstrip() for line in lines).rstrip()


def save_reward_png(
    path: str | Path,
    xs: Sequence[float],
    ys: Sequence[float | None],
    *,
    evals: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    title: str = "Reward over training",
) -> None:
    """Draw mean reward over rollouts, and per evaluation (name -> points) a line with marks; whole file or none.

    Raises RunDirError when the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    xs, finite_ys = _finite_points(xs, ys)
    axes.plot(xs, finite_ys, color="#1f6fb4", linewidth=1.6, label="training reward")
    for number, (name, points) in enumerate((evals or {}).items()):
        eval_xs, eval_ys = _finite_points([x for x, _ in points], [y for _, y in points])
        color = ("#d1601f", "#2b8a3e", "#7048a8", "#a61e4d")[number % 4]
        axes.plot(eval_xs, eval_ys, color=color, linewidth=1.2, linestyle="--", marker="o", markersize=4, label=name)
    axes.set(xlabel="rollout", ylabel="mean reward", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png")
