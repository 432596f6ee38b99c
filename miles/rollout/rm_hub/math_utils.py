r"""Whether two mathematical answers are the same: the grader of `--rm-type math`.

    response ── extract_answer ──► last \boxed{...} ──► mathd: equal as normalised text?   yes: correct
                                                   └──► sympy: equal element by element?   yes: correct

The normal form of the first step is that of the MATH data set (Hendrycks et al. 2021), the second step that of PRM800K
(Lightman et al. 2023). Everything here is a plain function that runs where it is called. Only `are_equal_under_sympy`
may take long; `undecided` tells whether it is needed at all. Time limits are left to `miles.rollout.rm_hub.pool`.
"""

from __future__ import annotations

import functools
import re
from decimal import Decimal
from typing import Any

from miles.rollout.rm_hub.latex_text import latex_to_text

# ---- the boxed answer ----------------------------------------------------------------------------------------------

_BOX = "\\boxed{"
_BRACE = re.compile(r"[{}]")


def last_boxed_only_string(string: str) -> str | None:
    r"""The last `\boxed`, else the last `\fbox`, through its closing brace; None if there is none or it is not closed.

    Example: `last_boxed_only_string(r"so \boxed{\frac{1}{2}}.") == r"\boxed{\frac{1}{2}}"`
    """
    start = string.rfind("\\boxed")
    if start < 0:
        start = string.rfind("\\fbox")
    return None if start < 0 else through_closing_brace(string, start)


def through_closing_brace(string: str, start: int) -> str | None:
    """`string` from `start` to the brace that closes the first one opened there."""
    depth = 0
    for brace in _BRACE.finditer(string, start):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return string[start : brace.end()]
    return None


def remove_boxed(s: str | None) -> str | None:
    r"""What stands in `\boxed{...}`; None for anything else."""
    if s is None or not (s.startswith(_BOX) and s.endswith("}")):
        return None
    return s[len(_BOX) : -1]


def extract_boxed_answer(solution: str) -> str | None:
    r"""The content of the last `\boxed{...}`."""
    return remove_boxed(last_boxed_only_string(solution))


def extract_answer(passage: str | None) -> str | None:
    r"""The boxed answer of a response; None without a `\boxed`."""
    return extract_boxed_answer(passage) if passage and "\\boxed" in passage else None


# ---- the normal form of the MATH data set --------------------------------------------------------------------------

_WHOLE_TEXT = re.compile(r"^\\text\{(.+?)\}$")

_MATHD_REPLACED = (
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
)
"""In this order."""

# What follows is a unit or a remark.
_UNIT = "\\text{ "
_INTEGER_FRACTION = re.compile(r"(-?(?:0|[1-9][0-9]*))/(-?(?:0|[1-9][0-9]*))")


def mathd_normalize_answer(answer: str | None) -> str | None:
    r"""The normal form in which equal answers are mostly equal texts.

    Example: `mathd_normalize_answer(r" \dfrac12\text{ cm} ") == r"\frac{1}{2}"`
    """
    if answer is None:
        return None
    answer = answer.strip()
    whole = _WHOLE_TEXT.match(answer)
    if whole is not None:
        answer = whole.group(1).strip()
    try:
        return _mathd(answer)
    except ValueError:  # a root or a fraction without its arguments, or more remarks than one
        return answer


def _mathd(text: str) -> str:
    for old, new in _MATHD_REPLACED:
        text = text.replace(old, new)
    text, _, remark = text.partition(_UNIT)
    if _UNIT in remark:
        raise ValueError("more than one remark: what stands between them belongs to the answer")
    text = text.replace("\\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    left, equals, right = text.partition("=")
    if equals and len(left) <= 2 and "=" not in right:
        text = right
    text = _brace_roots(text).replace(" ", "")
    text = _brace_fractions(text)
    if text == "0.5":
        return "\\frac{1}{2}"
    fraction = _INTEGER_FRACTION.fullmatch(text)
    return f"\\frac{{{fraction[1]}}}{{{fraction[2]}}}" if fraction else text


def _brace_roots(text: str) -> str:
    r"""`\sqrt3` as `\sqrt{3}`."""
    head, *parts = text.split("\\sqrt")
    for part in parts:
        if not part:
            raise ValueError("a root of nothing")
        head += "\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}")
    return head


def _brace_fractions(text: str) -> str:
    r"""`\frac12` and `\frac1{2}` as `\frac{1}{2}`. A text that breaks off within a fraction stays as it is."""
    head, *parts = text.split("\\frac")
    for part in parts:
        if not part:
            raise ValueError("a fraction of nothing")
        if part[0] == "{":
            head += "\\frac" + part
        elif len(part) < 2:
            return text
        else:
            below = part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}"
            head += f"\\frac{{{part[0]}}}{below}"
    return head


