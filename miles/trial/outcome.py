"""What a trial found out, and how it is said."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from socket import gaierror
from typing import Any

from miles.errors import EngineError, UsageError
from miles.hooks import Hook
from miles.hooks.blame import place_of
from miles.hooks.card import first_sample, sample_text
from miles.hooks.problems import at_place, form_text, problem
from miles.hooks.values import BadReturn, safely
from miles.trial.caller import Caller, TookTooLong
from miles.trial.material import Material
from miles.types import Sample

# What a plug-in raises that misses something in made-up samples which the run's own samples may have.
_LOOKUPS = (LookupError, AttributeError, TypeError, ValueError, AssertionError)


@dataclass
class Outcome:
    """`returned` fits a line. `details` are lines that `miles replay` shows beside it, `warnings` both commands.

    Example: `Outcome("0.0 .. 1.0 over 12 responses", ["an empty response scores 1.0, ..."])`
    """

    returned: str
    warnings: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    # The values themselves, where a later trial wants them: one reward per sample of the material.
    values: list[Any] | None = None


@dataclass
class Trial:
    """One plug-in, what it is called with, and how: the argument of every trial function.

    `args` are the plug-in's own: it may write on them. `thorough` tries everything (`miles replay`) where `miles check`
    is content with a part.
    """

    hook: Hook
    args: Namespace
    material: Material
    call: Caller
    thorough: bool = False
    evaluations: dict[str, list[Sample]] | None = None

    def raw(self, *given: Any, **named: Any) -> Any:
        """One call, adapted and unguarded. Raises Failed."""
        with failing(self, (*given, *named.values())):
            return self.call(self.hook.raw, *given, **named)


TrialFunction = Callable[[Trial], Outcome]


class Failed(Exception):
    """A call failed. `error` is what came out of it, `sample` what it was called with where that is one sample."""

    def __init__(self, error: BaseException, sample: Sample | None = None) -> None:
        self.error, self.sample = error, sample
        super().__init__(safely(str, error))


@contextmanager
def failing(trial: Trial, given: tuple[Any, ...] = ()) -> Iterator[None]:
    """Turn everything that a plug-in may raise into Failed."""
    try:
        yield
    except Failed:
        raise
    except (Exception, SystemExit, TookTooLong) as error:
        raise Failed(error, first_sample(given)) from error


def excuse(trial: Trial, error: BaseException) -> str | None:
    """Why a failure here need not be one in the run, as a clause; None where it is."""
    if isinstance(error, (BadReturn, UsageError, TookTooLong)):
        return None
    if _is_unanswered(error):
        return "it asks a server that does not answer now; the run needs it"
    if trial.material.trusted or not isinstance(error, _LOOKUPS):
        return None
    return "made-up samples may lack what those of the run have; --on RUN_DIR tries it on recorded ones"


def _is_unanswered(error: BaseException) -> bool:
    """Whether this error, or one that it comes from, is that of a connection that was not made."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (ConnectionError, TimeoutError, EngineError)) or type(seen) in (OSError, gaierror):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def problem_text(trial: Trial, failed: Failed) -> str:
    """A failed call as a problem of `miles check`.

    Example::

        --custom-rm-path my.rewards.grade
          found     ZeroDivisionError: division by zero at my/rewards.py:31: return 1 / len(sample.label)
                    sample 24 (group 3), completed: prompt '859+467=?', response '1326<eos>' (5 tokens), label ''
          remedy    mend that line
    """
    hook, error = trial.hook, failed.error
    found, remedy = _found(trial, error)
    if failed.sample is not None:
        found += f"\nsample {sample_text(failed.sample)}"
    expected = form_text(hook.point, hook.form) if isinstance(error, BadReturn) else ""
    return problem(hook.point, hook.path, found, expected=expected, remedy=remedy)


def _found(trial: Trial, error: BaseException) -> tuple[str, str]:
    source = trial.hook.source
    if isinstance(error, BadReturn):
        return f"{source} {error}", error.hint or "mend what it returns"
    if isinstance(error, UsageError):
        return f"{source}: {str(error).removeprefix(trial.hook.point.flag).lstrip(': ')}", "mend what it returns"
    if isinstance(error, TookTooLong):
        place = place_of(error, source.file, only_users=True)
        where = f"still at {place}: {place.text}" if place is not None else f"a call of {source} has not returned"
        return (
            f"no result after {trial.call.limit_s:g} s, {where}",
            "give what waits a time limit of its own; --limit-s gives a slow one more time",
        )
    return at_place(error, source.file), "mend that line"


def counted(count: int, noun: str) -> str:
    """Example: `counted(1, "group") == "1 group"`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def number_text(value: float) -> str:
    """Short, and always with a point. Examples: `0.0`, `0.333`, `1.5e-07`."""
    text = f"{value:.4g}"
    return text if any(c in text for c in ".en") else text + ".0"


def range_text(values: list[float]) -> str:
    """Example: `0.0 .. 1.0`; a single value stands alone."""
    low, high = min(values), max(values)
    return number_text(low) if low == high else f"{number_text(low)} .. {number_text(high)}"


def changed_text(names: list[str]) -> list[str]:
    """The warning for a plug-in that changed what it should look at; [] where it did not."""
    if not names:
        return []
    return [f"it changes {', '.join(f'sample.{n}' for n in names)}, which a run then trains with; work on a copy"]
