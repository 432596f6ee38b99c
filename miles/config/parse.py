"""From a command line to what a run is: `parse(argv) -> (RunConfig, Namespace)`.

    command line ──┐
    --config FILE ─┼─► Draft ──► --custom-config-path ──► resolve ──► sections ──► RunConfig
    add_arguments ─┘                                                      └──────► args, for the plug-ins

The command line wins over the file, the file over the defaults; `--custom-config-path` wins over all, as published.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import Any

from miles.config import help as help_text
from miles.config import passthrough
from miles.config.command_line import (
    ALL_FLAGS,
    Parser,
    add_flag,
    did_you_mean,
    read_plugin_value,
    refuse_leftovers,
    refuse_redeclared,
    take_defaults,
)
from miles.config.draft import Draft
from miles.config.flags import flags_of
from miles.config.resolve import resolve
from miles.config.run_config import RunConfig, flat_args
from miles.config.sections import FLAGS, SECTIONS
from miles.config.yaml_file import Entry, read_entries, read_value
from miles.errors import FlagError
from miles.hooks import extend_parser

AddArguments = Callable[[ArgumentParser], Any]


def parse_args(add_custom_arguments: AddArguments | None = None) -> Namespace:
    """The published entry: the flat `args` of this process's own command line.

    `add_custom_arguments(parser)` adds its options before all others.
    """
    return parse(sys.argv[1:], add_custom_arguments)[1]


def parse(argv: Sequence[str], add_custom_arguments: AddArguments | None = None) -> tuple[RunConfig, Namespace]:
    """What the run is, and the same as a Namespace for plug-ins. `argv` is without the name of the program.

    Raises FlagError (wrong flags), DataError (unreadable YAML), SystemExit(0) after printing help.
    """
    if help_text.asked(argv):
        print(help_text.render(everything="--help-all" in argv))
        raise SystemExit(0)
    _refuse_old_environment()
    _refuse_double_dash(argv)
    parser = build_parser(add_custom_arguments)
    draft = Draft()
    _read_all(draft, parser, argv)
    _apply_custom_config(draft)
    resolve(draft)
    config = _build(draft)
    return config, flat_args(config)


def build_parser(add_custom_arguments: AddArguments | None = None) -> Parser:
    """All declared flags; `add_custom_arguments` comes first, as published."""
    parser = Parser()
    if add_custom_arguments is not None:
        add_custom_arguments(parser)
    for flag in FLAGS.values():
        if flag.option in parser.options:
            raise FlagError(flag.option, given="add_custom_arguments adds this flag, but it is one of miles.")
        add_flag(parser, flag)
    return parser


# ---- reading -------------------------------------------------------------------------------------------------------


def _read_all(draft: Draft, parser: Parser, argv: Sequence[str]) -> None:
    """Fill the draft from the file and the command line, with the options that plug-ins add."""
    own, _ = passthrough.split(argv, parser.options)
    early, _ = parser.parse_known_args(own)
    path = getattr(early, "config", None)
    entries = _file_entries(path)
    if path is not None and not entries:
        draft.notices.append(f"--config {path}: the file holds no flags.")
    draft.claimed = _extend(parser, early, entries)

    rest, passed = passthrough.split(argv, parser.options)
    defaults, required = take_defaults(parser)
    given, leftovers = parser.parse_known_args(rest)
    refuse_leftovers(leftovers, parser)

    for name, value in defaults.items():
        draft.give(name, value, "default")
    _give_entries(draft, parser, entries)
    for name, value in {**vars(given), **passed}.items():
        draft.give(name, value, "command line")
    draft.passed = _undeclared(draft, parser)
    missing = [parser.plugin_actions[name].option_strings[0] for name in required if name not in draft.extras]
    if missing:
        raise FlagError(", ".join(missing), given="required by a plug-in, but not given.")


def _extend(parser: Parser, early: Namespace, entries: list[Entry]) -> set[str]:
    """Let the plug-ins that file and command line name add their options; the plug points that they declare anew."""
    by_name = {entry.key: entry for entry in entries}
    paths: dict[str, Any] = {}
    for flag in flags_of(SECTIONS["hooks"]):
        if flag.name in vars(early):
            paths[flag.name] = vars(early)[flag.name]
        elif flag.name in by_name and by_name[flag.name].value is not None:
            paths[flag.name] = read_value(flag, by_name[flag.name])
    ours = parser.actions
    extend_parser(parser, paths)
    refuse_redeclared(parser, ours)
    return {action.dest for option, action in parser.actions.items() if action is not ours.get(option, action)}


def _file_entries(path: str | None) -> list[Entry]:
    if path is None:
        return []

    def takes_mapping(key: str) -> bool:
        return key in FLAGS and FLAGS[key].kind in ("json", "pairs")

    return read_entries(path, "--config", takes_mapping)


def _give_entries(draft: Draft, parser: Parser, entries: list[Entry]) -> None:
    options = {option.strip("-").replace("-", "_"): name for name, flag in FLAGS.items() for option in _spellings(flag)}
    actions = {o.strip("-").replace("-", "_"): a for a in parser.plugin_actions.values() for o in a.option_strings}
    for entry in entries:
        if entry.value is None:
            continue
        if entry.key == "config":
            raise entry.error("--config", given="a file of flags cannot name another one.")
        name = options.get(entry.key, entry.key)
        if name in FLAGS:
            draft.give(name, read_value(FLAGS[name], entry), "file")
        elif entry.key in actions:
            action = actions[entry.key]
            draft.give(action.dest, read_plugin_value(action, entry), "file")
        elif passthrough.belongs(entry.key):
            draft.give(entry.key, entry.value, "file")
        else:
            option = "--" + entry.key.replace("_", "-")
            hint = did_you_mean(option, parser.options) or ALL_FLAGS
            raise entry.error(option, given=f"no such flag. {hint}")


def _spellings(flag: Any) -> tuple[str, ...]:
    negated = ("--no-" + flag.option.removeprefix("--"),) if flag.kind == "either" else ()
    return (flag.option, *flag.aliases, *negated)


def _undeclared(draft: Draft, parser: Parser) -> list[str]:
    declared = parser.plugin_actions
    return [name for name in draft.extras if name not in declared and name.startswith(passthrough.PREFIXES)]


def _apply_custom_config(draft: Draft) -> None:
    """Keys are attribute names: those of flags change the run, all others are for plug-ins and not checked."""
    path = draft["custom_config_path"]
    if path is None:
        return
    for entry in read_entries(path, "--custom-config-path", takes_mapping=lambda key: True):
        if entry.key not in FLAGS:
            draft.give(entry.key, entry.value, "custom config")
        elif entry.value is not None:
            draft.give(entry.key, read_value(FLAGS[entry.key], entry), "custom config")


def _refuse_old_environment() -> None:
    if "MILES_BACKEND" in os.environ:
        raise FlagError("MILES_BACKEND", given="no longer read.", remedy="Unset it and use --train-backend.")


def _refuse_double_dash(argv: Sequence[str]) -> None:
    """argparse drops `--` wherever it stands, and with it the value of `--lr=--`."""
    for text in argv:
        if text == "--" or text.endswith("=--"):
            raise FlagError("command line", given=f"{text!r} has no meaning here.")


# ---- building ------------------------------------------------------------------------------------------------------


def _build(draft: Draft) -> RunConfig:
    built: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        values = {flag.name: draft[flag.name] for flag in flags_of(section)}
        if name == "eval":
            values["eval_datasets"] = draft.eval_datasets
        built[name] = section(**values)
    origins: dict[str, str] = dict(draft.origins)
    return RunConfig(
        **built,
        extras=draft.extras,
        passed=tuple(draft.passed),
        notices=draft.notices,
        substitutions=draft.substitutions,
        origins=origins,
    )
