"""What `--train-backend megatron` needs: the library, a model that it knows, and sizes that fit each other.

    1. library        megatron-core
    2. SUBSTITUTES    number of processes, precision, fused kernels
    3. RULES          architecture, parallelism, pipelines, experts, memory

The rules run once, from `miles.config.resolve`, and only with this backend. What Megatron-Core would refuse
later, in every process, is refused here in the words of the flags.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from miles.config.architecture import fill_architecture
from miles.config.draft import Draft
from miles.config.layout import ParallelLayout
from miles.config.sections import FLAGS
from miles.errors import FlagError

Rule = Callable[[Draft], None]

ACTOR = FLAGS["actor_num_gpus_per_node"].option


def has(module: str) -> bool:
    """Whether a module can be imported; it is not imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


# ---- 1. libraries --------------------------------------------------------------------------------------------------


def refuse_missing_library(draft: Draft) -> None:
    if not has("megatron.core"):
        raise FlagError(
            "--train-backend megatron", given="Megatron-Core is not installed.", remedy="pip install 'miles[megatron]'"
        )


# ---- 2. what this machine cannot honour ----------------------------------------------------------------------------


def sizes(draft: Draft, world_size: int = 0) -> ParallelLayout:
    """The layout that the flags ask for; of its smallest world without a world size."""

    def layout(world: int) -> ParallelLayout:
        return ParallelLayout(
            world,
            tensor=draft["tensor_model_parallel_size"],
            context=draft["context_parallel_size"],
            pipeline=draft["pipeline_model_parallel_size"],
            expert=draft["expert_model_parallel_size"],
            expert_tensor=draft["expert_tensor_parallel_size"],
            virtual=draft["num_virtual_stages_per_pipeline_rank"],
        )

    return layout(world_size or layout(0).unit)


def smallest_world(draft: Draft) -> None:
    draft.substitute("actor_num_gpus_per_node", sizes(draft).world_size, "the least that the parallel flags allow.")


def precision(draft: Draft) -> None:
    if draft.gpus:
        draft.substitute("bf16", True, "there is a GPU; weights and optimizer stay float32.")
    else:
        draft.substitute("bf16", False, "without a GPU float32 is exact, and as fast.")


def fused_kernels(draft: Draft) -> None:
    gpus = draft.gpus
    needs = {
        "bias_swiglu_fusion": (bool(gpus), "the kernel needs a GPU."),
        "bias_dropout_fusion": (bool(gpus), "the kernel needs a GPU."),
        "apply_rope_fusion": (has("transformer_engine"), "the kernel is a part of Transformer Engine."),
        "gradient_accumulation_fusion": (has("fused_weight_gradient_mlp_cuda"), "the kernel is a part of APEX."),
    }
    for name, (present, why) in needs.items():
        if not present:
            draft.substitute(name, False, why)


def local_layers(draft: Draft) -> None:
    draft.substitute("transformer_impl", "local", "the layers are Megatron's local ones.")


SUBSTITUTES: list[Rule] = [smallest_world, precision, fused_kernels, local_layers]


# ---- 3. what follows, and what cannot be ---------------------------------------------------------------------------


def check(draft: Draft, world: int) -> None:
    """All rules about model and processes. Raises FlagError."""
    for rule in RULES:
        rule(draft)
    _fits_world(draft, world)


def true_on_policy(draft: Draft) -> None:
    if draft["true_on_policy_mode"]:
        raise FlagError(
            "--true-on-policy-mode",
            given="needs --train-backend fsdp: the engine computes with the same module, sum for sum.",
        )


def recomputation(draft: Draft) -> None:
    """--gradient-checkpointing, the flag of the other backend, means that every layer is computed again."""
    if draft["recompute_activations"]:
        draft.fill("recompute_granularity", "selective")
    if draft["gradient_checkpointing"] and draft["recompute_granularity"] is None:
        draft.derive("recompute_granularity", "full")
        draft.fill("recompute_method", "uniform")
        draft.fill("recompute_num_layers", 1)
    granularity, given = draft["recompute_granularity"], draft["recompute_num_layers"]
    if granularity == "full" and (draft["recompute_method"] is None or given is None):
        raise FlagError("--recompute-granularity full", given="needs --recompute-method and --recompute-num-layers.")
    if granularity == "selective" and given is not None:
        raise FlagError("--recompute-granularity selective", given="excludes --recompute-num-layers.")
    if granularity is not None and draft["distribute_saved_activations"] and draft["sequence_parallel"]:
        raise FlagError(
            "--distribute-saved-activations", given="excludes --sequence-parallel, which divides them already."
        )
    unread = ("recompute_method", "recompute_num_layers", "recompute_modules", "distribute_saved_activations")
    for name in unread:
        if granularity is None and draft.given(name) and draft[name] != FLAGS[name].default:
            draft.notices.append(f"{draft.option(name)}: no meaning here, without --recompute-granularity.")


