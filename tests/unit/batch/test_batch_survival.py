"""What plug-ins put into a batch is still beside its row when a loss sees it: after trimming, splitting, packing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from miles.batch import (
    TrainBatch,
    by_tokens,
    default_rewards,
    from_published_dict,
    pack,
    split_batch,
    to_train_batch,
    trim_rollout,
    with_failed_rows,
)
from miles.batch.media import joined_media
from miles.errors import UsageError
from miles.loss.published import loss_batch
from miles.types import Failure, Sample

LENGTHS = [(7, 3), (4, 1), (9, 6), (5, 2), (6, 2), (8, 1), (3, 1), (5, 4)]  # tokens, response


def rollout(**fields: Any) -> list[Sample]:
    samples = []
    for i, (total, response) in enumerate(LENGTHS):
        one = Sample(
            index=100 + i, group_index=i // 2, response_length=response, tokens=list(range(i, i + total)),
            reward=float(i), rollout_log_probs=[-float(i)] * response, train_metadata={"row": i},
            metadata={"round_number": i},
            multimodal_train_inputs={"pixel_values": torch.full((i % 3, 2), float(i))} if i % 2 else None,
        )  # fmt: skip
        one.teacher_log_probs = torch.full((response,), float(i))  # type: ignore[attr-defined]
        for name, value in fields.items():
            setattr(one, name, value)
        samples.append(one)
    return samples


def converted(samples: list[Sample]) -> TrainBatch:
    raw, rewards = default_rewards(
        samples, reward_key=None, estimator="ppo", normalization=False, std_normalization=False, n_samples_per_prompt=2
    )
    return to_train_batch(samples, raw, rewards)


def loss_batches(batch: TrainBatch, dp_size: int) -> list[dict[str, Any]]:
    """What a custom loss sees of every micro batch of every rank."""
    seen = []
    for shard in split_batch(batch, dp_size, balance=True):
        for rows in by_tokens(np.arange(len(shard)), shard.total_lengths, 12):
            micro = pack(shard, rows)
            columns = {name: micro.column(flat) for name, flat in shard.flat_columns().items()}
            seen.append(loss_batch(micro, columns, shard.row_values(micro.rows)))
    return seen


@pytest.mark.parametrize("dp_size", [1, 2])
def test_the_default_conversion_s_columns_reach_the_loss(dp_size: int) -> None:
    samples = trim_rollout(rollout() + rollout()[:1], 8).samples
    seen = loss_batches(converted(samples), dp_size)
    assert len(seen) > 2
    indices = [index for batch in seen for index in batch["sample_indices"]]
    assert sorted(indices) == [sample.index for sample in samples]
    for batch in seen:
        rows = [index - 100 for index in batch["sample_indices"]]
        assert [m["row"] for m in batch["metadata"]] == rows == batch["round_number"] == batch["rewards"]
        assert batch["raw_reward"] == rows and batch["truncated"] == [0] * len(rows)
        assert [t.tolist() for t in batch["teacher_log_probs"]] == [[float(i)] * LENGTHS[i][1] for i in rows]
        assert [t.tolist() for t in batch["rollout_log_probs"]] == [[-float(i)] * LENGTHS[i][1] for i in rows]
        assert [t.tolist() for t in batch["unconcat_tokens"]] == [samples[i].tokens for i in rows]
        items = [i % 3 if i % 2 else 0 for i in rows]
        if any(i % 2 for i in rows):
            assert batch["multimodal_num_items"] == {"pixel_values": items}
            joined = batch["multimodal_train_inputs"]["pixel_values"]
            assert joined[:, 0].tolist() == [float(i) for i, n in zip(rows, items) for _ in range(n)]
        else:
            assert batch["multimodal_train_inputs"] is batch["multimodal_num_items"] is None


@pytest.mark.parametrize("dp_size", [1, 2])
def test_a_custom_conversion_s_own_keys_reach_the_loss(dp_size: int) -> None:
    data: dict[str, Any] = {
        "tokens": [list(range(total)) for total, _ in LENGTHS],
        "response_lengths": [response for _, response in LENGTHS],
        "loss_masks": [[1] * response for _, response in LENGTHS],
        "rewards": [0.0] * 8,
        "advantages": [torch.full((response,), float(i)) for i, (_, response) in enumerate(LENGTHS)],
        "entropy": [[float(i)] * response for i, (_, response) in enumerate(LENGTHS)],
        "difficulty": list(range(8)),
        "words": [f"w{i}" for i in range(8)],
        "curriculum": {"level": 3},
        "threshold": 0.5,
    }
    seen = loss_batches(from_published_dict(data), dp_size)
    assert sorted(i for batch in seen for i in batch["difficulty"]) == list(range(8))
    for batch in seen:
        rows = batch["difficulty"]
        assert batch["words"] == [f"w{i}" for i in rows]
        assert batch["response_lengths"] == [LENGTHS[i][1] for i in rows]
        for name in ("advantages", "entropy"):
            assert [t.tolist() for t in batch[name]] == [[float(i)] * LENGTHS[i][1] for i in rows]
        assert batch["curriculum"] == {"level": 3} and batch["threshold"] == 0.5
        assert batch["log_probs"] is batch["returns"] is None and "metadata" not in batch


def test_a_key_that_belongs_to_the_batch_is_not_replaced_by_one_of_a_plug_in() -> None:
    data = {
        "tokens": [[1, 2]], "response_lengths": [1], "loss_masks": [[1]], "cu_seqlens": "mine", "position_ids": [7],
    }  # fmt: skip
    (batch,) = loss_batches(from_published_dict(data), 1)
    assert batch["cu_seqlens"].tolist() == [0, 2] and batch["position_ids"].tolist() == [[0, 1]]


# ---- columns that some samples have ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attribute", "lacking", "said"),
    [
        ("rollout_log_probs", None, r"sample 102 has no rollout_log_probs, while sample 100 has"),
        ("teacher_log_probs", None, r"sample 102 has no teacher_log_probs, while sample 100 has"),
        ("metadata", {}, r"sample 102 has no metadata\['round_number'\], while sample 100 has"),
    ],
)
def test_presence_is_not_decided_by_the_first_sample(attribute: str, lacking: Any, said: str) -> None:
    samples = rollout()
    setattr(samples[2], attribute, lacking)
    with pytest.raises(UsageError, match=said):
        converted(samples)
    setattr(samples[0], attribute, lacking)
    with pytest.raises(UsageError, match=r"sample 100 has no .*, while sample 101 has"):
        converted(samples)
    for sample in samples:
        setattr(sample, attribute, lacking)
    assert getattr(converted(samples), "round_number" if attribute == "metadata" else attribute) is None


def test_some_samples_without_media_or_metadata_are_fine() -> None:
    samples = rollout()
    samples[0].train_metadata = None
    batch = converted(samples)
    assert batch.metadata is not None and batch.metadata[:2] == [None, {"row": 1}]
    assert batch.multimodal_train_inputs is not None and batch.multimodal_train_inputs[0] is None


def test_raw_rewards_of_the_metadata_win() -> None:
    samples = rollout()
    for sample in samples:
        sample.metadata["raw_reward"] = -sample.index
    batch = converted(samples)
    assert batch.raw_reward == [-100 - i for i in range(8)]
    assert batch.rewards.tolist() == [float(i) for i in range(8)]  # type: ignore[union-attr]


@pytest.mark.parametrize("status", [Sample.Status.TRUNCATED, "truncated"])
def test_truncated_however_it_is_written(status: Any) -> None:
    samples = rollout()
    samples[3].status = status
    assert converted(samples).truncated.tolist() == [0, 0, 0, 1, 0, 0, 0, 0]  # type: ignore[union-attr]


@pytest.mark.parametrize("reward", [torch.tensor(0.5), torch.tensor([0.5]), np.float32(0.5), np.array(0.5), True])
def test_rewards_of_any_number_type(reward: Any) -> None:
    samples = rollout(reward=reward)
    assert converted(samples).rewards.tolist() == [float(reward)] * 8  # type: ignore[union-attr]


# ---- media -----------------------------------------------------------------------------------------------------------


def test_media_of_several_keys_and_array_types() -> None:
    rows = [
        {"pixel_values": np.ones((2, 3), dtype=np.float32), "image_grid_thw": torch.tensor([[1, 2, 1]])},
        None,
        {"pixel_values": torch.zeros(1, 3), "image_grid_thw": None},
    ]
    tensors, items = joined_media(rows)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {"pixel_values": (3, 3), "image_grid_thw": (1, 3)}
    assert items == {"pixel_values": [2, 0, 1], "image_grid_thw": [1, 0, 0]}
    assert tensors["image_grid_thw"].dtype == torch.int64
    assert joined_media([]) == joined_media([None]) == ({}, {})


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"a": torch.zeros(1, 2)}, {"a": torch.zeros(1, 3)}], r"'a'\]: the samples' shapes \[\(1, 2\), \(1, 3\)\]"),
        ([{"a": torch.tensor(1.0)}], r"shapes \[\(\)\] cannot be joined"),
        ([{"a": "cat.png"}], "expected a tensor or an array, got str 'cat.png'"),
    ],
)
def test_media_that_do_not_go_together(rows: list[Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        joined_media(rows)


# ---- failed scores under a custom conversion -------------------------------------------------------------------------


def custom(num: int) -> TrainBatch:
    return from_published_dict(
        {
            "tokens": [[1, 2, 3 + i] for i in range(num)],
            "response_lengths": [1 + i % 2 for i in range(num)],
            "loss_masks": [[1] * (1 + i % 2) for i in range(num)],
            "rewards": [1.0 + i for i in range(num)],
            "sample_indices": list(range(num)),
            "truncated": [1] * num,
            "level": [f"l{i}" for i in range(num)],
            "shared": 0.5,
        }
    )


def test_failed_samples_keep_their_places_without_being_seen() -> None:
    batch = with_failed_rows(custom(3), [True, False, False, True, False])
    assert len(batch) == 5 and batch.failed.tolist() == [True, False, False, True, False]
    assert batch.total_lengths.tolist() == [0, 3, 3, 0, 3] and batch.response_lengths.tolist() == [0, 1, 2, 0, 1]
    assert batch.rewards.tolist() == [0.0, 1.0, 2.0, 0.0, 3.0]  # type: ignore[union-attr]
    assert batch.sample_indices == [None, 0, 1, None, 2] and batch.extras == {"level": [None, "l0", "l1", None, "l2"]}
    assert batch.mask_sums.tolist() == [0, 1, 2, 0, 1] and batch.shared == {"shared": 0.5}
    assert batch.truncated.tolist() == [0, 1, 1, 0, 1]  # type: ignore[union-attr]
    micro = pack(batch, [2, 4])
    assert micro.tokens.tolist() == [1, 2, 4, 1, 2, 5]
    assert batch.row_values([2, 4])["level"] == ["l1", "l2"]


def test_failed_samples_stand_behind_where_the_conversion_made_its_own_rows() -> None:
    batch = with_failed_rows(custom(4), [True, False, True])
    assert batch.failed.tolist() == [False] * 4 + [True] * 2
    untouched = custom(2)
    assert with_failed_rows(untouched, [False, False]) is untouched


def test_rewards_that_are_no_numbers_keep_their_rows() -> None:
    batch = custom(2)
    batch.rewards = [torch.zeros(3), torch.ones(3)]
    got = with_failed_rows(batch, [False, True, False]).rewards
    assert isinstance(got, list) and got[1] == 0.0 and got[2].tolist() == [1.0, 1.0, 1.0]


def test_failures_mark_the_default_conversion_too() -> None:
    samples = rollout()
    failure = Failure(flag="--custom-rm-path", path="m.f", kind="nan", message="nan", location="m.py:1")
    samples[5].reward, samples[5].failure = None, failure  # type: ignore[attr-defined]
    batch = converted(samples)
    assert batch.failed.tolist() == [i == 5 for i in range(8)] and batch.mask_sums[5] == 0
