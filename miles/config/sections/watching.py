"""What a run tells about itself: trackers, debugging, checks of its own metrics."""

# ruff: noqa: RUF009  (`flag` declares a field; it makes no value that instances would share)

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from miles.config.flags import PATH, Check, Section, at_least, flag, no_meaning_here, not_built, template
from miles.config.sections.training import PROFILER, SNAPSHOTS

CHECKS = "This check of the test suite"


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Section):
    """Where metrics go, beside the run directory."""

    use_wandb: bool = flag(False, "Log to Weights & Biases.", common=True)
    wandb_mode: Literal["online", "offline", "disabled"] | None = flag(None, "W&B mode; WANDB_MODE when unset.")
    wandb_dir: str | None = flag(None, "Folder of W&B's own files.")
    wandb_key: str | None = flag(None, "W&B login.", secret=True)
    wandb_host: str | None = flag(None, "W&B server.")
    wandb_team: str | None = flag(None, "W&B entity.")
    wandb_group: str | None = flag(None, "W&B group, and name of the run.", common=True)
    wandb_project: str | None = flag(None, "W&B project.", common=True)
    wandb_random_suffix: bool = flag(True, "Add no random suffix to the group.", option="--disable-wandb-random-suffix")
    wandb_run_name: str | None = flag(
        None, "Name of the W&B run.", status=no_meaning_here("the run is named after --wandb-group.")
    )
    wandb_run_id: str | None = flag(None, "Join the W&B run with this id.")
    wandb_always_use_train_step: bool = flag(False, "Count rollouts and evaluations in optimizer steps.")
    log_multi_turn: bool = flag(False, "Log lengths and turns of responses with tools: multi_turn/...")
    log_passrate: bool = flag(False, "Log pass@k of rollouts (passrate/...) and evaluations.")
    log_reward_category: str | None = flag(None, "Entry of dict rewards whose values are counted.")
    log_correct_samples: bool = flag(
        False, "Log statistics of the samples with reward 1.", status=not_built("Statistics of correct samples")
    )
    use_tensorboard: bool = flag(False, "Log to TensorBoard.", common=True)
    tb_project_name: str | None = flag(None, "First folder of the TensorBoard log.")
    tb_experiment_name: str | None = flag(None, "Second folder of the TensorBoard log; the time when unset.")


@dataclass(frozen=True, kw_only=True)
class DebugConfig(Section):
    """Running one half alone, and looking inside."""

    debug_rollout_only: bool = flag(False, "Only roll out; nothing is trained.")
    debug_train_only: bool = flag(False, "Only train; no engine is started.")
    save_debug_rollout_data: str | None = flag(
        None,
        "Save the samples of each rollout: a path with {rollout_id} in it.",
        check=template("rollout_id", values=(0, "eval_0")),
    )
    load_debug_rollout_data: str | None = flag(
        None, "Train on saved samples; turns on --debug-train-only. A path with {rollout_id} in it.", check=PATH
    )
    load_debug_rollout_data_subsample: float | None = flag(
        None, "Fraction of the saved samples to take.", check=Check("a value > 0 and <= 1", lambda v: 0 < v <= 1)
    )
    save_debug_train_data: str | None = flag(
        None,
        "Save each train batch: a path with {rollout_id} and {rank} in it.",
        check=template("rollout_id", "rank"),
    )
    dump_details: str | None = flag(None, "Folder for samples, train batches and tokenizer.", check=PATH)
    memory_snapshot_dir: str = flag(".", "Folder of memory snapshots.", status=not_built(SNAPSHOTS))
    memory_snapshot_num_steps: int | None = flag(
        None, "Rollouts that a snapshot covers.", check=at_least(1), status=not_built(SNAPSHOTS)
    )
    memory_recorder: Literal["torch", "memray"] = flag("torch", "Who records them.", status=not_built(SNAPSHOTS))
    profile_target: list[Literal["train_overall", "train_actor", "train_log_probs"]] = flag(
        ["train_overall"], "What is profiled.", status=not_built(PROFILER)
    )
    check_weight_update_equal: bool = flag(
        False,
        "Compare the engines' weights with the trainer's after the first update.",
    )


@dataclass(frozen=True, kw_only=True)
class CIConfig(Section):
    """Assertions about the run's own metrics."""

    ci_test: bool = flag(False, "Check the internals of the run while it goes.", status=not_built(CHECKS))
    ci_disable_kl_checker: bool = flag(False, "Leave out the check of the KL.", status=not_built(CHECKS))
    ci_metric_checker_key: str | None = flag(None, "Evaluation metric that must reach the threshold once.")
    ci_metric_checker_threshold: float | None = flag(None, "That threshold.")
    ci_save_grad_norm: str | None = flag(None, "Save gradient norms to this path.", status=not_built(CHECKS))
    ci_load_grad_norm: str | None = flag(None, "Compare gradient norms with this file.", status=not_built(CHECKS))
