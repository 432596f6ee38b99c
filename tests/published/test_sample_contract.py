"""`Sample` is what plug-ins rely on: mutable, loose, and the same after every round trip."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from argparse import Namespace

import numpy as np
import pytest
import torch

from miles.utils.types import MultimodalTypes, Sample

META = {
    "finish_reason": {"type": "stop"},
    "weight_version": "3",
    "prompt_tokens": 10,
    "cached_tokens": 4,
    "completion_tokens": 6,
    "spec_accept_token_num": 3,
    "spec_draft_token_num": 4,
    "spec_verify_ct": 2,
}


def args(**given: object) -> Namespace:
    return Namespace(**{"reward_key": None, "sglang_speculative_algorithm": None, **given})


def test_fields_are_of_each_sample_alone() -> None:
    first, second = Sample(), Sample()
    first.tokens.append(1)
    first.metadata["a"] = 1
    first.weight_versions.append("1")
    first.spec_info.spec_verify_ct += 1
    assert second == Sample() and first != second
    assert second.status is Sample.Status.PENDING and second.prefix_cache_info == Sample.PrefixCacheInfo()


@pytest.mark.parametrize("status", list(Sample.Status))
def test_statuses_equal_their_strings(status: Sample.Status) -> None:
    assert status == status.value and status.value in {status}
    assert str(status) == f"{status}" == f"Status.{status.name}"
    assert Sample(status=status.value).status == status  # type: ignore[arg-type]
    assert {s.value for s in Sample.Status} == {"pending", "completed", "truncated", "aborted", "failed"}


def filled() -> Sample:
    sample = Sample(
        group_index=3, index=24, prompt=[{"role": "user", "content": "?"}], tokens=[1, 2, 3], response="ab",
        response_length=2, label={"target": ["x"]}, reward={"score": torch.tensor(0.5)}, loss_mask=[1, 0],
        rollout_log_probs=[-0.1, -0.2], rollout_routed_experts=np.ones((2, 1, 2), dtype=np.int32),
        multimodal_train_inputs={"pixel_values": torch.ones(2, 3)}, status=Sample.Status.TRUNCATED,
        train_metadata={"k": 1},
    )  # fmt: skip
    sample.spec_info.add(META)
    sample.prefix_cache_info.add(META)
    sample.tool_call_count = 4  # type: ignore[attr-defined]
    sample.teacher_log_probs = torch.tensor([-1.0, -2.0])  # type: ignore[attr-defined]
    return sample


def test_extra_attributes_survive_every_round_trip() -> None:
    sample = filled()
    data = sample.to_dict()
    for other in (Sample.from_dict(data), copy.deepcopy(sample), pickle.loads(pickle.dumps(sample))):
        assert other.tool_call_count == 4 and other.teacher_log_probs.tolist() == [-1.0, -2.0]
        assert other.status is Sample.Status.TRUNCATED
        assert (other.spec_info, other.prefix_cache_info) == (sample.spec_info, sample.prefix_cache_info)
        assert other.to_dict().keys() == data.keys()
    assert data["status"] == "truncated" and type(data["status"]) is str
    assert data["spec_info"] == {
        "spec_accept_token_num": 3, "spec_draft_token_num": 4, "spec_verify_ct": 2, "completion_token_num": 6,
    }  # fmt: skip
    assert data["tokens"] is sample.tokens  # shallow
    data["mine"] = 1
    assert "mine" not in vars(sample)


def test_from_dict_takes_what_older_files_hold() -> None:
    sample = Sample.from_dict({"status": "completed", "tokens": [1], "from_elsewhere": {"a": 1}})
    assert sample.status is Sample.Status.COMPLETED and sample.from_elsewhere == {"a": 1}  # type: ignore[attr-defined]
    assert sample.spec_info == Sample.SpecInfo()
    assert Sample.from_dict({"status": "won"}).status == "won"
    with pytest.raises(KeyError, match="status"):
        Sample.from_dict({"tokens": [1]})


def test_reward_values() -> None:
    sample = Sample(reward={"score": 0.5, "acc": True})
    assert sample.get_reward_value(args()) == {"score": 0.5, "acc": True}
    assert sample.get_reward_value(args(reward_key="score")) == 0.5
    assert sample.get_reward_value(args(reward_key="")) is sample.reward
    with pytest.raises(KeyError):
        sample.get_reward_value(args(reward_key="nothing"))


def test_effective_length() -> None:
    assert Sample(response_length=3).effective_response_length == 3
    assert Sample(response_length=3, loss_mask=[1, 0, 1]).effective_response_length == 2
    assert Sample(response_length=0, loss_mask=[]).effective_response_length == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"response_length": -1}, "response_length"),
        ({"response_length": 4}, "4 exceeds the 3 tokens"),
        ({"loss_mask": [1]}, "loss_mask length"),
        ({"rollout_log_probs": [0.0]}, "rollout_log_probs length"),
        ({"rollout_routed_experts": np.zeros((3, 1, 1))}, "rollout_routed_experts length"),
    ],
)
def test_validate(change: dict[str, object], said: str) -> None:
    sample = Sample(tokens=[1, 2, 3], response_length=2, loss_mask=[1, 1])
    sample.validate()
    with pytest.raises(AssertionError, match=said):
        dataclasses.replace(sample, **change).validate()


@pytest.mark.parametrize(
    ("reason", "status"), [("stop", "completed"), ("length", "truncated"), ("abort", "aborted"), ("other", "pending")]
)
def test_what_the_engine_reports(reason: str, status: str) -> None:
    sample = Sample()
    meta = {**META, "finish_reason": {"type": reason}}
    sample.update_from_meta_info(args(), meta)
    sample.update_from_meta_info(args(sglang_speculative_algorithm="EAGLE"), meta)
    assert sample.status.value == status and sample.weight_versions == ["3", "3"]
    assert sample.prefix_cache_info.prefix_cache_hit_rate == 0.4
    assert sample.spec_info.spec_accept_rate == 0.75 and sample.spec_info.spec_accept_length == 3.0
    sample.update_from_meta_info(args(), {"finish_reason": {"type": "stop"}})
    assert sample.weight_versions == ["3", "3"] and sample.prefix_cache_info.total_prompt_tokens == 20


def test_rates_of_nothing_are_zero() -> None:
    assert Sample.SpecInfo().spec_accept_rate == Sample.SpecInfo().spec_accept_length == 0.0
    assert Sample.PrefixCacheInfo().prefix_cache_hit_rate == 0.0


def test_media_types() -> None:
    assert [t.placeholder for t in MultimodalTypes.all()] == ["<image>", "<video>", "<audio>"]
    assert MultimodalTypes.get("video") is MultimodalTypes.VIDEO and MultimodalTypes.get("smell") is None


def test_a_status_is_json() -> None:
    assert json.dumps({"status": Sample.Status.FAILED}) == '{"status": "failed"}'
