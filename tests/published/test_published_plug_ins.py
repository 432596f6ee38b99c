"""Miniature plug-ins in the published style train, unmodified, and did what they are for."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from published_runs import logged, train

from miles.observe.record import read_rollouts

FINISHED = 2  # rollouts


def plug_in(name: str) -> Any:
    """The module, as the run imported it."""
    return importlib.import_module(name)


def test_search(tmp_path: Path) -> None:
    run = train(
        tmp_path,
        "--custom-generate-function-path", "search_generate.generate",
        "--custom-rm-path", "search_generate.reward_func",
    )  # fmt: skip
    samples = read_rollouts(run, 1)
    assert plug_in("search_generate").CALLS["search"] > 0
    assert plug_in("search_generate").CALLS["reward"] == 16 * FINISHED
    observed = [s for s in samples if 0 in s.loss_mask]
    assert observed and all(len(s.loss_mask) == s.response_length == len(s.rollout_log_probs) for s in samples)
    assert len({s.reward for s in samples}) > 1
    assert len(logged(run, "train/loss")) == FINISHED


def test_tools_with_dict_rewards_and_string_statuses(tmp_path: Path) -> None:
    run = train(
        tmp_path,
        "--custom-generate-function-path", "tool_generate.generate",
        "--custom-rm-path", "tool_generate.reward_func", "--reward-key", "score",
        "--save-debug-rollout-data", "{run_dir}/dump/{rollout_id}.pt",
    )  # fmt: skip
    seen = plug_in("tool_generate").SEEN
    statuses = [status for status, _ in seen]
    assert {calls for _, calls in seen} == {1} and set(statuses) == {"completed", "truncated"}
    assert all(type(status) is str for status in statuses)
    first, second = statuses[:16], statuses[16:32]
    shares = [part.count("truncated") / 16 for part in (first, second)]
    assert logged(run, "rollout/truncated_ratio") == pytest.approx(shares)
    assert logged(run, "rollout/truncated") == pytest.approx(shares)


def test_many_agents_write_into_args(tmp_path: Path) -> None:
    (tmp_path / "agents.yaml").write_text(
        "custom_multi_agent_function_path: multi_agent.run_agent_system\nnum_parallel: 3\n"
        "incorrect_reward_weight: 0.8\ncorrect_reward_weight: 1.2\n"
    )
    run = train(
        tmp_path,
        "--custom-generate-function-path", "multi_agent.generate_with_multi_agents",
        "--rm-type", "random", "--custom-config-path", str(tmp_path / "agents.yaml"),
        "--use-dynamic-global-batch-size",
    )  # fmt: skip
    assert plug_in("multi_agent").RESULTS == [(3, 0.8)] * 16 * FINISHED
    samples = read_rollouts(run, 0)
    assert len(samples) == 48 and {s.reward for s in samples} <= {0, 1.2}


def test_a_worker_thread_with_a_loop_of_its_own_beside_evaluations(tmp_path: Path) -> None:
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join(f'{{"prompt": "{100 + i}+200=?", "label": "{300 + i}"}}\n' for i in range(12)))
    run = train(
        tmp_path,
        "--rollout-function-path", "fully_async.generate_rollout_fully_async", "--rm-type", "random",
        # Few places, so that both event loops wait for one.
        "--sglang-server-concurrency", "3", "--eval-interval", "1", "--eval-prompt-data", "held", str(heldout),
        "--eval-function-path", "miles.rollout.sglang_rollout.generate_rollout",
    )  # fmt: skip
    plug_in("fully_async").stop_global_worker()
    assert len(logged(run, "eval/held")) >= FINISHED
    assert [len(read_rollouts(run, i)) for i in range(FINISHED)] == [16, 16]
    assert len(logged(run, "train/loss")) == FINISHED


def test_a_teacher_s_log_probs_reach_the_loss(tmp_path: Path) -> None:
    run = train(
        tmp_path,
        "--custom-rm-path", "distillation.reward_func",
        "--custom-reward-post-process-path", "distillation.post_process_rewards",
        "--loss-type", "custom_loss", "--custom-loss-function-path", "distillation.loss",
        "--disable-compute-advantages-and-returns",
    )  # fmt: skip
    assert plug_in("distillation").LOSS_SAW and all(plug_in("distillation").LOSS_SAW)
    # The teacher is the policy that sampled: at the first step there is no gap, up to rounding.
    assert logged(run, "train/gap")[0] == pytest.approx(0.0, abs=1e-3)


def test_a_data_source_its_metadata_and_own_columns_reach_the_loss(tmp_path: Path) -> None:
    run = train(
        tmp_path,
        "--data-source-path", "data_source.TaggingDataSource", "--rm-type", "random",
        "--custom-convert-samples-to-train-data-path", "data_source.keep_train_metadata",
        "--loss-type", "custom_loss", "--custom-loss-function-path", "data_source.loss",
        "--max-tokens-per-gpu", "128",
    )  # fmt: skip
    saw = plug_in("data_source").LOSS_SAW
    assert len(saw) > 2 * FINISHED  # several micro batches
    for batch in saw:
        assert batch["note"] == "for the whole batch" and batch["round_number"] is None
        assert [m["task"] for m in batch["metadata"]] == [f"t{i // 4}" for i in batch["sample_indices"]]
    by_index = {s.index: s for i in range(FINISHED) for s in read_rollouts(run, i)}
    for batch in saw:
        assert batch["difficulty"] == [len(by_index[i].label) for i in batch["sample_indices"]]
    assert plug_in("data_source").INSTANCES[0].get_metadata() == {"handed_out": 4 * FINISHED}
    assert len(logged(run, "train/pg_loss")) == FINISHED


@pytest.mark.parametrize("policy", ["mask", "drop"])
def test_failed_scores_reach_no_conversion_and_no_loss(tmp_path: Path, policy: str) -> None:
    run = train(
        tmp_path,
        "--custom-rm-path", "failing_reward.reward_func", "--hook-policy", f"custom-rm={policy}",
        "--hook-error-budget", "0.5", "--use-dynamic-global-batch-size",
        "--custom-convert-samples-to-train-data-path", "failing_reward.convert",
        "--loss-type", "custom_loss", "--custom-loss-function-path", "failing_reward.loss",
    )  # fmt: skip
    seen = plug_in("failing_reward").SEEN
    assert all(index % 5 for indices in seen["converted"] for index in indices)
    assert all(own == indices and None not in own for own, indices in seen["loss"])
    trained = sorted(index for own, _ in seen["loss"] for index in own)
    assert trained == [i for i in range(32) if i % 5]
    assert len(logged(run, "train/pg_loss")) == FINISHED


def test_samples_filled_in_every_loose_way(tmp_path: Path) -> None:
    run = train(tmp_path, "--rollout-function-path", "loose_rollout.generate_rollout", "--rm-type", "random")
    assert logged(run, "rollout/raw_reward") == [0.75] * FINISHED
    assert logged(run, "rollout/truncated") == logged(run, "rollout/truncated_ratio") == [0.25] * FINISHED
    # Masks of 3, 3, 2 and 2 trained tokens.
    assert logged(run, "rollout/response_len/mean") == [2.5] * FINISHED
    assert [s.tokens for s in read_rollouts(run, 0)] == [[12, 9, 13, 4, 8, 10]] * 16
