"""Every rule of miles.config.resolve: what follows from what, and what cannot stand together."""

from __future__ import annotations

import pytest
from config_helpers import namespace, refusal, settings, value_of

from miles.config import resolve as rules
from miles.config.draft import Draft
from miles.errors import FlagError

EFFECTS = [
    ([], {"eps_clip_high": 0.2, "over_sampling_batch_size": 16, "offload_train": False, "offload_rollout": False}),
    (["--eps-clip", "0.3"], {"eps_clip_high": 0.3}),
    (["--eps-clip", "0.3", "--eps-clip-high", "0.4"], {"eps_clip_high": 0.4}),
    (["--over-sampling-batch-size", "32"], {"over_sampling_batch_size": 32}),
    (["--colocate"], {"offload_train": True, "offload_rollout": True, "rollout_num_gpus": 1}),
    (["--colocate", "--no-offload-train"], {"offload_train": False, "offload_rollout": True}),
    (["--offload"], {"offload_train": True, "offload_rollout": True}),
    (
        ["--debug-rollout-only", "--colocate"],
        {"colocate": False, "offload_train": False, "offload_rollout": False, "train_memory_margin_bytes": 0},
    ),
    (["--debug-rollout-only"], {"actor_num_gpus_per_node": 1, "actor_num_nodes": 1}),
    (["--load-debug-rollout-data", "d/{rollout_id}.pt"], {"debug_train_only": True}),
    (
        ["--dump-details", "d"],
        {
            "save_debug_rollout_data": "d/rollout_data/{rollout_id}.pt",
            "save_debug_train_data": "d/train_data/{rollout_id}_{rank}.pt",
        },
    ),
    (["--load", "ckpt", "--lr", "0.1"], {"critic_load": "ckpt", "critic_lr": 0.1, "critic_num_nodes": 1}),
    (["--custom-generate-function-path", "a.b", "--reward-key", "acc"], {"eval_reward_key": "acc"}),
    (["--reward-key", "acc", "--eval-reward-key", "exact"], {"eval_reward_key": "exact"}),
    (["--rollout-function-path", "a.roll"], {"eval_function_path": "a.roll"}),
    (["--rollout-max-context-len", "512"], {"rollout_max_prompt_len": 511, "eval_max_context_len": 512}),
    (["--max-tokens-per-gpu", "4096"], {"log_probs_max_tokens_per_gpu": 4096}),
    (["--deterministic"], {"deterministic_mode": True}),
    (["--global-batch-size", "128"], {"grpo_std_normalization": True}),
    (["--n-samples-per-prompt", "1", "--global-batch-size", "16"], {"grpo_std_normalization": False}),
    (["--use-dynamic-global-batch-size", "--global-batch-size", "500"], {"global_batch_size": 500}),
]


@pytest.mark.parametrize(("flags", "expected"), EFFECTS, ids=[" ".join(e[0]) or "plain" for e in EFFECTS])
def test_effects(flags: list[str], expected: dict[str, object]) -> None:
    config, args = settings(*flags), namespace(*flags)
    for name, value in expected.items():
        assert value_of(config, name) == value, name
        assert getattr(args, name) == value, name


def test_steps_per_rollout_give_the_batch_size() -> None:
    config = draft_of(num_steps_per_rollout=4)
    rules.batch_size(config)
    assert config["global_batch_size"] == 32 and config.origins["global_batch_size"] == "derived"
    assert settings("--num-steps-per-rollout", "2").data.global_batch_size == 64  # agrees
    assert "expected 32 = 128 samples / --num-steps-per-rollout 4, got 64" in refusal("--num-steps-per-rollout", "4")


def draft_of(**values: object) -> Draft:
    """A draft as `settings()` would have it, with these values given."""
    draft = Draft()
    for name, value in {"rollout_batch_size": 16, "n_samples_per_prompt": 8, **values}.items():
        draft.give(name, value, "command line")
    return draft


