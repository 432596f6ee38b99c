r"""LaTeX of a final answer as the plain text that sympy reads: `\frac{\sqrt{3}}{2}` is `sqrt(3)/2`.

One pass, linear in the text, because it reads what a model has written. It knows what final answers are made of; a
command that it does not know stays as its bare name, so that no two different answers become one.
"""

from __future__ import annotations

import re
import unicodedata

# Deeper than any answer; a text of braces only must not exhaust the stack.
MAX_DEPTH = 40

_GREEK = (
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu"),
    *("xi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega"),
)

_SYMBOLS = {
    **{name: unicodedata.lookup(f"GREEK SMALL LETTER {name.upper().replace('LAMBDA', 'LAMDA')}") for name in _GREEK},
    **{"varepsilon": "ε", "vartheta": "θ", "varphi": "φ", "pi": "pi", "infty": "inf", "cup": "U", "cap": "∩"},
    **{"cdot": "*", "times": "*", "ast": "*", "div": "/", "pm": "±", "in": "∈", "emptyset": "∅", "varnothing": "∅"},
    **{"le": "≤", "leq": "≤", "leqslant": "≤", "ge": "≥", "geq": "≥", "geqslant": "≥"},
    **{"lt": "<", "gt": ">", "ne": "≠", "neq": "≠"},
    **dict.fromkeys(("quad", "qquad", " ", "~", "{", "}", "\\"), " "),
    **dict.fromkeys((",", ";", ":", "!", "(", ")", "[", "]", "lbrace", "rbrace", "lbrack", "rbrack"), ""),
    **dict.fromkeys(("left", "right", "big", "Big", "bigl", "bigr", "Bigl", "Bigr"), ""),
    **dict.fromkeys(("displaystyle", "textstyle", "limits"), ""),
}
"""What a command without arguments stands for; nothing where it only sets type."""

# Commands whose argument is all that counts.
_WRAPPERS = {
    *("text", "textbf", "textit", "textrm", "textnormal", "mbox", "hbox", "mathrm", "mathbf", "mathit", "mathsf"),
    *("mathbb", "mathcal", "boldsymbol", "bm", "operatorname", "boxed", "fbox", "ensuremath"),
}
_FRACTIONS = {"frac", "dfrac", "tfrac", "cfrac"}

_COMMAND = re.compile(r"\\([A-Za-z]+|.|$)", re.DOTALL)
# What may stand below a fraction bar, or under a sum, without parentheses.
_ATOM = re.compile(r"[0-9.]+|[^\W\d_]|pi|sqrt\([^()]*\)")
_TERM = re.compile(r"-?[^+\-±,=<>≤≥]*")


def latex_to_text(latex: str) -> str:
    """`latex` as text. What is nested too deeply to be an answer is returned as it is."""
    try:
        text, _ = _until(latex, 0, None, 0)
    except RecursionError:
        return latex
    return text.replace("√", "sqrt").replace("π", "pi").replace("∞", "inf").replace("∪", "U").replace(
        "·", "*").replace("×", "*").strip()  # fmt: skip


def _until(latex: str, at: int, closing: str | None, depth: int) -> tuple[str, int]:
    """The text from `at` to the `closing` character or the end, and the place behind it."""
    if depth > MAX_DEPTH:
        raise RecursionError
    pieces = []
    while at < len(latex):
        ch = latex[at]
        if ch == closing:
            return "".join(pieces), at + 1
        if ch == "{":
            inner, at = _until(latex, at + 1, "}", depth + 1)
            pieces.append(f"{{{inner}}}")
        elif ch == "\\":
            text, at = _command(latex, at, depth)
            pieces.append(text)
        else:
            pieces.append(" " if ch == "~" else ch)
            at += 1
    return "".join(pieces), at


def _command(latex: str, at: int, depth: int) -> tuple[str, int]:
    """The text of the command at `at`, with its arguments, and the place behind it."""
    match = _COMMAND.match(latex, at)
    assert match is not None
    name, at = match.group(1), match.end()
    if name in _FRACTIONS:
        above, at = _argument(latex, at, depth)
        below, at = _argument(latex, at, depth)
        # The space lets a number in front of it be read as the whole part of a mixed number.
        return f" {_wrapped(above, _TERM)}/{_wrapped(below, _ATOM)}", at
    if name == "sqrt":
        index = None
        if at < len(latex) and latex[at] == "[":
            index, at = _until(latex, at + 1, "]", depth + 1)
        under, at = _argument(latex, at, depth)
        return (f"sqrt({under})" if index is None else f"({under})^(1/{index})"), at
    if name in _WRAPPERS:
        return _argument(latex, at, depth)
    if name in _SYMBOLS:
        return _SYMBOLS[name], at
    return name, at


def _argument(latex: str, at: int, depth: int) -> tuple[str, int]:
    """A group, a command or a single character. Braces inside are gone."""
    while at < len(latex) and latex[at] == " ":
        at += 1
    if at == len(latex):
        return "", at
    if depth > MAX_DEPTH:
        raise RecursionError
    if latex[at] == "{":
        text, at = _until(latex, at + 1, "}", depth + 1)
    elif latex[at] == "\\":
        text, at = _command(latex, at, depth + 1)
    else:
        text, at = latex[at], at + 1
    return text.replace("{", "").replace("}", "").strip(), at


def _wrapped(text: str, plain: re.Pattern[str]) -> str:
    return text if plain.fullmatch(text) else f"({text})"
