"""Curves as text and as a picture."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from miles.errors import RunDirError
from miles.observe import files
from miles.observe.plots import save_reward_png, terminal_curve

XS = list(range(40))
YS = [0.27 + 0.6 * (1 - math.exp(-x / 10)) for x in XS]


def is_braille(character: str) -> bool:
    return "\u2801" <= character <= "\u28ff"


def test_the_terminal_curve_rises() -> None:
    lines = terminal_curve(XS, YS, 60, 12).splitlines()
    assert len(lines) == 12 and max(map(len, lines)) <= 60
    assert "\x1b" not in "".join(lines)
    first, last = lines[0].strip(), lines[-1].strip()
    assert (first, last) == ("reward", "rollout")
    starts = [next((i for i, c in enumerate(line) if is_braille(c)), None) for line in lines]
    drawn = [start for start in starts if start is not None]
    assert len(drawn) >= 5 and drawn == sorted(drawn, reverse=True), "the higher the line, the later it starts"
    assert {"0", "39"} <= set(lines[-2].split())


@pytest.mark.parametrize("ys", [[], [None, math.nan, math.inf]])
def test_nothing_to_draw_is_an_empty_text(ys: list[float | None]) -> None:
    assert terminal_curve(list(range(len(ys))), ys) == ""


def test_gaps_and_single_points_are_drawn() -> None:
    assert any(map(is_braille, terminal_curve([3], [0.5])))
    assert any(map(is_braille, terminal_curve([0, 1, 2], [0.1, None, 0.9])))


def test_curves_do_not_leak_into_each_other() -> None:
    alone = terminal_curve(XS, YS, 60, 12)
    terminal_curve([0, 1], [5.0, 9.0], 30, 9, title="other", x_label="else")
    assert terminal_curve(XS, YS, 60, 12) == alone


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="got 2 xs and 1 ys"):
        terminal_curve([1, 2], [1.0])


def test_the_picture_is_a_png_with_something_on_it(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "reward.png"
    save_reward_png(path, XS, YS, evals={"carry greedy": [(0, 0.0), (39, 0.95)], "carry sampled": [(0, 0.27)]})
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and image.width >= 800 and image.height >= 400
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 24)}
    assert {(0x1F, 0x6F, 0xB4), (0xD1, 0x60, 0x1F), (0x2B, 0x8A, 0x3E)} <= colors, "each curve in its own colour"
    assert [entry.name for entry in tmp_path.iterdir()] == ["reward.png"]


def test_a_full_disk_leaves_the_old_picture(tmp_path: Path) -> None:
    path = tmp_path / "reward.png"
    path.write_bytes(b"old")
    files.temporary_name(path).symlink_to("/dev/full")
    with pytest.raises(RunDirError, match=r"reward\.png: cannot be written: No space left"):
        save_reward_png(path, XS, YS)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
