"""--custom-convert-samples-to-train-data-path: once per rollout; its columns are the batch, known or not."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hooks_stage import SAMPLES, Stage

from miles.errors import HookError
from miles.types import Sample

MakeStage = Callable[..., Stage]


def columns(samples: list[Sample], **more: Any) -> dict[str, Any]:
    return {
        "tokens": [s.tokens for s in samples],
        "response_lengths": [s.response_length for s in samples],
        "loss_masks": [[1] * s.response_length for s in samples],
        "rewards": [float(i) for i in range(len(samples))],
        **more,
    }


def test_the_published_call(stage: MakeStage) -> None:
    """`(args, samples)` by position with the flat list; nothing of the default conversion runs."""
    seen: list[Any] = []

    def convert(*given: Any, **kwargs: Any) -> dict[str, Any]:
        seen.append((given, kwargs))
        return columns(given[1], truncated=[0] * 4, sample_indices=[40, 41, 42, 43])

    s = stage(custom_convert_samples_to_train_data=convert)
    batch = s.rollout().shards[0]
    (((args, samples), kwargs),) = seen
    assert args is s.args and kwargs == {} and [m.index for m in samples] == [0, 1, 2, 3]
    assert all(isinstance(m, Sample) for m in samples)
    assert np.asarray(batch.rewards).tolist() == [0.0, 1.0, 2.0, 3.0], "not normalised"
    assert batch.sample_indices == [40, 41, 42, 43] and batch.rollout_log_probs is None


def test_unknown_keys_survive_and_reach_the_trainers_plug_ins(stage: MakeStage) -> None:
    seen: list[Any] = []

    def convert(args: Namespace, samples: list[Sample]) -> dict[str, Any]:
        images = [{"pixel_values": torch.full((1, 2), float(i))} for i in range(len(samples))]
        return columns(
            samples, difficulty=list(range(len(samples))), metadata=[{"i": i} for i in range(len(samples))],
            multimodal_train_inputs=images, note="whole batch",
        )  # fmt: skip

    def look(args: Namespace, rollout_id: int, rollout_data: dict[str, Any]) -> None:
        seen.append({k: rollout_data[k] for k in ("difficulty", "metadata", "note", "multimodal_train_inputs")})

    s = stage(custom_convert_samples_to_train_data=convert, rollout_data_postprocess=look)
    s.train(s.rollout())
    (data,) = seen
    assert data["difficulty"] == [0, 1, 2, 3] and data["metadata"][3] == {"i": 3} and data["note"] == "whole batch"
    assert data["multimodal_train_inputs"][2]["pixel_values"].tolist() == [[2.0, 2.0]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: None, "returned None, expected a dict of columns"),
        (lambda c: list(c), "expected a dict of columns"),
        (lambda c: {"input_ids": c["tokens"]}, "returned a dict without 'tokens'\n  hint      columns: input_ids"),
        (lambda c: {k: v for k, v in c.items() if k != "loss_masks"}, "returned no 'loss_masks'"),
        (lambda c: {**c, "tokens": c["tokens"][:3]}, "response_lengths: expected one entry per sample (3), got 4"),
        (lambda c: {**c, "rewards": [1.0]}, "rewards: expected one entry per sample (4), got 1"),
        (lambda c: {**c, "rewards": [float("nan")] * SAMPLES}, "rewards[0]: float nan, expected a finite number"),
        (lambda c: {**c, "rewards": None}, "got none"),
        (lambda c: {**c, "loss_masks": [[1]] * SAMPLES}, "loss_masks length of row 1 is 1, its response_length is 2"),
        (lambda c: {**c, "response_lengths": [99] * SAMPLES}, "response_length of row 0 is 99, but it has"),
        (lambda c: {**c, "tokens": [[5, 99_999]] * SAMPLES, "response_lengths": [1] * SAMPLES,
                    "loss_masks": [[1]] * SAMPLES}, "has the token id 99999, expected ids from 0 to 52"),
        (lambda c: {**c, "rollout_log_probs": [[float("nan")] * n for n in c["response_lengths"]]},
         "rollout_log_probs of row 0 is nan at response token 0"),
        (lambda c: {k: [] for k in c}, "returned no rows for 4 samples"),
    ],
)  # fmt: skip
def test_what_is_no_batch(change: Callable[[Any], Any], says: str, stage: MakeStage) -> None:
    s = stage(custom_convert_samples_to_train_data=lambda args, samples: change(columns(samples)))
    with pytest.raises(HookError) as caught:
        s.train(s.rollout())
    assert says in str(caught.value) and "--custom-convert-samples-to-train-data-path" in str(caught.value)


def test_fewer_rows_than_samples_are_trained_as_they_are(stage: MakeStage) -> None:
    """A conversion may merge samples; what it returns is what is trained, where it fills the optimizer steps."""
    s = stage(
        "--use-dynamic-global-batch-size",
        custom_convert_samples_to_train_data=lambda args, samples: columns(samples[:2], sample_indices=[0, 1]),
    )
    assert len(s.rollout().shards[0]) == 2
