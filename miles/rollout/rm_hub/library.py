r"""The grader of `--rm-type math_verify`: the library Math-Verify (Hugging Face) reads both answers and compares them.

It accepts more than `math`: sets, intervals, inequalities, equations, answers without a box. Of a response that thinks
aloud, what follows the last `</think>` is read. The library's own time limits need signals in the main thread and count
as "not equal"; they are switched off, `miles.rollout.rm_hub.pool` has its own.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType


def compute_math_verify_reward(response: str, label: object) -> int:
    r"""1 or 0. Raises ValueError for a label that cannot be read as an answer.

    Example: `compute_math_verify_reward(r"The set is $\{2, 1\}$.", r"\{1,2\}") == 1`
    """
    library = _library()
    gold = library.parse(_as_latex(str(label)), parsing_timeout=None, raise_on_error=False)
    if label is None or not gold:
        raise ValueError(f"--rm-type math_verify cannot read the label {label!r}")
    given = library.parse(response.rpartition("</think>")[2], parsing_timeout=None, raise_on_error=False)
    return int(library.verify(gold, given, timeout_seconds=None, raise_on_error=False))


def _as_latex(label: str) -> str:
    """A bare label is an answer as a whole: in a box it is read as one."""
    return label if "$" in label or "\\boxed" in label or "\\(" in label else f"\\boxed{{{label}}}"


@functools.cache
def _library() -> ModuleType:
    import math_verify

    for name in ("math_verify.parser", "math_verify.grader"):
        # It warns once that its time limits are off; that is on purpose.
        logging.getLogger(name).setLevel(logging.ERROR)
    return math_verify
