"""The pages of the documentation, taken apart: fenced blocks, commands, links, headings, flags."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "examples/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]

_FENCE = re.compile(r"^```(?P<language>\w*) ?(?P<info>[\w-]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
# A flag that is written in full: `--sglang-...` names a family.
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9](?!-?\.\.\.)(?![\w-])")


@dataclass(frozen=True)
class Block:
    """One fenced block. Example: `Block(page, 17, "yaml", "eval-config", "datasets:\\n...")`; `line` is its first."""

    page: Path
    line: int
    language: str
    info: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a page with the output that the page shows, if any."""

    where: str
    words: list[str]
    output: list[str]

    def __str__(self) -> str:
        return f"{self.where} {' '.join(self.words[:2])}"


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in _FENCE.finditer(text):
            if match["language"] in languages:
                line = text.count("\n", 0, match.start("text")) + 1
                found.append(Block(page, line, match["language"], match["info"], match["text"]))
    return found


def bash_commands() -> list[Command]:
    """Every line of every bash block."""
    return [
        Command(f"{block.page.relative_to(ROOT)}:{block.line + i}", words, [])
        for block in blocks("bash")
        for i, line in enumerate(block.text.splitlines())
        if (words := shlex.split(line, comments=True))
    ]


def console_commands() -> list[Command]:
    """Every `$ command` of every console block, with the lines below it."""
    found: list[Command] = []
    for block in blocks("console"):
        for i, line in enumerate(block.text.splitlines()):
            if line.startswith("$ "):
                found.append(Command(f"{block.page.relative_to(ROOT)}:{block.line + i}", shlex.split(line[2:]), []))
            else:
                found[-1].output.append(line)
    return found


def inline_commands() -> list[Command]:
    """`miles ...` inside a sentence or a table."""
    return [
        Command(str(page.relative_to(ROOT)), code.split(), [])
        for page in PAGES
        for code in _INLINE.findall(prose(page))
        if code.startswith("miles ")
    ]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """(file, heading or "") of every link that stays inside the repository."""
    for target in _LINK.findall(prose(page)):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            yield (page.parent / file).resolve() if file else page, anchor


def anchors(page: Path) -> set[str]:
    """The headings as they appear in links: lower case, spaces as dashes, punctuation left out."""
    headings = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in _HEADING.findall(prose(page))]
    return {heading.replace(" ", "-") for heading in headings}


def flags_named(page: Path) -> set[str]:
    """Flags in prose, commands and YAML. Python code has options of its own; consoles show mistakes, and are run."""
    text = page.read_text()
    for match in reversed([*_FENCE.finditer(text)]):
        if match["language"] in ("python", "console"):
            text = text[: match.start()] + text[match.end() :]
    return set(_FLAG.findall(text))
