"""The conversations of this example: a pupil of the tiny tool model meets a teacher who always calculates.

    37*48=?      <tool_call>{"name": "python", "arguments": {"code": "print(37*48)"}}</tool_call>
    (tool) 1776  <answer>1776</answer>
    +21=?        <tool_call>{"name": "python", "arguments": {"code": "print(1776+21)"}}</tool_call>
    (tool) 1797  <answer>1797</answer>

One conversation in four begins with a guess of the pupil, which has `step_loss_mask` 0: the model sees it and does not
learn it. Needs nothing beside the standard library:

    python examples/sft/conversations.py          # writes data/*.jsonl beside this file
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # run as a script, `examples` is not importable yet

from examples.tiny_tools.lessons import (  # noqa: E402
    PYTHON,
    Row,
    answered,
    arithmetic,
    assistant,
    calculate,
    jsonl,
    user,
)

SEED, NUM_TRAIN, NUM_HELDOUT = 3, 256, 64


def calculated(expression: str, result: int) -> list[Row]:
    """The tool is asked, answers, and is believed."""
    call = {"name": "python", "arguments": {"code": f"print({expression})"}}
    return [
        {**assistant(""), "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": str(result)},
        assistant(answered(result)),
    ]


def conversation(rng: random.Random) -> Row:
    a, b, operator = arithmetic(rng)
    first = calculate(a, operator, b)
    messages = [user(f"{a}{operator}{b}=?")]
    if rng.random() < 0.25:
        guess = {**assistant(answered(rng.randrange(10, 100))), "step_loss_mask": 0}
        messages += [guess, user("use python")]
    messages += calculated(f"{a}{operator}{b}", first)
    more = rng.randint(10, 99)
    messages += [user(f"+{more}=?"), *calculated(f"{first}+{more}", first + more)]
    return {"messages": messages, "tools": [PYTHON]}


def conversations() -> list[Row]:
    rng = random.Random(SEED)
    return [conversation(rng) for _ in range(NUM_TRAIN + NUM_HELDOUT)]


def files() -> dict[Path, str]:
    """Path -> content of both data files; the same every time."""
    rows = conversations()
    return {
        HERE / "data" / "train.jsonl": jsonl(rows[:NUM_TRAIN]),
        HERE / "data" / "heldout.jsonl": jsonl(rows[NUM_TRAIN:]),
    }


if __name__ == "__main__":
    for path, content in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
