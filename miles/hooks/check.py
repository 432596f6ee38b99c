"""`miles hooks`: the plug points, from the catalogue, and what the plug-ins of a run were bound as.

`miles check`, which calls them too, is `miles.trial`.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from miles.errors import FlagError
from miles.hooks.bind import Hooks, bind
from miles.hooks.call import Hook
from miles.hooks.catalog import CATALOG, plug_point_named
from miles.hooks.docs import customization_page
from miles.hooks.foreign import adapter_of
from miles.hooks.point import PlugPoint, allowed_policies
from miles.hooks.problems import form_text


class _RunSettings(Protocol):
    @property
    def hook_policy(self) -> Mapping[str, str]: ...
    @property
    def hook_form(self) -> Mapping[str, str]: ...
    @property
    def hook_timeout_s(self) -> float | None: ...
    @property
    def hook_error_budget(self) -> float: ...


class CheckedConfig(Protocol):
    """What is needed of a resolved config: the section `run`, and the notices to print."""

    @property
    def run(self) -> _RunSettings: ...
    @property
    def notices(self) -> Sequence[str]: ...


def bound_main(config: CheckedConfig, args: Namespace) -> int:
    """Bind every plug-in of the run and print the table. Raises HookReport (exit status 2) with all problems."""
    run = config.run
    hooks = bind(args, run.hook_policy, run.hook_form, run.hook_timeout_s, run.hook_error_budget)
    for notice in config.notices:
        print(f"note: {notice}")
    print(bound_table(hooks, args))
    return 0


def bound_table(hooks: Hooks, args: Namespace) -> str:
    """One row per bound plug-in.

    Example::

        flag              path              form    defined at        policy
        --custom-rm-path  my.rewards.grade  sample  my/rewards.py:12  drop
    """
    backend = vars(args).get("train_backend")
    rows = [("flag", "path", "form", "defined at", "policy")]
    notes = []
    for hook in hooks:
        rows.append((hook.point.flag, hook.path, form_of(hook), str(hook.source), str(hook.policy)))
        if backend is not None and backend not in hook.point.backends:
            notes.append(f"note: {hook.point.flag} is never called with --train-backend {backend}")
    closing = f"{len(rows) - 1} plug-in{'s' if len(rows) != 2 else ''} bound, no problems."
    return "\n".join([*columns_text(rows), *notes, closing])


def form_of(hook: Hook) -> str:
    """The form, with what the adapter adds: an object made of a class, a thread for a synchronous function."""
    extra = []
    if hook.point.instantiates and inspect.isclass(hook.target):
        extra.append("object of the class")
    if hook.in_thread:
        extra.append("in a thread")
    adapter = adapter_of(hook.target)
    if adapter is not None:
        extra.append(adapter)
    return f"{hook.form} ({', '.join(extra)})" if extra else hook.form


def columns_text(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines in which every column is as wide as its widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def list_main(argv: Sequence[str]) -> int:
    """`miles hooks [NAME]`: all plug points in a line each, or one in full; with --markdown, the page of the docs."""
    parser = argparse.ArgumentParser(prog="miles hooks", description="List the plug points of a run, or show one.")
    parser.add_argument("name", nargs="?", help="a plug point: custom-rm, custom_rm or --custom-rm-path")
    parser.add_argument("--markdown", action="store_true", help="write docs/customization.md to standard output")
    parser.add_argument("--json", action="store_true", help="write what the catalogue says as JSON")
    # `--custom-rm-path` would be read as an option of this command.
    given = parser.parse_args([word.lstrip("-") if plug_point_named(word) else word for word in argv])
    if given.json:
        points = [known_point(given.name)] if given.name else list(CATALOG.values())
        print(json.dumps([point_record(point) for point in points], indent=2))
    elif given.markdown:
        print(customization_page([known_point(given.name)] if given.name else ()), end="")
    elif given.name is None:
        print("\n".join(columns_text([(point.flag, point.when) for point in CATALOG.values()])))
        print("\n`miles hooks NAME` shows one in full; `miles new NAME` writes a skeleton.")
    else:
        print(point_text(known_point(given.name)))
    return 0


def known_point(name: str) -> PlugPoint:
    """The plug point of that name. Raises FlagError with the nearest one."""
    point = plug_point_named(name)
    if point is None:
        keys = [p.key for p in CATALOG.values()]
        close = difflib.get_close_matches(name.strip().lstrip("-").replace("_", "-"), keys, n=1)
        remedy = f"Did you mean {close[0]}?" if close else "`miles hooks` lists them all."
        raise FlagError("PLUGPOINT", given=name, expected="the name of a plug point", remedy=remedy)
    return point


def point_record(point: PlugPoint) -> dict[str, Any]:
    """What the catalogue says about one plug point, for `miles hooks --json`.

    Example (some of it)::

        {"name": "custom_rm", "flag": "--custom-rm-path", "default": null, "process": "manager", "pure": true,
         "signature": "(args: Namespace, sample: Sample) -> float | dict[str, Any]", "replayable": true,
         "forms": [{"name": "sample", "signature": "...", "recognised_by": "..."}], "policies": ["raise", "drop"]}
    """
    return {
        "name": point.name,
        "key": point.key,
        "flag": point.flag,
        "plural": point.plural,
        "default": point.default,
        "signature": point.canonical,
        "awaited": point.awaited,
        "contract": point.contract,
        "when": point.when,
        "process": point.process,
        "backends": list(point.backends),
        "forms": [
            {
                "name": form.name,
                "target": form.target,
                "signature": form.signature,
                "recognised_by": form.recognised_by,
            }
            for form in point.forms
        ],
        "methods": list(point.methods),
        "policies": ["raise", *(action for action, _ in point.tolerates), *(["retry:N"] if point.retries else [])],
        "pure": point.pure,
        "replayable": not point.replay,
        "why_not_replayable": point.replay or None,
    }


def point_text(point: PlugPoint) -> str:
    """Everything the catalogue says about one plug point."""
    lines = [
        point.flag + (" PATH ..." if point.plural else " PATH"),
        f"  {point.help.removeprefix('Plug-in: ')}",
        "",
        f"when      {point.when}",
        f"where     {point.process} process; backends: {', '.join(point.backends)}",
        f"default   {point.default or 'none'}",
        f"policies  {allowed_policies(point)}",
        *(f"          {action}: {what}" for action, what in point.tolerates),
        f"check     {'called by `miles check`' if point.pure else 'not called by `miles check`: it acts on something'}",
        f"replay    {'on a recorded rollout or from a bundle' if not point.replay else point.replay}",
        "",
        "accepted forms (--hook-form names):",
    ]
    for form in point.forms:
        lines += [f"  {form.name}", f"      {form_text(point, form.name)}"]
        lines.append(f"      recognised by: {form.recognised_by}")
    if point.instantiates:
        lines.append("  A class is instantiated without arguments; its objects are called like the functions above.")
    if point.methods:
        lines.append(f"  The object must have: {', '.join(point.methods)}.")
    return "\n".join([*lines, "", point.contract])
