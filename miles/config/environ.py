"""The environment variable that picks the default of `--rollout-function-path`.

`MILES_EXPERIMENTAL_ROLLOUT_REFACTOR` is a whole number; 1 makes the class-based rollout the default. Both forms of
rollout functions load either way; the two paths stand in `miles.hooks.catalog`.
"""

from __future__ import annotations

import os

from miles.config.sections.hooks import ROLLOUT_FUNCTION
from miles.errors import FlagError

SWITCH = "MILES_EXPERIMENTAL_ROLLOUT_REFACTOR"


def enable_experimental_rollout_refactor() -> bool:
    """Whether the variable is set to a number other than 0. Raises ValueError for anything but a whole number."""
    return bool(int(os.environ.get(SWITCH, "0")))


def default_rollout_function_path() -> str | None:
    """The default of `--rollout-function-path`. Raises FlagError for a variable that is not a whole number."""
    try:
        return ROLLOUT_FUNCTION.default
    except ValueError:
        raise FlagError(SWITCH, given=os.environ[SWITCH], expected="a whole number") from None
