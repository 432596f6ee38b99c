"""Whether what a rollout returned can be logged, recorded and converted at all: said once, before anything reads it.

What belongs together inside a sample (lengths of masks and log-probs, rewards) is checked by `convert` and `rewards`,
which know what is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from miles.batch.ragged import shown
from miles.batch.types import row_name
from miles.errors import UsageError
from miles.types import Sample


def check_samples(samples: Sequence[Sample]) -> None:
    """UsageError names the first sample with a field of the wrong kind. Metadata of None counts as empty."""
    for row, sample in enumerate(samples):
        if not isinstance(sample.response, str):
            raise _wrong(row, sample, "response", "text")
        if sample.metadata is None:
            sample.metadata = {}
        elif not isinstance(sample.metadata, dict):
            raise _wrong(row, sample, "metadata", "a dict")
        if isinstance(sample.tokens, str | bytes) or not hasattr(sample.tokens, "__len__"):
            raise _wrong(row, sample, "tokens", "a list of token ids")
        if isinstance(sample.loss_mask, str | bytes | dict) or not (
            sample.loss_mask is None or hasattr(sample.loss_mask, "__len__")
        ):
            raise _wrong(row, sample, "loss_mask", "a list with one number per response token, or None")
        if not _is_whole(sample.response_length):
            raise _wrong(row, sample, "response_length", "a whole number")


def _is_whole(value: Any) -> bool:
    try:
        return bool(int(value) == value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def _wrong(row: int, sample: Sample, field: str, expected: str) -> UsageError:
    name = row_name(row, sample.index)
    return UsageError(f"{field} of {name} is {shown(getattr(sample, field))}. Expected {expected}.")
