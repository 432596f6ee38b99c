"""What an error of a plug-in says, and which line of the user's it came from.

Cards, reports of problems and warnings tell both. Where a line belongs to is `source`.
"""

from __future__ import annotations

from collections.abc import Iterator

from miles.hooks.source import Place, own_place
from miles.hooks.values import safely

_MAX_MESSAGE = 2000
# Of an exception group: levels, and errors of each, that are told.
_MAX_DEPTH = 3
_MAX_INNER = 5


def message_of(error: BaseException) -> str:
    """`ValueError: no answer`; of an exception group also what it holds, a line each. Long ones are cut in the middle:
    a whole response in a message must not bury the rest."""
    text, half = "\n".join(_lines(error)), _MAX_MESSAGE // 2
    if len(text) <= _MAX_MESSAGE:
        return text
    return f"{text[:half]}\n... ({len(text) - 2 * half} more characters) ...\n{text[-half:]}"


def _lines(error: BaseException, depth: int = 0) -> Iterator[str]:
    yield "  " * depth + f"{type(error).__name__}: {safely(str, error)}".rstrip(": ")
    if isinstance(error, BaseExceptionGroup) and depth < _MAX_DEPTH:
        for inner in error.exceptions[:_MAX_INNER]:
            yield from _lines(inner, depth + 1)


def place_of(error: BaseException, plugin_file: str | None, *, only_users: bool = False) -> Place | None:
    """The line that the error came from: of the user where there is one in it or its causes, otherwise see `own_place`.

    `only_users` gives None instead of a line that is neither the user's nor of the plug-in's own file.
    """
    chain = list(_inwards(error))
    for stop in (True,) if only_users else (True, False):
        for one in chain:
            place = own_place(one.__traceback__, plugin_file, only_users=stop)
            if place is not None:
                return place
    return None


def _inwards(error: BaseException) -> Iterator[BaseException]:
    """The errors that may lead to the user's line: of a group first what it holds, then itself, then its causes.

    The line is in a cause where asyncio or Python put an error of their own in the place of the user's: a time limit,
    a StopIteration that left a coroutine.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, BaseExceptionGroup):
            yield from (e for inner in current.exceptions for e in _inwards(inner))
        yield current
        current = current.__cause__


def innermost(error: BaseException | None, kind: type[BaseException]) -> BaseException | None:
    """`error`, one of its causes or one inside of it (an ExceptionGroup) that is a `kind`; None without any."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, kind):
            return error
        if isinstance(error, BaseExceptionGroup):
            return next((e for e in (innermost(e, kind) for e in error.exceptions) if e is not None), None)
        error = error.__cause__
    return None
