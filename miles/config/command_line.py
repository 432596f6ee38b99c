"""The argument parser: one argparse option per declared flag, and room for those of plug-ins.

argparse only takes the line apart. Defaults, precedence over files, required flags and the answer to unknown ones are
ours, so every option is parsed with its default suppressed: what the namespace holds was given.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from miles.config.flags import Flag, flags_of
from miles.config.sections import FLAGS, SECTIONS
from miles.config.yaml_file import Entry
from miles.errors import FlagError

PLUG_POINTS = {flag.name for flag in flags_of(SECTIONS["hooks"])}
ALL_FLAGS = "`miles train --help-all` shows every one."


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, exits and a help of its own; its errors are FlagErrors."""

    def __init__(self) -> None:
        super().__init__(
            prog="miles train",
            add_help=False,
            allow_abbrev=False,
            conflict_handler="resolve",
        )

    def error(self, message: str) -> NoReturn:
        match = re.match(r"argument (?P<option>\S+): (?P<problem>.*)", message, re.DOTALL)
        if match is None:
            raise FlagError("command line", given=message)
        raise FlagError(match["option"], given=match["problem"] + ".")

    @property
    def options(self) -> set[str]:
        return set(self._option_string_actions)

    @property
    def actions(self) -> dict[str, argparse.Action]:
        """A copy of the table option -> action."""
        return dict(self._option_string_actions)

    @property
    def plugin_actions(self) -> dict[str, argparse.Action]:
        """The options that plug-ins have added, by destination."""
        return {a.dest: a for a in self._actions if a.dest not in FLAGS}


class _ExtendPairs(argparse.Action):
    """Collects NAME=VALUE pairs over all occurrences of the option."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, {**getattr(namespace, self.dest, {}), **dict(values)})


def add_flag(parser: argparse.ArgumentParser, flag: Flag) -> None:
    options: dict[str, Any] = {"dest": flag.name, "default": argparse.SUPPRESS}
    if flag.kind in ("true", "false"):
        options["action"] = "store_true" if flag.kind == "true" else "store_false"
    elif flag.kind == "either":
        options["action"] = argparse.BooleanOptionalAction
    elif flag.kind == "pairs":
        options.update(type=flag.read, nargs="+", action=_ExtendPairs)
    else:
        options.update(type=flag.read, nargs="+" if flag.many else None)
    parser.add_argument(flag.option, *flag.aliases, **options)


# ---- flags of plug-ins ---------------------------------------------------------------------------------------------


def refuse_redeclared(parser: Parser, ours: dict[str, argparse.Action]) -> None:
    """Raise FlagError where a plug-in has taken a flag over. Plug-in paths are exempt: their users may declare them."""
    for option, action in parser._option_string_actions.items():
        before = ours.get(option, action)
        if action is not before and before.dest in FLAGS and before.dest not in PLUG_POINTS:
            raise FlagError(option, given="a plug-in adds this flag, but it is one of miles.")


def take_defaults(parser: Parser) -> tuple[dict[str, Any], list[str]]:
    """The defaults of plug-in flags and the names of required ones; the parser then reports what was given only."""
    defaults: dict[str, Any] = dict(parser._defaults)
    parser._defaults.clear()
    required = []
    for action in parser._actions:
        if action.dest in FLAGS:
            action.default = argparse.SUPPRESS
    for name, action in parser.plugin_actions.items():
        if not action.option_strings:
            raise FlagError(name, given="a plug-in may add options (--name), not positional arguments.")
        if action.required:
            required.append(name)
            action.required = False
        elif action.default is not argparse.SUPPRESS:
            text = isinstance(action.default, str)
            defaults[name] = _convert(action, action.default) if text else action.default
        action.default = argparse.SUPPRESS
    return defaults, required


def read_plugin_value(action: argparse.Action, entry: Entry) -> Any:
    """The value that a file gives for a plug-in's option."""
    option = action.option_strings[0]
    if action.nargs == 0:
        if not isinstance(entry.value, bool):
            raise entry.error(option, given=entry.value, expected="true or false")
        turned_off = isinstance(action, argparse._StoreFalseAction)
        return entry.value != turned_off
    if entry.texts is None:
        return entry.value
    try:
        values = [_convert(action, text) for text in entry.texts]
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise entry.error(option, given=entry.value, expected="another value", remedy=f"({error})") from None
    for value in values:
        if action.choices is not None and value not in action.choices:
            raise entry.error(option, given=value, expected="one of " + ", ".join(map(str, action.choices)))
    return values if action.nargs is not None else values[0]


def _convert(action: argparse.Action, text: str) -> Any:
    return action.type(text) if callable(action.type) else text


# ---- what nobody declared ------------------------------------------------------------------------------------------


def did_you_mean(option: str, options: set[str]) -> str:
    close = difflib.get_close_matches(option, sorted(options), n=3, cutoff=0.7)
    if not close:
        words = set(option.strip("-").split("-"))
        close = sorted(o for o in options if len(words & set(o.strip("-").split("-"))) >= max(2, len(words) - 1))[:3]
    return f"Did you mean {' or '.join(close)}?" if close else ""


def refuse_leftovers(leftovers: Sequence[str], parser: Parser) -> None:
    """Raise FlagError for what no option has taken: unknown flags first, each with the nearest names."""
    unknown = [text.partition("=")[0] for text in leftovers if text.startswith("--")]
    if unknown:
        texts = []
        for option in dict.fromkeys(unknown):
            spelled = option.replace("_", "-")
            texts.append(f"{option}: no such flag. {did_you_mean(spelled, parser.options) or ALL_FLAGS}")
        raise FlagError(unknown[0], given="\n".join(texts).removeprefix(f"{unknown[0]}: "))
    if leftovers:
        raise FlagError("command line", given=f"{' '.join(leftovers)!r} belongs to no flag.")
