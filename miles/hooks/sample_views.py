"""Rollout data as samples: what a post-processing function receives whose parameter is annotated as samples.

The trainer holds columns, not samples: no prompt text, no response text, no reward model. A view has what the columns
say, and three of its fields lead back to them: `loss_mask`, `remove_sample` (a mask of zeros) and `metadata`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import MutableMapping
from typing import Any

from miles.hooks.values import BadReturn, kind_of
from miles.types import Sample

Data = MutableMapping[str, Any]

# Columns that are fields of a Sample; every other column with one entry per row becomes an attribute of that name.
_FIELDS = {
    "tokens", "response_lengths", "total_lengths", "loss_masks", "rewards", "raw_reward", "truncated", "sample_indices",
    "group_index", "rollout_log_probs", "rollout_routed_experts", "metadata", "multimodal_train_inputs",
}  # fmt: skip


class SampleViews:
    """The rows of `data` that have a score, as samples.

    Example::

        views = SampleViews(rollout_data)
        plug_in(args, views.groups(args))   # sample.loss_mask[0] = 0; sample.metadata["seen"] = True
        views.write_back()

    A view has `tokens` (list of int), `response_length`, `reward` (the raw one), `loss_mask` (list of int),
    `rollout_log_probs`, `status`, `metadata` (what generation left in `train_metadata`), and each column of the trainer
    under its own name: `advantages`, `returns`, `log_probs`, `ref_log_probs`, `values` (tensors [response_length]).
    """

    def __init__(self, data: Data) -> None:
        self.data = data
        self._columns = {name: data[name] for name in data if _is_column(data[name], len(data["tokens"]))}
        self._samples = [self._sample(row) for row in range(len(data["tokens"]))]
        raw = self._columns.get("raw_reward")
        # The rows whose score has failed: no plug-in sees them.
        self._hidden = {row for row, value in enumerate(raw or ()) if value is None}

    def _sample(self, row: int) -> Sample:
        def of(name: str) -> Any:
            column = self._columns.get(name)
            return None if column is None else column[row]

        reward = of("raw_reward")
        sample = Sample(
            group_index=of("group_index"),
            index=of("sample_indices"),
            tokens=_numbers(of("tokens")),
            response_length=int(of("response_lengths")),
            reward=of("rewards") if reward is None else reward,
            loss_mask=_numbers(of("loss_masks")),
            rollout_log_probs=None if of("rollout_log_probs") is None else _numbers(of("rollout_log_probs")),
            rollout_routed_experts=of("rollout_routed_experts"),
            multimodal_train_inputs=of("multimodal_train_inputs"),
            status=Sample.Status.TRUNCATED if of("truncated") else Sample.Status.COMPLETED,
            metadata=of("metadata") or {},
        )
        for name in self._columns.keys() - _FIELDS:
            vars(sample)[name] = of(name)
        return sample

    def flat(self) -> list[Sample]:
        return [sample for row, sample in enumerate(self._samples) if row not in self._hidden]

    def groups(self, args: Namespace) -> list[list[Sample]]:
        """Samples of one prompt together, in order of appearance.

        Where the columns do not say which those are, `n_samples_per_prompt` neighbours are.
        """
        groups: dict[Any, list[Sample]] = {}
        for row, sample in enumerate(self._samples):
            if row not in self._hidden:
                unnamed = ("neighbours", row // vars(args).get("n_samples_per_prompt", 1))
                key = unnamed if sample.group_index is None else sample.group_index
                groups.setdefault(key, []).append(sample)
        return list(groups.values())

    def write_back(self) -> None:
        """Take over masks and metadata. Raises BadReturn for those that do not fit."""
        self.data["loss_masks"] = [self._mask(row, sample) for row, sample in enumerate(self._samples)]
        for row, sample in enumerate(self._samples):
            if not isinstance(sample.metadata, dict):
                found = kind_of(sample.metadata)
                raise BadReturn("type", f"metadata of {self._name(row)} is {found}, expected a dict")
        if "metadata" in self._columns or any(sample.metadata for sample in self._samples):
            self.data["metadata"] = [sample.metadata or None for sample in self._samples]

    def _mask(self, row: int, sample: Sample) -> list[int]:
        length = len(self._columns["loss_masks"][row])
        if sample.remove_sample:
            return [0] * length
        mask: Any = sample.loss_mask
        if not hasattr(mask, "__len__"):
            raise BadReturn("type", f"loss_mask of {self._name(row)} is {mask!r}, expected a list of 0 and 1")
        if len(mask) != length:
            raise BadReturn("length", f"loss_mask of {self._name(row)} has {len(mask)} entries for {length} tokens")
        wrong = next((value for value in mask if value not in (0, 1)), None)
        if wrong is not None:
            raise BadReturn("type", f"loss_mask of {self._name(row)} holds {wrong!r}, expected 0 and 1")
        return [int(value) for value in mask]

    def _name(self, row: int) -> str:
        index = self._samples[row].index
        return f"row {row}" if index is None else f"sample {index}"


def _is_column(value: Any, rows: int) -> bool:
    return isinstance(value, list) and len(value) == rows


def _numbers(row: Any) -> list[Any]:
    """A row as a list of Python numbers, whether it is a tensor, an array or a list."""
    return list(row.tolist() if hasattr(row, "tolist") else row)
