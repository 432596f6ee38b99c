r"""The grader of `--rm-type dapo`: the answer after "Answer:" against a whole number, scored 1.0 or -1.0.

The rule is that of DAPO (Yu et al. 2025, section 3.4); the normal form and its two tables are those of Minerva
(Lewkowycz et al. 2022, appendix D.1). Only the end of a response is read, so every step is bounded.
"""

from __future__ import annotations

import logging
import re
import signal
import threading
from decimal import Decimal
from types import FrameType, TracebackType
from typing import TypedDict

from miles.rollout.rm_hub.math_utils import through_closing_brace

logger = logging.getLogger(__name__)

# Characters at the end of a response in which its answer is looked for.
ANSWER_CHARS = 300
BOX_CHARS = 100

INVALID = "[INVALID]"


class DapoScore(TypedDict):
    """Example: `{"score": -1.0, "acc": False, "pred": "[INVALID]"}`; `--reward-key score` trains on the first."""

    score: float
    acc: bool
    pred: str | None


def last_boxed_only_string(string: str) -> str | None:
    r"""The last `\boxed{`, through its closing brace; None if there is none or it is not closed."""
    start = string.rfind("\\boxed{")
    return None if start < 0 else through_closing_brace(string, start)


def remove_boxed(s: str) -> str:
    r"""What stands in `\boxed{...}`. Raises AssertionError for anything else."""
    assert s.startswith("\\boxed{") and s.endswith("}"), f"expected \\boxed{{...}}, got {s[:80]!r}"
    return s[len("\\boxed{") : -1]


# ---- the normal form -----------------------------------------------------------------------------------------------

SUBSTITUTIONS = [
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    (r"\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
]

REMOVED_EXPRESSIONS = [
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots", "sue", "points"),
    *("feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students"),
    *("childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3"),
    *("\\text{\n}", "\\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', "\\dots"),
]

_UNWRAPPED = [
    (re.compile(r"(.*?)(\$)(.*?)(\$)(.*)"), r"$\3$"),
    (re.compile(r"(\\text\{)(.*?)(\})"), r"\2"),
    (re.compile(r"(\\textbf\{)(.*?)(\})"), r"\2"),
    (re.compile(r"(\\overline\{)(.*?)(\})"), r"\2"),
    (re.compile(r"(\\boxed\{)(.*)(\})"), r"\2"),
    (re.compile(r"(frac)([^{])(.)"), r"frac{\2}{\3}"),
    (re.compile(r"(sqrt)([^{])"), r"sqrt{\2}"),
]
"""In this order: formulas and emphasis down to their content, then shorthand fractions and roots in full."""


def normalize_final_answer(final_answer: str) -> str:
    r"""The normal form of an answer.

    Example: `normalize_final_answer(r"x = $1,\!234$ dollars") == "1234"`
    """
    text = final_answer.split("=")[-1]
    for before, after in SUBSTITUTIONS:
        text = text.replace(before, after)
    for expression in REMOVED_EXPRESSIONS:
        text = text.replace(expression, "")
    for pattern, replacement in _UNWRAPPED:
        text = pattern.sub(replacement, text)
    text = text.replace("$", "")
    if text.replace(",", "").isdigit():
        text = text.replace(",", "")
    return text.strip()


# ---- the score -----------------------------------------------------------------------------------------------------

_told: set[str] = set()


def whole_number(ground_truth: str) -> str:
    """A numeric label as the whole number that answers are compared with: `"7.0"` is `"7"`. Raises ValueError."""
    try:
        float_value = float(ground_truth)
        number = int(Decimal(str(ground_truth).strip()) if abs(float_value) != float("inf") else float_value)
    except (TypeError, ValueError, OverflowError, ArithmeticError):
        raise ValueError(f"--rm-type dapo needs a number as label, got {ground_truth!r}") from None
    if float_value != number and "label" not in _told:
        _told.add("label")
        logger.warning("--rm-type dapo compares whole numbers: label %r counts as %d.", ground_truth, number)
    return str(number)


def is_correct_minerva(
    solution_str: str, gt: str, gt_need_extract: bool = False, answer_pattern: str = r"(?i)Answer\s*:\s*([^\n]+)"
) -> tuple[bool, str]:
    r"""(correct, answer): the last match of `answer_pattern` against `gt`, which is a number, or in a `\boxed{}`."""
    matches = re.findall(answer_pattern, solution_str)
    pred = normalize_final_answer(matches[-1] if matches else INVALID)
    if gt_need_extract:
        gt = normalize_final_answer(remove_boxed(last_boxed_only_string(gt) or ""))
    else:
        gt = whole_number(gt)
    return pred == gt, pred


def is_correct_strict_box(
    pred: str, gt: str, pause_tokens_index: list[int] | None = None
) -> tuple[int, str | None]:
    r"""(1 or -1, answer): the last `\boxed{}` of the last 100 characters against `gt`, character by character."""
    if pause_tokens_index is not None:
        assert len(pause_tokens_index) == 4, f"expected four pause token indices, got {pause_tokens_index}"
        tail = pred[pause_tokens_index[-1] - BOX_CHARS :]
    else:
        tail = pred[-BOX_CHARS:]
    boxed = last_boxed_only_string(tail)
    extracted = remove_boxed(boxed) if boxed is not None else None
    return (1 if extracted == gt else -1), extracted


def verify(
    solution_str: str, answer: str, strict_box_verify: bool = False, pause_tokens_index: list[int] | None = None
) -> tuple[bool, str | None]:
    """(correct, answer) by one of the two rules."""
    if strict_box_verify:
        correct, pred = is_correct_strict_box(solution_str, answer, pause_tokens_index)
        return correct == 1, pred
    return is_correct_minerva(solution_str, answer)


def compute_score(
    solution_str: str,
    ground_truth: str,
    strict_box_verify: bool = False,
    pause_tokens_index: list[int] | None = None,
) -> DapoScore:
    """The score of a response; only its last 300 characters count.

    Example: `compute_score("... Answer: 34", "34") == {"score": 1.0, "acc": True, "pred": "34"}`
    """
    correct, pred = verify(solution_str[-ANSWER_CHARS:], ground_truth, strict_box_verify, pause_tokens_index)
    return {"score": 1.0 if correct else -1.0, "acc": correct, "pred": pred}


class timeout:
    """A block that may take `seconds`, for plug-ins; TimeoutError after that. Works in the main thread only."""

    def __init__(self, seconds: int = 1, error_message: str = "Timeout") -> None:
        self.seconds, self.error_message = seconds, error_message

    def handle_timeout(self, signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(self.error_message)

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("timeout needs the main thread: signals arrive nowhere else")
        self._before = signal.signal(signal.SIGALRM, self.handle_timeout)
        signal.alarm(self.seconds)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, self._before)
