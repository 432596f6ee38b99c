"""SGLang's own server flags, as a table that was made from SGLang: what `--sglang-<flag>` may say.

`sglang_flags.json` is written by `benchmarks/sglang_flags.py` and compared with the installed SGLang by
`make conformance`. It is read when the first such flag is looked up, and never for `miles --help`.

An SGLang of another version may have other flags: a name that resembles none of the table is passed on with a notice.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from miles.errors import FlagError

PREFIX = "sglang_"

# Published names of flags that SGLang has renamed since -> their names now.
RENAMED = {"cuda-graph-max-bs": "cuda-graph-max-bs-decode"}

# SGLang takes 4k and 4Ki for numbers of tokens.
_SHORT_NUMBER = re.compile(r"\d+(\.\d+)?(k|M|G|T|Ki|Mi|Gi|Ti)$")

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "no value (it is a switch)",
    "json": "a JSON object",
    "str": "one value",
}


@dataclass(frozen=True)
class ServerFlag:
    """One option of SGLang's server.

    Example: `ServerFlag("log-level", "str", "log_level", default="info")`
    """

    option: str  # without dashes
    type: str  # bool, int, float, str, json
    dest: str
    aliases: tuple[str, ...] = ()
    nargs: str | None = None  # argparse's: "+", "*" or "?"
    choices: tuple[str, ...] = ()
    default: Any = None

    @property
    def takes_several(self) -> bool:
        return self.nargs in ("+", "*")


@functools.cache
def table() -> tuple[str, Mapping[str, ServerFlag]]:
    """The version of SGLang, and its flags by every spelling that they have."""
    read = json.loads(resources.files("miles.config").joinpath("sglang_flags.json").read_text())
    flags: dict[str, ServerFlag] = {}
    for option, row in read["flags"].items():
        row = {k: tuple(v) if k in ("aliases", "choices") else v for k, v in row.items()}
        flag = ServerFlag(option=option, **row)
        flags |= dict.fromkeys((option, *flag.aliases), flag)
    return read["sglang"], flags


def find(name: str) -> ServerFlag | None:
    """The flag behind an attribute of `args`. Example: `find("sglang_tp_size").option == "tp-size"`"""
    option = name.removeprefix(PREFIX).replace("_", "-")
    return table()[1].get(RENAMED.get(option, option))


def check(name: str, value: Any) -> str | None:
    """Raise FlagError where SGLang would refuse the flag; returns a notice about one that is not in the table."""
    shown = "--" + name.replace("_", "-")
    flag = find(name)
    if flag is None:
        version, flags = table()
        close = difflib.get_close_matches(name.removeprefix(PREFIX).replace("_", "-"), flags, n=1, cutoff=0.8)
        if close:
            raise FlagError(shown, given=f"SGLang {version} has no such flag. Did you mean --sglang-{close[0]}?")
        return f"{shown}: SGLang {version} has no such flag; passed on as it is."
    values = value if isinstance(value, list) else [value]
    if len(values) > 1 and not flag.takes_several:
        raise FlagError(shown, given=value, expected=_EXPECTED[flag.type])
    for one in values:
        if not _fits(flag, one):
            raise FlagError(shown, given=one, expected=_EXPECTED[flag.type])
        if flag.choices and text(flag, one) not in flag.choices:
            raise FlagError(shown, given=one, expected="one of " + ", ".join(flag.choices))
    return None


def _fits(flag: ServerFlag, value: Any) -> bool:
    if flag.type == "bool":
        return isinstance(value, bool) or value is None
    if value is True and not flag.choices:
        return flag.nargs in ("?", "*")  # the flag was given without a value
    if flag.type == "int":
        is_short = isinstance(value, str) and bool(_SHORT_NUMBER.match(value))
        return (isinstance(value, int) and not isinstance(value, bool)) or is_short
    if flag.type == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if flag.type == "json":
        return isinstance(value, dict | list) or (isinstance(value, str) and _is_json(value))
    return True


def _is_json(value: str) -> bool:
    try:
        json.loads(value)
    except ValueError:
        return False
    return True


def text(flag: ServerFlag | None, value: Any) -> str:
    """One value as it stands on SGLang's command line."""
    if value is None and flag is not None and "none" in flag.choices:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def argv(name: str, value: Any) -> list[str]:
    """The flag as words of SGLang's command line; none for a switch that is off and a value that is unset.

    Example: `argv("sglang_mem_fraction_static", 0.8) == ["--mem-fraction-static", "0.8"]`
    """
    flag = find(name)
    option = flag.option if flag is not None else name.removeprefix(PREFIX).replace("_", "-")
    if flag is None or flag.type == "bool":
        negated = None if flag is None or f"no-{flag.option}" not in flag.aliases else f"no-{flag.option}"
        if negated is not None and name.removeprefix(PREFIX).replace("_", "-") == negated:
            value = value is False
        if negated is not None and value is False:
            return [f"--{negated}"]
        if value is True or value in (False, None):
            return [f"--{option}"] if value is True else []
    if value is None and not (flag is not None and "none" in flag.choices):
        return []
    if value is True and flag is not None and not flag.choices:
        return [f"--{option}"]  # one that may go without a value
    several = isinstance(value, list) and (flag is None or flag.takes_several)
    return [f"--{option}", *(text(flag, one) for one in (value if several else [value]))]
