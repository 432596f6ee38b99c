"""`--help` (the flags that most runs use) and `--help-all` (every flag), grouped by section, without argparse."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

from miles.config.flags import Flag, flags_of
from miles.config.sections import FLAGS, SECTIONS

INDENT = 4
HELP_COLUMN = 40
WIDEST = 120

HEAD = """\
usage: miles train [--config FILE] [flags]

Every flag can also stand in the YAML file (lr: 1e-6); the command line wins.
"""


def asked(argv: Sequence[str]) -> bool:
    return any(text in ("-h", "--help", "--help-all") for text in argv)


def render(*, everything: bool, width: int | None = None) -> str:
    """The help text. `width` is that of the terminal."""
    width = min(width or shutil.get_terminal_size().columns, WIDEST)
    parts = [HEAD]
    shown = 0
    for name, section in SECTIONS.items():
        flags = [f for f in flags_of(section) if everything or f.common or f.required]
        if flags:
            parts.append(f"{name.replace('_', ' ')}:\n" + "\n".join(_line(f, width) for f in flags) + "\n")
            shown += len(flags)
    if not everything:
        parts.append(f"These are {shown} of {len(FLAGS)} flags: miles train --help-all shows every one.")
    return "\n".join(parts)


def _line(flag: Flag, width: int) -> str:
    left = " " * INDENT + " ".join([flag.option, *_value(flag)])
    text = flag.help + _remark(flag)
    lines = textwrap.wrap(text, max(30, width - HELP_COLUMN), break_on_hyphens=False)
    indent = "\n" + " " * HELP_COLUMN
    if len(left) > width:  # long lists of choices break after a comma
        pieces = left.strip().replace(",", ", ")
        first, more = " " * INDENT, " " * 2 * INDENT
        wrapped = textwrap.wrap(pieces, width, initial_indent=first, subsequent_indent=more, break_on_hyphens=False)
        left = "\n".join(wrapped).replace(", ", ",")
    if len(left) + 2 > HELP_COLUMN:
        return left + indent + indent.join(lines)
    return left.ljust(HELP_COLUMN) + indent.join(lines)


def _value(flag: Flag) -> list[str]:
    if flag.is_switch:
        return []
    if flag.choices:
        shown = "{" + ",".join(c for c in flag.choices if not _missing(flag, c)) + "}"
    else:
        shown = {"int": "N", "float": "X", "json": "JSON", "pairs": "NAME=VALUE", "pattern": "PATTERN"}.get(
            flag.kind, "TEXT"
        )
    return [shown, "..."] if flag.many or flag.kind == "pairs" else [shown]


def _remark(flag: Flag) -> str:
    remarks = []
    if flag.required:
        remarks.append("required")
    elif not flag.is_switch and flag.default not in (None, {}, ""):
        remarks.append(f"default {flag.default}")
    if flag.status.kind == "not_built":
        missing = [c for c in flag.choices if _missing(flag, c)]
        remarks.append("not built yet" + (": " + ", ".join(missing) if missing else ""))
    elif flag.status.kind == "no_meaning_here":
        remarks.append("no meaning here")
    elif "embedded" in flag.status.engines:
        remarks.append("with --rollout-engine sglang")
    return f" [{', '.join(remarks)}]" if remarks else ""


def _missing(flag: Flag, choice: str) -> bool:
    return flag.status.kind == "not_built" and flag.status.applies_to(choice, flag.default)
