"""Where the user's code is: the file and line of an object, the frame of a traceback that is the user's own."""

from __future__ import annotations

import functools
import hashlib
import inspect
import linecache
import os
import sysconfig
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import miles

_LIBRARIES = tuple(
    {os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)
_PACKAGE = os.path.realpath(os.path.dirname(miles.__file__)) + os.sep
# What stands between a command and a plug-in, and is never what an error is about.
_MACHINERY = tuple(os.path.join(_PACKAGE, name) + os.sep for name in ("hooks", "trial"))


@dataclass(frozen=True)
class Source:
    """Where a plug-in is defined. `file` is absolute; both are None for what has no source (a list, a builtin).

    Example: `Source(file="/home/me/rewards.py", line=31)`; `str()` of it is `rewards.py:31` in /home/me.
    """

    file: str | None
    line: int | None

    def __str__(self) -> str:
        if self.file is None:
            return "(no source file)"
        return f"{shown(self.file)}:{self.line}" if self.line is not None else shown(self.file)

    @property
    def sha256(self) -> str | None:
        """Of the whole file, in hexadecimal."""
        if self.file is None or not os.path.isfile(self.file):
            return None
        return hashlib.sha256(Path(self.file).read_bytes()).hexdigest()


def shown(file: str) -> str:
    """A file name as the user would write it: relative where it lies under the working directory."""
    relative = os.path.relpath(file) if os.path.isabs(file) else file
    return file if relative.startswith("..") else relative


def source_of(obj: Any) -> Source:
    """Of a function, class, method, partial, or of the class of any other object."""
    while isinstance(obj, functools.partial):
        obj = obj.func
    obj = inspect.unwrap(obj) if callable(obj) else obj
    if not (inspect.isroutine(obj) or inspect.isclass(obj)):
        obj = type(obj)
    try:
        file = inspect.getsourcefile(obj) or inspect.getfile(obj)
        if inspect.isclass(obj):
            return Source(file, inspect.getsourcelines(obj)[1])
        return Source(file, obj.__code__.co_firstlineno)
    except (TypeError, OSError, AttributeError):
        return Source(None, None)


@dataclass(frozen=True)
class Place:
    """One line of the user's code. `text` is the line itself, stripped; empty where it cannot be read."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{shown(self.file)}:{self.line}"


def own_place(tb: TracebackType | None, plugin_file: str | None, *, only_users: bool = False) -> Place | None:
    """The innermost line of a traceback that the user wrote.

    That is the last frame outside of Python's library, installed packages and miles; where there is none (a plug-in
    that is installed, or built in), the last frame of the plug-in's own file, or of miles for one that is built in;
    else the last outside of this package and of `miles.trial`. `only_users` stops after the plug-in's own file.
    """
    frames = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(tb)]
    built_in = plugin_file is not None and is_built_in(plugin_file)
    kinds = (_is_users, _is_ours if built_in else lambda file: file == plugin_file, _is_any)
    for belongs in kinds[:2] if only_users else kinds:
        for file, line in reversed(frames):
            if belongs(file):
                return Place(file, line, linecache.getline(file, line).strip())
    return None


def _is_users(file: str) -> bool:
    if file.startswith("<"):
        return False
    real = os.path.realpath(file)
    if f"{os.sep}site-packages{os.sep}" in real or f"{os.sep}dist-packages{os.sep}" in real:
        return False
    return not real.startswith((*_LIBRARIES, _PACKAGE))


def is_built_in(file: str) -> bool:
    """Whether a file is part of miles."""
    return os.path.realpath(file).startswith(_PACKAGE)


def is_machinery(file: str) -> bool:
    """Whether a file is part of what calls plug-ins, rather than of what they may call."""
    return os.path.realpath(file).startswith(_MACHINERY)


def _is_ours(file: str) -> bool:
    return is_built_in(file) and _is_any(file)


def _is_any(file: str) -> bool:
    return not file.startswith(("<", *_MACHINERY))


def trimmed_traceback(error: BaseException) -> str:
    """The traceback from the user's first line on, without the frames of this package, as Python prints it."""
    summary = traceback.TracebackException.from_exception(error, capture_locals=False)
    users = [i for i, f in enumerate(summary.stack) if _is_users(f.filename)]
    kept = [f for f in summary.stack[min(users, default=0) :] if not f.filename.startswith(_MACHINERY)]
    if kept:
        summary.stack = traceback.StackSummary.from_list(kept)
    return "".join(summary.format())