def test_derived_numbers() -> None:
    data = settings("--global-batch-size", "50").data
    assert (data.samples_per_rollout, data.steps_per_rollout) == (128, 2)


def test_samples_that_no_step_takes_are_announced() -> None:
    notices = settings("--global-batch-size", "50").notices
    assert "--global-batch-size 50: 28 of the 128 samples of each rollout are cut off." in notices
    assert not any(
        "cut off" in n for n in settings("--global-batch-size", "50", "--disable-rollout-trim-samples").notices
    )


def test_a_step_that_no_rollout_fills() -> None:
    assert "expected at most 128" in refusal("--global-batch-size", "256")
    settings("--global-batch-size", "256", "--custom-generate-function-path", "a.b")  # may bring several samples each


def test_derived_attributes_of_args() -> None:
    args = namespace()
    assert args.use_critic is False
    assert (args.rank, args.world_size) == (0, 1)
    assert (args.sglang_tp_size, args.sglang_dp_size, args.sglang_pp_size, args.sglang_ep_size) == (1, 1, 1, 1)
    assert not hasattr(args, "offload")
    assert args.eval_datasets == []


def test_run_dir_defaults_to_the_time() -> None:
    run_dir = settings().run.run_dir
    assert run_dir is not None and run_dir.startswith("runs/2")
    assert settings("--run-dir", "runs/x").run.run_dir == "runs/x"


EVALUATION = ["--eval-interval", "5", "--eval-prompt-data", "a", "a.jsonl"]

REFUSALS = [
    (["--over-sampling-batch-size", "8"], "expected at least --rollout-batch-size 16, got 8"),
    (["--num-steps-per-rollout", "129"], "expected at most 128, the samples of a rollout, got 129"),
    (["--rollout-max-context-len", "64", "--rollout-max-prompt-len", "64"], "expected at most 63"),
    (["--eval-interval", "5"], "--eval-interval: there is nothing to evaluate on. Give --eval-prompt-data."),
    ([*EVALUATION, "--group-rm"], "--group-rm: rewards of whole groups are not defined for evaluation."),
    (["--save-interval", "5"], "--save-interval 5: needs --save."),
    (["--loss-type", "custom_loss"], "--loss-type custom_loss: needs --custom-loss-function-path."),
    (["--get-mismatch-metrics"], "--get-mismatch-metrics: needs --custom-tis-function-path."),
    (["--use-dynamic-batch-size"], "--use-dynamic-batch-size: needs --max-tokens-per-gpu."),
    (["--use-tis", "--use-rollout-logprobs"], "--use-tis: excludes --use-rollout-logprobs"),
    (["--debug-rollout-only", "--debug-train-only"], "--debug-rollout-only: excludes --debug-train-only"),
    (["--lr-warmup-iters", "3", "--lr-warmup-fraction", "0.1"], "--lr-warmup-iters: excludes --lr-warmup-fraction"),
    (["--lr-decay-style", "WSD"], "--lr-decay-style WSD: needs --lr-wsd-decay-iters."),
    (["--load-debug-rollout-data-subsample", "0.5"], "needs --load-debug-rollout-data."),
    (["--ci-metric-checker-key", "eval/a"], "needs --ci-metric-checker-threshold."),
    (["--rollout-temperature", "0"], "--rollout-temperature: expected a value > 0 for training, got 0."),
    (
        ["--rollout-temperature", "0", "--loss-type", "sft_loss"],
        "--rollout-temperature: expected a value > 0 for training, got 0.",
    ),
]


@pytest.mark.parametrize(("flags", "sentence"), REFUSALS, ids=[" ".join(r[0]) for r in REFUSALS])
def test_refusals(flags: list[str], sentence: str) -> None:
    assert sentence in refusal(*flags)


def test_temperature_zero_is_fine_where_nothing_is_trained() -> None:
    for flags in (["--num-rollout", "0"], ["--debug-rollout-only"]):
        assert settings("--rollout-temperature", "0", *flags).rollout.rollout_temperature == 0


