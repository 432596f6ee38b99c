"""Megatron's flags that say how a model is trained: parallelism, precision, memory, optimizer, checkpoints.

What follows from several of them, and from the machine, is in `miles.config.megatron`.
"""

# ruff: noqa: RUF009  (`flag` declares a field; it makes no value that instances would share)

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from miles.config.flags import Section, at_least, no_meaning_here, not_built
from miles.config.sections.megatron_model import TRANSFORMER, megatron_flag

OPTIMIZER = "OptimizerConfig"
DDP = "DistributedDataParallelConfig"

OWN_ATTENTION = no_meaning_here("the attention follows from the device, and its softmax is float32.")
OWN_NORM = no_meaning_here("the norms are computed without that kernel.")
OWN_METRICS = no_meaning_here("a run records its own metrics.")
OWN_LENGTH = no_meaning_here("--num-rollout says how long the run is.")
OWN_TOKENIZER = no_meaning_here("the tokenizer is that of --hf-checkpoint.")
NAN_POLICY = no_meaning_here("--nan-policy says what becomes of such a step.")
BY_MACHINE = "Megatron's launch default; switched off where the machine lacks the kernel"


@dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class MegatronParallel(Section):
    """How many processes share what. --context-parallel-size is a flag of the trainer."""

    tensor_model_parallel_size: int = megatron_flag(
        1, "Processes that share each matrix.", check=at_least(1), common=True, sets=TRANSFORMER
    )
    pipeline_model_parallel_size: int = megatron_flag(
        1, "Stages that the layers are divided into.", check=at_least(1), common=True, sets=TRANSFORMER
    )
    expert_model_parallel_size: int = megatron_flag(
        1, "Processes that share the experts.", check=at_least(1), common=True, sets=TRANSFORMER
    )
    expert_tensor_parallel_size: int | None = megatron_flag(
        None,
        "Processes that share each expert's matrices; as --tensor-model-parallel-size when unset.",
        check=at_least(1),
        sets=TRANSFORMER,
    )
    sequence_parallel: bool = megatron_flag(
        False, "Divide what lies between the shared matrices by tokens.", common=True, sets=TRANSFORMER
    )
    num_layers_per_virtual_pipeline_stage: int | None = megatron_flag(
        None, "Layers of a chunk, for a pipeline whose stages take several chunks in turn.", check=at_least(1)
    )
    num_virtual_stages_per_pipeline_rank: int | None = megatron_flag(
        None,
        "The same, as the number of chunks per stage.",
        check=at_least(1),
        sets=f"{TRANSFORMER}.virtual_pipeline_model_parallel_size",
    )
    microbatch_group_size_per_virtual_pipeline_stage: int | None = megatron_flag(
        None,
        "Micro batches that a chunk takes before the next one's turn.",
        check=at_least(1),
        sets=f"{TRANSFORMER}.microbatch_group_size_per_vp_stage",
    )
    decoder_first_pipeline_num_layers: int | None = megatron_flag(
        None,
        "Layers of the first stage.",
        check=at_least(1),
        sets=f"{TRANSFORMER}.num_layers_in_first_pipeline_stage",
    )
    decoder_last_pipeline_num_layers: int | None = megatron_flag(
        None,
        "Layers of the last stage.",
        check=at_least(1),
        sets=f"{TRANSFORMER}.num_layers_in_last_pipeline_stage",
    )
    cp_comm_type: list[str] | None = megatron_flag(
        None,
        "How context parallelism exchanges keys and values.",
        status=no_meaning_here("keys and values are gathered."),
        sets=TRANSFORMER,
    )
    overlap_p2p_comm: bool = megatron_flag(
        True,
        "Do not overlap sends between stages with computation.",
        option="--no-overlap-p2p-communication",
        status=no_meaning_here("sends between stages overlap where stages are virtual, and only there."),
    )
    use_cpu_initialization: bool = megatron_flag(
        False, "Make the weights in main memory first; always so without a GPU.", sets=TRANSFORMER
    )
    use_tp_pp_dp_mapping: bool = megatron_flag(
        False, "Order the axes tp-cp-ep-pp-dp.", status=not_built("Another order of the axes than tp-cp-ep-dp-pp")
    )


@dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class MegatronNumerics(Section):
    """Precision, recomputation, fused kernels."""

    bf16: bool | None = megatron_flag(
        None,
        "Train in bfloat16 with float32 master weights; unset: where there is a GPU.",
        common=True,
        sets=(TRANSFORMER, OPTIMIZER),
        deviates="unset is decided by the machine",
    )
    accumulate_allreduce_grads_in_fp32: bool = megatron_flag(
        False, "Sum gradients in float32; always so with --bf16.", sets=f"{DDP}.grad_reduce_in_fp32"
    )
    attention_softmax_in_fp32: bool = megatron_flag(False, "Softmax in float32; it always is.")
    fp32_residual_connection: bool = megatron_flag(False, "Residual stream in float32.", sets=TRANSFORMER)
    apply_query_key_layer_scaling: bool = megatron_flag(
        False, "Scale scores by the layer's number.", status=not_built("Scores scaled by the layer's number")
    )
    fp16_lm_cross_entropy: bool = megatron_flag(
        False, "Loss in half precision.", status=no_meaning_here("the loss is computed in float32.")
    )
    cross_entropy_loss_fusion: bool = megatron_flag(
        False,
        "Fused cross entropy.",
        sets=TRANSFORMER,
        status=no_meaning_here("losses have their own log-probs, in chunks."),
    )
    cross_entropy_fusion_impl: Literal["native", "te"] = megatron_flag(
        "native", "Which one.", sets=TRANSFORMER, status=no_meaning_here("losses have their own log-probs, in chunks.")
    )

    recompute_granularity: Literal["full", "selective"] | None = megatron_flag(
        None, "What is computed again in the backward pass.", common=True, sets=TRANSFORMER
    )
    recompute_method: Literal["uniform", "block"] | None = megatron_flag(
        None, "Which layers, with full.", sets=TRANSFORMER
    )
    recompute_num_layers: int | None = megatron_flag(None, "How many layers.", check=at_least(1), sets=TRANSFORMER)
    recompute_modules: list[str] | None = megatron_flag(None, "Which modules, with selective.", sets=TRANSFORMER)
    recompute_activations: bool = megatron_flag(False, "Short for --recompute-granularity selective.")
    distribute_saved_activations: bool = megatron_flag(
        False, "Divide what is kept among the tensor-parallel processes.", sets=TRANSFORMER
    )

    masked_softmax_fusion: bool = megatron_flag(
        True,
        "No fused masked softmax.",
        option="--no-masked-softmax-fusion",
        status=OWN_ATTENTION,
    )
    bias_gelu_fusion: bool = megatron_flag(
        True, "No fused GELU.", option="--no-bias-gelu-fusion", status=no_meaning_here("the MLP has no GELU.")
    )
    bias_swiglu_fusion: bool = megatron_flag(
        True,
        "No fused SwiGLU.",
        option="--no-bias-swiglu-fusion",
        sets=f"{TRANSFORMER}.bias_activation_fusion",
        deviates=BY_MACHINE,
    )
    bias_dropout_fusion: bool = megatron_flag(
        True, "No fused dropout.", option="--no-bias-dropout-fusion", sets=TRANSFORMER, deviates=BY_MACHINE
    )
    apply_rope_fusion: bool = megatron_flag(
        True, "No fused rotation.", option="--no-rope-fusion", sets=TRANSFORMER, deviates=BY_MACHINE
    )
    gradient_accumulation_fusion: bool = megatron_flag(
        True,
        "No fused sums of gradients.",
        option="--no-gradient-accumulation-fusion",
        sets=TRANSFORMER,
        deviates=BY_MACHINE,
    )
    no_persist_layer_norm: bool = megatron_flag(False, "No persistent norm kernel.", status=OWN_NORM)
    memory_efficient_layer_norm: bool = megatron_flag(
        False, "Norm that keeps its output.", status=OWN_NORM, sets=TRANSFORMER
    )
    attention_backend: Literal["flash", "fused", "unfused", "local", "auto"] = megatron_flag(
        "auto", "Which attention.", status=OWN_ATTENTION
    )
    use_flash_attn: bool = megatron_flag(False, "An older name of that.", status=OWN_ATTENTION)
    transformer_impl: Literal["local", "transformer_engine", "inference_optimized"] = megatron_flag(
        "transformer_engine",
        "Whose layers.",
        sets=TRANSFORMER,
        status=not_built("Other layers than Megatron's local ones", when=lambda v: v != "local"),
    )
    spec: list[str] | None = megatron_flag(
        None, "Module and function of a layer spec.", status=not_built("A layer spec of one's own")
    )
    use_mcore_models: bool = megatron_flag(
        False, "Megatron-Core's models.", status=no_meaning_here("they always are Megatron-Core's.")
    )
    seq_length: int = megatron_flag(
        4096, "Length of a sample.", check=at_least(1), status=no_meaning_here("samples keep their lengths.")
    )


@dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class MegatronOptimizer(Section):
    """What the optimizer shards and overlaps. Learning rate and AdamW are flags of the trainer."""

    use_distributed_optimizer: bool | None = megatron_flag(
        True,
        "Divide the optimizer's state among the data-parallel processes.",
        sets=(OPTIMIZER, DDP),
        deviates="published default of the project",
    )
    overlap_grad_reduce: bool = megatron_flag(False, "Sum gradients during the backward pass.", sets=DDP)
    overlap_param_gather: bool = megatron_flag(
        False, "Gather parameters during the forward pass.", sets=(OPTIMIZER, DDP)
    )
    align_param_gather: bool = megatron_flag(
        True,
        "Let pipeline stages gather parameters at their own time.",
        option="--no-align-param-gather",
        sets=DDP,
        deviates="Megatron's launch default",
    )
    ddp_bucket_size: int | None = megatron_flag(
        None, "Parameters of one bucket of gradients.", check=at_least(1), sets=f"{DDP}.bucket_size"
    )
    ddp_average_in_collective: bool = megatron_flag(
        False,
        "Average gradients in the collective.",
        sets=f"{DDP}.average_in_collective",
        status=not_built("Averaging gradients in the collective"),
    )
    ddp_pad_buckets_for_high_nccl_busbw: bool = megatron_flag(
        False, "Pad buckets to sizes that NCCL likes.", sets=f"{DDP}.pad_buckets_for_high_nccl_busbw"
    )
    check_for_nan_in_loss_and_grad: bool = megatron_flag(
        True,
        "Do not look for gradients that are not finite.",
        option="--no-check-for-nan-in-loss-and-grad",
        status=NAN_POLICY,
    )
    check_for_large_grads: bool = megatron_flag(
        False, "Look for unexpectedly large gradients.", sets=DDP, status=NAN_POLICY
    )
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = megatron_flag(
        "constant",
        "How the weight decay changes.",
        status=not_built("A weight decay that changes", when=lambda v: v != "constant"),
    )
    start_weight_decay: float | None = megatron_flag(
        None, "Weight decay at first.", status=not_built("A weight decay that changes")
    )
    end_weight_decay: float | None = megatron_flag(
        None, "Weight decay at last.", status=not_built("A weight decay that changes")
    )


@dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class MegatronRest(Section):
    """Checkpoints, and what launch scripts give although the run decides it otherwise."""

    ckpt_format: Literal["torch", "torch_dist", "zarr", "torch_dcp", "fsdp_dtensor"] = megatron_flag(
        "torch_dist",
        "Format of the checkpoints.",
        status=not_built("Another checkpoint format than torch_dist", when=lambda v: v != "torch_dist"),
    )
    ckpt_fully_parallel_save: bool = megatron_flag(
        True,
        "Do not divide the writing of a checkpoint among the data-parallel processes.",
        option="--no-ckpt-fully-parallel-save",
        status=no_meaning_here("how checkpoints are written is fixed."),
    )
    ckpt_fully_parallel_load: bool = megatron_flag(
        False, "Divide the reading.", status=no_meaning_here("how checkpoints are read is fixed.")
    )
    dist_ckpt_strictness: str = megatron_flag(
        "assume_ok_unexpected",
        "What a wrong checkpoint does.",
        status=no_meaning_here("a wrong checkpoint is refused."),
    )
    use_dist_ckpt: bool = megatron_flag(False, "Distributed checkpoints.", status=no_meaning_here("they always are."))
    auto_detect_ckpt_format: bool = megatron_flag(
        False, "Find the format out.", status=no_meaning_here("there is one format.")
    )
    dist_ckpt_save_pre_mcore_014: bool = megatron_flag(
        False,
        "Write the layout of before 0.14.",
        status=not_built("The checkpoint layout of before Megatron-Core 0.14"),
    )

    train_iters: int | None = megatron_flag(None, "Optimizer steps of the run.", status=OWN_LENGTH)
    train_samples: int | None = megatron_flag(None, "Samples of the run.", status=OWN_LENGTH)
    eval_iters: int = megatron_flag(
        100, "Steps of an evaluation.", status=no_meaning_here("--eval-interval evaluates.")
    )
    exit_interval: int | None = megatron_flag(None, "Steps until the run ends.", status=OWN_LENGTH)
    exit_duration_in_mins: int | None = megatron_flag(None, "Minutes until the run ends.", status=OWN_LENGTH)
    lr_decay_samples: int | None = megatron_flag(
        None, "Decay, counted in samples.", status=not_built("A schedule that counts samples")
    )
    lr_warmup_samples: int = megatron_flag(
        0, "Warm-up, counted in samples.", status=not_built("A schedule that counts samples")
    )
    rampup_batch_size: list[str] | None = megatron_flag(
        None, "Let the batch grow.", status=not_built("A batch size that grows")
    )

    log_interval: int = megatron_flag(100, "Steps between two lines of the log.", status=OWN_METRICS)
    log_throughput: bool = megatron_flag(False, "Log operations per second.", status=OWN_METRICS)
    log_progress: bool = megatron_flag(False, "Log progress to a file.", status=OWN_METRICS)
    log_params_norm: bool = megatron_flag(False, "Log the norm of the parameters.", status=OWN_METRICS)
    log_num_zeros_in_grad: bool = megatron_flag(
        False, "Log how many gradients are zero.", status=OWN_METRICS, sets=OPTIMIZER
    )
    log_timers_to_tensorboard: bool = megatron_flag(False, "Log timers.", status=OWN_METRICS)
    log_validation_ppl_to_tensorboard: bool = megatron_flag(False, "Log perplexity.", status=OWN_METRICS)
    log_memory_to_tensorboard: bool = megatron_flag(False, "Log memory.", status=OWN_METRICS)
    log_world_size_to_tensorboard: bool = megatron_flag(False, "Log the world size.", status=OWN_METRICS)
    log_loss_scale_to_tensorboard: bool = megatron_flag(
        True, "Do not log the loss scale.", option="--no-log-loss-scale-to-tensorboard", status=OWN_METRICS
    )
    log_learning_rate_to_tensorboard: bool = megatron_flag(
        True, "Do not log the learning rate.", option="--no-log-learnig-rate-to-tensorboard", status=OWN_METRICS
    )
    timing_log_level: int = megatron_flag(0, "How much is timed.", status=OWN_METRICS)
    timing_log_option: str = megatron_flag("minmax", "How times are summed up.", status=OWN_METRICS)
    tensorboard_log_interval: int = megatron_flag(1, "Steps between two records.", status=OWN_METRICS)
    barrier_with_L1_time: bool = megatron_flag(
        True, "Do not wait for each other before timing.", option="--no-barrier-with-level-1-timing", status=OWN_METRICS
    )
    wandb_exp_name: str = megatron_flag("", "Name of the run.", status=no_meaning_here("--wandb-group names it."))
    wandb_save_dir: str = megatron_flag("", "Folder of wandb.", status=no_meaning_here("--wandb-dir names it."))

    manual_gc: bool = megatron_flag(False, "Collect garbage at fixed steps.", status=no_meaning_here("Python does."))
    manual_gc_interval: int = megatron_flag(0, "Which steps.", status=no_meaning_here("Python collects garbage."))
    empty_unused_memory_level: int = megatron_flag(
        0, "When cached memory is given back.", status=no_meaning_here("the trainer gives it back by itself.")
    )
    num_workers: int = megatron_flag(
        2, "Processes that read data.", status=no_meaning_here("the data source reads the data.")
    )
    tokenizer_type: str | None = megatron_flag(None, "Kind of the tokenizer.", status=OWN_TOKENIZER)
    tokenizer_model: str | None = megatron_flag(None, "Name of the tokenizer.", status=OWN_TOKENIZER)
    variable_seq_lengths: bool = megatron_flag(
        False, "Samples differ in length.", status=no_meaning_here("they always may.")
    )
    loss_scale: float | None = megatron_flag(
        None, "Fixed scale of the loss.", status=no_meaning_here("only fp16 scales the loss."), sets=OPTIMIZER
    )
    initial_loss_scale: float = megatron_flag(
        2**32, "First scale of the loss.", status=no_meaning_here("only fp16 scales the loss."), sets=OPTIMIZER
    )
    min_loss_scale: float = megatron_flag(
        1.0, "Least scale of the loss.", status=no_meaning_here("only fp16 scales the loss."), sets=OPTIMIZER
    )
    loss_scale_window: float = megatron_flag(
        1000, "Steps until it grows.", status=no_meaning_here("only fp16 scales the loss."), sets=OPTIMIZER
    )
    hysteresis: int = megatron_flag(
        2, "Overflows until it shrinks.", status=no_meaning_here("only fp16 scales the loss."), sets=OPTIMIZER
    )
