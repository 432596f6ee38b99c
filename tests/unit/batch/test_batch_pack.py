"""Packed micro batches against a loop over rows and tokens."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.batch import TrainBatch, from_published_dict, pack

shapes = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=8)


def batch_of(shape: list[tuple[int, int]]) -> TrainBatch:
    return from_published_dict(
        {
            "tokens": [[10 * i + t for t in range(p + r)] for i, (p, r) in enumerate(shape)],
            "response_lengths": [r for _, r in shape],
            "loss_masks": [[(i + t) % 2 for t in range(r)] for i, (_, r) in enumerate(shape)],
            "rollout_log_probs": [[-float(10 * i + t) for t in range(r)] for i, (_, r) in enumerate(shape)],
        }
    )


def test_the_example_of_the_docstring() -> None:
    data = {"tokens": [[12, 9, 4, 5], [12, 8, 6]], "response_lengths": [2, 1], "loss_masks": [[1, 0], [1]]}
    micro = pack(from_published_dict(data), [0, 1])
    assert micro.tokens.tolist() == [12, 9, 4, 5, 12, 8, 6]
    assert micro.cu_seqlens.tolist() == [0, 4, 7] and micro.cu_seqlens.dtype == torch.int32
    assert micro.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert micro.predicting.tolist() == [1, 2, 5] and micro.targets.tolist() == [4, 5, 6]
    assert micro.sample_ids.tolist() == [0, 0, 1] and micro.loss_mask.tolist() == [1, 0, 1]
    assert micro.max_seqlen == 4 and micro.total_lengths == [4, 3] and micro.response_lengths == [2, 1]


@given(shapes, st.data())
def test_against_the_loop(shape: list[tuple[int, int]], data: st.DataObject) -> None:
    batch = batch_of(shape)
    rows = data.draw(st.permutations(range(len(shape))))[: data.draw(st.integers(0, len(shape)))]
    micro = pack(batch, rows)
    view = batch.as_dict()
    tokens, positions, predicting, targets, ids, mask, log_probs = [], [], [], [], [], [], []
    for k, row in enumerate(rows):
        prompt, response = shape[row]
        for t in range(prompt + response):
            if t >= prompt:
                predicting.append(len(tokens) - 1)
                targets.append(view["tokens"][row][t])
                ids.append(k)
                mask.append(view["loss_masks"][row][t - prompt])
                log_probs.append(view["rollout_log_probs"][row][t - prompt])
            tokens.append(view["tokens"][row][t])
            positions.append(t)
    assert micro.tokens.tolist() == tokens and micro.position_ids.tolist() == positions
    assert micro.predicting.tolist() == predicting and micro.targets.tolist() == targets
    assert micro.sample_ids.tolist() == ids and micro.loss_mask.tolist() == mask
    assert batch.rollout_log_probs is not None
    assert micro.column(torch.from_numpy(batch.rollout_log_probs)).tolist() == log_probs
    assert len(micro) == len(rows) and micro.rows.tolist() == list(rows)
    assert (micro.cu_seqlens[1:] - micro.cu_seqlens[:-1]).tolist() == micro.total_lengths
