"""Samples to a `TrainBatch`: the default conversion, and the reading of what a custom conversion returned.

Rewards arrive ready: `rewards` computes them. Trimming comes before (`trim`), cutting into shards after (`split`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from miles.batch.columns import (
    check_finite,
    check_lengths,
    numbers_or_list,
    one_per_row,
    response_column,
    response_tensor,
    whole_numbers,
)
from miles.batch.ragged import FloatArray, IntArray, flatten_rows, offsets_of
from miles.batch.types import ROW_COLUMNS, TrainBatch, row_name
from miles.batch.view import RESPONSE_COLUMNS
from miles.errors import UsageError
from miles.types import Sample, is_failed

REQUIRED = ("tokens", "response_lengths", "loss_masks")


def to_train_batch(samples: Sequence[Sample], raw_reward: list[Any], rewards: FloatArray | list[Any]) -> TrainBatch:
    """The default conversion of flat samples, with rewards as `miles.batch.rewards` returns them.

    A mask of None means all ones; `remove_sample` and a failed score make it all zeros. Whether an optional column
    exists is decided over all samples: one that lacks what the others have is a UsageError that names it.
    """
    assert len(samples) == len(raw_reward) == len(rewards)
    reader = SampleReader(samples)
    loss_masks = reader.loss_masks()
    better_raw = reader.optional("metadata['raw_reward']", metadata_entry("raw_reward"))
    return TrainBatch(
        tokens=reader.tokens,
        token_offsets=offsets_of(reader.total_lengths),
        response_lengths=reader.response_lengths,
        loss_masks=loss_masks,
        failed=reader.failed,
        rewards=rewards,
        raw_reward=raw_reward if better_raw is None else better_raw,
        truncated=np.array([s.status == Sample.Status.TRUNCATED for s in samples], dtype=np.int64),
        sample_indices=[s.index for s in samples],
        group_index=[s.group_index for s in samples],
        rollout_log_probs=reader.rollout_log_probs(loss_masks),
        round_number=reader.optional("metadata['round_number']", metadata_entry("round_number")),
        rollout_routed_experts=reader.routed_experts(),
        metadata=any_of([s.train_metadata for s in samples]),
        multimodal_train_inputs=any_of([s.multimodal_train_inputs for s in samples]),
        teacher_log_probs=reader.optional("teacher_log_probs", attribute("teacher_log_probs")),
    )


# ---- columns of the default conversion ---------------------------------------------------------------------------

ABSENT = object()


def attribute(name: str) -> Callable[[Sample], Any]:
    """Reads an attribute that plug-ins may have set on the sample itself; None counts as not set."""

    def read(sample: Sample) -> Any:
        value = sample.__dict__.get(name)
        return ABSENT if value is None else value

    return read


def metadata_entry(key: str) -> Callable[[Sample], Any]:
    def read(sample: Sample) -> Any:
        return sample.metadata.get(key, ABSENT) if sample.metadata else ABSENT

    return read


def any_of(values: list[Any]) -> list[Any] | None:
    """Columns whose rows may be None each: absent only where every row is."""
    return values if any(value is not None for value in values) else None


class SampleReader:
    """Reads one column after another from the samples, and checks that all of them agree on what is there."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self.failed = np.fromiter(map(is_failed, samples), dtype=np.bool_, count=len(samples))
        self.tokens, self.total_lengths = flatten_rows("tokens", [s.tokens for s in samples], np.int64)
        lengths = [s.response_length for s in samples]
        self.response_lengths = whole_numbers("response_length", lengths, len(samples), self.name_of)
        check_lengths(self.total_lengths, self.response_lengths, self.name_of)

    def name_of(self, row: int) -> str:
        return row_name(row, self.samples[row].index)

    def optional(
        self, what: str, read: Callable[[Sample], Any], may_lack: npt.NDArray[np.bool_] | None = None
    ) -> list[Any] | None:
        """One value per sample; None where no sample has it. Samples that may lack it (failed ones always) get None."""
        values = [read(sample) for sample in self.samples]
        present = np.array([value is not ABSENT for value in values], dtype=np.bool_)
        if not present.any():
            return None
        excused = self.failed if may_lack is None else self.failed | may_lack
        for i in np.flatnonzero(~present & ~excused)[:1].tolist():
            having = self.name_of(int(np.argmax(present)))
            raise UsageError(
                f"{self.name_of(i)} has no {what}, while {having} has. Expected all samples of a batch, or none."
            )
        return [None if value is ABSENT else value for value in values]

    def loss_masks(self) -> npt.NDArray[np.int32]:
        """int32 [R]."""
        samples = self.samples
        if all(sample.loss_mask is None for sample in samples):
            masks = np.ones(int(self.response_lengths.sum()), dtype=np.int32)
        else:
            rows = [
                np.ones(length, dtype=np.int32) if sample.loss_mask is None else sample.loss_mask
                for sample, length in zip(samples, self.response_lengths.tolist())
            ]
            masks = response_column("loss_mask", rows, np.int32, self.response_lengths, self.name_of)
        removed = np.fromiter((bool(s.remove_sample) for s in samples), dtype=np.bool_, count=len(samples))
        masks[np.repeat(removed | self.failed, self.response_lengths)] = 0
        return masks

    def rollout_log_probs(self, loss_masks: npt.NDArray[np.int32]) -> FloatArray | None:
        """float32 [R]. An empty response needs none; a failed sample without them gets zeros, which are masked."""
        lengths = self.response_lengths
        rows = self.optional("rollout_log_probs", attribute("rollout_log_probs"), may_lack=lengths == 0)
        if rows is None:
            return None
        filled = [
            np.zeros(length, dtype=np.float32) if row is None else row for row, length in zip(rows, lengths.tolist())
        ]
        values = response_column("rollout_log_probs", filled, np.float32, lengths, self.name_of)
        check_finite("rollout_log_probs", values, loss_masks, lengths, self.name_of)
        return values

    def routed_experts(self) -> list[Any] | None:
        """Per row int32 [tokens - 1, num_layers, moe_router_topk]; zeros for a failed sample that has none."""
        rows = self.optional("rollout_routed_experts", attribute("rollout_routed_experts"))
        if rows is None:
            return None
        tail = next(np.shape(row)[1:] for row in rows if row is not None)
        result = []
        for i, (row, length) in enumerate(zip(rows, self.total_lengths.tolist())):
            expected = (max(length - 1, 0), *tail)
            array = np.zeros(expected, dtype=np.int32) if row is None else np.asarray(row, dtype=np.int32)
            if array.shape != expected:
                raise UsageError(
                    f"rollout_routed_experts of {self.name_of(i)} has shape {array.shape}, expected {expected}: one "
                    "row per token but the last, as for the other samples."
                )
            result.append(array)
        return result