def test_group_rewards_with_an_evaluation_of_ones_own() -> None:
    assert settings(*EVALUATION, "--group-rm", "--eval-function-path", "my.evaluate").reward.group_rm


def test_epochs_beside_rollouts_mean_nothing() -> None:
    assert any(n.startswith("--num-epoch: no meaning here") for n in settings("--num-epoch", "2").notices)


# Rules about flags that are refused before they come to them: they hold from the day on which the flag is built.

LATER_EFFECTS = [
    (rules.routing_replay, {"use_rollout_routing_replay": True}, "use_routing_replay", True),
    (rules.debug_rollout, {"debug_rollout_only": True, "rollout_num_gpus": 16}, "actor_num_nodes", 2),
    (rules.debug_rollout, {"debug_rollout_only": True, "rollout_num_gpus": 16}, "actor_num_gpus_per_node", 8),
    (rules.colocation, {"colocate": True, "actor_num_nodes": 2}, "rollout_num_gpus", 16),
]


@pytest.mark.parametrize(("rule", "given", "name", "expected"), LATER_EFFECTS)
def test_effects_of_flags_that_are_not_built(
    rule: rules.Rule, given: dict[str, object], name: str, expected: object
) -> None:
    draft = draft_of(**given)
    rule(draft)
    assert draft[name] == expected


LATER_REFUSALS = [
    (
        rules.refuse_exclusive,
        {"use_checkpoint_lr_scheduler": True, "override_lr_scheduler": True},
        "excludes --override-lr-scheduler",
    ),
    (rules.refuse_exclusive, {"kl_coef": 0.1, "kl_loss_coef": 0.1}, "--kl-coef: excludes --kl-loss-coef"),
    (rules.refuse_exclusive, {"prefill_num_servers": 1, "rollout_external": True}, "excludes --rollout-external"),
    (rules.refuse_exclusive, {"qkv_format": "bshd", "train_backend": "fsdp"}, "--qkv-format bshd"),
    (rules.refuse_exclusive, {"qkv_format": "bshd", "use_dynamic_batch_size": True}, "--qkv-format bshd"),
    (rules.refuse_lacking, {"use_kl_loss": True}, "--use-kl-loss: needs --ref-load."),
    (rules.refuse_lacking, {"kl_coef": 0.1}, "--kl-coef 0.1: needs --ref-load."),
    (rules.refuse_lacking, {"enable_mtp_training": True}, "needs --mtp-num-layers."),
    (rules.refuse_lacking, {"rollout_external": True}, "needs --rollout-external-engine-addrs."),
    (rules.whitening, {"advantage_estimator": "reinforce_plus_plus"}, "needs --normalize-advantages."),
    (rules.whitening, {"advantage_estimator": "reinforce_plus_plus_baseline"}, "needs --normalize-advantages."),
]


@pytest.mark.parametrize(("rule", "given", "sentence"), LATER_REFUSALS)
def test_refusals_of_flags_that_are_not_built(rule: rules.Rule, given: dict[str, object], sentence: str) -> None:
    with pytest.raises(FlagError, match=sentence.replace(".", r"\.")):
        rule(draft_of(**given))


def test_the_critic_belongs_to_ppo() -> None:
    from miles.config import AlgorithmConfig

    assert AlgorithmConfig(advantage_estimator="ppo").use_critic
    assert not AlgorithmConfig().use_critic


def test_true_on_policy_is_for_built_in_losses_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    custom = ["--true-on-policy-mode", "--loss-type", "custom_loss", "--custom-loss-function-path", "my.loss"]
    notices = settings(*custom).notices
    assert any("--true-on-policy-mode: a custom loss gets ordinary logits" in notice for notice in notices)
    monkeypatch.setattr(rules, "local_gpus", lambda: 1)
    assert "--true-on-policy-mode: works on a CPU" in refusal("--true-on-policy-mode")
