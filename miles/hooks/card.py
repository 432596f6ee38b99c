"""A failed plug-in call, told: the error card, and the bundle that `miles replay` runs again.

    BUNDLE/call.json            which plug-in, which form, its args and inputs, what happened
    BUNDLE/tensors.safetensors  tensors and arrays of the inputs, where there are any
    BUNDLE/traceback.txt        the whole traceback
"""

from __future__ import annotations

import json
import linecache
import os
import shlex
import sys
import sysconfig
import textwrap
import traceback
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.hooks.blame import innermost, message_of, place_of
from miles.hooks.codec import Encoder
from miles.hooks.point import PlugPoint, Policy, allowed_policies
from miles.hooks.source import Place, Source, shown
from miles.hooks.values import BadReturn, safely
from miles.types import Failure, GenerateFnInput, Sample

BUNDLE_FILE = "call.json"
TRACEBACK_FILE = "traceback.txt"
BUNDLE_VERSION = 1
_MAX_TEXT = 160

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class FailedCall:
    """One failed call with all that a card and a bundle need. `call` is "call", "batch", "build" or "method"."""

    point: PlugPoint
    path: str
    form: str
    source: Source
    policy: Policy
    error: BaseException
    inputs: Inputs
    call: str = "call"
    sample: Sample | None = None
    timeout_s: float | None = None

    @property
    def replayable(self) -> bool:
        """Whether the call can be made again by itself: whole rollouts and methods of live objects cannot."""
        return not self.point.replay and self.call != "method"

    @property
    def kind(self) -> str:
        if isinstance(self.error, BadReturn):
            return self.error.kind
        return "timeout" if self.timeout_s is not None else "exception"

    @property
    def message(self) -> str:
        if isinstance(self.error, BadReturn):
            return str(self.error)
        if self.timeout_s is not None:
            return f"took longer than {self.timeout_s:g} s (--hook-timeout-s)"
        return message_of(self.error)

    @property
    def place(self) -> Place | None:
        """The user's line that failed, or where it was when its time was up; the definition where the return value is
        at fault."""
        if not isinstance(self.error, BadReturn):
            place = place_of(self.error, self.source.file, only_users=self.timeout_s is not None)
            if place is not None:
                return place
        if self.source.file is None or self.source.line is None:
            return None
        text = linecache.getline(self.source.file, self.source.line).strip()
        return Place(self.source.file, self.source.line, text)

    def failure(self, bundle: str | None) -> Failure:
        return Failure(
            flag=self.point.flag,
            path=self.path,
            kind=self.kind,
            message=self.message,
            location=str(self.place or self.source),
            sample_index=self.sample.index if self.sample is not None else None,
            bundle=bundle,
            dropped=self.policy.action == "drop",
        )


def card(failed: FailedCall, bundle: str | None) -> str:
    """The error card.

    Example::

        --custom-rm-path my.rewards.grade failed at my/rewards.py:31
          31 | return 1 / len(sample.label)
          ZeroDivisionError: division by zero
          sample    24 (group 3), completed: prompt '859+467=?', response '1326' (4 tokens), label ''
          policy    raise; --hook-policy custom-rm=drop would go on without the sample
          replay    miles replay runs/x/failures/000001-custom-rm --pdb
    """
    place = failed.place
    lines = [f"{failed.point.flag} {failed.path} failed at {place or failed.source}"]
    if place is not None and place.text:
        lines.append(f"  {place.line} | {place.text}")
    lines += textwrap.indent(failed.message, "  ").splitlines()
    if failed.sample is not None:
        lines.append(f"  sample    {sample_text(failed.sample)}")
    hint = hint_for(failed)
    if hint:
        lines.append(f"  hint      {hint}")
    lines.append(f"  policy    {_policy_text(failed)}")
    if bundle is not None and failed.replayable:
        lines.append(f"  replay    miles replay {shlex.quote(shown(bundle))} --pdb")
    elif bundle is not None and not isinstance(failed.error, BadReturn):
        lines.append(f"  trace     {shown(os.path.join(bundle, TRACEBACK_FILE))}")
    return "\n".join(lines)


def sample_text(sample: Sample) -> str:
    """One line about a sample, long texts cut in the middle."""
    status = sample.status.value if isinstance(sample.status, Sample.Status) else sample.status
    group = f" (group {sample.group_index})" if sample.group_index is not None else ""
    return (
        f"{sample.index}{group}, {status}: prompt {_cut(sample.prompt)}, response {_cut(sample.response)}"
        f" ({sample.response_length} tokens), label {_cut(sample.label)}"
    )


def _cut(value: Any) -> str:
    text = safely(repr, value)
    half = _MAX_TEXT // 2
    return text if len(text) <= _MAX_TEXT else f"{text[:half]} ... {text[-half:]}"


