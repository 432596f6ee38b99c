"""The trainer: its backend, its optimizer, its checkpoints."""

# ruff: noqa: RUF009  (`flag` declares a field; it makes no value that instances would share)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from miles.config.flags import (
    JSON_OBJECT,
    PATH,
    Check,
    Section,
    at_least,
    between,
    flag,
    more_than,
    no_meaning_here,
    not_built,
    template,
)

PROFILER = "Profiling the trainer"
SNAPSHOTS = "Recording memory snapshots"
OPTIMIZER = "OptimizerConfig"
PUBLISHED = "published default of the project"
BETA = Check("a value >= 0 and < 1", lambda v: 0 <= v < 1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """The backend that turns batches into gradients."""

    train_backend: Literal["megatron", "fsdp"] = flag(
        "megatron",
        "Who computes the gradients.",
        common=True,
    )
    qkv_format: Literal["thd", "bshd"] = flag(
        "thd",
        "Layout of a micro batch: thd packs the samples, bshd pads them (megatron only).",
    )
    true_on_policy_mode: bool = flag(False, "Make log-probs of trainer and engine bitwise equal, several times slower.")
    train_env_vars: dict[str, Any] = flag(
        {},
        "Environment variables of the trainer's processes, where there are several.",
        check=JSON_OBJECT,
    )
    train_memory_margin_bytes: int = flag(
        1024**3,
        "Memory left free when the trainer is offloaded.",
        check=at_least(0),
        status=no_meaning_here("nothing is offloaded."),
    )
    enable_weights_backuper: bool = flag(
        True,
        "Keep no copies of the weights in main memory.",
        option="--disable-weights-backuper",
        status=no_meaning_here("copies are kept where something reads them, and nowhere else."),
    )
    megatron_to_hf_mode: Literal["raw", "bridge"] = flag(
        "raw",
        "Who converts Megatron weights: miles, or Megatron-Bridge.",
        only="megatron",
    )
    recompute_loss_function: bool = flag(
        False, "Recompute the loss in the backward pass instead of keeping its activations."
    )
    log_probs_chunk_size: int = flag(-1, "Tokens whose log-probs are computed at a time; the built-in size when <= 0.")
    padded_vocab_size: int | None = flag(
        None, "Size that the vocabulary is padded to.", check=at_least(1), only="megatron"
    )
    attn_implementation: str = flag(
        "flash_attention_2",
        "Attention of the Hugging Face model.",
        status=not_built("Another attention than sdpa", when=lambda v: v != "sdpa"),
        only="fsdp",
    )
    gradient_checkpointing: bool = flag(False, "Recompute activations in the backward pass.", common=True)
    fp16: bool = flag(False, "Train in half precision.", status=not_built("Training in fp16"))
    fsdp_state_dict_cpu_offload: bool = flag(
        False,
        "Gather checkpoints in main memory.",
        status=no_meaning_here("each process writes its own shards; nothing is gathered."),
        only="fsdp",
    )
    fsdp_cpu_offload: bool = flag(
        False,
        "Keep parameters and optimizer in main memory, where several trainer processes have GPUs.",
        only="fsdp",
    )
    fsdp_param_dtype: Literal["float32", "bfloat16"] = flag(
        "float32",
        "What several trainer processes compute in; weights, optimizer and sums of gradients stay float32.",
        only="fsdp",
    )
    fsdp_cpu_backend: str = flag(
        "gloo",
        "Communication library for tensors in main memory, beside nccl.",
        check=Check("gloo", lambda v: v == "gloo"),
        only="fsdp",
    )
    deterministic_mode: bool = flag(
        False, "Use deterministic kernels; on with --deterministic.", sets="TransformerConfig"
    )
    context_parallel_size: int = flag(
        1,
        "Processes that share the tokens of one sample (megatron only).",
        check=at_least(1),
        common=True,
        sets="TransformerConfig",
    )
    record_memory_history: bool = flag(False, "Record a memory snapshot.", status=not_built(SNAPSHOTS))
    memory_snapshot_path: str = flag("snapshot.pickle", "File of the snapshot.", status=not_built(SNAPSHOTS))
    use_pytorch_profiler: bool = flag(False, "Profile some training steps.", status=not_built(PROFILER))
    profile_step_start: int = flag(10, "First profiled step.", check=at_least(0), status=not_built(PROFILER))
    profile_step_end: int = flag(12, "Step after the last profiled one.", check=at_least(0), status=not_built(PROFILER))
    tensorboard_dir: str | None = flag(None, "Folder of the profiler's traces.", status=not_built(PROFILER))


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """AdamW and its learning rate.

    The rate rises from `lr_warmup_init` to `lr` over the warm-up, then follows `lr_decay_style` down to `min_lr`.
    """

    optimizer: str = flag(
        "adam",
        "The optimizer; adam is AdamW.",
        check=Check("adam (which is AdamW)", lambda v: v == "adam"),
        sets=OPTIMIZER,
    )
    lr: float = flag(1e-6, "Learning rate.", check=at_least(0), common=True, sets=OPTIMIZER, deviates=PUBLISHED)
    min_lr: float = flag(
        0.0, "Learning rate at the end of the decay.", check=at_least(0), sets=OPTIMIZER, deviates=PUBLISHED
    )
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = flag(
        "constant", "Shape of the decay.", common=True
    )
    lr_decay_iters: int | None = flag(
        None, "Optimizer steps of warm-up and decay together; those of the whole run when unset.", check=at_least(1)
    )
    lr_warmup_init: float = flag(0.0, "Learning rate at the first step of the warm-up.", check=at_least(0))
    lr_warmup_iters: int = flag(0, "Optimizer steps of the warm-up.", check=at_least(0), common=True)
    lr_warmup_fraction: float | None = flag(
        None, "Warm-up as a fraction of --lr-decay-iters, in place of --lr-warmup-iters.", check=between(0, 1)
    )
    lr_wsd_decay_iters: int | None = flag(None, "Steps of the final decay of WSD.", check=at_least(1))
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] | None = flag(
        None, "Shape of the final decay of WSD; exponential when unset."
    )
    use_checkpoint_lr_scheduler: bool = flag(
        False,
        "On resume, take the schedule's settings from the checkpoint.",
        status=not_built("A schedule whose settings come from the checkpoint"),
    )
    override_lr_scheduler: bool = flag(
        False,
        "On resume, take the schedule's settings from the flags.",
        status=no_meaning_here("they always come from the flags; the checkpoint keeps the step."),
    )
    warmup_ratio: float = flag(
        0.03,
        "Warm-up as a fraction of the run.",
        check=between(0, 1),
        status=no_meaning_here("no backend reads it; --lr-warmup-fraction does that."),
    )
    weight_decay: float = flag(
        0.0, "Decoupled weight decay.", check=at_least(0), common=True, sets=OPTIMIZER, deviates=PUBLISHED
    )
    adam_beta1: float = flag(0.9, "Decay of the first moment.", check=BETA, sets=OPTIMIZER)
    adam_beta2: float = flag(0.95, "Decay of the second moment.", check=BETA, sets=OPTIMIZER, deviates=PUBLISHED)
    adam_eps: float = flag(1e-8, "Term that keeps the update finite.", check=more_than(0), sets=OPTIMIZER)
    clip_grad: float = flag(
        1.0, "Largest norm of the gradient; 0 does not clip.", check=at_least(0), common=True, sets=OPTIMIZER
    )
    critic_lr: float | None = flag(None, "Learning rate of the critic; --lr when unset.", check=at_least(0))
    critic_lr_warmup_iters: int = flag(0, "Warm-up steps of the critic.", check=at_least(0))


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """What is loaded and saved."""

    load: str | None = flag(
        None,
        "Folder to resume from: the --save of an earlier run. {run_dir} in it is the run directory.",
        check=PATH,
        common=True,
    )
    save: str | None = flag(
        None, "Folder of the checkpoints. {run_dir} in it is the run directory.", check=PATH, common=True
    )
    save_interval: int | None = flag(None, "Rollouts between two checkpoints.", check=at_least(1), common=True)
    async_save: bool = flag(
        False, "Write checkpoints in the background; each counts from the end of the next rollout's training."
    )
    no_save_optim: bool = flag(False, "Leave the optimizer out of the checkpoints.")
    no_load_optim: bool = flag(
        False, "Resume without the optimizer's state; the schedule of the learning rate starts anew, too."
    )
    no_save_rng: bool = flag(False, "Leave the states of random generators out of the checkpoints.")
    no_load_rng: bool = flag(False, "Resume without the states of random generators.")
    finetune: bool = flag(
        False, "Take nothing but the weights of --load: optimizer, random generators, data and rollouts begin anew."
    )
    save_hf: str | None = flag(
        None,
        "Also write a Hugging Face folder with each checkpoint: a path with {rollout_id} in it.",
        check=template("rollout_id"),
    )
    start_rollout_id: int | None = flag(
        None, "First rollout; follows from the checkpoint when unset.", check=at_least(0)
    )
    ref_load: str | None = flag(
        None, "Weights of the reference model: a Hugging Face folder, or the --save of a run.", check=PATH
    )
    ref_ckpt_step: int | None = flag(None, "Which checkpoint of --ref-load; the latest when unset.", check=at_least(0))
    critic_load: str | None = flag(None, "Folder that the critic resumes from; --load when unset.", check=PATH)
    critic_save: str | None = flag(
        None, "Folder of the critic's checkpoints; a part of those in --save when unset.", check=PATH
    )


@dataclass(frozen=True, kw_only=True)
class MTPConfig(Section):
    """Multi-token prediction layers."""

    mtp_num_layers: int | None = flag(
        None, "Number of them.", check=at_least(0), status=not_built("Multi-token prediction")
    )
    mtp_loss_scaling_factor: float = flag(
        0.2, "Weight of their loss.", check=at_least(0), status=not_built("Multi-token prediction")
    )
    enable_mtp_training: bool = flag(False, "Train them.", status=not_built("Multi-token prediction"))
