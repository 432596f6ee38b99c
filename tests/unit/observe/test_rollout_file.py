"""Samples to columns and back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miles.errors import MilesError
from miles.observe.record import RunRecord, read_rollout_table, read_rollouts
from miles.types import Failure, Sample


def full_sample() -> Sample:
    sample = Sample(
        group_index=3,
        index=24,
        prompt="859+467=?",
        tokens=[12, 9, 13, 4, 8],
        response="1326<eos>",
        response_length=2,
        label={"answer": "1326", "tags": [1, 2]},
        reward=1.0,
        loss_mask=[1, 0],
        weight_versions=["4", "5"],
        rollout_log_probs=[-0.5, -0.25],
        rollout_routed_experts=np.arange(4 * 2 * 3, dtype=np.int32).reshape(4, 2, 3),
        remove_sample=True,
        status=Sample.Status.TRUNCATED,
        metadata={"source": "α", "nested": {"depth": 2}},
        train_metadata={"k": 1},
        non_generation_time=1.5,
    )
    sample.spec_info.spec_draft_token_num = 7
    sample.prefix_cache_info.cached_tokens = 3
    sample.round_number = 2  # type: ignore[attr-defined]  # as plug-ins do
    sample.payload_text = "raw"  # type: ignore[attr-defined]
    return sample


def round_trip(tmp_path: Path, *samples: Sample) -> list[Sample]:
    with RunRecord(tmp_path / "r") as run:
        run.write_rollout(0, samples)
    return read_rollouts(tmp_path / "r", 0)


def test_everything_but_media_comes_back(tmp_path: Path) -> None:
    before = full_sample()
    before.multimodal_inputs = {"images": [object()]}
    plain = Sample(prompt=[{"role": "user", "content": "1+1=?"}])
    after, after_plain = round_trip(tmp_path, before, plain)
    assert after_plain == plain
    assert after.multimodal_inputs is None
    np.testing.assert_array_equal(after.rollout_routed_experts, before.rollout_routed_experts)
    assert after.rollout_routed_experts.dtype == np.int32  # type: ignore[union-attr]
    before.multimodal_inputs = before.rollout_routed_experts = after.rollout_routed_experts = None
    assert after == before
    assert vars(after) == vars(before)


@pytest.mark.parametrize(
    ("reward", "column", "restored"),
    [
        (0.5, 0.5, 0.5),
        (None, None, None),
        (1, 1.0, 1),
        (True, 1.0, True),
        (np.float32(0.5), 0.5, 0.5),
        (torch.tensor(2.0), 2.0, 2.0),
        (torch.tensor([2.0, 3.0]), None, [2.0, 3.0]),
        ({"score": 1, "why": "ok"}, None, {"score": 1, "why": "ok"}),
        ({"score": math.nan}, None, {"score": None}),
        ("good", None, "good"),
        ({1, 2}, None, [1, 2]),
    ],
)
def test_rewards_of_any_kind(tmp_path: Path, reward: Any, column: float | None, restored: Any) -> None:
    (sample,) = round_trip(tmp_path, Sample(reward=reward))
    assert sample.reward == restored
    assert read_rollout_table(tmp_path / "r", 0)["reward"].to_pylist() == [column]


def test_nan_stays_nan(tmp_path: Path) -> None:
    (sample,) = round_trip(tmp_path, Sample(reward=math.nan))
    assert isinstance(sample.reward, float) and math.isnan(sample.reward)


def test_a_failed_score_comes_back_as_a_failure(tmp_path: Path) -> None:
    failed = Sample(index=1, status=Sample.Status.FAILED)
    failed.failure = Failure("--custom-rm-path", "my.grade", "exception", "boom", "my.py:3", 1)  # type: ignore[attr-defined]
    (sample,) = round_trip(tmp_path, failed)
    assert sample == failed and vars(sample)["failure"] == vars(failed)["failure"]


def test_odd_values_of_plug_ins(tmp_path: Path) -> None:
    odd = Sample(status="custom", response="half \ud83d", loss_mask=[True, False], tokens=np.array([1, 2]))  # type: ignore[arg-type]
    odd.teacher_log_probs = torch.tensor([0.5, 1.0])  # type: ignore[attr-defined]
    (sample,) = round_trip(tmp_path, odd)
    assert (sample.status, sample.loss_mask, sample.tokens) == ("custom", [1, 0], [1, 2])
    assert sample.response == "half ?"
    assert vars(sample)["teacher_log_probs"] == [0.5, 1.0]


def test_a_value_that_fits_no_column_is_named(tmp_path: Path) -> None:
    run = RunRecord(tmp_path / "r")
    run.write_rollout(0, [Sample(tokens=["a"])])  # type: ignore[list-item]
    with pytest.raises(MilesError, match=r"its tokens must be list<.*int32"):
        run.close()


def test_dropped_samples_are_marked_and_groups_flattened(tmp_path: Path) -> None:
    with RunRecord(tmp_path / "r") as run:
        groups = [[Sample(index=0), [Sample(index=1), Sample(index=2)]], [Sample(index=3)]]
        run.write_rollout(0, groups, dropped=[[Sample(index=4)]])
        run.write_rollout(1, [])
    assert [s.index for s in read_rollouts(tmp_path / "r", 0)] == [0, 1, 2, 3, 4]
    assert [s.index for s in read_rollouts(tmp_path / "r", 0, kept_only=True)] == [0, 1, 2, 3]
    assert read_rollout_table(tmp_path / "r", 0)["kept"].to_pylist() == [True, True, True, True, False]
    assert read_rollouts(tmp_path / "r", 1) == []


def test_the_record_holds_what_the_sample_was_when_it_was_given(tmp_path: Path) -> None:
    with RunRecord(tmp_path / "r") as run:
        sample = full_sample()
        run.write_rollout(0, [sample])
        sample.tokens.append(99)
        sample.metadata["later"] = True
        assert sample.loss_mask is not None
        sample.loss_mask[0] = 0
    (recorded,) = read_rollouts(tmp_path / "r", 0)
    assert (recorded.tokens, recorded.loss_mask) == ([12, 9, 13, 4, 8], [1, 0])
    assert "later" not in recorded.metadata


def test_column_types(tmp_path: Path) -> None:
    round_trip(tmp_path, full_sample())
    schema = read_rollout_table(tmp_path / "r", 0).schema
    types = {name: str(schema.field(name).type).replace("element: ", "item: ") for name in schema.names}
    assert types["tokens"] == "list<item: int32>"
    assert types["rollout_log_probs"] == "list<item: float>"
    assert (types["index"], types["reward"], types["response_length"]) == ("int64", "double", "int32")
