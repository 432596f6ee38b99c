r"""The grader of `--rm-type gpqa`: which letter of a multiple choice a response settles on.

What a response says most plainly counts: "answer: C" before "option C is correct" before a bare letter, and of
equally plain statements the last. Where no letter is known, the text of the right choice is looked for.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from typing import Any

DEFAULT_VALID_LETTERS = list(string.ascii_uppercase[:8])

# A letter may stand in brackets, bold, or LaTeX. Possessive, so that no text makes it search long.
_WRAP = r"(?:[\s*(\[{$\"'`]|\\boxed|\\text(?:bf)?|\\mathrm|\\mathbf)*+"
# "answer is a number" names no choice: a small "a" must end its clause.
_LETTER = r"([B-Zb-z]|A|a(?=[\s*)\]}$\"'`]*+(?:[.,;:!]|\n|\Z)))(?![A-Za-z0-9])"
_STATEMENTS = [
    re.compile(pattern)
    for pattern in (
        rf"\b(?i:answer|final\s+option)\s*+(?:(?i:is)\b|:){_WRAP}{_LETTER}",
        rf"\b(?i:option|choice)\s*+(?:(?i:is)\b|:){_WRAP}{_LETTER}",
        r"(?<![A-Za-z0-9])([A-Za-z])[\s*)\]}$\"'`]++(?i:is\s+(?:the\s+)?correct)\b",
        rf"\b(?i:answer|option|choice)(?=[\s*(\[{{$\"'`\\]){_WRAP}{_LETTER}",
    )
]
_STANDALONE = re.compile(r"\b([A-Z])\b")


def _strip_chain_of_thought(text: str) -> str:
    """What follows the last `</think>`."""
    return text.rpartition("</think>")[2] if text else ""


def _normalize_text(text: str) -> str:
    """Lower case, letters and digits, single spaces."""
    return " ".join(re.sub(r"[^a-z0-9]+", " ", text.lower()).split())


def _extract_letter_from_response(response: str, valid_letters: Iterable[str]) -> str | None:
    """The letter that the response settles on; None where it names none of `valid_letters`."""
    valid = {letter.upper() for letter in valid_letters}
    text = _strip_chain_of_thought(response)
    for pattern in (*_STATEMENTS, _STANDALONE):
        named = [letter.upper() for letter in pattern.findall(text) if letter.upper() in valid]
        if named:
            return named[-1]
    return None


def compute_gpqa_reward(response: str | None, label: Any, metadata: dict[str, Any] | None = None) -> float:
    """1.0 or 0.0.

    `label` is a letter, an index into the choices, or the text of the right choice; `metadata` may hold `choices` (list
    or dict), `valid_letters`, `correct_letter`, `correct_answer`, `answer_text`.

    Example: `compute_gpqa_reward("So the answer is (B).", "B") == 1.0`
    """
    if response is None:
        return 0.0
    known = metadata or {}
    choices = _choices(known)
    letters = _valid_letters(known, choices)
    correct = _correct_letter(label, known, choices, letters)
    given = _extract_letter_from_response(response, letters)
    if correct is not None and given is not None:
        return float(given == correct)
    text = f" {_normalize_text(_strip_chain_of_thought(response))} "
    targets = _target_texts(label, known, choices.get(correct or ""), letters)
    if any(f" {target} " in text for target in targets):
        return 1.0
    return float(given is not None and isinstance(label, str) and given == label.strip().upper())


def _choices(metadata: dict[str, Any]) -> dict[str, str]:
    """Letter -> text of the choice."""
    choices = metadata.get("choices")
    if isinstance(choices, dict):
        return {str(letter).strip().upper(): str(text) for letter, text in choices.items()}
    if choices is None or isinstance(choices, str):
        return {}
    return {letter: str(text) for letter, text in zip(string.ascii_uppercase, choices)}


def _valid_letters(metadata: dict[str, Any], choices: dict[str, str]) -> list[str]:
    if metadata.get("valid_letters"):
        return [str(letter).strip().upper() for letter in metadata["valid_letters"]]
    if choices and not all(len(letter) == 1 and letter in string.ascii_uppercase for letter in choices):
        return list(string.ascii_uppercase[: len(choices)])
    return list(choices) or DEFAULT_VALID_LETTERS


def _correct_letter(
    label: Any, metadata: dict[str, Any], choices: dict[str, str], letters: list[str]
) -> str | None:
    if isinstance(label, (int, float)) and not isinstance(label, bool):
        return letters[int(label)] if 0 <= label < len(letters) else None
    named = str(metadata.get("correct_letter") or "").strip().upper()
    if named:
        return named
    text = label.strip() if isinstance(label, str) else ""
    if text.upper() in letters:
        return text.upper()
    wanted = _normalize_text(text)
    return next((letter for letter, choice in choices.items() if wanted and _normalize_text(choice) == wanted), None)


def _target_texts(label: Any, metadata: dict[str, Any], choice: str | None, letters: list[str]) -> list[str]:
    """Normalised texts of which one must occur in the response. A bare letter occurs in too many."""
    label_text = "" if label is None or str(label).strip().upper() in letters else label
    texts = (choice, metadata.get("correct_answer"), metadata.get("answer_text"), label_text)
    return [normal for text in texts if text is not None and (normal := _normalize_text(str(text)))]