# ---- custom conversions ------------------------------------------------------------------------------------------


def from_published_dict(data: Mapping[str, Any]) -> TrainBatch:
    """A batch from the dict of lists that a custom conversion returned.

    `tokens`, `response_lengths` and `loss_masks` are required. Keys that miles does not know survive: a list with one
    entry per sample as a column of `extras`, anything else as a value in `shared`.
    """
    for key in REQUIRED:
        if key not in data:
            raise UsageError(
                f"--custom-convert-samples-to-train-data-path returned no {key!r}. Expected at least "
                f"{', '.join(REQUIRED)}; got {', '.join(map(str, data)) or 'an empty dict'}."
            )
    n = len(data["tokens"])
    indices = one_per_row("sample_indices", data["sample_indices"], n) if has(data, "sample_indices") else None

    def name_of(row: int) -> str:
        return row_name(row, None if indices is None else indices[row])

    tokens, total_lengths = flatten_rows("tokens", data["tokens"], np.int64)
    response_lengths = whole_numbers("response_lengths", data["response_lengths"], n, name_of)
    check_lengths(total_lengths, response_lengths, name_of)
    mask_rows = one_per_row("loss_masks", data["loss_masks"], n)
    batch = TrainBatch(
        tokens=tokens,
        token_offsets=offsets_of(total_lengths),
        response_lengths=response_lengths,
        loss_masks=response_column("loss_masks", mask_rows, np.int32, response_lengths, name_of),
        failed=np.zeros(n, dtype=np.bool_),
        sample_indices=indices,
    )
    if has(data, "total_lengths") and one_per_row("total_lengths", data["total_lengths"], n) != total_lengths.tolist():
        raise UsageError("total_lengths: the given numbers are not the lengths of tokens. Leave the key out.")
    if has(data, "rewards"):
        batch.rewards = numbers_or_list("rewards", data["rewards"], n)
    if has(data, "truncated"):
        batch.truncated = whole_numbers("truncated", data["truncated"], n, name_of)
    if has(data, "rollout_log_probs"):
        rows = one_per_row("rollout_log_probs", data["rollout_log_probs"], n)
        values = response_column("rollout_log_probs", rows, np.float32, response_lengths, name_of)
        check_finite("rollout_log_probs", values, batch.loss_masks, response_lengths, name_of)
        batch.rollout_log_probs = values
    for key in ROW_COLUMNS:
        if has(data, key):
            setattr(batch, key, one_per_row(key, data[key], n))
    keep_unknown(batch, data, n, name_of)
    return batch


