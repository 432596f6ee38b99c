"""Which form a plug-in has: `inspect.signature(...).bind` decides, declared tells break ties, the rest is an error.

    1. candidates: forms of the right target whose arguments bind
    2. candidates that an annotation tells win, then those that a parameter's name tells, then the others
    3. a form that receives the same arguments and more wins over the shorter one
    4. more than one left: ambiguous, and --hook-form decides

What a form means at the call site is `adapters`; this file calls nothing of the user's.
"""

from __future__ import annotations

import difflib
import inspect
import re
from dataclasses import dataclass
from typing import Any

from miles.hooks.point import Form, PlugPoint
from miles.hooks.problems import described, expected_forms
from miles.hooks.values import kind_of


class Mismatch(Exception):
    """No form fits, or several do. `found` and `remedy` are lines of the problem's text."""

    def __init__(self, found: str, remedy: str) -> None:
        self.found, self.remedy = found, remedy
        super().__init__(found)


@dataclass(frozen=True)
class Callee:
    """A plug-in with what its signature says. `obj` is the function, class, object or value itself."""

    obj: Any
    name: str
    signature: inspect.Signature | None

    @property
    def is_class(self) -> bool:
        return inspect.isclass(self.obj)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters that are neither *args nor **kwargs."""
        return tuple(p.name for p in self._parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))

    @property
    def num_positional(self) -> int:
        """How many arguments it can take by position, *args aside."""
        return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in self._parameters)

    @property
    def takes_any_keyword(self) -> bool:
        return any(p.kind is p.VAR_KEYWORD for p in self._parameters)

    @property
    def _parameters(self) -> list[inspect.Parameter]:
        return list(self.signature.parameters.values()) if self.signature is not None else []

    def binds(self, form: Form) -> bool:
        if self.signature is None:
            return False
        try:
            self.signature.bind(*form.positional, **dict.fromkeys(form.keywords))
        except TypeError:
            return False
        return True


def callee_of(obj: Any, name: str) -> Callee:
    try:
        signature = inspect.signature(obj) if callable(obj) else None
    except (TypeError, ValueError):
        signature = None
    return Callee(obj, name, signature)


def is_async(obj: Any) -> bool:
    """Whether calling `obj` is known to give an awaitable: `async def`, or an object whose `__call__` is."""
    if inspect.iscoroutinefunction(obj):
        return True
    call = next((vars(k)["__call__"] for k in type(obj).__mro__ if "__call__" in vars(k)), None)
    return inspect.iscoroutinefunction(call)


def recognise(point: PlugPoint, callee: Callee, forced: str | None = None) -> Form:
    """The form of `callee`. Raises Mismatch."""
    if forced is not None:
        return _forced(point, callee, forced)
    _check_value(point, callee)
    candidates = [f for f in point.forms if _is_candidate(f, callee)]
    if not candidates:
        raise Mismatch(described(callee.obj, callee.name), _remedy(point, callee))
    annotated = [f for f in candidates if _tells(f, callee, annotations_only=True)]
    candidates = annotated or [f for f in candidates if _tells(f, callee)] or candidates
    longest = [f for f in candidates if not any(_extends(other, f) for other in candidates)]
    if len(longest) > 1:
        names = " or ".join(f.name for f in longest)
        raise Mismatch(
            f"{described(callee.obj, callee.name)}, which fits several forms ({names})",
            f"say which: --hook-form {point.key}={longest[0].name}",
        )
    return longest[0]


def _check_value(point: PlugPoint, callee: Callee) -> None:
    """A value that is asked for is a list of dicts: the one kind of value that plug points take."""
    value = callee.obj
    if callable(value) or all(form.target != "value" for form in point.forms):
        return
    remedy = "name a list of dicts, one per tool"
    if not isinstance(value, (list, tuple)):
        raise Mismatch(f"{callee.name}, {kind_of(value)}, not a list", remedy)
    for place, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise Mismatch(f"{callee.name}, a list with {kind_of(entry)} at place {place}", remedy)


def _forced(point: PlugPoint, callee: Callee, name: str) -> Form:
    form = point.form(name)
    known = ", ".join(f.name for f in point.forms)
    if form is None:
        raise Mismatch(f"--hook-form {point.key}={name}", f"forms of this plug point: {known}")
    if not _has_target(form, callee) or (callee.signature is not None and not _binds(form, callee)):
        raise Mismatch(
            f"{described(callee.obj, callee.name)}, which is not callable as --hook-form {point.key}={name} says",
            f"forms of this plug point: {known}",
        )
    return form


def _is_candidate(form: Form, callee: Callee) -> bool:
    if not _has_target(form, callee):
        return False
    names = set(callee.names)
    if not names.issuperset(form.requires) or names.intersection(form.excludes):
        return False
    if form.needs_tell and not _tells(form, callee):
        return False
    return _binds(form, callee)


def _binds(form: Form, callee: Callee) -> bool:
    """Forms with `requires` are called by keyword with what the function names, so their names are their arity."""
    return form.target == "value" or bool(form.requires) or callee.binds(form)


def _has_target(form: Form, callee: Callee) -> bool:
    if form.target == "value":
        return not callable(callee.obj)
    return callable(callee.obj) and callee.is_class == (form.target == "class")


def _tells(form: Form, callee: Callee, *, annotations_only: bool = False) -> bool:
    if form.requires:
        return not annotations_only
    parameters = callee._parameters
    for tell in form.tells:
        if tell.index < len(parameters):
            parameter = parameters[tell.index]
            if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                continue
            if annotation_text(parameter.annotation) in tell.annotations:
                return True
            if parameter.name in tell.names and not annotations_only:
                return True
    return False


def _extends(longer: Form, shorter: Form) -> bool:
    """Whether `longer` passes everything that `shorter` passes, in the same places, and more."""
    if longer is shorter or longer.target != shorter.target:
        return False
    if longer.requires or shorter.requires:
        return False
    count = len(shorter.positional)
    same_places = _same(longer.positional[:count], shorter.positional)
    more = len(longer.positional) + len(longer.keywords) > count + len(shorter.keywords)
    return same_places and set(longer.keywords) >= set(shorter.keywords) and more


# The published tables call the same argument by several names.
_SYNONYMS = {"all_groups": "samples"}


def _same(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    return [_SYNONYMS.get(x, x) for x in a] == [_SYNONYMS.get(x, x) for x in b]


def _remedy(point: PlugPoint, callee: Callee) -> str:
    forms = [form for form in point.forms if _has_target(form, callee)]
    if not forms:
        targets = dict.fromkeys("a value" if f.target == "value" else f"a {f.target}" for f in point.forms)
        return "name " + " or ".join(targets)
    if callee.signature is None:
        return f"its signature cannot be read; say which form it has: --hook-form {point.key}={forms[0].name}"
    form = min(forms, key=lambda f: abs(len(f.positional) - callee.num_positional))
    try:
        callee.signature.bind(*form.positional, **dict.fromkeys(form.keywords))
    except TypeError as error:
        passed = [*form.positional, *(f"{k}=" for k in form.keywords)]
        return f"the call passes ({', '.join(passed)}): {error}{_misspelled(form, callee)}"
    return f"make the signature one of these: {expected_forms(point)}"


def _misspelled(form: Form, callee: Callee) -> str:
    """`; did you mean train_log_probs?` where a parameter is almost called like something that is passed by keyword."""
    for name in callee.names:
        close = difflib.get_close_matches(name, form.keywords, n=1)
        if close and name not in form.keywords and close[0] not in callee.names:
            return f"; did you mean {close[0]}?"
    return ""


_MODULE_PREFIX = re.compile(r"(?:[A-Za-z_]\w*\.)+")
_CAPITALS = {"List": "list", "Tuple": "tuple", "Dict": "dict"}


def annotation_text(annotation: Any) -> str:
    """An annotation without module names, spaces and quotes: `typing.List["types.Sample"]` is `list[Sample]`."""
    if annotation is inspect.Parameter.empty:
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"ForwardRef\(([^)]*)\)", r"\1", text)
    text = _MODULE_PREFIX.sub("", re.sub(r"[\s'\"]", "", text))
    return re.sub(r"\b(List|Tuple|Dict)\b", lambda m: _CAPITALS[m.group(1)], text)
