"""Token F1 between two short answers, as in the SQuAD evaluation (Rajpurkar et al. 2016, section 6.1)."""

from __future__ import annotations

import re
import string
from collections import Counter

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_VERDICTS = {"yes", "no", "noanswer"}


def normalize_answer(s: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    bare = "".join(ch for ch in s.lower() if ch not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def f1_score(prediction: str | None, ground_truth: str | None) -> tuple[float, float, float]:
    """(f1, precision, recall) over the bag of words; yes, no and noanswer must match as a whole."""
    nothing = (0.0, 0.0, 0.0)
    if prediction is None or ground_truth is None:
        return nothing
    given, truth = normalize_answer(prediction), normalize_answer(ground_truth)
    if given != truth and (given in _VERDICTS or truth in _VERDICTS):
        return nothing
    given_words, true_words = given.split(), truth.split()
    same = sum((Counter(given_words) & Counter(true_words)).values())
    if same == 0:
        return nothing
    precision, recall = same / len(given_words), same / len(true_words)
    return 2 * precision * recall / (precision + recall), precision, recall
