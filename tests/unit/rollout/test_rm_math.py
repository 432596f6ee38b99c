r"""The mathematical graders: `math`, `deepscaler` and `dapo`, case by case."""

from __future__ import annotations

import logging
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.rollout.rm_hub import math_dapo_utils as dapo
from miles.rollout.rm_hub import math_utils as m
from miles.rollout.rm_hub.deepscaler import get_deepscaler_rule_based_reward
from miles.rollout.rm_hub.latex_text import latex_to_text

BOXES = [
    (r"so \boxed{42}.", r"\boxed{42}", "42"),
    (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\{1,2\}} }", r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed{a{b{c}d}e}", r"\boxed{a{b{c}d}e}", "a{b{c}d}e"),
    (r"\fbox{7}", r"\fbox{7}", None),
    (r"\fbox{7} \boxed{8}", r"\boxed{8}", "8"),
    (r"\boxed 9", None, None),
    (r"\boxed{9", None, None),
    (r"\boxed{1} \boxed{2", None, None),  # the last one counts, closed or not
    (r"\boxed{}", r"\boxed{}", ""),
    ("no box", None, None),
    ("", None, None),
]


@pytest.mark.parametrize(("text", "box", "content"), BOXES)
def test_boxes(text: str, box: str | None, content: str | None) -> None:
    assert m.last_boxed_only_string(text) == box
    assert m.extract_boxed_answer(text) == content
    assert m.extract_answer(text) == (content if "\\boxed" in text else None)


@pytest.mark.parametrize("text", [None, "", "42", r"\boxed{42", r"\boxed {42}", r"\fbox{42}", r" \boxed{42}"])
def test_remove_boxed_needs_the_exact_form(text: str | None) -> None:
    assert m.remove_boxed(text) is None


