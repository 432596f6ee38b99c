"""Every plug point of a run at once, in two trainings: the published order of all calls, how often, which threads."""

from __future__ import annotations

import contextlib
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hooks_helpers import path_of
from hooks_stage import BASE, PER_PROMPT, PROMPTS, ROOT, SAMPLES

from miles.__main__ import main
from miles.hooks import CATALOG, load_function

ROLLOUTS = 2
STEPS = 2
COMMON = {
    "data_source": "Source",
    "custom_generate_function": "generate",
    "custom_rm": "reward",
    "dynamic_sampling_filter": "dynamic_filter",
    "rollout_sample_filter": "sample_filter",
    "rollout_all_samples_process": "all_samples",
    "custom_rollout_log_function": "log",
    "custom_eval_rollout_log_function": "log_eval",
    "rollout_data_postprocess": "data_postprocess",
}
POLICY_LOSS = {
    "rollout_function": "rollout",
    "buffer_filter": "buffer_filter",
    "custom_reward_post_process": "post_process",
    "custom_tis_function": "tis",
    "custom_pg_loss_reducer_function": "reducer",
}
CUSTOM_LOSS = {
    "rollout_function": "Rollout",
    "custom_convert_samples_to_train_data": "convert",
    "custom_loss_function": "loss",
}


def calls_of(folder: Path, plug_ins: dict[str, str], *flags: object) -> list[tuple[str, Any, str]]:
    """What a training of two rollouts with these plug-ins called, in order."""
    calls: list[tuple[str, Any, str]] = load_function(path_of("recorder:CALLS"))
    calls.clear()
    data = ROOT / "examples" / "quickstart" / "data"
    argv = [
        "train", "--hf-checkpoint", BASE, "--prompt-data", data / "train.jsonl", "--input-key", "prompt",
        "--label-key", "label", "--num-rollout", ROLLOUTS, "--rollout-batch-size", PROMPTS, "--n-samples-per-prompt",
        PER_PROMPT, "--num-steps-per-rollout", STEPS, "--micro-batch-size", 1, "--rollout-max-response-len", 6,
        "--eval-prompt-data", "held", f"{data / 'heldout.jsonl'}@[0:2]", "--eval-interval", 2,
        "--skip-eval-before-train", "--save", folder / "ck", "--run-dir", folder / "run", "--progress", "none", *flags,
    ]  # fmt: skip
    for name, plug_in in {**COMMON, **plug_ins}.items():
        argv += [CATALOG[name].flag, path_of(f"recorder:{plug_in}")]
    with contextlib.chdir(ROOT):
        assert main([str(word) for word in argv]) == 0
    return list(calls)


@pytest.fixture(scope="module")
def policy_loss(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Any, str]]:
    return calls_of(tmp_path_factory.mktemp("policy"), POLICY_LOSS, "--use-tis")


@pytest.fixture(scope="module")
def custom_loss(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Any, str]]:
    return calls_of(tmp_path_factory.mktemp("custom"), CUSTOM_LOSS, "--loss-type", "custom_loss")


def phases(calls: list[tuple[str, Any, str]]) -> list[str]:
    """Plug points in order, neighbours of one phase together; generation and its reward, which overlap, are one."""
    samples = ("custom_generate_function", "custom_rm", "dynamic_sampling_filter")
    losses = ("custom_loss_function", "custom_tis_function", "custom_pg_loss_reducer_function")
    merged = dict.fromkeys(samples, "samples") | dict.fromkeys(losses, "loss")
    return [name for name, _ in groupby(merged.get(point, point) for point, _, _ in calls)]


ONE_ROLLOUT = ["rollout_sample_filter", "rollout_all_samples_process", "data_source", "custom_rollout_log_function"]


def test_the_order_with_a_policy_loss(policy_loss: list[tuple[str, Any, str]]) -> None:
    first = [
        "data_source", "rollout_function", "data_source", "samples", *ONE_ROLLOUT, "custom_reward_post_process",
        "rollout_data_postprocess", "loss",
    ]  # fmt: skip
    second = [
        "rollout_function", "data_source", "buffer_filter", "samples", *ONE_ROLLOUT, "custom_reward_post_process",
        "rollout_data_postprocess", "loss",
    ]  # fmt: skip
    end = ["data_source", "eval_function", "samples", "custom_eval_rollout_log_function"]
    assert phases(policy_loss) == first + second + end


