"""Every error that miles raises on purpose, and what the command line does with each.

    MilesError
    ├── UsageError            something the user gave is wrong: printed without a traceback, exit status 2
    │   ├── FlagError         a flag: name, given, expected, remedy
    │   ├── DataError         a data file: file, line number, what was expected
    │   ├── CheckpointError   a checkpoint or model folder that cannot be used here
    │   ├── RunDirError       a run directory that cannot be written, or is in use
    │   └── HookReport        all problems of all plug-ins of a run, found before it starts
    ├── HookError             plug-in code failed while the run was going: error card, exit status 1
    │   └── ErrorBudgetExceeded   too many tolerated failures in one rollout
    ├── TrainerError          a process of the trainer failed or died
    ├── StepError             an optimizer step has no finite loss or gradient, and --nan-policy is stop: exit status 1
    ├── EngineError           an engine answered with an error, or not at all
    └── RunStopped            the user asked to stop (SIGINT, SIGTERM): exit status 130

A failure that a policy tolerates is not an error but data: see `miles.types.Failure`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miles.types import Failure


# Characters of a value that a message repeats.
MAX_GIVEN = 200


class MilesError(Exception):
    """Base of all errors that miles raises on purpose."""

    exit_status = 1


class UsageError(MilesError):
    """Something the user gave is wrong. The message says what was given, what was expected and what to do."""

    exit_status = 2


class FlagError(UsageError):
    """A flag has a value that cannot be used.

    Example: `FlagError("--n-samples-per-prompt", given=0, expected="a whole number >= 1")` reads
    `--n-samples-per-prompt: expected a whole number >= 1, got 0.`
    """

    def __init__(self, flag: str, *, given: object = None, expected: str = "", remedy: str = "") -> None:
        self.flag, self.given, self.expected, self.remedy = flag, given, expected, remedy
        text = f"{flag}: expected {expected}, got {_excerpt(given)}." if expected else f"{flag}: {given}"
        super().__init__(f"{text} {remedy}".rstrip())


def _excerpt(given: object) -> str:
    text = repr(given)
    return text if len(text) <= MAX_GIVEN else f"{text[: MAX_GIVEN - 20]}...{text[-17:]}"


class DataError(UsageError):
    """A data file cannot be used; `line` counts from 1.

    Example: `train.jsonl:17: expected a JSON object, got 'hello' (…). Mend or delete the line.`
    """

    def __init__(self, path: str, message: str, *, line: int | None = None, remedy: str = "") -> None:
        self.path, self.line, self.remedy = path, line, remedy
        place = f"{path}:{line}" if line is not None else path
        super().__init__(f"{place}: {message} {remedy}".rstrip())


class CheckpointError(UsageError):
    """A checkpoint or a model folder is missing, damaged, or of another architecture."""


class RunDirError(UsageError):
    """The run directory cannot be created or written, or another run is using it."""


class HookReport(UsageError):
    """All problems of all plug-ins of one run, in one message. `problems` holds one text per problem."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        head = f"{count} plug-in problem{'s' if count != 1 else ''}, found before anything was started:"
        super().__init__("\n\n".join([head, *self.problems]))


class HookError(MilesError):
    """Plug-in code failed during the run and its policy is `raise`. `failure` says which, where and on what."""

    def __init__(self, failure: Failure, card: str) -> None:
        self.failure = failure
        super().__init__(card)


class ErrorBudgetExceeded(HookError):
    """More plug-in calls of one rollout failed than `--hook-error-budget` tolerates."""


class StepError(MilesError):
    """An optimizer step has no finite loss or gradient. The message says which, and where its samples are kept."""


class EngineError(MilesError):
    """An engine refused a request or could not be reached. `status` is the HTTP status, where there was one."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        self.status = status
        super().__init__(message)


class TrainerError(MilesError):
    """One of several trainer processes failed or died. The message names it and holds what it said last.

    `consequence` says that another one may have caused it: collectives fail when a neighbour is gone.
    """

    def __init__(self, message: str, *, consequence: bool = False) -> None:
        self.consequence = consequence
        super().__init__(message)


class RunStopped(MilesError):
    """The user asked the run to stop. The message says what was saved and how to resume."""

    exit_status = 130
