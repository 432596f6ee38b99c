"""How a setting is declared: one field of a section = one flag = one attribute of `args`.

`flag(default, help, ...)` carries what the annotation cannot say; the rest follows from the annotation:

    int, float, str          one value                        --lr 1e-6
    list[int], list[str]     several values                   --rollout-stop END STOP
    Literal["a", "b"]        one of these                     --loss-type sft_loss
    dict[str, Any]           JSON                             --apply-chat-template-kwargs '{"k": 1}'
    dict[str, str]           NAME=VALUE pairs, repeatable     --hook-policy custom-rm=drop
    bool, default False      a switch                         --group-rm
    bool, default True       a switch that turns it off       --disable-rewards-normalization
    bool | None              both, unset by default           --offload-train / --no-offload-train
    Pattern                  a number, or one per layer       --moe-layer-freq '([0]*1+[1]*3)'

`only` names the one backend that reads a flag; `sets` what it sets in Megatron-Core, `Class.field` or, where the field
has the flag's name, `Class`.

Each `Flag` reads its own values (from text, from a YAML node's scalars) and checks them beside the field. What depends
on several flags is left to `miles.config.resolve`, the command line to `miles.config.parse`.
"""

from __future__ import annotations

import ast
import json
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from miles.errors import FlagError

Kind = Literal["int", "float", "str", "json", "pairs", "pattern", "true", "false", "either"]
Backend = Literal["fsdp", "megatron"]

Pattern = int | list[int]
"""One number, or one per layer."""


class _Required:
    """The default of a flag that has none."""

    def __repr__(self) -> str:
        return "(required)"


REQUIRED: Any = _Required()


# ---- what becomes of a flag that is given explicitly --------------------------------------------------------------


@dataclass(frozen=True)
class Status:
    """`effective`; `no_meaning_here`: one notice when given; `not_built`: refused when given, with `sentence`.

    `when` narrows the last two to some values; without it they hold for every value that is not the default.
    `engines` are the statuses for some values of `--rollout-engine`; this one holds for the others.
    """

    kind: Literal["effective", "no_meaning_here", "not_built"] = "effective"
    sentence: str = ""
    when: Callable[[Any], bool] | None = None
    engines: Mapping[str, Status] = field(default_factory=dict)

    def of(self, engine: str) -> Status:
        """What becomes of the flag in a run with this engine."""
        return self.engines.get(engine, self)

    def applies_to(self, value: Any, default: Any) -> bool:
        if self.kind == "effective":
            return False
        return self.when(value) if self.when is not None else value != default


EFFECTIVE = Status()


def no_meaning_here(sentence: str, *, when: Callable[[Any], bool] | None = None) -> Status:
    return Status("no_meaning_here", sentence, when)


def not_built(sentence: str, *, when: Callable[[Any], bool] | None = None) -> Status:
    return Status("not_built", sentence, when)


def by_engine(**statuses: Status) -> Status:
    """Effective, except with the engines that are named."""
    return Status(engines=statuses)


def above(limit: float) -> Callable[[Any], bool]:
    return lambda value: value is not None and value > limit


# ---- checks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """`expected` completes the sentence "expected ..., got 0."."""

    expected: str
    holds: Callable[[Any], bool]


def at_least(limit: float) -> Check:
    return Check(f"a value >= {limit}", lambda v: v >= limit)


def more_than(limit: float) -> Check:
    return Check(f"a value > {limit}", lambda v: v > limit)


def between(low: float, high: float) -> Check:
    return Check(f"a value from {low} to {high}", lambda v: low <= v <= high)


FRACTION = Check("a value > 0 and <= 1", lambda v: 0 < v <= 1)
TOP_K = Check("a value >= 1, or -1 for no limit", lambda v: v == -1 or v >= 1)
PORT = Check("a port from 1 to 65535", lambda v: 1 <= v <= 65535)
JSON_OBJECT = Check("a JSON object such as '{\"enable_thinking\": false}'", lambda v: isinstance(v, dict))


PATH = Check("a path", lambda v: bool(v.strip()))
PATH_WITHOUT_BRACES = Check("a path without braces", lambda v: bool(v.strip()) and not set("{}") & set(v))


