"""--rollout-data-postprocess-path: once per training, after advantages, before the first step; its changes train."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any, List  # noqa: UP035

import pytest
import torch
from hooks_helpers import bound
from hooks_stage import SAMPLES, Stage

from miles.errors import HookError, UsageError
from miles.types import Group, Sample

MakeStage = Callable[..., Stage]


def test_slimes_call_with_everything(stage: MakeStage) -> None:
    """`(args, rollout_id, rollout_data)` by position, once per training however many steps it has."""
    seen: list[Any] = []

    def look(*given: Any, **kwargs: Any) -> None:
        seen.append((given, kwargs, {key: given[2][key] for key in given[2]}))

    flags = ("--hook-form", "rollout-data-postprocess=rollout-id", "--num-steps-per-rollout", 2)
    s = stage(*flags, rollout_data_postprocess=look)
    assert s.train(s.rollout(4), rollout_id=4).steps == 2
    (((args, rollout_id, _), kwargs, data),) = seen
    assert args is s.args and rollout_id == 4 and kwargs == {}
    for column in ("tokens", "loss_masks", "rollout_log_probs", "log_probs", "advantages", "returns"):
        assert len(data[column]) == SAMPLES and all(isinstance(row, torch.Tensor) for row in data[column])
    lengths = data["response_lengths"]
    assert [len(row) for row in data["advantages"]] == lengths == [1, 2, 3, 1]
    assert all(torch.isfinite(row).all() for row in data["log_probs"]), "log-probs are computed before it"
    assert data["raw_reward"] == [0.0, 1.0, 0.0, 1.0] and data["group_index"] == [0, 0, 1, 1]


def test_the_published_call_with_args_alone(stage: MakeStage) -> None:
    seen: list[Any] = []

    def process(args: Namespace) -> None:
        seen.append(args)

    s = stage(rollout_data_postprocess=process)
    s.train(s.rollout())
    assert seen == [s.args] and s.hooks.rollout_data_postprocess.form == "args"


def masks_of(stage: MakeStage, plug_in: Any) -> tuple[str, list[int], Stage]:
    s = stage(rollout_data_postprocess=plug_in)
    report = s.rollout()
    s.train(report)
    return s.hooks.rollout_data_postprocess.form, report.shards[0].loss_masks.tolist(), s


def test_columns_change_in_place_and_by_assignment(stage: MakeStage) -> None:
    def process(args: Namespace, rollout_data: dict[str, Any]) -> None:
        rollout_data["loss_masks"][1][0] = 0
        rollout_data["advantages"] = [2 * a for a in rollout_data["advantages"]]
        rollout_data["curriculum"] = ["easy"] * SAMPLES

    form, masks, _ = masks_of(stage, process)
    assert form == "rollout-data" and masks == [1, 0, 1, 1, 1, 1, 1]


def test_the_guides_groups_of_samples_write_back(stage: MakeStage) -> None:
    """Annotated `list[list[Sample]]`: what the columns say, as samples; mask, removal and metadata lead back."""
    seen: list[list[list[Sample]]] = []

    def process(args: Namespace, samples: list[list[Sample]]) -> None:
        seen.append(samples)
        assert samples[0][1].loss_mask is not None
        samples[0][1].loss_mask[0] = 0
        samples[1][0].remove_sample = True
        samples[1][1].metadata["hard"] = True

    s = stage(rollout_data_postprocess=process)
    report = s.rollout()
    batch = report.shards[0]
    s.train(report)
    (groups,) = seen
    assert s.hooks.rollout_data_postprocess.form == "groups"
    assert [[m.index for m in g] for g in groups] == [[0, 1], [2, 3]]
    first: Any = groups[0][1]
    assert first.tokens == batch.tokens[batch.token_offsets[1] : batch.token_offsets[2]].tolist()
    assert first.response_length == 2 and first.reward == 1.0 and first.group_index == 0
    assert first.rollout_log_probs == [-0.5, -0.5] and first.status == Sample.Status.COMPLETED
    assert first.advantages.tolist() == pytest.approx([0.7071, 0.7071], abs=1e-3) and len(first.log_probs) == 2
    assert batch.loss_masks.tolist() == [1, 0, 1, 0, 0, 0, 1]
    assert batch.metadata == [None, None, None, {"hard": True}]


def flat(args: Namespace, samples: list[Sample]) -> None:
    for sample in samples:
        sample.loss_mask = [0] * sample.response_length if sample.index == 2 else sample.loss_mask


def old_style(args: Namespace, samples: List[Sample]) -> None:  # noqa: UP006
    flat(args, samples)


def by_alias(args: Namespace, samples: list[Group]) -> None:
    flat(args, [s for group in samples for s in group])


@pytest.mark.parametrize(
    ("fn", "form"), [(flat, "samples"), (old_style, "samples"), (by_alias, "groups")], ids=lambda v: str(v)[:20]
)
def test_the_annotation_decides(fn: Any, form: str, stage: MakeStage) -> None:
    got, masks, _ = masks_of(stage, fn)
    assert got == form and masks == [1, 1, 1, 0, 0, 0, 1]


def test_without_annotation_samples_are_the_rollout_data(stage: MakeStage) -> None:
    seen: list[Any] = []

    def process(args, samples):  # type: ignore[no-untyped-def]
        seen.append(list(samples))

    form, _, _ = masks_of(stage, process)
    assert form == "rollout-data" and "tokens" in seen[0]


def test_metadata_of_generation_is_there(stage: MakeStage) -> None:
    seen: list[Any] = []

    async def generate(args: Namespace, sample: Sample, sampling_params: Any) -> Sample:
        sample.tokens, sample.response_length, sample.rollout_log_probs = [6, 7, 8], 1, [-0.5]
        sample.train_metadata = {"turn": sample.index}
        sample.status = Sample.Status.TRUNCATED
        return sample

    def look(args: Namespace, samples: list[Sample]) -> None:
        seen.extend((s.metadata, s.status) for s in samples)

    s = stage(custom_generate_function=generate, rollout_data_postprocess=look)
    s.train(s.rollout())
    assert seen == [({"turn": i}, Sample.Status.TRUNCATED) for i in range(SAMPLES)]


def test_views_hold_no_failed_score_and_leave_its_mask_empty(stage: MakeStage) -> None:
    seen: list[Any] = []

    async def fails_on_two(args: Namespace, sample: Sample) -> float:
        return (sample.index or 0) / (sample.index != 2)

    def look(args: Namespace, samples: list[list[Sample]]) -> None:
        seen.extend([[s.index for s in g] for g in samples])

    flags = ("--hook-policy", "custom-rm=mask", "--n-samples-per-prompt", 4)
    s = stage(*flags, custom_rm=fails_on_two, rollout_data_postprocess=look)
    report = s.rollout()
    s.train(report)
    batch = report.shards[0]
    assert seen == [[0, 1, 3], [4, 5, 6, 7]]
    assert not batch.loss_masks[batch.response_offsets[2] : batch.response_offsets[3]].any()


def test_groups_without_numbers_are_neighbours(stage: MakeStage) -> None:
    seen: list[Any] = []

    def convert(args: Namespace, samples: list[Sample]) -> dict[str, Any]:
        return {
            "tokens": [s.tokens for s in samples],
            "response_lengths": [s.response_length for s in samples],
            "loss_masks": [[1] * s.response_length for s in samples],
            "rewards": [1.0, -1.0, 1.0, -1.0],
        }

    def look(args: Namespace, samples: list[list[Sample]]) -> None:
        seen.extend([s.reward for s in g] for g in samples)

    s = stage(custom_convert_samples_to_train_data=convert, rollout_data_postprocess=look)
    s.train(s.rollout())
    assert seen == [[1.0, -1.0], [1.0, -1.0]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: setattr(s, "loss_mask", [1]), "loss_mask of sample 1 has 1 entries for 2 tokens"),
        (lambda s: setattr(s, "loss_mask", None), "loss_mask of sample 1 is None, expected a list of 0 and 1"),
        (lambda s: setattr(s, "loss_mask", [0.5, 1]), "loss_mask of sample 1 holds 0.5, expected 0 and 1"),
        (lambda s: setattr(s, "metadata", "hard"), "metadata of sample 1 is a str, expected a dict"),
    ],
)
def test_views_that_do_not_fit(change: Callable[[Sample], None], says: str, stage: MakeStage) -> None:
    def process(args: Namespace, samples: list[Sample]) -> None:
        change(samples[1])

    s = stage(rollout_data_postprocess=process)
    report = s.rollout()
    with pytest.raises(HookError) as caught:
        s.train(report)
    assert says in str(caught.value) and report.shards[0].loss_masks.all(), "nothing was written"


def test_columns_that_do_not_fit_are_told_as_the_plug_ins_failure(stage: MakeStage) -> None:
    def process(args: Namespace, rollout_data: Any) -> None:
        rollout_data["loss_masks"][0] = [1, 1, 1]

    s = stage(rollout_data_postprocess=process)
    report = s.rollout()
    with pytest.raises(HookError, match=r"--rollout-data-postprocess-path (.|\n)*loss_masks length of sample 0 is 3"):
        s.train(report)


def test_it_is_called_without_advantages(stage: MakeStage) -> None:
    seen: list[Any] = []
    s = stage(
        "--disable-compute-advantages-and-returns", "--loss-type", "custom_loss",
        custom_loss_function=lambda args, batch, logits, reduce: (logits.sum() * 0, {}),
        rollout_data_postprocess=lambda args, rollout_id, data: seen.append("advantages" in data),
    )  # fmt: skip
    s.train(s.rollout())
    assert seen == [False]


def test_an_ambiguous_one_names_the_flag() -> None:
    with pytest.raises(UsageError, match=r"fits several forms(.|\n)*--hook-form rollout-data-postprocess="):
        bound("rollout_data_postprocess", "training:post_anything")