def vocabulary(draft: Draft) -> None:
    """padded_vocab_size = the next multiple of make_vocab_size_divisible_by * tensor_model_parallel_size."""
    tokens, tensor = draft["vocab_size"], draft["tensor_model_parallel_size"]
    if tokens is None:
        return
    unit = draft["make_vocab_size_divisible_by"] * tensor
    draft.fill("padded_vocab_size", -(-tokens // unit) * unit)
    padded = draft["padded_vocab_size"]
    if padded < tokens or padded % tensor:
        raise FlagError(
            "--padded-vocab-size",
            given=padded,
            expected=f"a multiple of --tensor-model-parallel-size {tensor} of at least {tokens}, the model's tokens",
        )


def tensor_parallel(draft: Draft) -> None:
    tensor, heads, groups = draft["tensor_model_parallel_size"], draft["num_attention_heads"], draft["num_query_groups"]
    flag = f"--tensor-model-parallel-size {tensor}"
    if draft["sequence_parallel"] and tensor == 1:
        draft.notices.append("--sequence-parallel: no meaning here, without --tensor-model-parallel-size.")
        draft.derive("sequence_parallel", False)
    if heads is not None and heads % tensor:
        raise FlagError(flag, given=f"must divide the {heads} attention heads of the model.")
    if groups is not None and groups % tensor and tensor % groups:
        raise FlagError(flag, given=f"must divide the {groups} heads of keys and values, or be a multiple of them.")
    for name, what in (("ffn_hidden_size", "the width of the MLP"), ("moe_ffn_hidden_size", "the width of an expert")):
        share = _expert_tensor(draft) if name.startswith("moe") else tensor
        if draft[name] is not None and draft[name] % share:
            raise FlagError(flag, given=f"must divide {draft[name]}, {what}.")


def _expert_tensor(draft: Draft) -> int:
    size: int | None = draft["expert_tensor_parallel_size"]
    return draft["tensor_model_parallel_size"] if size is None else size


def pipeline(draft: Draft) -> None:
    """Stages and chunks of layers; Megatron-Core builds each from equally many layers, but for first and last stage."""
    stages, layers = draft["pipeline_model_parallel_size"], draft["num_layers"]
    flag = f"--pipeline-model-parallel-size {stages}"
    ends = [draft["decoder_first_pipeline_num_layers"], draft["decoder_last_pipeline_num_layers"]]
    if stages == 1:
        _without_stages(draft)
        return
    if layers is None:
        return
    if layers < stages:
        raise FlagError(flag, given=f"the model has {layers} layers, fewer than stages.")
    given = [n for n in ends if n is not None]
    rest, between = layers - sum(given), stages - len(given)
    if bool(rest > 0) != bool(between) or rest < 0 or (between and rest % between):
        raise FlagError(
            flag,
            given=f"{rest} layers cannot be divided among {between} equal stages.",
            remedy="--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers set the ends apart.",
        )
    per_stage = [*given, *([rest // between] if between else [])]
    _chunks(draft, per_stage)


def _without_stages(draft: Draft) -> None:
    for name in OF_STAGES:
        if draft[name] is not None:
            raise FlagError(draft.option(name), given="needs --pipeline-model-parallel-size 2 or more.")


OF_STAGES = (
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "microbatch_group_size_per_virtual_pipeline_stage",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
)


def _chunks(draft: Draft, per_stage: list[int]) -> None:
    """num_virtual_stages_per_pipeline_rank = layers of a stage / num_layers_per_virtual_pipeline_stage."""
    per_chunk, chunks = draft["num_layers_per_virtual_pipeline_stage"], draft["num_virtual_stages_per_pipeline_rank"]
    if per_chunk is not None and chunks is not None:
        raise FlagError(
            "--num-layers-per-virtual-pipeline-stage", given="excludes --num-virtual-stages-per-pipeline-rank."
        )
    if per_chunk is not None:
        if len(set(per_stage)) > 1:
            raise FlagError(
                "--num-layers-per-virtual-pipeline-stage",
                given="needs equal stages; --num-virtual-stages-per-pipeline-rank works with unequal ones.",
            )
        if per_stage[0] % per_chunk:
            raise FlagError(
                "--num-layers-per-virtual-pipeline-stage",
                given=per_chunk,
                expected=f"a divisor of {per_stage[0]}, the layers of a stage",
            )
        chunks = per_stage[0] // per_chunk
    elif chunks is not None and any(layers % chunks for layers in per_stage):
        raise FlagError(
            "--num-virtual-stages-per-pipeline-rank",
            given=chunks,
            expected=f"a divisor of {', '.join(map(str, sorted(set(per_stage))))}, the layers of a stage",
        )
    # One chunk per stage is a pipeline without interleaving.
    draft.derive("num_virtual_stages_per_pipeline_rank", chunks if chunks != 1 else None)
    group, stages = draft["microbatch_group_size_per_virtual_pipeline_stage"], draft["pipeline_model_parallel_size"]
    if group is not None and group < stages:
        raise FlagError(
            "--microbatch-group-size-per-virtual-pipeline-stage", given=group, expected=f"at least {stages}, the stages"
        )


def experts(draft: Draft) -> None:
    number, size = draft["num_experts"], draft["expert_model_parallel_size"]
    if number is None:
        if size > 1:
            raise FlagError(f"--expert-model-parallel-size {size}", given="the model has no experts.")
        if draft.given("expert_tensor_parallel_size"):
            draft.notices.append("--expert-tensor-parallel-size: no meaning here, the model has no experts.")
            draft.derive("expert_tensor_parallel_size", None)
        return
    if number % size:
        raise FlagError(f"--expert-model-parallel-size {size}", given=f"must divide the {number} experts of the model.")
    if draft["moe_router_topk"] > number:
        raise FlagError("--moe-router-topk", given=draft["moe_router_topk"], expected=f"at most {number}, the experts")
    over_chosen = draft["moe_router_score_function"] == "softmax" and not draft["moe_router_pre_softmax"]
    if draft["moe_router_topk"] == 1 and over_chosen:
        raise FlagError("--moe-router-topk 1", given="needs --moe-router-pre-softmax: one weight is always 1.")
    if draft["tensor_model_parallel_size"] > 1 and not draft["sequence_parallel"]:
        raise FlagError(
            f"--tensor-model-parallel-size {draft['tensor_model_parallel_size']}",
            given="needs --sequence-parallel where a model has experts.",
        )
    _expert_routing(draft)


def _expert_routing(draft: Draft) -> None:
    groups, chosen = draft["moe_router_num_groups"], draft["moe_router_group_topk"]
    if chosen is not None and (groups is None or chosen > groups or draft["num_experts"] % groups):
        raise FlagError(
            f"--moe-router-group-topk {chosen}",
            given="needs --moe-router-num-groups, at least as many, that divide the experts.",
        )
    if draft["moe_token_dispatcher_type"] == "allgather":
        if draft.given("moe_token_dispatcher_type"):
            draft.notices.append(
                "--moe-token-dispatcher-type allgather: alltoall in its place, as samples differ in length."
            )
        draft.derive("moe_token_dispatcher_type", "alltoall")


def gradients(draft: Draft) -> None:
    """What Megatron's own launch rules make of precision and overlap."""
    draft.derive("variable_seq_lengths", draft["qkv_format"] == "thd")
    if draft["bf16"]:
        draft.derive("accumulate_allreduce_grads_in_fp32", True)
    if draft["overlap_param_gather"] and not (draft["use_distributed_optimizer"] and draft["overlap_grad_reduce"]):
        raise FlagError("--overlap-param-gather", given="needs --use-distributed-optimizer and --overlap-grad-reduce.")
    if not draft.gpus:
        draft.derive("use_cpu_initialization", True)
        for name in ("hidden_dropout", "attention_dropout"):
            if draft[name] and draft.given(name):
                raise FlagError(f"{draft.option(name)} {draft[name]}", given="needs a GPU.", remedy="Use 0.")


def _fits_world(draft: Draft, world: int) -> None:
    least = sizes(draft)
    if world % least.unit == 0:
        return
    names = {
        "tensor_model_parallel_size": least.tensor,
        "context_parallel_size": least.context,
        "pipeline_model_parallel_size": least.pipeline,
        "expert_model_parallel_size": least.expert,
        "expert_tensor_parallel_size": draft["expert_tensor_parallel_size"] or 1,
    }
    parts = " and ".join(f"{draft.option(name)} {size}" for name, size in names.items() if size > 1)
    raise FlagError(ACTOR, given=world, expected=f"a multiple of {least.unit}, because of {parts}")


RULES: list[Rule] = [
    true_on_policy,
    fill_architecture,
    vocabulary,
    experts,
    tensor_parallel,
    pipeline,
    recomputation,
    gradients,
]
