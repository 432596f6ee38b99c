"""What a rollout returned is looked at before anything reads it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from miles.batch import check_samples
from miles.errors import UsageError
from miles.types import Sample


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tokens": torch.tensor([1, 2]), "response_length": np.int64(1), "loss_mask": np.ones(1)},
        {"tokens": (1, 2), "response_length": 1.0, "loss_mask": torch.ones(1), "status": "won"},
    ],
)
def test_loose_samples_pass(fields: dict[str, Any]) -> None:
    check_samples([Sample(**fields)])


def test_no_metadata_is_empty_metadata() -> None:
    nothing: Any = None
    sample = Sample(metadata=nothing)
    check_samples([sample])
    assert sample.metadata == {}


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("response", None, r"response of sample 7 is NoneType None\. Expected text\."),
        ("response", b"abc", "is bytes b'abc'. Expected text"),
        ("metadata", ["a"], r"is list \['a'\]\. Expected a dict"),
        ("tokens", None, "Expected a list of token ids"),
        ("tokens", "1 2", "Expected a list of token ids"),
        ("loss_mask", 1, "Expected a list with one number per response token"),
        ("loss_mask", "11", "Expected a list with one number per response token"),
        ("response_length", None, "Expected a whole number"),
        ("response_length", 1.5, "Expected a whole number"),
        ("response_length", float("nan"), "Expected a whole number"),
        ("response_length", torch.ones(2), "Expected a whole number"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(field: str, value: Any, said: str) -> None:
    wrong = Sample(index=7)
    setattr(wrong, field, value)
    with pytest.raises(UsageError, match=said):
        check_samples([Sample(), wrong])