def grade_answer_mathd(given_answer: str | None, ground_truth: str | None) -> bool:
    """Equal in the normal form of the MATH data set."""
    return mathd_normalize_answer(ground_truth) == mathd_normalize_answer(given_answer)


# ---- the text that sympy reads -------------------------------------------------------------------------------------

_REPLACED = (
    ("\\%", "%"),
    ("\\$", "$"),
    ("$", ""),
    ("%", ""),
    (" or ", " , "),
    (" and ", " , "),
    ("million", "*10^6"),
    ("billion", "*10^9"),
    ("trillion", "*10^12"),
)
"""In this order."""

_UNITS = (
    *("degree", "cm", "centimeter", "meter", "mile", "second", "minute", "hour"),
    *("day", "week", "month", "year", "foot", "feet", "inch", "yard"),
)
_UNIT_WORDS = [re.compile(unit + r"(?:es)?s? *(?:\^[0-9]+)?") for unit in _UNITS]
_DEGREE_MARK = re.compile(r"\^ *\\circ")
_THIN_COMMA = re.compile(r",\\! *")
_GROUPING_COMMA = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?:[^0-9]|$))")
_MIXED_NUMBER = re.compile(r"([0-9]) +([0-9])")
_WITHOUT_BRACES = str.maketrans("", "", " {}")


def _normalize(expr: str | None) -> str | None:
    r"""The text that is compared, and then given to sympy.

    Example: `_normalize(r"2\frac{1}{3}\text{ cm}") == "2+1/3"`, `_normalize("1,234") == "1234"`
    """
    if expr is None:
        return None
    whole = _WHOLE_TEXT.search(expr)
    if whole is not None:
        expr = whole.group(1)
    for old, new in _REPLACED:
        expr = expr.replace(old, new)
    for unit in _UNIT_WORDS:
        expr = unit.sub("", expr)
    expr = _DEGREE_MARK.sub("", expr)
    if len(expr) > 0 and expr[0] == "{" and expr[-1] == "}":
        expr = expr[1:-1]
    expr = _THIN_COMMA.sub("", expr)
    number = _float(expr)
    if number is not None and _is_whole(number):
        expr = str(round(number))
    if "\\" in expr:
        expr = latex_to_text(expr)
    expr = re.sub("- *", "-", expr)
    expr = _MIXED_NUMBER.sub(r"\1+\2", expr)
    expr = expr.translate(_WITHOUT_BRACES).lower()
    return _plain_integer(expr) or expr


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _is_whole(number: float) -> bool:
    return abs(number) != float("inf") and number == number and abs(number - round(number)) <= 1e-7


def _plain_integer(text: str) -> str | None:
    """`1,234` as `1234`, `5.0` as `5`; None for what is no whole number."""
    number = _float(_GROUPING_COMMA.sub("", text))
    if number is None or not _is_whole(number):
        return None
    return str(int(float(text.replace(",", ""))))


def _is_int(text: str) -> bool:
    return _plain_integer(text) is not None


# ---- element by element --------------------------------------------------------------------------------------------

