"""The scoring process's part: make an entry of a data set again, and ask the data set for the score of an answer.

Imports nothing but the library, because every scoring process imports this file before its first score.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import reasoning_gym


def score(name: str, config: dict[str, Any], seed: int, index: int, answer: str | None) -> float:
    """From 0 to 1. Example: `score("chain_sum", {"size": 500}, 7, 3, "141")` is `1.0`."""
    dataset = dataset_of(name, json.dumps(config, sort_keys=True), seed)
    return float(dataset.score_answer(answer, dataset[index]))


@functools.lru_cache(maxsize=64)
def dataset_of(name: str, config: str, seed: int) -> Any:
    """The library's object; `config` is JSON, so that it can be a key."""
    return reasoning_gym.create_dataset(name, seed=seed, **json.loads(config))
