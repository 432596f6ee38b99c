"""Samples to columns and back to the published dict: values, presence rules, and what is said about bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.batch import TrainBatch, default_rewards, from_published_dict, to_train_batch
from miles.errors import UsageError
from miles.types import Failure, Sample

FAILURE = Failure(flag="--custom-rm-path", path="m.f", kind="exception", message="boom", location="m.py:1")


def sample(index: int = 0, prompt: int = 3, response: int = 2, **fields: Any) -> Sample:
    tokens = list(range(100 * index, 100 * index + prompt + response))
    return Sample(index=index, group_index=index // 2, tokens=tokens, response_length=response, reward=1.0, **fields)


def failed(index: int = 0, **fields: Any) -> Sample:
    result = sample(index, **fields)
    result.reward, result.status = None, Sample.Status.FAILED
    result.failure = FAILURE  # type: ignore[attr-defined]
    return result


def convert(samples: list[Sample]) -> TrainBatch:
    rewards = np.arange(len(samples), dtype=np.float32)
    return to_train_batch(samples, [s.reward for s in samples], rewards)


# ---- the default conversion --------------------------------------------------------------------------------------


def test_published_layout_of_the_default_conversion() -> None:
    a = sample(0, rollout_log_probs=[-0.5, -0.25], status=Sample.Status.TRUNCATED, train_metadata={"k": 1})
    b = sample(1, response=1, loss_mask=[0], rollout_log_probs=[-1.0])
    view = convert([a, b]).as_dict()
    assert dict(view) == {
        "tokens": [a.tokens, b.tokens],
        "response_lengths": [2, 1],
        "rewards": [0.0, 1.0],
        "raw_reward": [1.0, 1.0],
        "truncated": [1, 0],
        "sample_indices": [0, 1],
        "loss_masks": [[1, 1], [0]],
        "rollout_log_probs": [[-0.5, -0.25], [-1.0]],
        "metadata": [{"k": 1}, None],
        "group_index": [0, 0],
        "total_lengths": [5, 4],
    }


def test_samples_are_not_changed() -> None:
    one = sample(loss_mask=None, remove_sample=True)
    convert([one])
    assert one.loss_mask is None


def test_removed_samples_keep_their_place_with_an_empty_mask() -> None:
    batch = convert([sample(0, loss_mask=[1, 0]), sample(1, remove_sample=True, loss_mask=[1, 1])])
    assert batch.as_dict()["loss_masks"] == [[1, 0], [0, 0]]
    assert batch.mask_sums.tolist() == [1, 0]


def test_failed_samples_have_no_mask_and_need_no_columns() -> None:
    full = sample(1, rollout_log_probs=[-1.0, -2.0], rollout_routed_experts=np.ones((4, 2, 3), np.int32))
    batch = convert([failed(0, loss_mask=[1, 1]), full])
    view = batch.as_dict()
    assert view["loss_masks"] == [[0, 0], [1, 1]]
    assert view["rollout_log_probs"] == [[0.0, 0.0], [-1.0, -2.0]]
    assert view["rollout_routed_experts"][0].shape == (4, 2, 3) and not view["rollout_routed_experts"][0].any()
    assert batch.failed.tolist() == [True, False]


def test_an_empty_response_needs_no_log_probs() -> None:
    batch = convert([sample(0, rollout_log_probs=[-1.0, -2.0]), sample(1, response=0)])
    assert batch.as_dict()["rollout_log_probs"] == [[-1.0, -2.0], []]


def test_optional_columns_from_metadata_and_attributes() -> None:
    a, b = sample(0, metadata={"raw_reward": 7, "round_number": 2}), sample(1, metadata={"raw_reward": 8})
    b.metadata["round_number"] = 3
    a.teacher_log_probs, b.teacher_log_probs = torch.zeros(2), torch.ones(2)  # type: ignore[attr-defined]
    batch = convert([a, b])
    assert batch.raw_reward == [7, 8] and batch.round_number == [2, 3]
    assert batch.teacher_log_probs is not None and batch.teacher_log_probs[1] is b.teacher_log_probs  # type: ignore[attr-defined]


def test_text_and_images_may_stand_in_one_batch() -> None:
    pixels = {"pixel_values": torch.zeros(1)}
    assert convert([sample(0), sample(1, multimodal_train_inputs=pixels)]).multimodal_train_inputs == [None, pixels]


@pytest.mark.parametrize("nan_at", [0, 1])
def test_log_probs_must_be_finite_where_the_mask_is_one(nan_at: int) -> None:
    values = [-1.0, -1.0]
    values[nan_at] = float("nan")
    one = sample(24, loss_mask=[1, 0], rollout_log_probs=values)
    if nan_at == 1:
        assert convert([one]).as_dict()["rollout_log_probs"] == [[-1.0, 0.0]]
    else:
        with pytest.raises(UsageError, match=r"rollout_log_probs of sample 24 is nan at response token 0"):
            convert([one])


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([sample(0), sample(24, loss_mask=[1])], "loss_mask length of sample 24 is 1, its response_length is 2"),
        ([sample(0), sample(24, loss_mask=[1, 0.5])], "loss_mask: row 1 must be a list of whole numbers"),
        ([sample(0), sample(24, rollout_log_probs=[0.0] * 3)], "sample 0 has no rollout_log_probs, while sample 24"),
        ([sample(24, rollout_log_probs=[0.0] * 3)], "rollout_log_probs length of sample 24 is 3"),
        ([sample(24, rollout_log_probs=[0.0, None])], "rollout_log_probs: row 0 must be a list of numbers"),
        ([sample(24, metadata={"round_number": 1}), sample(0)], r"sample 0 has no metadata\['round_number'\]"),
        ([sample(24, metadata={"raw_reward": 1}), sample(0)], r"sample 0 has no metadata\['raw_reward'\]"),
        ([sample(24, prompt=0)], "response_length of sample 24 is 2, but it has 2 tokens"),
        ([Sample(index=24, tokens=[1, 2], response_length=3)], "response_length of sample 24 is 3, but it has 2"),
        ([Sample(index=24, tokens=[1, 2], response_length=-1)], "response_length of sample 24 is -1"),
        ([Sample(tokens=[1, "a"], response_length=1)], "tokens: row 0 must be a list of whole numbers"),
        ([Sample(tokens=None, response_length=1)], "tokens: row 0 must be a list of whole numbers"),  # type: ignore[arg-type]
        ([sample(24, rollout_routed_experts=np.zeros((3, 1, 1), np.int32))], r"sample 24 has shape \(3, 1, 1\)"),
    ],
)
def test_bad_samples_are_named(samples: list[Sample], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        convert(samples)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6), st.booleans()), min_size=1, max_size=8), st.data())
def test_conversion_equals_lists(shapes: list[tuple[int, int, bool]], data: st.DataObject) -> None:
    """Against the plain list-of-lists conversion, and `select` against indexing those lists."""
    samples = [sample(i, prompt, response) for i, (prompt, response, _) in enumerate(shapes)]
    for one, (_, response, masked) in zip(samples, shapes):
        one.rollout_log_probs = [-float(t) for t in range(response)]
        one.loss_mask = [t % 2 for t in range(response)] if masked else None
    batch = convert(samples)
    rows = data.draw(st.lists(st.integers(0, len(samples) - 1), max_size=10))
    for view, chosen in [(batch.as_dict(), range(len(samples))), (batch.select(rows).as_dict(), rows)]:
        assert view["tokens"] == [samples[i].tokens for i in chosen]
        assert view["loss_masks"] == [samples[i].loss_mask or [1] * samples[i].response_length for i in chosen]
        assert view["rollout_log_probs"] == [samples[i].rollout_log_probs for i in chosen]
        assert view["rewards"] == [float(i) for i in chosen]
        assert view["sample_indices"] == list(chosen)


# ---- the published dict ------------------------------------------------------------------------------------------


def published() -> dict[str, Any]:
    return {
        "tokens": [[1, 2, 3], [4, 5]],
        "response_lengths": [2, 1],
        "loss_masks": [[1, 1], [0]],
        "rewards": [1.0, -1.0],
        "my_column": ["a", "b"],
        "my_setting": {"x": 1},
    }


def test_custom_dict_with_unknown_keys_survives_selection() -> None:
    batch = from_published_dict(published())
    assert dict(batch.as_dict()) == published() | {"total_lengths": [3, 2]}
    view = batch.select([1]).as_dict()
    assert view["my_column"] == ["b"] and view["my_setting"] == {"x": 1} and view["tokens"] == [[4, 5]]


def test_custom_dict_of_tensors_and_arrays() -> None:
    data = published()
    data["tokens"] = [torch.tensor([1, 2, 3]), np.array([4, 5])]
    data["loss_masks"] = [torch.ones(2), np.zeros(1)]
    data["advantages"] = [torch.tensor([0.5, 0.5]), torch.tensor([-1.0])]
    batch = from_published_dict(data)
    assert batch.as_dict()["tokens"] == [[1, 2, 3], [4, 5]]
    assert batch.loss_masks.tolist() == [1, 1, 0] and batch.loss_masks.dtype == np.int32
    assert batch.response_columns["advantages"].tolist() == [0.5, 0.5, -1.0]


def test_rewards_that_are_no_numbers_are_kept() -> None:
    data = published() | {"rewards": [torch.zeros(2), torch.zeros(1)]}
    assert from_published_dict(data).as_dict()["rewards"] is data["rewards"]
    assert from_published_dict({k: v for k, v in data.items() if k != "rewards"}).rewards is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, "returned no 'tokens'"),
        ({"loss_masks": [[1, 1]]}, r"loss_masks: expected one entry per sample \(2\), got 1"),
        ({"loss_masks": [[1, 1], [1, 0]]}, "loss_masks length of row 1 is 2, its response_length is 1"),
        ({"sample_indices": [7, 8], "loss_masks": [[1], [0]]}, "loss_masks length of sample 7 is 1"),
        ({"response_lengths": [2, 1.5]}, "response_lengths of row 1: expected a whole number, got float 1.5"),
        ({"tokens": [[1, 2, 3], [4.5, 5]]}, "tokens: row 1 must be a list of whole numbers"),
        ({"rewards": 3}, "rewards: expected a list with one entry per sample"),
        ({"rollout_log_probs": [[0.0, 0.0], ["x"]]}, "rollout_log_probs: row 1 must be a list of numbers"),
        ({"advantages": [torch.zeros(2), torch.zeros(3)]}, r"advantages of row 1 has shape \(3,\)"),
        ({"total_lengths": [3, 3]}, "total_lengths"),
    ],
)
def test_bad_custom_dicts_are_explained(change: dict[str, Any], message: str) -> None:
    data = {key: value for key, value in (published() | change).items() if value is not None}
    with pytest.raises(UsageError, match=message):
        from_published_dict(data)


# ---- the view ----------------------------------------------------------------------------------------------------


def test_writes_reach_the_columns() -> None:
    batch = from_published_dict(published())
    view = batch.as_dict()
    view["rewards"] = [5, 6]
    view["loss_masks"] = [[0, 1], [1]]
    view["tokens"] = [[9, 9, 9], [8, 8]]
    view["rollout_log_probs"] = [[-1, -2], [-3]]
    view["values"] = [[0.5, 0.25], [0.125]]
    view["mine"] = ["x", "y"]
    view["whole"] = 7
    assert batch.rewards is not None and list(batch.rewards) == [5.0, 6.0]
    assert batch.loss_masks.tolist() == [0, 1, 1]
    assert batch.tokens.tolist() == [9, 9, 9, 8, 8]
    assert batch.rollout_log_probs is not None and batch.rollout_log_probs.tolist() == [-1, -2, -3]
    assert batch.response_columns["values"].tolist() == [0.5, 0.25, 0.125]
    assert batch.extras["mine"] == ["x", "y"] and batch.shared["whole"] == 7
    assert view["rewards"] == [5, 6] and len(view) == len(list(view)) and "values" in view and "nope" not in view


@pytest.mark.parametrize("tensors", [False, True])
def test_changes_in_place_are_written_back(tensors: bool) -> None:
    batch = from_published_dict(published())
    batch.response_columns["advantages"] = torch.tensor([1.0, 2.0, 3.0])
    view = batch.as_dict(tensors=tensors)
    view["rewards"][0] = 9.0
    view["loss_masks"][0][1] = 0
    view["advantages"][1] = torch.tensor([4.0]) if tensors else [4.0]
    view["my_column"].reverse()
    view.write_back()
    assert batch.rewards is not None and batch.rewards[0] == 9.0
    assert batch.loss_masks.tolist() == [1, 0, 0]
    assert batch.response_columns["advantages"].tolist() == [1.0, 2.0, 4.0]
    assert batch.extras["my_column"] == ["b", "a"]


def test_tensor_rows_of_the_trainer() -> None:
    batch = from_published_dict(published() | {"rollout_log_probs": [[-1.0, -2.0], [-3.0]]})
    view = batch.as_dict(tensors=True)
    assert [row.dtype for row in view["tokens"]] == [torch.int64] * 2
    assert [row.dtype for row in view["loss_masks"]] == [torch.int32] * 2
    assert [row.tolist() for row in view["rollout_log_probs"]] == [[-1.0, -2.0], [-3.0]]
    assert view["rewards"] == [1.0, -1.0]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokens", [[1, 2], [4, 5]], "tokens of row 0: length 2 where the batch has 3"),
        ("response_lengths", [1, 1], "Lengths are fixed"),
        ("loss_masks", [[1, 1], [1, 1]], "loss_masks length of row 1 is 2"),
        ("rewards", [1.0], "rewards: expected one entry per sample"),
        ("metadata", {"a": 1}, "metadata: expected a list"),
    ],
)
def test_writes_that_do_not_fit_are_refused(key: str, value: Any, message: str) -> None:
    batch = from_published_dict(published())
    with pytest.raises(UsageError, match=message):
        batch.as_dict()[key] = value
    assert dict(batch.as_dict()) == published() | {"total_lengths": [3, 2]}


def test_flat_columns_follow_writes() -> None:
    batch = from_published_dict(published() | {"values": [[1.0, 2.0], [3.0]]})
    assert set(batch.flat_columns()) == {"values"}
    batch.as_dict(tensors=True)["rollout_log_probs"] = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])]
    columns = batch.flat_columns()
    assert columns["rollout_log_probs"].tolist() == [-1.0, -2.0, -3.0]
    assert columns["values"].tolist() == [1.0, 2.0, 3.0]


def test_deleting_columns() -> None:
    batch = from_published_dict(published() | {"metadata": [{}, {}], "values": [[0.0, 0.0], [0.0]]})
    view = batch.as_dict()
    for key in ("metadata", "my_column", "my_setting", "values", "rewards"):
        del view[key]
        assert key not in view
    with pytest.raises(KeyError):
        del view["metadata"]
    with pytest.raises(UsageError, match="cannot do without"):
        del view["tokens"]


def test_every_published_key_round_trips() -> None:
    """`from_published_dict(batch.as_dict())` is the same batch."""
    samples = [
        sample(i, response=i + 1, rollout_log_probs=[0.0] * (i + 1), metadata={"round_number": i}) for i in range(3)
    ]
    _, rewards = default_rewards(
        samples, reward_key=None, estimator="grpo", normalization=True, std_normalization=True, n_samples_per_prompt=2
    )
    batch = to_train_batch(samples, [1.0] * 3, rewards)
    assert dict(from_published_dict(batch.as_dict()).as_dict()) == dict(batch.as_dict())