TUPLE_CHARS = "()[]"
_NUMBER = re.compile(r"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_FRACTION = re.compile(r"-?[0-9]+\.?/0*[1-9][0-9]*\.?")


def split_tuple(expr: str) -> list[str]:
    """The elements of a tuple, an interval or a list; anything else is its own only element.

    Example: `split_tuple("(1,2]") == ["1", "2"]`, `split_tuple("1,234") == ["1234"]`, `split_tuple("") == []`
    """
    expr = _GROUPING_COMMA.sub("", expr)
    if not expr:
        return []
    wrapped = len(expr) > 2 and expr[0] in TUPLE_CHARS and expr[-1] in TUPLE_CHARS
    if wrapped and not any(ch in TUPLE_CHARS for ch in expr[1:-1]):
        return [element.strip() for element in expr[1:-1].split(",")]
    return [expr]


def undecided(given_answer: str | None, ground_truth: str | None) -> bool | list[tuple[str, str]]:
    """The verdict where text comparison suffices, else what sympy must find equal: (truth, given) per element."""
    if given_answer is None or ground_truth is None:
        return False
    if grade_answer_mathd(given_answer, ground_truth):
        return True
    truth, given = _normalize(ground_truth), _normalize(given_answer)
    assert truth is not None and given is not None
    if truth == given:
        return True
    if not given:
        return False
    true_elements, given_elements = split_tuple(truth), split_tuple(given)
    if len(true_elements) > 1 and (truth[0] != given[0] or truth[-1] != given[-1]):
        return False
    if len(true_elements) != len(given_elements):
        return False
    pairs = []
    for pair in zip(true_elements, given_elements, strict=True):
        verdict = _compare_text(*pair)
        if verdict is False:
            return False
        if verdict is None:
            pairs.append(pair)
    return pairs or bool(true_elements)


def _compare_text(truth: str, given: str) -> bool | None:
    """None where sympy has to decide."""
    if _FRACTION.fullmatch(truth) and _FRACTION.fullmatch(given):
        return truth == given  # an unreduced fraction is another answer
    if _is_int(truth) != _is_int(given):
        return False
    if not should_allow_eval(_difference(truth, given)):
        return False
    if _NUMBER.fullmatch(truth) and _NUMBER.fullmatch(given):
        return Decimal(truth) == Decimal(given)
    return None


def grade_answer_sympy(given_answer: str | None, ground_truth: str | None) -> bool:
    """Equal as text, or element by element as expressions."""
    verdict = undecided(given_answer, ground_truth)
    return verdict if isinstance(verdict, bool) else all_equal_under_sympy(verdict)


# ---- sympy ---------------------------------------------------------------------------------------------------------

BAD_SUBSTRINGS = ["^{", "^("]
BAD_REGEXES = [r"\^[0-9]+\^", r"\^[0-9][0-9]+"]
_LARGE_FACTORIAL = re.compile(r"[0-9]{4}!|! *!")

# Nobody's final answer; sympy would take minutes over it.
MAX_SYMPY_CHARS = 1000


def count_unknown_letters_in_expr(expr: str) -> int:
    """Distinct letters outside of `sqrt` and `frac`."""
    return len({ch for ch in expr.replace("sqrt", "").replace("frac", "") if ch.isalpha()})


def should_allow_eval(expr: str) -> bool:
    """Whether sympy may see this: few unknowns, no towers of powers, no large factorials."""
    if len(expr) > MAX_SYMPY_CHARS or count_unknown_letters_in_expr(expr) > 2:
        return False
    powers = expr.replace("**", "^")
    if any(bad in powers for bad in BAD_SUBSTRINGS) or any(re.search(bad, powers) for bad in BAD_REGEXES):
        return False
    return _LARGE_FACTORIAL.search(expr) is None


def _difference(truth: str, given: str) -> str:
    return f"({truth})-({given})"


def are_equal_under_sympy(ground_truth_normalized: str, given_normalized: str) -> bool:
    """Whether the difference simplifies to zero. What sympy cannot read is not equal."""
    expr = _difference(ground_truth_normalized, given_normalized)
    if not should_allow_eval(expr):
        return False
    import sympy

    try:
        return bool(sympy.simplify(_parse(expr)) == 0)
    except MemoryError:
        raise
    except Exception:  # sympy raises anything at all on what is no mathematics: that is "not equal"
        return False


def all_equal_under_sympy(pairs: list[tuple[str, str]]) -> bool:
    """`are_equal_under_sympy` for every (truth, given); the first difference ends it."""
    return all(are_equal_under_sympy(truth, given) for truth, given in pairs)


def _parse(expr: str) -> Any:
    from sympy.parsing import sympy_parser

    rules = (*sympy_parser.standard_transformations, sympy_parser.implicit_multiplication_application)
    return sympy_parser.parse_expr(expr.replace("^", "**"), transformations=rules, global_dict=dict(_names()))


@functools.cache
def _names() -> dict[str, Any]:
    """What an expression may name: sympy, and none of Python's own functions, because `parse_expr` evaluates it."""
    import sympy

    return {**{name: getattr(sympy, name) for name in sympy.__all__}, "__builtins__": {}}


# ---- the reward ----------------------------------------------------------------------------------------------------


def unboxed_truth(ground_truth: object) -> str | None:
    r"""The ground truth as text, taken out of its `\boxed{}` where it has one."""
    truth = str(ground_truth)
    return extract_answer(truth) if "\\boxed" in truth else truth


def undecided_verl(solution_str: str | None, ground_truth: object) -> bool | list[tuple[str, str]]:
    """`grade_answer_verl` as far as text comparison goes; see `undecided`."""
    truth = unboxed_truth(ground_truth) if ground_truth else None
    return undecided(extract_answer(solution_str), truth) if truth and truth.strip() else False


def grade_answer_verl(solution_str: str | None, ground_truth: object) -> bool:
    r"""Whether the boxed answer of a response is the ground truth (which may be boxed, too).

    Example: `grade_answer_verl(r"... so \boxed{0.5}", r"\frac{1}{2}")`
    """
    verdict = undecided_verl(solution_str, ground_truth)
    return verdict if isinstance(verdict, bool) else all_equal_under_sympy(verdict)
