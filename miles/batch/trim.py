"""From the nested result of a rollout to flat samples whose number fits the optimizer steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from miles.errors import UsageError
from miles.types import Sample


@dataclass(frozen=True)
class TrimmedRollout:
    """Flat samples and the optimizer step's share of them.

    Example: 130 samples with `--global-batch-size 64` become 128 samples, `global_batch_size=64`.
    """

    samples: list[Sample]
    global_batch_size: int  # samples per optimizer step, over all data-parallel ranks


def flatten_groups(nested: Iterable[Any]) -> list[Sample]:
    """The samples of groups, of groups of groups (multi-sample generation), or of a mix, in order."""
    return list(_walk(nested))


def _walk(nested: Iterable[Any]) -> Iterator[Sample]:
    for entry in nested:
        if isinstance(entry, list | tuple):
            yield from _walk(entry)
        else:
            yield entry


def trim_rollout(
    samples: list[Sample],
    global_batch_size: int | None,
    *,
    dp_size: int = 1,
    dynamic: bool = False,
    enabled: bool = True,
) -> TrimmedRollout:
    """Keep the first samples, as many as fill whole optimizer steps; the tail (highest indices) is dropped.

    `dynamic` (`--use-dynamic-global-batch-size`) makes one optimizer step of the rollout: its size is the number of
    samples, rounded down to a multiple of `dp_size`. `enabled` is False under `--disable-rollout-trim-samples`, which
    also switches `dynamic` off. UsageError where not one step can be filled.
    """
    n = len(samples)
    if dynamic and enabled:
        global_batch_size = max(n // dp_size, 1) * dp_size
    if global_batch_size is None:
        raise UsageError(
            "--global-batch-size: expected the number of samples per optimizer step, got nothing. "
            "Give it, or --num-steps-per-rollout."
        )
    keep = n // global_batch_size * global_batch_size
    if keep == 0:
        source = (
            "the data-parallel size, the least --use-dynamic-global-batch-size can use"
            if dynamic and enabled
            else "--global-batch-size"
        )
        raise UsageError(
            f"The rollout gave {n} samples, fewer than one optimizer step of {global_batch_size} ({source}). Let "
            "fewer groups be filtered away, raise --rollout-batch-size or --n-samples-per-prompt, or lower "
            "--global-batch-size."
        )
    if not enabled:
        return TrimmedRollout(samples, global_batch_size)
    return TrimmedRollout(samples[:keep], global_batch_size)