def test_the_order_with_a_custom_loss(custom_loss: list[tuple[str, Any, str]]) -> None:
    convert = ["custom_convert_samples_to_train_data", "rollout_data_postprocess", "loss"]
    rollout = ["rollout_function", "data_source", "samples", *ONE_ROLLOUT, *convert]
    built = ["data_source", "rollout_function", "data_source"]  # the source, both classes, its load
    end = ["data_source", "eval_function", "samples", "custom_eval_rollout_log_function"]
    assert phases(custom_loss) == built + rollout + rollout + end


@pytest.mark.parametrize("run", ["policy_loss", "custom_loss"])
def test_how_often(run: str, request: pytest.FixtureRequest) -> None:
    calls = request.getfixturevalue(run)
    counts = {name: [about for point, about, _ in calls if point == name] for name in CATALOG}
    evaluated = 2
    assert len(counts["custom_generate_function"]) == len(counts["custom_rm"]) == ROLLOUTS * SAMPLES + evaluated
    assert len(counts["dynamic_sampling_filter"]) == ROLLOUTS * PROMPTS
    for name in ("rollout_sample_filter", "rollout_all_samples_process"):
        assert counts[name] == [PROMPTS] * ROLLOUTS
    for name in ("custom_rollout_log_function", "rollout_data_postprocess"):
        assert counts[name] == [0, 1]
    assert counts["eval_function"] == counts["custom_eval_rollout_log_function"] == [1]
    per_micro_batch = [1] * (ROLLOUTS * SAMPLES)
    if run == "policy_loss":
        assert counts["rollout_function"] == [0, 1] and counts["buffer_filter"] == [PROMPTS]
        assert counts["custom_reward_post_process"] == [SAMPLES] * ROLLOUTS
        assert counts["custom_tis_function"] == counts["custom_pg_loss_reducer_function"] == per_micro_batch
    else:
        assert counts["rollout_function"] == ["built", "built", 0, 1]
        assert counts["custom_convert_samples_to_train_data"] == [SAMPLES] * ROLLOUTS
        assert counts["custom_loss_function"] == per_micro_batch
    source = [about for about in counts["data_source"] if about != ("get", 1) and about != ("add", 1)]
    assert source == [
        "built", ("load", -1), ("get", PROMPTS), ("add", 0), ("get", PROMPTS), ("add", 0), ("save", 1)
    ]  # fmt: skip


def test_within_a_group(policy_loss: list[tuple[str, Any, str]]) -> None:
    """Each sample is scored after it is generated; a group is judged after all of its samples are scored."""
    for index in range(SAMPLES):
        points = [p for p, about, _ in policy_loss if about == index and p in ("custom_generate_function", "custom_rm")]
        assert points[:2] == ["custom_generate_function", "custom_rm"]
    order = [(point, about) for point, about, _ in policy_loss]
    for group in range(PROMPTS):
        judged = order.index(("dynamic_sampling_filter", group))
        assert all(order.index(("custom_rm", PER_PROMPT * group + i)) < judged for i in range(PER_PROMPT))


def test_importance_sampling_precedes_the_reducer(policy_loss: list[tuple[str, Any, str]]) -> None:
    pair = ["custom_tis_function", "custom_pg_loss_reducer_function"]
    assert [p for p, _, _ in policy_loss if p in pair] == pair * (ROLLOUTS * SAMPLES)


def test_threads(policy_loss: list[tuple[str, Any, str]]) -> None:
    """What makes samples runs in the event loop; the manager and the trainer each have a thread of their own."""
    threads = {name: {thread for point, _, thread in policy_loss if point == name} for name in CATALOG}
    for name in ("custom_generate_function", "custom_rm", "dynamic_sampling_filter", "buffer_filter",
                 "rollout_sample_filter", "rollout_all_samples_process"):  # fmt: skip
        assert threads[name] == {"miles-loop"}, name
    manager = threads["rollout_function"]
    assert len(manager) == 1 and manager == threads["custom_rollout_log_function"]
    assert manager == threads["custom_reward_post_process"] == threads["eval_function"]
    trainer = threads["rollout_data_postprocess"]
    assert trainer == threads["custom_tis_function"] == threads["custom_pg_loss_reducer_function"]
    assert len(trainer) == 1 and not trainer & (manager | {"miles-loop"})