def _policy_text(failed: FailedCall) -> str:
    others = [f"{action} ({what})" for action, what in failed.point.tolerates if action != failed.policy.action]
    text = str(failed.policy)
    if failed.policy.action == "raise" and (others or failed.point.retries):
        text += f"; --hook-policy {failed.point.key}=... takes {allowed_policies(failed.point)}"
    return text


def hint_for(failed: FailedCall) -> str:
    """A sentence that often helps with this kind of failure; empty where nothing can be said."""
    error, sample = failed.error, failed.sample
    if isinstance(error, BadReturn):
        return error.hint
    if failed.timeout_s is not None:
        waited = innermost(error, TimeoutError) is not None
        return "a call that waits for a server needs a time limit of its own" if waited else ""
    if isinstance(error, KeyError) and sample is not None and isinstance(sample.metadata, dict):
        return f"metadata of this sample has {', '.join(map(repr, sample.metadata)) or 'no keys'}"
    if isinstance(error, ModuleNotFoundError):
        return f"install {error.name}, or import it at the top of the file so that `miles check` sees it"
    if isinstance(error, SystemExit):
        return "raise an exception instead: exiting is for programs, not for functions"
    text = safely(str, error)
    if isinstance(error, AttributeError) and "'list' object" in text and failed.call == "batch":
        return "a group arrives as a list: annotate the parameter `sample: Sample` to be called once per sample"
    if "'Sample' object is not iterable" in text:
        return f"the other form passes groups: --hook-form {failed.point.key}=groups"
    if isinstance(error, TypeError) and failed.form in ("trl", "verl") and "required" in text:
        return "columns come from the keys of the data row's metadata, and from its label"
    return ""


# ---- bundles ------------------------------------------------------------------------------------------------------


def write_bundle(failed: FailedCall, folder: Path, number: int) -> Path:
    """Write one bundle under `folder` and return its path."""
    path = folder / f"{number:06d}-{failed.point.key}"
    path.mkdir(parents=True, exist_ok=True)
    encoder = Encoder()
    args, inputs = _without_args(failed.inputs)
    positional, keywords = inputs
    content = {
        "version": BUNDLE_VERSION,
        "plug_point": failed.point.name,
        "flag": failed.point.flag,
        "path": failed.path,
        "form": failed.form,
        "call": failed.call,
        "source": {"file": failed.source.file, "line": failed.source.line, "sha256": failed.source.sha256},
        "failure": {"kind": failed.kind, "message": failed.message, "location": str(failed.place or failed.source)},
        "sample_index": failed.sample.index if failed.sample is not None else None,
        "cwd": os.getcwd(),
        "import_path": list(_users_import_path()),
        "args": None if args is None else encoder.encode(vars(args)),
        "inputs": [v if v is ARGS_MARK else encoder.encode(v) for v in positional],
        "keywords": {k: v if v is ARGS_MARK else encoder.encode(v) for k, v in keywords.items()},
    }
    encoder.save_tensors(path)
    text = "".join(traceback.format_exception(failed.error))
    (path / TRACEBACK_FILE).write_text(text, encoding="utf-8", errors="backslashreplace")
    (path / BUNDLE_FILE).write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    return path


# Stands in `inputs` where the call passes the run's `args`, which are written once.
ARGS_MARK = {"$args": True}


def _without_args(inputs: Inputs) -> tuple[Namespace | None, Inputs]:
    positional, keywords = inputs
    for value in (*positional, *keywords.values()):
        if isinstance(value, Namespace):
            return value, _replace(inputs, value)
        if isinstance(value, GenerateFnInput):
            return value.args, inputs
    return None, inputs


def _replace(inputs: Inputs, args: Namespace) -> Inputs:
    positional, keywords = inputs
    marked = tuple(ARGS_MARK if v is args else v for v in positional)
    return marked, {k: ARGS_MARK if v is args else v for k, v in keywords.items()}


def _users_import_path() -> Iterable[str]:
    """Entries of the import path that are neither Python's nor installed packages."""
    libraries = tuple(os.path.realpath(sysconfig.get_path(n)) for n in ("stdlib", "platstdlib", "purelib", "platlib"))
    for entry in sys.path:
        real = os.path.realpath(entry or os.getcwd())
        if os.path.isdir(real) and not real.startswith(libraries):
            yield real


def first_sample(inputs: Sequence[Any]) -> Sample | None:
    """The sample that a card speaks of: the first one among the inputs, not looking into groups."""
    for value in inputs:
        if isinstance(value, Sample):
            return value
        if isinstance(value, GenerateFnInput):
            return value.sample
    return None