def template(*names: str, values: tuple[object, object] = (0, 1)) -> Check:
    """A path template with `{name}` of the first name, or every rollout would overwrite the last one's file.

    The other names and {run_dir} may stand in it, too. `values` are two that it will be filled with.
    """

    def holds(text: str) -> bool:
        try:
            a, b = (text.format(**{**dict.fromkeys(names, 0), names[0]: v}, run_dir="") for v in values)
        except (KeyError, IndexError, ValueError, AttributeError):
            return False
        return a != b

    others = "".join(f" and {{{name}}}" for name in names[1:])
    return Check(f"a path with {{{names[0]}}}{others} in it, and no other braces", holds)


# ---- the flag -----------------------------------------------------------------------------------------------------

# What numpy, torch and the files of a run can hold.
MAX_INT = 2**63 - 1

_EXPECTED = {
    **{"int": "a whole number", "float": "a number", "json": "JSON", "pairs": "NAME=VALUE"},
    "pattern": "a whole number, or one per layer such as [0,1,1] or [0]*1+[1]*3",
}


@dataclass(frozen=True)
class Flag:
    """One declared setting.

    Example: `Flag(name="rewards_normalization", option="--disable-rewards-normalization", kind="false", default=True,
    help="Train on the rewards as they are, not relative to their group.")`
    """

    name: str
    option: str
    kind: Kind
    default: Any
    help: str
    many: bool = False
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    common: bool = False
    secret: bool = False
    status: Status = EFFECTIVE
    check: Check | None = None
    only: Backend | None = None
    # Fields of Megatron-Core's dataclasses: "TransformerConfig.hidden_size".
    sets: tuple[str, ...] = ()
    # Why the default is another one than that of the field; it is then set where the flag is not given, too.
    deviates: str = ""

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    @property
    def is_switch(self) -> bool:
        return self.kind in ("true", "false", "either")

    def fresh_default(self) -> Any:
        """The default, never shared: plug-ins write on `args`."""
        if isinstance(self.default, (list, dict)):
            return type(self.default)(self.default)
        return None if self.required else self.default

    def read(self, text: str) -> Any:
        """One value from text, as on the command line."""
        try:
            value = self._convert(text)
        except ValueError:
            raise FlagError(self.option, given=text, expected=_EXPECTED[self.kind]) from None
        if self.choices and value not in self.choices:
            raise FlagError(self.option, given=text, expected="one of " + ", ".join(self.choices))
        return value

    def _convert(self, text: str) -> Any:
        if self.kind == "int":
            whole = int(text)
            if abs(whole) > MAX_INT:
                raise FlagError(self.option, given=text, expected=f"a whole number of at most {MAX_INT}")
            return whole
        if self.kind == "float":
            number = float(text)
            if not math.isfinite(number):
                raise FlagError(self.option, given=text, expected="a finite number")
            return number
        if self.kind == "json":
            return json.loads(text)
        if self.kind == "pattern":
            return _read_pattern(text)
        if self.kind == "pairs":
            name, separator, value = text.partition("=")
            if not (name and separator and value):
                raise ValueError(text)
            return name, value
        if "\0" in text or (not text.isascii() and text.encode("utf-8", "replace").decode() != text):
            raise FlagError(self.option, given=text, expected="text in UTF-8 without NUL characters")
        return text

    def verify(self, value: Any) -> None:
        """Raise FlagError where the value is outside of what the flag allows; None means unset."""
        if value is None or self.check is None:
            return
        if not self.check.holds(value):
            raise FlagError(self.option, given=value, expected=self.check.expected)


MAX_LAYERS = 10_000
"""Longest pattern that is written out: more layers than any model has."""


def _read_pattern(text: str) -> Pattern:
    """Whole numbers, lists of them, and their sums and products: `([0]*1+[1]*3)*2`. Raises ValueError."""
    try:
        value = _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError):
        raise ValueError(text) from None
    return value


