"""What the trainer receives: the samples of one rollout as flat columns.

`TrainBatch` is built by `convert`, cut into shards by `split`, into micro batches by `micro`, and laid out for the
model by `pack`. Plug-ins see it through `as_dict()` (`view`), in the published layout of one list per column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from miles.batch.ragged import FloatArray, IntArray, gathered, offsets_of, places_of

if TYPE_CHECKING:
    from miles.batch.view import PublishedView

# Columns of one value per row that may be absent, in the published order.
ROW_COLUMNS = (
    "raw_reward",
    "sample_indices",
    "group_index",
    "round_number",
    "rollout_routed_experts",
    "metadata",
    "multimodal_train_inputs",
    "teacher_log_probs",
)


@dataclass
class TrainBatch:
    """N samples in columns: T tokens in all, R of them in responses.

    Row i owns `tokens[token_offsets[i]:token_offsets[i + 1]]`, of which the last `response_lengths[i]` are its
    response, and the places `response_offsets[i]:response_offsets[i + 1]` of every column over response tokens.

    Example, two samples with three and two response tokens::

        TrainBatch(tokens=[12, 9, 4, 5, 1, 12, 8, 6, 1], token_offsets=[0, 5, 9], response_lengths=[3, 2],
                   loss_masks=[1, 1, 1, 1, 1], rewards=[0.7, -0.7], raw_reward=[1.0, 0.0], truncated=[0, 0],
                   sample_indices=[24, 25], group_index=[3, 3], rollout_log_probs=[-0.1, -0.2, 0.0, -0.9, -0.3],
                   failed=[False, False])

    A row whose score failed has `failed` set, reward 0, raw reward None and an empty mask: it keeps its place, and no
    statistic counts it. Where it is `dropped` as well, the mean over the samples of its optimizer step is taken without
    it.
    """

    tokens: IntArray  # int64 [T]
    token_offsets: IntArray  # int64 [N + 1]
    response_lengths: IntArray  # int64 [N]
    loss_masks: npt.NDArray[np.int32]  # int32 [R], 1 = trained
    failed: npt.NDArray[np.bool_]  # bool [N]
    dropped: npt.NDArray[np.bool_] | None = None  # bool [N]; None where no row is
    # float32 [N] after post-processing; a list where a plug-in gave something else than numbers; None where a custom
    # conversion left rewards out.
    rewards: FloatArray | list[Any] | None = None
    raw_reward: list[Any] | None = None
    truncated: IntArray | None = None  # int64 [N], 1 = cut off at the length limit
    sample_indices: list[Any] | None = None
    group_index: list[Any] | None = None
    rollout_log_probs: FloatArray | None = None  # float32 [R], under the distribution that was sampled from
    round_number: list[Any] | None = None
    rollout_routed_experts: list[Any] | None = None  # per row int32 [tokens - 1, num_layers, moe_router_topk]
    metadata: list[Any] | None = None
    multimodal_train_inputs: list[dict[str, Any] | None] | None = None
    teacher_log_probs: list[Any] | None = None
    # What the trainer adds, each a tensor [R]: log_probs, ref_log_probs, values, advantages, returns, entropy. Never
    # rollout_log_probs, which has its own field: `flat_columns` gives both.
    response_columns: dict[str, torch.Tensor] = field(default_factory=dict)
    # Columns of custom conversions that miles does not know: one value per row.
    extras: dict[str, list[Any]] = field(default_factory=dict)
    # Values of custom conversions that are no column: they belong to the batch as a whole.
    shared: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.response_lengths)
        assert len(self.token_offsets) == n + 1 and len(self.failed) == n
        assert len(self.tokens) == self.token_offsets[-1]
        assert len(self.loss_masks) == self.response_lengths.sum()
        assert "rollout_log_probs" not in self.response_columns

    def __len__(self) -> int:
        return len(self.response_lengths)

    def num_dropped(self, rows: IntArray) -> int:
        """How many of `rows` are dropped."""
        return 0 if self.dropped is None else int(self.dropped[rows].sum())

    @property
    def total_lengths(self) -> IntArray:
        """Tokens of each row, prompt and response: int64 [N]."""
        return np.diff(self.token_offsets)

    @property
    def response_offsets(self) -> IntArray:
        """Cumulative response lengths: int64 [N + 1]."""
        return offsets_of(self.response_lengths)

    @property
    def mask_sums(self) -> IntArray:
        """Trained tokens of each row: int64 [N]."""
        sums = offsets_of(self.loss_masks)
        offsets = self.response_offsets
        return sums[offsets[1:]] - sums[offsets[:-1]]

    def flat_columns(self) -> dict[str, torch.Tensor]:
        """Everything over response tokens that losses read, [R] each: `response_columns` and `rollout_log_probs`."""
        if self.rollout_log_probs is None:
            return dict(self.response_columns)
        return {"rollout_log_probs": torch.from_numpy(self.rollout_log_probs), **self.response_columns}

    def select(self, rows: Sequence[int] | IntArray) -> TrainBatch:
        """The given rows in the given order, as a batch of its own. `shared` values are carried over whole."""
        rows = np.asarray(rows, dtype=np.int64)
        offsets = self.response_offsets
        index = torch.from_numpy(places_of(offsets, rows)) if self.response_columns else torch.empty(0)
        picked = {name: pick(getattr(self, name), rows) for name in ROW_COLUMNS}
        return TrainBatch(
            tokens=gathered(self.tokens, self.token_offsets, rows),
            token_offsets=offsets_of(self.total_lengths[rows]),
            response_lengths=self.response_lengths[rows],
            loss_masks=gathered(self.loss_masks, offsets, rows),
            failed=self.failed[rows],
            dropped=None if self.dropped is None else self.dropped[rows],
            rewards=self.rewards[rows] if isinstance(self.rewards, np.ndarray) else pick(self.rewards, rows),
            truncated=None if self.truncated is None else self.truncated[rows],
            rollout_log_probs=(
                None if self.rollout_log_probs is None else gathered(self.rollout_log_probs, offsets, rows)
            ),
            response_columns={name: x[index.to(x.device)] for name, x in self.response_columns.items()},
            extras={name: [column[i] for i in rows] for name, column in self.extras.items()},
            shared=dict(self.shared),
            **picked,
        )

    def row_values(self, rows: Sequence[int] | IntArray) -> dict[str, Any]:
        """Everything about these rows that is no column over tokens, under the published names: one value per row in a
        list, and the `shared` values whole. Absent columns are left out.

        Example: `{"rewards": [0.7], "raw_reward": [1.0], "sample_indices": [24], "my_column": ["b"], ...}`.
        """
        values: dict[str, Any] = {name: pick(column, rows) for name, column in self.extras.items()}
        for name in ("rewards", "truncated", *ROW_COLUMNS):
            column = getattr(self, name)
            if column is not None:
                values[name] = column[rows].tolist() if isinstance(column, np.ndarray) else pick(column, rows)
        return {**self.shared, **values}

    def name_of(self, row: int) -> str:
        """How error messages call a row: `sample 24`, or `row 3` where the sample has no index."""
        return row_name(row, None if self.sample_indices is None else self.sample_indices[row])

    def as_dict(self, *, tensors: bool = False) -> PublishedView:
        """The published dict of lists, reading from and writing to this batch.

        With `tensors`, token columns are lists of tensors (as plug-ins of the trainer see them); without, plain lists
        (as a conversion returns them).
        """
        from miles.batch.view import PublishedView

        return PublishedView(self, tensors=tensors)


def pick(column: list[Any] | None, rows: Sequence[int] | IntArray) -> list[Any] | None:
    return None if column is None else [column[i] for i in rows]


def row_name(row: int, index: Any) -> str:
    return f"row {row}" if index is None else f"sample {index}"
