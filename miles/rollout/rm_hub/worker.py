"""The process in which graders read untrusted text: one request per line on standard input, one reply on the output.

    {"load": "sympy"}                                          -> {"value": null}      imports may take seconds
    {"grade": "sympy", "given": [[["1/2", "0.5"]]], "limit_s": 10} -> {"value": true}
                                                               -> {"error": "ValueError: ..."}

It ends with its parent, however that ended: an idle one at the end of its input (or, where another child of the parent
holds the pipe open, when it finds itself orphaned), a busy one when the kernel's alarm for the current request rings,
which needs no help of the interpreter. Starting, timing and replacing workers is left to `miles.rollout.rm_hub.pool`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

GRADERS: dict[str, tuple[str, str, tuple[Any, ...]]] = {
    "sympy": ("miles.rollout.rm_hub.math_utils", "all_equal_under_sympy", ([["x+1", "1+x"]],)),
    "math_verify": ("miles.rollout.rm_hub.library", "compute_math_verify_reward", ("$x+1$", "1+x")),
    "ifbench": ("miles.rollout.rm_hub.ifbench", "compute_ifbench_reward", ("", None, None)),
}
"""Name in a request -> module, function, and arguments of a first call that makes it import what it needs.

Arguments and values of the functions are JSON.
"""

# Far more than any grader needs, far less than 9^9^9 would take.
MAX_MEMORY_BYTES = 8 << 30
# How often an idle worker looks whether it has been orphaned.
ORPHAN_CHECK_S = 5.0
# The pool ends a worker at the limit of the request; the alarm is for a worker whose parent is gone.
ALARM_GRACE_S = 2.0


def main(parent: int) -> None:
    """Answer requests until the input ends. `parent` is the process id of the pool's process."""
    replies = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # a grader that prints must not write into the replies
    os.dup2(nowhere, 2)  # up to here the pool has kept it, for a worker that does not even start
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends its workers itself
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(ValueError, OSError):  # a lower limit is in force, or the system has none
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    loaded: dict[str, Callable[..., Any]] = {}
    for line in _lines(0, parent):
        _write(replies, json.dumps(_reply(json.loads(line), loaded)).encode() + b"\n")


def _reply(request: dict[str, Any], loaded: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    try:
        if "load" in request:
            name = request["load"]
            loaded[name] = _load(*GRADERS[name]) if name in GRADERS else _load_plug_in(name)
            return {"value": None}
        signal.setitimer(signal.ITIMER_REAL, request["limit_s"] + ALARM_GRACE_S)
        try:
            return {"value": loaded[request["grade"]](*request["given"])}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Exception as error:  # told to the pool, which raises it where the score was asked for
        return {"error": f"{type(error).__name__}: {error}"}


def _load(module: str, name: str, first_call: tuple[Any, ...]) -> Callable[..., Any]:
    grader: Callable[..., Any] = getattr(importlib.import_module(module), name)
    with contextlib.suppress(ValueError):  # IFBench's first call is for the import alone: it has no instructions
        grader(*first_call)
    return grader


def _load_plug_in(path: str) -> Callable[..., Any]:
    """A grader of the user's own, named as flags name plug-ins: pkg.module:fn or path/to/file.py:fn."""
    from miles.hooks import load_function

    grader: Callable[..., Any] = load_function(path)
    return grader


def _lines(fd: int, parent: int) -> Iterator[bytes]:
    pending = b""
    while os.getppid() == parent:
        if not select.select([fd], [], [], ORPHAN_CHECK_S)[0]:
            continue
        chunk = os.read(fd, 1 << 20)
        if not chunk:
            return
        *complete, pending = (pending + chunk).split(b"\n")
        yield from complete


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


if __name__ == "__main__":
    main(int(sys.argv[1]))
