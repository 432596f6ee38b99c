"""What the tiny tool model learns, and the prompts of the examples that use it.

    search   capital of Japan?   <think>look up</think><search>capital Japan</search>
                                 <information>Tokyo is the capital of Japan.</information><answer>Tokyo</answer>
    tools    37*48=?             <tool_call>{"name": "python", "arguments": {"code": "print(37*48)"}}</tool_call>
             (tool) 1776         <answer>1776</answer>
    solve    7+8=?               <answer>15</answer>
    select   7+8=? A 14 B 15     <answer>B</answer>

Each is shown by a pupil who is right about half the time, so that samples of the model differ and reinforcement
learning has something to choose from. Pairs of names are drawn at random in the search lessons: the model learns to
read the answer, not to know it. Needs nothing beside the standard library:

    python examples/tiny_tools/lessons.py          # writes data/*.jsonl beside this file, and search-r1/corpus.jsonl
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # run as a script, `examples` is not importable yet

from examples.tiny_tools import facts  # noqa: E402

DATA_DIR = HERE / "data"
CORPUS = HERE.parent / "search-r1" / "corpus.jsonl"
LESSON_SEED, DATA_SEED = 1, 2
NUM_PROBLEMS = 128  # of each data file

PYTHON = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "Run a Python program and return what it prints.",
        "parameters": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
    },
}
OPERATORS = "+-*"
CITIES = [capital for capital, _ in facts.COUNTRIES.values()]
MONEYS = sorted({money for _, money in facts.COUNTRIES.values()})

Row = dict[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def answered(text: object) -> str:
    return f"<answer>{text}</answer>"


# ---- lessons: conversations with a pupil ---------------------------------------------------------------------------


def search_lesson(rng: random.Random) -> Row:
    """The pupil looks for the wrong relation or for none at times, and sometimes guesses without looking."""
    country = rng.choice(list(facts.COUNTRIES))
    asked = rng.choice(facts.RELATIONS)
    guess = rng.choice(CITIES if asked == "capital" else MONEYS)
    if rng.random() < 0.15:
        said = f"<think>guess</think>{answered(guess)}"
    else:
        wanted = asked if rng.random() < 0.7 else rng.choice(facts.RELATIONS)
        found = rng.choice(CITIES if wanted == "capital" else MONEYS)
        told = facts.sentence(wanted, country, found)
        said = f"<think>look up</think><search>{wanted} {country}</search><information>{told}</information>"
        said += answered(found if rng.random() < 0.9 else country)
    return {"messages": [user(facts.question(asked, country)), assistant(said)]}


def tool_lesson(rng: random.Random) -> Row:
    """The pupil calculates with the wrong sign at times, forgets to print, or guesses without calculating."""
    a, b, operator = arithmetic(rng)
    messages = [user(f"{a}{operator}{b}=?")]
    if rng.random() < 0.15:
        messages.append(assistant(answered(rng.randrange(10, 100))))
    else:
        used = operator if rng.random() < 0.7 else rng.choice(OPERATORS)
        prints = rng.random() < 0.9
        code = f"print({a}{used}{b})" if prints else f"{a}{used}{b}"
        call = {"name": "python", "arguments": {"code": code}}
        result = str(calculate(a, used, b)) if prints else ""
        messages += [
            {**assistant(""), "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": result},
            assistant(answered(result or 0)),
        ]
    return {"messages": messages, "tools": [PYTHON]}


def solve_lesson(rng: random.Random) -> Row:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    return {"messages": [user(f"{a}+{b}=?"), assistant(answered(proposal(rng, a + b, 0.7)))]}


def select_lesson(rng: random.Random) -> Row:
    """Two proposals; the pupil chooses a right one where there is one, most of the time."""
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    proposals = [proposal(rng, a + b, 0.5) for _ in range(2)]
    right = [letter for letter, value in zip("AB", proposals, strict=True) if value == a + b]
    choice = rng.choice(right) if right and rng.random() < 0.7 else rng.choice("AB")
    return {"messages": [user(selection_prompt(f"{a}+{b}=?", map(str, proposals))), assistant(answered(choice))]}


# Lesson: its share in percent.
LESSONS: dict[Callable[[random.Random], Row], int] = {
    search_lesson: 25,
    tool_lesson: 30,
    solve_lesson: 30,
    select_lesson: 15,
}


def lessons(count: int, seed: int = LESSON_SEED) -> list[Row]:
    rng = random.Random(seed)
    kinds = rng.choices(list(LESSONS), weights=list(LESSONS.values()), k=count)
    return [kind(rng) for kind in kinds]


def selection_prompt(problem: str, proposals: Any) -> str:
    """Example: `selection_prompt("7+8=?", ["14", "15"])` is `"7+8=? A 14 B 15"`."""
    return " ".join([problem, *(f"{letter} {text}" for letter, text in zip("ABCDEFGH", proposals, strict=False))])


def arithmetic(rng: random.Random) -> tuple[int, int, str]:
    return rng.randint(10, 99), rng.randint(10, 99), rng.choice(OPERATORS)


def calculate(a: int, operator: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[operator]


def proposal(rng: random.Random, right: int, share_right: float) -> int:
    return right if rng.random() < share_right else right + rng.choice((-1, 1))


# ---- prompts of the examples ---------------------------------------------------------------------------------------


def search_rows() -> list[Row]:
    """Every question of the corpus once. Example: `{"prompt": [...], "label": "Tokyo"}`."""
    asked = [(r, country) for country in facts.COUNTRIES for r in facts.RELATIONS]
    random.Random(DATA_SEED).shuffle(asked)
    return [row(facts.question(r, country), facts.value(r, country)) for r, country in asked]


def tool_rows() -> list[Row]:
    rng = random.Random(DATA_SEED)
    problems = [arithmetic(rng) for _ in range(NUM_PROBLEMS)]
    return [row(f"{a}{operator}{b}=?", str(calculate(a, operator, b))) for a, b, operator in problems]


def solve_rows() -> list[Row]:
    pairs = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    random.Random(DATA_SEED).shuffle(pairs)
    return [row(f"{a}+{b}=?", str(a + b)) for a, b in pairs]


def row(prompt: str, label: str) -> Row:
    return {"prompt": [user(prompt)], "label": label}


def files() -> dict[Path, str]:
    """Path -> content of every data file; the same every time."""
    rows = {
        CORPUS: [{"id": i, "contents": text} for i, text in enumerate(facts.corpus())],
        DATA_DIR / "search.jsonl": search_rows(),
        DATA_DIR / "tools.jsonl": tool_rows(),
        DATA_DIR / "solve.jsonl": solve_rows(),
    }
    return {path: jsonl(entries) for path, entries in rows.items()}


def jsonl(rows: list[Row]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in rows)


if __name__ == "__main__":
    for path, content in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
