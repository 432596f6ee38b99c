"""The settings of a run as its record keeps them.

`resolved` says every value and where it came from; `as_yaml` is what has to be written to get the same run again.
Secrets (`--wandb-key`) stand in neither.
"""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict
from typing import Any

from miles.config.flags import Flag, flags_of
from miles.config.run_config import RunConfig
from miles.config.sections import FLAGS, SECTIONS

HIDDEN = "(hidden)"

WRITTEN = ("file", "command line", "substituted")


def resolved(config: RunConfig, args: Namespace) -> dict[str, Any]:
    """Everything about a run's settings, ready for `json.dumps`.

    Example::

        {"flags": {"optimizer": {"lr": {"value": 0.00015, "from": "file"}, ...}, ...},
         "eval_datasets": [{"name": "carry", "path": "eval.jsonl", ...}],
         "extras": {"max_turns": {"value": 3, "from": "command line"}},
         "args": {"use_critic": false, ...},
         "notices": ["--train-backend: 'fsdp' in place of the default 'megatron': ..."]}

    `args` holds the attributes of `args` that are neither flags nor extras.
    """
    own = {*FLAGS, *config.extras, "eval_datasets"}
    return {
        "flags": {name: _section(config, name) for name in SECTIONS},
        "eval_datasets": [plain(asdict(d)) for d in config.eval.eval_datasets],
        "extras": {k: {"value": plain(v), "from": config.origins[k]} for k, v in config.extras.items()},
        "args": {k: plain(v) for k, v in vars(args).items() if k not in own},
        "notices": list(config.notices),
    }


def _section(config: RunConfig, name: str) -> dict[str, dict[str, Any]]:
    section = config.section(name)
    return {f.name: {"value": _shown(f, section), "from": config.origins[f.name]} for f in flags_of(type(section))}


def _shown(flag: Flag, section: Any) -> Any:
    value = getattr(section, flag.name)
    return HIDDEN if flag.secret and value is not None else plain(value)


def plain(value: Any) -> Any:
    """`value` if JSON can hold it, else its repr."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return repr(value)
    return value


def as_yaml(config: RunConfig) -> str:
    """A file that `--config` reads back to an equal config: what was given or substituted; the rest follows from it.

    `run_dir` is always in it, since its default is the time of the start.
    """
    import yaml

    lines: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        values = {}
        for flag in flags_of(section):
            if flag.secret or flag.name == "config":
                continue
            if config.origins[flag.name] in WRITTEN or flag.name == "run_dir":
                values.update(_entry(flag, getattr(config.section(name), flag.name)))
        if values:
            lines[name] = values
    extras = {k.replace("_", "-"): v for k, v in config.extras.items() if config.origins[k] in WRITTEN}
    if extras:
        lines["extras"] = extras
    return yaml.safe_dump(lines, sort_keys=False, allow_unicode=True)


def _entry(flag: Flag, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    key = flag.option.removeprefix("--")
    return {key: not value if flag.kind == "false" else value}
