"""Published helpers that take `parallel_state`, for callers that know of none: slime's plug-ins leave the argument out.

What a helper computes is left to the helper; samples are whole in this process where no state was given.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from miles.loss.parallel_state import ParallelState

T = TypeVar("T")


def state_optional(helper: Callable[..., T]) -> Callable[..., T]:
    """`helper` with its published signature; a call without `parallel_state` gets that of a single process.

    Example: `get_sum_of_sample_mean(total_lengths, response_lengths, loss_masks, True)` is
    `get_sum_of_sample_mean(total_lengths, response_lengths, loss_masks, ParallelState.single_process(), True)`.
    """
    place = list(inspect.signature(helper).parameters).index("parallel_state")

    @functools.wraps(helper)
    def call(*given: Any, **named: Any) -> T:
        if "parallel_state" in named or (len(given) > place and hasattr(given[place], "cp_size")):
            return helper(*given, **named)
        if len(given) > place:
            return helper(*given[:place], ParallelState.single_process(), *given[place:], **named)
        return helper(*given, parallel_state=ParallelState.single_process(), **named)

    return call
