"""The quickstart's task: three-digit addition with at least one carry, answered column by column.

    859+467=?   <think>9+7=16;5+6+1=12;8+4+1=13</think>1326        right
    859+467=?   <think>9+7=16;5+6=11;8+4=12</think>1216            a pupil who forgets to carry

Here are the problems, the demonstrations of a pupil who forgets most carries (the base model learns from them, see
make_base.py), the reward, and the data files. Needs nothing beside the standard library:

    python examples/quickstart/carry.py            # writes train.jsonl and heldout.jsonl into data/ beside this file
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import Namespace

    from miles.types import Sample

DATA_DIR = Path(__file__).parent / "data"

# Every file has a seed of its own, so that one can grow without changing the others.
HELDOUT_SEED, TRAIN_SEED, SFT_SEED = 1, 2, 3
NUM_HELDOUT, NUM_TRAIN = 1024, 2048

FORGET_PROBABILITY = 0.65  # of each carry, in the demonstrations

Problem = tuple[int, int]


async def reward(args: Namespace, sample: Sample) -> float:
    """1.0 if the response thinks once and then answers exactly the label, else 0.0 (`--custom-rm-path`)."""
    return float(answer(sample.response) == sample.label)


def answer(response: str) -> str | None:
    """What follows the only `</think>`, without the end marker; None where there is not exactly one.

    Example: `answer("<think>9+7=16;5+6+1=12;8+4+1=13</think>1326<eos>")` is `"1326"`.
    """
    _, *after = response.split("</think>")
    return after[0].removesuffix("<eos>") if len(after) == 1 else None


def problems(seed: int, exclude: Collection[Problem] = ()) -> Iterator[Problem]:
    """Distinct problems without end, always the same ones for a seed, none of them in `exclude`."""
    rng = random.Random(seed)
    seen = set(exclude)
    while True:
        problem = rng.randrange(100, 1000), rng.randrange(100, 1000)
        if needs_carry(*problem) and problem not in seen:
            seen.add(problem)
            yield problem


def needs_carry(a: int, b: int) -> bool:
    """Whether the units or the tens carry; what the hundreds carry is written down in any case."""
    return a % 10 + b % 10 >= 10 or a % 100 + b % 100 >= 100


def prompt(a: int, b: int) -> str:
    return f"{a}+{b}=?"


def solution(a: int, b: int, forgets: Callable[[], bool] = lambda: False) -> str:
    """The worked answer, from the right-most column to the left; `forgets()` is asked at each carry.

    Example: `solution(859, 467)` is `"<think>9+7=16;5+6+1=12;8+4+1=13</think>1326"`.
    """
    columns: list[str] = []
    digits = ""
    total = 0
    for place in (1, 10, 100):
        x, y = a // place % 10, b // place % 10
        carried = total >= 10 and not forgets()
        total = x + y + carried
        columns.append(f"{x}+{y}{'+1' if carried else ''}={total}")
        digits = str(total if place == 100 else total % 10) + digits
    return f"<think>{';'.join(columns)}</think>{digits}"


def demonstrations(count: int, seed: int = SFT_SEED) -> list[dict[str, Any]]:
    """Conversations with the forgetful pupil; no held-out problem is among them.

    Example of one: `{"messages": [{"role": "user", "content": "859+467=?"}, {"role": "assistant", "content":
    "<think>9+7=16;5+6=11;8+4=12</think>1216"}]}`
    """
    pupil = random.Random(seed + 1)
    stream = problems(seed, exclude=heldout_problems())
    rows = []
    for _ in range(count):
        a, b = next(stream)
        worked = solution(a, b, forgets=lambda: pupil.random() < FORGET_PROBABILITY)
        rows.append({"messages": [{"role": "user", "content": prompt(a, b)}, {"role": "assistant", "content": worked}]})
    return rows


def heldout_problems() -> list[Problem]:
    stream = problems(HELDOUT_SEED)
    return [next(stream) for _ in range(NUM_HELDOUT)]


def train_problems() -> list[Problem]:
    stream = problems(TRAIN_SEED, exclude=heldout_problems())
    return [next(stream) for _ in range(NUM_TRAIN)]


def rows(chosen: list[Problem]) -> list[dict[str, Any]]:
    """Example of one: `{"prompt": "859+467=?", "label": "1326"}`."""
    return [{"prompt": prompt(a, b), "label": str(a + b)} for a, b in chosen]


def write_data(folder: Path = DATA_DIR) -> None:
    """Write train.jsonl and heldout.jsonl; the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "train.jsonl", rows(train_problems()))
    write_jsonl(folder / "heldout.jsonl", rows(heldout_problems()))


def write_sft_data(path: Path, count: int, seed: int = SFT_SEED) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, demonstrations(count, seed))


def write_jsonl(path: Path, data: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")


if __name__ == "__main__":
    write_data(*map(Path, sys.argv[1:2]))
