"""What a plug point and an accepted form are, and what a failure policy says. The table itself is `catalog`.

A *plug point* is a place where the run calls a function of the user's. A *form* is one signature that such a function
may have. `adapt` recognises the form of a function and translates; the core only ever makes the canonical call, which
is the `Protocol` of the plug point.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

Process = Literal["manager", "trainer", "router"]
Target = Literal["function", "class", "value"]
Action = Literal["raise", "drop", "mask"]


@dataclass(frozen=True)
class Tell:
    """One sign that a function has a certain form: the name or the annotation of its parameter number `index`.

    Annotations are compared as text without module names and spaces: `"list[Sample]"` and `List[types.Sample]` agree.

    Example: `Tell(1, names=("batch",))`, `Tell(1, annotations=("list[Sample]",))`
    """

    index: int
    names: tuple[str, ...] = ()
    annotations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Form:
    """One accepted signature.

    `signature` is what the user writes; what is passed is read from it: parameters before `*` by position, those after
    it by keyword. `also` names keywords that are passed only to functions that have a parameter of that name.

    A form is a candidate where the arguments bind, `requires` are all and `excludes` none of the parameter names. A
    `needs_tell` form is a candidate only where one of its `tells` holds. Among several candidates those with a tell
    win; among those, one that receives the same arguments and more wins; what is left is ambiguous.

    Example::

        Form("five-arguments", "(args, parallel_state, batch, logits, sum_of_sample_mean) -> tuple",
             "five positional arguments", tells=(Tell(1, names=("parallel_state",)),))
    """

    name: str
    signature: str
    recognised_by: str
    target: Target = "function"
    also: tuple[str, ...] = ()
    tells: tuple[Tell, ...] = ()
    needs_tell: bool = False
    requires: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()

    @cached_property
    def _arguments(self) -> ast.arguments:
        tree = ast.parse(f"def f{self.signature}: ...").body[0]
        assert isinstance(tree, ast.FunctionDef)
        return tree.args

    @property
    def positional(self) -> tuple[str, ...]:
        """Names of what is passed by position."""
        return tuple(a.arg for a in self._arguments.args)

    @property
    def keywords(self) -> tuple[str, ...]:
        """Names of what is always passed by keyword."""
        return tuple(a.arg for a in self._arguments.kwonlyargs)


@dataclass(frozen=True)
class PlugPoint:
    """One plug point: everything that flags, documentation, `miles hooks`, `miles check` and the call site derive from.

    Example: `CATALOG["custom_rm"].flag == "--custom-rm-path"`, `.key == "custom-rm"`, `.dest == "custom_rm_path"`
    """

    name: str
    flag: str
    protocol: type[Any]
    when: str
    help: str
    process: Process
    forms: tuple[Form, ...]
    # Awaited by the core. A synchronous plug-in of an awaited plug point runs in a thread.
    awaited: bool = False
    # Takes `async def` although the core calls it from synchronous code (rollout and evaluation functions).
    may_be_async: bool = False
    # A class that is given is instantiated without arguments, and its object takes the function's place.
    instantiates: bool = False
    backends: tuple[str, ...] = ("fsdp", "megatron")
    plural: bool = False
    # Methods that the object must have that a class (or factory) of this plug point makes.
    methods: tuple[str, ...] = ()
    # Actions that --hook-policy may name beside `raise`, each with what it does.
    tolerates: tuple[tuple[Action, str], ...] = ()
    retries: bool = False
    default_factory: Callable[[], str | None] = lambda: None
    # Whether a call has no effect but its value and its changes of what it is given: `miles check` makes one.
    pure: bool = False
    # Why `miles replay` cannot make a recorded call again, as one sentence; empty where it can.
    replay: str = ""

    @property
    def dest(self) -> str:
        """The attribute of `args`: the flag with underscores."""
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def key(self) -> str:
        """How --hook-policy and --hook-form name this plug point: the flag without dashes and `-path`."""
        return normalise_key(self.flag)

    @property
    def default(self) -> str | None:
        """The path that is used where the flag is not given."""
        return self.default_factory()

    @property
    def nargs(self) -> str | None:
        return "+" if self.plural else None

    @property
    def contract(self) -> str:
        """The docstring of the Protocol."""
        return inspect.getdoc(self.protocol) or ""

    @property
    def canonical(self) -> str:
        """The signature of the canonical call as text, e.g. `(args: Namespace, sample: Sample) -> float`."""
        return canonical_signature(self.protocol)

    def form(self, name: str) -> Form | None:
        return next((f for f in self.forms if f.name == name), None)


def canonical_signature(protocol: type[Any]) -> str:
    """The signature of a Protocol's `__call__` as text, without `self`."""
    signature = inspect.signature(protocol.__call__)
    return signature_text(signature.replace(parameters=list(signature.parameters.values())[1:]))


def normalise_key(text: str) -> str:
    """`--custom-rm-path`, `custom_rm` and `custom-rm` are one plug point."""
    key = text.strip().lstrip("-").replace("_", "-")
    return key.removesuffix("-paths").removesuffix("-path")


def signature_text(signature: inspect.Signature) -> str:
    """A signature as it is written in source: annotations that are strings lose their quotes."""
    return str(signature).replace("'", "")


@dataclass(frozen=True)
class Policy:
    """What happens when a plug-in call fails.

    Examples: `raise` (the default), `drop`, `mask`, `retry:3` (three more attempts, then raise), `retry:3,drop`.
    """

    action: Action = "raise"
    retries: int = 0

    def __str__(self) -> str:
        if not self.retries:
            return self.action
        return f"retry:{self.retries}" + ("" if self.action == "raise" else f",{self.action}")


def parse_policy(text: str, point: PlugPoint) -> Policy:
    """Read one policy. Raises ValueError whose message says what `point` allows."""
    action: str | None = None
    retries = 0
    for part in text.split(","):
        word, _, count = part.strip().partition(":")
        if word == "retry" and count.isdecimal() and int(count) >= 1 and point.retries:
            retries = int(count)
        elif not count and word in ("raise", *(a for a, _ in point.tolerates)):
            if action not in (None, word):
                raise ValueError(f"got {text!r}, expected {allowed_policies(point)}")
            action = word
        else:
            raise ValueError(f"got {text!r}, expected {allowed_policies(point)}")
    return Policy(action or "raise", retries)  # type: ignore[arg-type]


def allowed_policies(point: PlugPoint) -> str:
    """Example: `raise, drop, mask, retry:N or retry:N,drop`."""
    actions: list[str] = [action for action, _ in point.tolerates]
    words = ["raise", *actions]
    if point.retries:
        words += ["retry:N", *(f"retry:N,{action}" for action in actions)]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