def with_failed_rows(batch: TrainBatch, failed: Sequence[bool]) -> TrainBatch:
    """A custom conversion's batch with a row for each sample that it was not shown, because its score failed.

    Such a row has no tokens and counts as a sample: the rollout still fills its optimizer steps, and no plug-in sees
    it. It stands where the sample stood; behind all others where the conversion changed the number of rows.
    """
    num_failed = sum(failed)
    if num_failed == 0:
        return batch
    if len(batch) != len(failed) - num_failed:
        failed = [False] * len(batch) + [True] * num_failed
    places = np.flatnonzero(~np.asarray(failed, dtype=np.bool_))

    def spread(column: IntArray) -> IntArray:
        result = np.zeros(len(failed), dtype=column.dtype)
        result[places] = column
        return result

    def spread_list(column: list[Any] | None) -> list[Any] | None:
        if column is None:
            return None
        values = iter(column)
        return [None if bad else next(values) for bad in failed]

    rewards: Any = None
    if batch.rewards is not None:
        entries = iter(batch.rewards)
        rewards = numbers_or_list("rewards", [0.0 if bad else next(entries) for bad in failed], len(failed))
    others: dict[str, Any] = {key: spread_list(getattr(batch, key)) for key in ROW_COLUMNS}
    return replace(
        batch,
        token_offsets=offsets_of(spread(batch.total_lengths)),
        response_lengths=spread(batch.response_lengths),
        failed=np.asarray(failed, dtype=np.bool_),
        rewards=rewards,
        truncated=None if batch.truncated is None else spread(batch.truncated),
        extras={key: spread_list(column) or [] for key, column in batch.extras.items()},
        **others,
    )


def has(data: Mapping[str, Any], key: str) -> bool:
    """A published column that is None is the same as one that is absent."""
    return data.get(key) is not None


KNOWN = {*REQUIRED, *ROW_COLUMNS, "total_lengths", "rewards", "truncated", "rollout_log_probs"}


def keep_unknown(batch: TrainBatch, data: Mapping[str, Any], n: int, name_of: Callable[[int], str]) -> None:
    for key, value in data.items():
        if key in KNOWN:
            continue
        if key in RESPONSE_COLUMNS and value is not None:
            rows = one_per_row(key, value, n)
            batch.response_columns[key] = response_tensor(key, rows, batch.response_lengths, name_of)
        elif isinstance(value, list | tuple) and len(value) == n:
            batch.extras[key] = list(value)
        else:
            batch.shared[key] = value