MATHD = [
    (None, None),
    ("  7 ", "7"),
    (r"\text{ yes}", "yes"),
    (r"\text{Monday}", "Monday"),
    (r"\dfrac{1}{2}", r"\frac{1}{2}"),
    (r"\tfrac12", r"\frac{1}{2}"),
    (r"\frac1{72}", r"\frac{1}{72}"),
    (r"\frac{1}2", r"\frac{1}2"),
    (r"\left(1,\,2\right)", r"(1,\,2)"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    (r"\$5", "5"),
    (r"5\text{ dollars}", "5"),
    (r"50\%", "50"),
    (".5", r"\frac{1}{2}"),
    ("0.5", r"\frac{1}{2}"),
    (".25", "0.25"),
    ("1 .25", "10.25"),
    (r"\frac{.5}{2}", r"\frac{0.5}{2}"),
    ("x=3", "3"),
    ("k = 3", "3"),
    ("xyz=3", "xyz=3"),
    ("a=b=3", "a=b=3"),
    (r"\sqrt3", r"\sqrt{3}"),
    (r"2\sqrt{3}", r"2\sqrt{3}"),
    ("3/4", r"\frac{3}{4}"),
    ("-3/4", r"\frac{-3}{4}"),
    ("03/4", "03/4"),
    ("a/b", "a/b"),
    ("1/2/3", "1/2/3"),
    ("1\n2", "12"),
    (r"1\!000", "1000"),
    ("a\\\\b", r"a\b"),
    (r"\sqrt", r"\sqrt"),  # nothing under the root: left as it is
    (r"\frac", r"\frac"),
    (r"\frac3", r"\frac3"),
    ("", ""),
]


@pytest.mark.parametrize(("text", "expected"), MATHD)
def test_mathd_normal_form(text: str | None, expected: str | None) -> None:
    assert m.mathd_normalize_answer(text) == expected


NORMAL = [
    (None, None),
    (r"\text{7}", "7"),
    (r"\$1,234", "1234"),
    ("1,000,000", "1000000"),
    ("1,000,000,000", "1000000000"),
    ("1,23", "1,23"),
    ("12,34,567", "12,34,567"),
    (r"50\%", "50"),
    ("50%", "50"),
    ("5.0", "5"),
    ("5.5", "5.5"),
    ("3 or 4", "3,4"),
    ("3 and 4", "3,4"),
    ("5 million", "5*10^6"),
    ("7 cm", "7"),
    ("7 cm^2", "7"),
    ("7 inches", "7"),
    ("3 feet", "3"),
    ("5 days", "5"),
    (r"45^\circ", "45"),
    (r"45 ^ \circ", "45"),
    ("45 degrees", "45"),
    ("{7}", "7"),
    (r"1,\!000", "1000"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac12", "1/2"),
    (r"2\frac{1}{3}", "2+1/3"),
    ("2 1/3", "2+1/3"),
    (r"\frac{a+b}{c}", "(a+b)/c"),
    (r"\frac{1}{2\sqrt{3}}", "1/(2sqrt(3))"),
    (r"\frac{\sqrt{3}}{2}", "sqrt(3)/2"),
    (r"\sqrt[3]{2}", "(2)^(1/3)"),
    (r"3\pi", "3pi"),
    (r"\infty", "inf"),
    (r"(-\infty, 2] \cup [3, \infty)", "(-inf,2]u[3,inf)"),
    (r"2 \cdot 3 \times 4", "2*3*4"),
    ("- 3", "-3"),
    ("X + Y", "x+y"),
    ("x^{2}", "x^2"),
    ("nan", "nan"),
    ("1e400", "1e400"),
    ("", ""),
]


@pytest.mark.parametrize(("text", "expected"), NORMAL)
def test_normal_form_for_sympy(text: str | None, expected: str | None) -> None:
    assert m._normalize(text) == expected


TUPLES = [
    ("(1,2)", ["1", "2"]),
    ("[1, 2)", ["1", "2"]),
    ("(1,234)", ["1234"]),
    ("((1,2),3)", ["((1,2),3)"]),
    ("(1)", ["1"]),
    ("()", ["()"]),
    ("1,2", ["1,2"]),
    ("", []),
]


@pytest.mark.parametrize(("text", "elements"), TUPLES)
def test_split_tuple(text: str, elements: list[str]) -> None:
    assert m.split_tuple(text) == elements


EQUAL = [
    ("0.5", r"\frac{1}{2}"),
    ("(1,0.50)", "(1,.5)"),
    (r"\dfrac{3}{4}", "3/4"),
    ("2x+1", "1+2x"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"\sqrt{12}", r"2\sqrt{3}"),
    (r"\frac{1}{2\sqrt{3}}", r"\frac{\sqrt{3}}{6}"),
    (r"2\frac{1}{2}", "5/2"),
    ("1,234", "1234"),
    (r"\$18.00", "18"),
    (r"18\%", "18"),
    (r"7\text{ cm}", "7"),
    (r"90^\circ", "90 degrees"),
    ("(1, 2)", "(1,2)"),
    (r"\left( \frac{1}{2}, 3 \right)", "(0.5,3)"),
    ("[0, 1)", "[0,1)"),
    ("x=5", "5"),
    (r"\text{even}", "even"),
    (r"\pi/2", r"\frac{\pi}{2}"),
    (r"\(5\)", "5"),
]
DIFFERENT = [
    ("2", "3"),
    ("2/4", "1/2"),  # unreduced
    ("0.333", "0.3333"),
    ("9" * 5000, "8"),
    ("2.0001", "2"),
    (r"\sqrt{2}", "1.41421356"),  # close is not equal
    ("(1,2)", "[1,2]"),
    ("(1,2)", "(2,1)"),
    ("(1,2,3)", "(1,2)"),
    ("", "5"),
    ("abc", "cba"),
    ("x^{10}", "x^{11}"),
    ("5 million", "5000000"),  # an integer needs the integer
    ("__import__('os').system('true')", "0"),
    ("id(0)-id(0)+x", "x+y"),
    (r"\sqrt[3]{8}", r"\sqrt{8}"),
    ("9**9**9**9**9", "9"),
    ("99999!", "x"),
    ("x" + "+x" * 1000, "1001*x"),
]


@pytest.mark.parametrize(("given_answer", "truth"), EQUAL)
def test_equal_answers(given_answer: str, truth: str) -> None:
    assert m.grade_answer_verl(rf"... \boxed{{{given_answer}}}", truth)
    assert m.grade_answer_verl(rf"... \boxed{{{given_answer}}}", rf"\boxed{{{truth}}}")


@pytest.mark.parametrize(("given_answer", "truth"), DIFFERENT)
def test_different_answers(given_answer: str, truth: str) -> None:
    assert not m.grade_answer_verl(rf"... \boxed{{{given_answer}}}", truth)


@pytest.mark.parametrize(
    ("solution", "truth"),
    [("42", "42"), (r"\boxed{2}", ""), (r"\boxed{2}", None), (r"\boxed{}", " "), (r"\boxed{1}", r"\boxed{1"), ("", 1)],
)
def test_without_a_box_or_a_truth_nothing_is_right(solution: str, truth: object) -> None:
    assert m.grade_answer_verl(solution, truth) is False


def test_a_number_may_be_the_truth() -> None:
    assert m.grade_answer_verl(r"\boxed{42}", 42) and m.grade_answer_verl(r"\boxed{4.5}", 4.5)
    assert not m.grade_answer_verl(r"\boxed{0}", 0), "a falsy truth is published as never right"
    assert m.grade_answer_sympy("1", None) is False and m.grade_answer_sympy(None, "1") is False


def test_numbers_need_no_sympy() -> None:
    assert m.undecided("41", "42") is False and m.undecided("(1,0.50)", "(1,.5)") is True
    assert m.undecided("x+1", "1+x") == [("1+x", "x+1")]


def test_what_sympy_may_see() -> None:
    assert m.count_unknown_letters_in_expr("sqrt(x)+frac+y") == 2
    assert m.should_allow_eval("x^2+y") and m.should_allow_eval("2**3")
    for bad in ("a+b+c", "2^{3}", "2^(3)", "2^3^4", "2^34", "2**3**4", "2**(3)", "12345!", "9!!"):
        assert not m.should_allow_eval(bad), bad


def test_an_expression_reaches_no_function_of_python() -> None:
    assert not {"id", "open", "exec", "__import__"} & set(m._names()) and m._names()["__builtins__"] == {}


LATEX = [
    (r"\frac{\frac{1}{2}}{3}", "1/2/3"),
    (r"\frac{3}{\frac{1}{2}}", "3/(1/2)"),
    (r"\frac{-x}{y}", "-x/y"),
    (r"\frac{x-1}{y}", "(x-1)/y"),
    (r"\sqrt2", "sqrt(2)"),
    (r"\sqrt{\frac{1}{2}}", "sqrt(1/2)"),
    (r"\text{hello}", "hello"),
    (r"\alpha+\lambda", "α+λ"),
    (r"3 \le x", "3 ≤ x"),
    (r"\unknown{x}", "unknown{x}"),
    (r"\frac", "/()"),
    ("\\", ""),
    ("{" * 5000, "{" * 5000),
]


@pytest.mark.parametrize(("latex", "text"), LATEX)
def test_latex_to_text(latex: str, text: str) -> None:
    assert latex_to_text(latex) == text


# ---- deepscaler ----------------------------------------------------------------------------------------------------

DEEPSCALER = [
    (r"<think>\boxed{1}</think> \boxed{42}", "42", 1),
    (r"<think>a</think> \boxed{1} </think> \boxed{42}", 42, 1),
    (r"###Response \boxed{42}", "42", 1),
    (r"###Response \boxed{42} ###Response \boxed{7}", "42", 1),
    (r"</think> \boxed{0.5}", r"\boxed{\frac12}", 1),
    (r"</think> \boxed{x+1}", "1+x", 1),
    (r"</think> \boxed{0}", 0, 1),
    (r"\boxed{42}", "42", 0),
    (r"\boxed{42}</think> 42", "42", 0),
    (r"</think> \boxed{42}", "", 0),
    (r"</think> \boxed{42}", r"\boxed{42", 0),
    ("", "42", 0),
]


@pytest.mark.parametrize(("response", "label", "score"), DEEPSCALER)
def test_deepscaler(response: str, label: str | int, score: int) -> None:
    assert get_deepscaler_rule_based_reward(response, label) == score


@pytest.mark.parametrize("label", [None, ["42"], {"a": 1}])
def test_deepscaler_refuses_other_labels(label: object) -> None:
    with pytest.raises(AssertionError, match="needs text or a number as label"):
        get_deepscaler_rule_based_reward(r"</think> \boxed{42}", label)  # type: ignore[arg-type]


# ---- dapo ----------------------------------------------------------------------------------------------------------

FINAL = [
    ("34", "34"),
    ("x = 34", "34"),
    ("$34$", "34"),
    (r"\boxed{34}", "34"),
    (r"\text{34}", "34"),
    (r"\textbf{34}.", "34."),
    ("1,234", "1234"),
    (r"1{,}234", "1234"),
    (r"34^\circ", "34"),
    ("34 dollars", "34"),
    ("34 square inches", "34"),
    (r"\frac12", r"\frac{1}{2}"),
    (r"\sqrt3", r"\sqrt{3}"),
    ("a 34", "34"),
    ("the value is $7$ or so", "7"),
]


@pytest.mark.parametrize(("text", "expected"), FINAL)
def test_minerva_normal_form(text: str, expected: str) -> None:
    assert dapo.normalize_final_answer(text) == expected


SCORES = [
    ("Answer: 34", "34", True, "34"),
    ("answer : 34", 34, True, "34"),
    ("Answer: 33\nAnswer: 34", "34", True, "34"),
    ("Answer: 34\nAnswer: 33", "34", False, "33"),
    (r"Answer: $\boxed{34}$", "34.0", True, "34"),
    (r"Answer: \boxed{34}", "3.4e1", True, "34"),
    ("34", "34", False, "[INVALID]"),
    ("Answer:\n34", "34", True, "34"),
    ("Answer: 34" + " " * 291, "34", False, "[INVALID]"),  # behind the last 300 characters
    ("Answer: -5", -5, True, "-5"),
    ("Answer: 123456789012345678901", "123456789012345678901", True, "123456789012345678901"),
]


@pytest.mark.parametrize(("response", "label", "correct", "pred"), SCORES)
def test_dapo_scores(response: str, label: str, correct: bool, pred: str) -> None:
    score = dapo.compute_score(response, label)
    assert score == {"score": 1.0 if correct else -1.0, "acc": correct, "pred": pred}


@pytest.mark.parametrize("label", ["", "x", None, "nan", "inf", "1e999999999", "1/2"])
def test_a_dapo_label_that_is_no_number_is_no_score(label: str) -> None:
    with pytest.raises(ValueError, match="needs a number as label"):
        dapo.compute_score("Answer: 34", label)


def test_a_dapo_label_that_is_no_whole_number_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    dapo._told.clear()
    with caplog.at_level(logging.WARNING):
        assert [dapo.compute_score("Answer: 3", "3.5")["acc"] for _ in range(2)] == [True, True]
    assert [r.getMessage() for r in caplog.records] == [
        "--rm-type dapo compares whole numbers: label '3.5' counts as 3."
    ]


def test_strict_boxes() -> None:
    assert dapo.is_correct_strict_box(r"\boxed{34}", "34") == (1, "34")
    assert dapo.is_correct_strict_box(r"\boxed{34.0}", "34") == (-1, "34.0")
    assert dapo.is_correct_strict_box("34", "34") == (-1, None)
    assert dapo.is_correct_strict_box(r"\boxed{34}" + "." * 100, "34") == (-1, None)
    assert dapo.is_correct_strict_box("x" * 200 + r"\boxed{34}" + "y" * 50, "34", [0, 0, 0, 260]) == (1, "34")
    assert dapo.compute_score(r"\boxed{34}", "34", strict_box_verify=True)["score"] == 1.0
    assert dapo.is_correct_minerva("Answer: 34", r"so \boxed{34}", gt_need_extract=True) == (True, "34")
    with pytest.raises(AssertionError, match="expected"):
        dapo.remove_boxed("34")


def test_timeout_interrupts_a_block_of_the_main_thread() -> None:
    with pytest.raises(TimeoutError, match="too slow"), dapo.timeout(1, "too slow"):
        time.sleep(5)


# ---- any text ------------------------------------------------------------------------------------------------------

# What answers are made of, so that the search meets the interesting corners.
PIECES = st.sampled_from(
    [*"0123456789+-*/^=(){}[],.!% $xyπ\n", "\\frac", "\\sqrt", "\\text{", "\\boxed{", "\\left(", "\\right)", "\\pi"]
    + ["\\", " or ", " and ", "million", "cm", "^\\circ", "Answer: ", "</think>", "\\cup", "1,000", "**"]
    + ["\ud800", "\0"]
)
TEXTS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=25).map("".join))


@settings(max_examples=400, deadline=1000)
@given(response=TEXTS, answer=TEXTS, truth=TEXTS)
def test_any_text_has_a_verdict_or_a_bounded_question(response: str, answer: str, truth: str) -> None:
    for text in (response, f"{response}</think>\\boxed{{{answer}}}"):
        verdict = m.undecided_verl(text, truth)
        assert isinstance(verdict, bool) or all(m.should_allow_eval(f"({a})-({b})") for a, b in verdict)
    assert m.grade_answer_mathd(answer, answer)
    assert m.undecided(answer, answer) is True
    assert dapo.compute_score(f"{response}Answer: {answer}", "7")["score"] in (1.0, -1.0)


@pytest.mark.parametrize(
    "piece", ["{", "\\frac", "\\sqrt", "1,000", "- ", "\\text{", "^ ", "cm ", "(", "1 ", "\\boxed{"]
)
def test_long_answers_cost_linear_time(piece: str) -> None:
    begin = time.perf_counter()
    m.undecided(piece * 20_000, "7")
    m.extract_answer("\\boxed{" + piece * 20_000 + "}")
    assert time.perf_counter() - begin < 2.0
