"""Several samples of one conversation into one: what lies between two turns becomes text without loss."""

from __future__ import annotations

from dataclasses import fields
from functools import reduce
from typing import Any

from miles.types import Sample

__all__ = ["merge_samples"]

# What all turns of a conversation share.
_EQUAL = (
    "group_index", "index", "multimodal_inputs", "multimodal_train_inputs", "label", "reward", "remove_sample",
    "metadata", "train_metadata", "non_generation_time",
)  # fmt: skip
# What belongs to the conversation as it stands after its last turn.
_OF_LAST = ("prompt", "rollout_routed_experts", "status")


def merge_samples(samples: list[Sample], tokenizer: Any) -> Sample:
    """The one sample that these turns make, in order: each begins with all tokens of the one before.

    AssertionError where they do not, where nothing lies between two turns, where a turn but the last did not complete,
    or where they differ in what a conversation shares (label, reward, metadata, ...).
    """
    assert samples, "expected at least one sample"
    return reduce(lambda a, b: _merge_sample_pair(a, b, tokenizer), samples)


def _merge_sample_pair(a: Sample, b: Sample, tokenizer: Any) -> Sample:
    """`a`, then the observation that `b`'s request has beyond it (loss mask 0, log-prob 0.0), then `b`'s response."""
    a, b = _with_columns(a), _with_columns(b)
    for name in _EQUAL:
        assert _same(getattr(a, name), getattr(b, name)), (
            f"{name} mismatch: {getattr(a, name)!r} in one turn, {getattr(b, name)!r} in the next"
        )
    assert a.status == Sample.Status.COMPLETED, f"only the last turn may end otherwise than completed, got {a.status}"
    assert _extends(b.prompt, a.prompt), "b.prompt must start with a.prompt"
    assert b.tokens[: len(a.tokens)] == a.tokens, "b.tokens must start with a.tokens"
    observation = b.tokens[len(a.tokens) : len(b.tokens) - b.response_length]
    n = len(b.tokens) - len(a.tokens) - b.response_length
    assert n > 0, f"obs_len must be > 0, got {n}: nothing lies between the two turns"
    assert a.loss_mask is not None and b.loss_mask is not None
    assert a.rollout_log_probs is not None and b.rollout_log_probs is not None
    merged = {
        **{key: value for key, value in {**vars(a), **vars(b)}.items() if key not in _DECLARED},
        **{name: getattr(a, name) for name in _EQUAL},
        **{name: getattr(b, name) for name in _OF_LAST},
        "tokens": b.tokens,
        "response": a.response + tokenizer.decode(observation) + b.response,
        "response_length": a.response_length + n + b.response_length,
        "loss_mask": a.loss_mask + [0] * n + b.loss_mask,
        "rollout_log_probs": a.rollout_log_probs + [0.0] * n + b.rollout_log_probs,
        "weight_versions": a.weight_versions + b.weight_versions,
        "spec_info": _sum(a.spec_info, b.spec_info),
        "prefix_cache_info": _sum(a.prefix_cache_info, b.prefix_cache_info),
    }
    sample = Sample()
    vars(sample).update(merged)
    return sample


_DECLARED = {field.name for field in fields(Sample)}


def _with_columns(sample: Sample) -> Sample:
    """A copy whose optional columns are written out, after a check of their lengths."""
    sample.validate()
    n = sample.response_length
    copy = Sample()
    vars(copy).update(vars(sample))
    copy.loss_mask = [1] * n if sample.loss_mask is None else sample.loss_mask
    copy.rollout_log_probs = [0.0] * n if sample.rollout_log_probs is None else sample.rollout_log_probs
    return copy


def _extends(longer: Any, shorter: Any) -> bool:
    """Texts by their beginning, message lists by their first messages."""
    if isinstance(longer, str) and isinstance(shorter, str):
        return longer.startswith(shorter)
    return type(longer) is type(shorter) and longer[: len(shorter)] == shorter


def _same(one: Any, other: Any) -> bool:
    """Equality that also holds for one and the same object whose `==` is no truth value (arrays, tensors)."""
    if one is other:
        return True
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if hasattr(one, "shape") and hasattr(other, "shape"):
        return one.shape == other.shape and bool((one == other).all())
    return bool(one == other)


def _sum(a: Any, b: Any) -> Any:
    return type(a)(**{name: value + getattr(b, name) for name, value in vars(a).items()})