def _evaluate(node: ast.expr) -> Pattern:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            return number
        case ast.List(elts=elements):
            numbers = [_evaluate(e) for e in elements]
            if any(isinstance(n, list) for n in numbers):
                raise ValueError("a list of lists")
            return [n for n in numbers if isinstance(n, int)]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            a, b = _evaluate(left), _evaluate(right)
            if isinstance(a, list) and isinstance(b, list) and len(a) + len(b) <= MAX_LAYERS:
                return a + b
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            a, b = _evaluate(left), _evaluate(right)
            if isinstance(a, int) and isinstance(b, list):
                a, b = b, a
            if isinstance(a, list) and isinstance(b, int) and len(a) * max(b, 0) <= MAX_LAYERS:
                return a * b
    raise ValueError("no pattern of layers")


def flag(
    default: Any,
    help: str,
    *,
    option: str | None = None,
    aliases: tuple[str, ...] = (),
    check: Check | None = None,
    status: Status = EFFECTIVE,
    common: bool = False,
    secret: bool = False,
    compare: bool = True,
    only: Backend | None = None,
    sets: str | tuple[str, ...] = (),
    deviates: str = "",
) -> Any:
    """A dataclass field that is a flag. `common` flags are in the short `--help`; `secret` ones are never written."""
    declared = {
        "default": default,
        "help": help,
        "option": option,
        "aliases": aliases,
        "check": check,
        "status": status,
        "common": common,
        "secret": secret,
        "only": only,
        "sets": (sets,) if isinstance(sets, str) else sets,
        "deviates": deviates,
    }
    if default is REQUIRED:
        return field(metadata={"flag": declared}, compare=compare)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"flag": declared}, compare=compare)
    return field(default=default, metadata={"flag": declared}, compare=compare)


def derived(default_factory: Callable[[], Any]) -> Any:
    """A field that is no flag: `miles.config.resolve` fills it, and `args` carries it."""
    return field(default_factory=default_factory, metadata={"derived": True})


class Section:
    """Base of the sections: frozen dataclasses whose fields are flags. Building one checks every value."""

    def __post_init__(self) -> None:
        for declared in flags_of(type(self)):
            declared.verify(getattr(self, declared.name))


_FLAGS_OF: dict[type[Any], tuple[Flag, ...]] = {}


def flags_of(section: type[Any]) -> tuple[Flag, ...]:
    """The flags of a section, in order of declaration."""
    if section not in _FLAGS_OF:
        _FLAGS_OF[section] = _declared_flags(section)
    return _FLAGS_OF[section]


def _declared_flags(section: type[Any]) -> tuple[Flag, ...]:
    hints = get_type_hints(section)
    return tuple(
        _flag(f.name, hints[f.name], dict(f.metadata["flag"])) for f in fields(section) if "flag" in f.metadata
    )


def _flag(name: str, hint: Any, declared: dict[str, Any]) -> Flag:
    kind, many, choices = _kind_of(hint, declared["default"])
    declared["option"] = declared["option"] or "--" + name.replace("_", "-")
    declared["sets"] = tuple(target if "." in target else f"{target}.{name}" for target in declared["sets"])
    return Flag(name=name, kind=kind, many=many, choices=choices, **declared)


def _kind_of(hint: Any, default: Any) -> tuple[Kind, bool, tuple[str, ...]]:
    """The kind of a flag, whether it takes several values, and its choices: all from the annotation."""
    optional = False
    if hint == Pattern:
        return "pattern", False, ()
    if get_origin(hint) in (Union, types.UnionType):
        optional = True
        (hint,) = (h for h in get_args(hint) if h is not type(None))
    if hint is bool:
        return ("either" if optional else "false" if default is True else "true"), False, ()
    if get_origin(hint) is list:
        kind, _, choices = _kind_of(get_args(hint)[0], None)
        return kind, True, choices
    if get_origin(hint) is dict:
        return ("pairs" if get_args(hint)[1] is str else "json"), False, ()
    if get_origin(hint) is Literal:
        return "str", False, get_args(hint)
    return _SCALARS[hint], False, ()


_SCALARS: dict[Any, Kind] = {int: "int", float: "float", str: "str"}
