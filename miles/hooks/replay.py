"""`miles replay BUNDLE`: run one recorded plug-in call again, with the same args and inputs, in this process.

Synchronous functions run in the main thread and without a time limit, so that breakpoints work; the form is the
recorded one. The plug-in is loaded from its path as it is now: a mended plug-in passes.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import os
import pdb
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.errors import UsageError
from miles.hooks.bind import Binder
from miles.hooks.call import Hook, RewardHook, RolloutHook
from miles.hooks.card import ARGS_MARK, BUNDLE_FILE, BUNDLE_VERSION, sample_text
from miles.hooks.catalog import CATALOG
from miles.hooks.codec import Decoder
from miles.hooks.guard import Guard
from miles.hooks.load import make_importable
from miles.hooks.point import PlugPoint
from miles.hooks.source import trimmed_traceback
from miles.hooks.values import BadReturn
from miles.types import GenerateFnInput, GenerateFnOutput, Sample


@dataclass(frozen=True)
class Bundle:
    """One recorded call. `call` is "call", "batch" or "build"; `sha256` that of the plug-in's file at the time."""

    point: PlugPoint
    path: str
    form: str
    call: str
    message: str
    sha256: str | None
    inputs: tuple[Any, ...]
    keywords: dict[str, Any]


def read_bundle(folder: Path) -> Bundle:
    """Raises UsageError for what is no bundle. Puts the recorded import path behind this process's own."""
    file = folder / BUNDLE_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        found = "there is no such folder" if not folder.is_dir() else f"it has no {BUNDLE_FILE}"
        raise UsageError(
            f"{folder}: expected the folder of a failed call, but {found}. Error cards name theirs; those of a run lie "
            "in RUN_DIR/failures."
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}: expected a folder with the {BUNDLE_FILE} of a failed call: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file}: expected the JSON object of a failed call, got a {type(content).__name__}.")
    if content.get("version") != BUNDLE_VERSION or content.get("plug_point") not in CATALOG:
        raise UsageError(f"{file}: written by another version of miles (version {content.get('version')!r}).")
    try:
        return _bundle(content, Decoder(folder))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise UsageError(f"{folder}: damaged or incomplete ({type(error).__name__}: {error}).") from error


def _bundle(content: dict[str, Any], decoder: Decoder) -> Bundle:
    for entry in (content["cwd"], *content["import_path"]):
        if os.path.isdir(entry):
            make_importable(entry)
    args = None if content["args"] is None else Namespace(**decoder.decode(content["args"]))

    def value(recorded: Any) -> Any:
        return args if recorded == ARGS_MARK else decoder.decode(recorded)

    return Bundle(
        point=CATALOG[content["plug_point"]],
        path=content["path"],
        form=content["form"],
        call=content["call"],
        message=content["failure"]["message"],
        sha256=content["source"]["sha256"],
        inputs=tuple(value(v) for v in content["inputs"]),
        keywords={k: value(v) for k, v in content["keywords"].items()},
    )


def load_hook(bundle: Bundle) -> Hook:
    """The plug-in of a bundle. Raises HookReport where it cannot be bound any more."""
    binder = Binder(Namespace(), {}, {bundle.point.name: bundle.form}, None, Guard(1.0), None)
    return binder.require(bundle.point, bundle.path)


def run_again(hook: Hook, bundle: Bundle) -> Any:
    """The call itself, unguarded: what the plug-in raises, this raises; a bad return value raises BadReturn."""
    if isinstance(hook, RolloutHook):
        raise UsageError(
            f"{bundle.point.flag}: a whole rollout needs its data source and engines, which a bundle does not hold. "
            "Run it again with --load-debug-rollout-data, or replay the generate function or the reward instead."
        )
    call = hook.raw_batch if bundle.call == "batch" and isinstance(hook, RewardHook) else hook.raw
    value = call(*bundle.inputs, **bundle.keywords)
    return asyncio.run(_finished(value)) if inspect.isawaitable(value) else value


async def _finished(value: Any) -> Any:
    return await value


def replay_main(argv: Sequence[str]) -> int:
    """Print the result (exit status 0) or the traceback (exit status 1)."""
    parser = argparse.ArgumentParser(prog="miles replay", description="Run a failed plug-in call again.")
    parser.add_argument("bundle", type=Path, help="a folder under RUN_DIR/failures")
    parser.add_argument("--pdb", action="store_true", help="stop in the debugger where it fails")
    given = parser.parse_args(argv)
    bundle = read_bundle(given.bundle)
    hook = load_hook(bundle)
    print(f"{bundle.point.flag} {bundle.path} ({hook.source}), form {bundle.form}")
    print(f"recorded  {bundle.message}")
    if bundle.sha256 is not None and hook.source.sha256 != bundle.sha256:
        print("note      the plug-in's file has changed since")
    for value in (*bundle.inputs, *bundle.keywords.values()):
        shown = value.sample if isinstance(value, GenerateFnInput) else value
        if isinstance(shown, Sample):
            print(f"sample    {sample_text(shown)}")
    try:
        result = run_again(hook, bundle)
    except UsageError:
        raise
    except BadReturn as error:
        print(f"result    {error}" + (f" ({error.hint})" if error.hint else ""))
        return 1
    except (Exception, SystemExit) as error:
        print(trimmed_traceback(error), end="")
        if given.pdb:
            pdb.post_mortem(error.__traceback__)
        return 1
    finally:
        sys.stdout.flush()
    print(f"result    {_shown(result)}")
    return 0


def _shown(result: Any) -> str:
    if isinstance(result, GenerateFnOutput):
        samples = result.samples if isinstance(result.samples, list) else [result.samples]
        return "\n          ".join(sample_text(s) for s in samples) or "no samples"
    return repr(result)
