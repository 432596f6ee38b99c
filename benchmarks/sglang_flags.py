"""Writes `miles/config/sglang_flags.json`: SGLang's own server flags, against which `--sglang-<flag>` is checked.

Run it with the interpreter of an environment that has SGLang (`make conformance` builds one):

    .venv-sglang/bin/python benchmarks/sglang_flags.py            write the table
    .venv-sglang/bin/python benchmarks/sglang_flags.py --check    compare it; status 1 where this SGLang differs

One row per option, by its name without dashes: the attribute it sets, the other spellings, what its values are, how
many it takes (argparse's nargs), its choices, its default.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "miles" / "config" / "sglang_flags.json"

# What argparse converts a value with -> what it is. Any other converter reads text that only SGLang understands.
TYPES = {None: "str", "str": "str", "int": "int", "float": "float", "human_readable_int": "int", "loads": "json"}


def row(action: argparse.Action) -> dict[str, Any]:
    """One line of the table.

    Example: `{"dest": "tp_size", "aliases": ["tp-size"], "type": "int", "default": 1}`
    """
    longest, *others = [option.removeprefix("--") for option in action.option_strings if option.startswith("--")]
    kind = "bool" if action.nargs == 0 else TYPES.get(getattr(action.type, "__name__", None), "str")
    fields: dict[str, Any] = {"dest": action.dest, "aliases": others, "type": kind}
    if action.nargs != 0 and action.nargs is not None:
        fields["nargs"] = action.nargs
    if action.choices is not None:
        fields["choices"] = sorted(map(str, action.choices))
    default = action.default
    fields["default"] = default if isinstance(default, bool | int | float | str | list | dict) else None
    return {name: value for name, value in fields.items() if value != []} | {"option": longest}


def table() -> dict[str, Any]:
    """Every option of the installed SGLang."""
    from sglang.srt.server_args import ServerArgs
    from sglang.version import __version__

    parser = argparse.ArgumentParser(add_help=False)
    ServerArgs.add_cli_args(parser)
    rows = [row(action) for action in parser._actions]
    flags = {fields.pop("option"): fields for fields in rows}
    return {"sglang": __version__, "flags": dict(sorted(flags.items()))}


def render(made: dict[str, Any]) -> str:
    """JSON with one flag per line, so that a new version of SGLang is a readable difference."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(fields)}" for name, fields in made["flags"].items())
    return f'{{"sglang": {json.dumps(made["sglang"])}, "flags": {{\n{lines}\n}}}}\n'


def main() -> int:
    made = table()
    if "--check" not in sys.argv:
        TABLE.write_text(render(made))
        print(f"{TABLE.relative_to(ROOT)}: {len(made['flags'])} flags of SGLang {made['sglang']}")
        return 0
    committed = json.loads(TABLE.read_text())["flags"]
    differing = [n for n in {**committed, **made["flags"]} if committed.get(n) != made["flags"].get(n)]
    for name in differing:
        print(f"--{name}: committed {committed.get(name)}, SGLang {made['sglang']} {made['flags'].get(name)}")
    return 1 if differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
