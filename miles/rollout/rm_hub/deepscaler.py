r"""The grader of `--rm-type deepscaler`: the boxed answer behind the reasoning, as in DeepScaleR (Luo et al. 2025).

The same comparison as `--rm-type math`, but only what follows the thinking counts; a response without its marker is
wrong.
"""

from __future__ import annotations

from miles.rollout.rm_hub import math_utils

THINKING_ENDS = "</think>"
RESPONSE_BEGINS = "###Response"


def answer_part(response: str) -> str | None:
    """What follows the last `</think>`, else what stands between the first two `###Response`; None without either."""
    if THINKING_ENDS in response:
        return response.rpartition(THINKING_ENDS)[2]
    if RESPONSE_BEGINS in response:
        return response.split(RESPONSE_BEGINS, 2)[1]
    return None


def undecided(response: str, label: object) -> bool | list[tuple[str, str]]:
    """The verdict as far as text comparison goes; see `math_utils.undecided`. AssertionError for a label of no use."""
    answer = answer_part(response)
    given = math_utils.extract_answer(answer) if answer is not None else None
    if given is None or label == "":
        return False
    assert isinstance(label, (str, float, int)), f"--rm-type deepscaler needs text or a number as label, got {label!r}"
    truth = math_utils.unboxed_truth(label)
    return math_utils.undecided(given, truth) if truth and truth.strip() else False


def get_deepscaler_rule_based_reward(response: str, label: str | float | int) -> int:
    r"""1 or 0.

    Example: `get_deepscaler_rule_based_reward(r"<think>7*6</think> It is \boxed{42}.", 42) == 1`
    """
    verdict = undecided(response, label)
    return int(verdict if isinstance(verdict, bool) else math_utils.all_equal_under_sympy(verdict))
