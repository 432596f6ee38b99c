"""Megatron's flags whose part of Megatron is not built here: declared, so that each is refused with its own sentence.

A row is what argparse of Megatron has: option, type, default; then the field of Megatron-Core that it sets, and what is
missing. The attribute of `args` is the field's name where the row gives it as `dest`.
"""

from __future__ import annotations

from dataclasses import make_dataclass
from typing import Any, NamedTuple

from miles.config.flags import Section, not_built
from miles.config.sections.megatron_model import TRANSFORMER, megatron_flag
from miles.config.sections.megatron_trainer import DDP, OPTIMIZER


class Row(NamedTuple):
    """Example: `Row("--fp8-format", "str | None", None, "TransformerConfig.fp8", "Training in fp8", dest="fp8")`"""

    option: str
    type: str
    default: Any
    sets: str | tuple[str, ...]
    missing: str
    dest: str = ""

    @property
    def name(self) -> str:
        return self.dest or self.option.removeprefix("--").replace("-", "_")


T, OPT, D = TRANSFORMER, OPTIMIZER, DDP
FP8, FP4 = "Training in fp8", "Training in fp4"
GRAPHS = "Capturing CUDA graphs"
TP_OVERLAP = "Overlapping tensor-parallel communication, a part of Transformer Engine,"
OFFLOADING = "Keeping activations or weights in main memory"
CPU_ADAM = "The optimizer in main memory"
PRECISE = "The precision-aware optimizer, a part of Transformer Engine,"
MEGATRON_FSDP = "Megatron's own FSDP"
MLA = "Multi-latent attention"
MUON = "The muon optimizer"
DROPPING = "Dropping tokens of busy experts"
EP_OVERLAP = "Overlapping the exchange between experts"
DEEPEP = "The flex dispatcher"
LINEAR = "Linear attention"
INDEXER = "Sparse attention with an indexer"
WINDOWS = "Sliding-window attention"
SPLIT = "Another division of the layers than even stages or a first and last of their own"
QUANTIZED = "Quantized experts or layers"
KITCHEN = "Kernels of the kitchen library"
INFERENCE = "Megatron's inference"
MAMBA = "State-space layers"

ROWS: tuple[Row, ...] = (
    Row("--fp8-format", "str | None", None, f"{T}.fp8", FP8, "fp8"),
    Row("--fp8-recipe", "str", "delayed", (f"{T}.fp8_recipe",), FP8),
    Row("--fp8-margin", "int", 0, T, FP8),
    Row("--fp8-interval", "int", 1, T, FP8),
    Row("--fp8-amax-history-len", "int", 1, T, FP8),
    Row("--fp8-amax-compute-algo", "str", "most_recent", T, FP8),
    Row("--fp8-quantizer-factory", "str | None", None, T, FP8),
    Row("--no-fp8-wgrad", "bool", True, f"{T}.fp8_wgrad", FP8, "fp8_wgrad"),
    Row("--fp8-param-gather", "bool", False, (f"{T}.fp8_param", D), FP8),
    Row("--reuse-grad-buf-for-mxfp8-param-ag", "bool", False, (OPT, D), FP8),
    Row("--first-last-layers-bf16", "bool", False, T, FP8),
    Row("--num-layers-at-start-in-bf16", "int", 1, T, FP8),
    Row("--num-layers-at-end-in-bf16", "int", 1, T, FP8),
    Row("--te-rng-tracker", "bool", False, f"{T}.use_te_rng_tracker", GRAPHS),
    Row("--moe-router-padding-for-fp8", "bool", False, T, FP8),
    Row("--moe-router-padding-for-quantization", "bool", False, T, FP8),
    Row("--fp4-format", "str | None", None, f"{T}.fp4", FP4, "fp4"),
    Row("--fp4-recipe", "str", "nvfp4", T, FP4),
    Row("--fp4-quantizer-factory", "str | None", None, T, FP4),
    Row("--fp4-param-gather", "bool", False, f"{T}.fp4_param", FP4),
    Row("--enable-cuda-graph", "bool", False, T, GRAPHS),
    Row("--external-cuda-graph", "bool", False, T, GRAPHS),
    Row("--cuda-graph-impl", "str", "none", T, GRAPHS),
    Row("--cuda-graph-scope", "str", "full", T, GRAPHS),
    Row("--cuda-graph-warmup-steps", "int", 3, T, GRAPHS),
    Row("--tp-comm-overlap", "bool", False, T, TP_OVERLAP),
    Row("--tp-comm-overlap-cfg", "str | None", None, (), TP_OVERLAP),
    Row("--disable-tp-comm-overlap-ag", "bool", True, f"{T}.tp_comm_overlap_ag", TP_OVERLAP, "tp_comm_overlap_ag"),
    Row("--disable-tp-comm-overlap-rs", "bool", True, f"{T}.tp_comm_overlap_rs", TP_OVERLAP, "tp_comm_overlap_rs"),
    Row("--tp-comm-overlap-rs-dgrad", "bool", False, T, TP_OVERLAP),
    Row("--disable-tp-comm-bulk-dgrad", "bool", True, f"{T}.tp_comm_bulk_dgrad", TP_OVERLAP, "tp_comm_bulk_dgrad"),
    Row("--disable-tp-comm-bulk-wgrad", "bool", True, f"{T}.tp_comm_bulk_wgrad", TP_OVERLAP, "tp_comm_bulk_wgrad"),
    Row("--disable-tp-comm-split-ag", "bool", True, f"{T}.tp_comm_split_ag", TP_OVERLAP, "tp_comm_split_ag"),
    Row("--disable-tp-comm-split-rs", "bool", True, f"{T}.tp_comm_split_rs", TP_OVERLAP, "tp_comm_split_rs"),
    Row("--tp-comm-bootstrap-backend", "str", "nccl", T, TP_OVERLAP),
    Row("--defer-embedding-wgrad-compute", "bool", False, T, "Deferred gradients of the output layer"),
    Row("--wgrad-deferral-limit", "int", 0, T, "Deferred gradients of the output layer"),
    Row("--cpu-offloading-num-layers", "int", 0, T, OFFLOADING),
    Row("--fine-grained-activation-offloading", "bool", False, T, OFFLOADING),
    Row("--offload-modules", "list[str]", [], T, OFFLOADING),
    Row("--min-offloaded-tensor-size", "int", 1024 * 1024, T, OFFLOADING),
    Row("--optimizer-cpu-offload", "bool", False, OPT, CPU_ADAM),
    Row("--optimizer-offload-fraction", "float", 0.0, OPT, CPU_ADAM),
    Row("--use-torch-optimizer-for-cpu-offload", "bool", False, OPT, CPU_ADAM),
    Row("--overlap-cpu-optimizer-d2h-h2d", "bool", False, OPT, CPU_ADAM),
    Row("--no-pin-cpu-grads", "bool", True, f"{OPT}.pin_cpu_grads", CPU_ADAM, "pin_cpu_grads"),
    Row("--no-pin-cpu-params", "bool", True, f"{OPT}.pin_cpu_params", CPU_ADAM, "pin_cpu_params"),
    Row("--use-precision-aware-optimizer", "bool", False, OPT, PRECISE),
    Row("--main-grads-dtype", "str", "fp32", OPT, PRECISE),
    Row("--main-params-dtype", "str", "fp32", OPT, PRECISE),
    Row("--exp-avg-dtype", "str", "fp32", OPT, PRECISE),
    Row("--exp-avg-sq-dtype", "str", "fp32", OPT, PRECISE),
    Row("--decoupled-lr", "float | None", None, OPT, "A learning rate of embeddings and output layer"),
    Row("--decoupled-min-lr", "float | None", None, OPT, "A learning rate of embeddings and output layer"),
    Row("--apply-wd-to-qk-layernorm", "bool", False, OPT, "Weight decay of the norms of queries and keys"),
    Row("--no-weight-decay-cond-type", "str | None", None, (), "A choice of what has weight decay"),
    Row("--sgd-momentum", "float", 0.9, OPT, "Plain gradient descent"),
    Row("--muon-momentum", "float", 0.95, OPT, MUON),
    Row("--muon-no-split-qkv", "bool", True, f"{OPT}.muon_split_qkv", MUON, "muon_split_qkv"),
    Row("--muon-use-nesterov", "bool", False, OPT, MUON),
    Row("--muon-scale-mode", "str", "spectral", OPT, MUON),
    Row("--muon-fp32-matmul-prec", "str", "medium", OPT, MUON),
    Row("--muon-num-ns-steps", "int", 5, OPT, MUON),
    Row("--muon-tp-mode", "str", "blockwise", OPT, MUON),
    Row("--muon-extra-scale-factor", "float", 1.0, OPT, MUON),
    Row("--overlap-param-gather-with-optimizer-step", "bool", False, OPT, "Gathering parameters in the optimizer step"),
    Row("--num-distributed-optimizer-instances", "int", 1, D, "Several copies of the distributed optimizer"),
    Row("--use-megatron-fsdp", "bool", False, D, MEGATRON_FSDP),
    Row("--use-custom-fsdp", "bool", False, D, MEGATRON_FSDP),
    Row("--use-torch-fsdp2", "bool", False, (), MEGATRON_FSDP),
    Row("--data-parallel-sharding-strategy", "str", "no_shard", D, MEGATRON_FSDP),
    Row("--outer-dp-sharding-strategy", "str", "no_shard", D, MEGATRON_FSDP),
    Row("--no-gradient-reduce-div-fusion", "bool", True, f"{D}.gradient_reduce_div_fusion", MEGATRON_FSDP,
        "gradient_reduce_div_fusion"),
    Row("--suggested-communication-unit-size", "int | None", None, D, MEGATRON_FSDP),
    Row("--keep-fp8-transpose-cache", "bool", False, D, MEGATRON_FSDP),
    Row("--fsdp-double-buffer", "bool", False, D, MEGATRON_FSDP),
    Row("--fsdp-manual-registration", "bool", False, D, MEGATRON_FSDP),
    Row("--use-nccl-ub", "bool", False, f"{D}.nccl_ub", "Buffers that NCCL has registered"),
    Row("--disable-symmetric-registration", "bool", False, D, "Buffers that NCCL has registered"),
    Row("--ddp-reduce-scatter-with-fp32-accumulation", "bool", False, f"{D}.reduce_scatter_with_fp32_accumulation",
        "Scattered sums in float32 of bfloat16 gradients"),
    Row("--delay-wgrad-compute", "bool", False, (T, D), EP_OVERLAP),
    Row("--overlap-moe-expert-parallel-comm", "bool", False, T, EP_OVERLAP),
    Row("--ep-overlap-early-attn-memory-release", "bool", False, T, EP_OVERLAP),
    Row("--moe-shared-expert-overlap", "bool", False, T, EP_OVERLAP),
    Row("--moe-enable-deepep", "bool", False, T, DEEPEP),
    Row("--moe-flex-dispatcher-backend", "str", "deepep", T, DEEPEP),
    Row("--moe-deepep-num-sms", "int", 20, T, DEEPEP),
    Row("--moe-hybridep-num-sms", "int", 16, T, DEEPEP),
    Row("--moe-extended-tp", "bool", False, T, "Experts divided over all tensor- and expert-parallel processes"),
    Row("--moe-expert-capacity-factor", "float | None", None, T, DROPPING),
    Row("--moe-pad-expert-input-to-capacity", "bool", False, T, DROPPING),
    Row("--moe-token-drop-policy", "str", "probs", T, DROPPING),
    Row("--moe-token-dropping", "bool", False, T, DROPPING),
    Row("--moe-input-jitter-eps", "float | None", None, T, "Noise on the router's input"),
    Row("--moe-router-topk-limited-devices", "int | None", None, T, "Routing that is limited to some devices"),
    Row("--moe-layer-recompute", "bool", False, T, "Recomputing experts under that name (--recompute-modules moe)"),
    Row("--moe-apply-probs-on-input", "bool", False, T, "Weighting the input of experts"),
    Row("--moe-latent-size", "int | None", None, T, "Experts in a latent space"),
    Row("--moe-use-upcycling", "bool", False, (), "Making experts of a dense model"),
    Row("--moe-upcycling-granularity", "int", 1, (), "Making experts of a dense model"),
    Row("--account-for-embedding-in-pipeline-split", "bool", False, T, SPLIT),
    Row("--account-for-loss-in-pipeline-split", "bool", False, T, SPLIT),
    Row("--pipeline-model-parallel-layout", "str | None", None, T, SPLIT),
    Row("--pipeline-model-parallel-comm-backend", "str | None", None, T, "Another library between stages"),
    Row("--overlap-p2p-communication-warmup-flush", "bool", False, f"{T}.overlap_p2p_comm_warmup_flush",
        "Overlapping sends of the pipeline's start and end", "overlap_p2p_comm_warmup_flush"),
    Row("--hierarchical-context-parallel-sizes", "list[int] | None", None, T, "Nested context parallelism"),
    Row("--hybrid-context-parallel", "bool", False, T, "Context parallelism of varying size"),
    Row("--max-seqlen-per-dp-cp-rank", "int | None", None, T, "Context parallelism of varying size"),
    Row("--multi-latent-attention", "bool", False, T, MLA),
    Row("--q-lora-rank", "int | None", None, (), MLA),
    Row("--kv-lora-rank", "int", 32, (), MLA),
    Row("--qk-head-dim", "int", 128, (), MLA),
    Row("--qk-pos-emb-head-dim", "int", 64, (), MLA),
    Row("--v-head-dim", "int", 128, (), MLA),
    Row("--rotary-scaling-factor", "float", 1.0, (), MLA),
    Row("--mscale", "float", 1.0, (), MLA),
    Row("--mscale-all-dim", "float", 0.0, (), MLA),
    Row("--experimental-attention-variant", "str | None", None, T, LINEAR),
    Row("--linear-attention-freq", "str | None", None, T, LINEAR),
    Row("--linear-conv-kernel-dim", "int", 4, T, LINEAR),
    Row("--linear-key-head-dim", "int", 128, T, LINEAR),
    Row("--linear-value-head-dim", "int", 128, T, LINEAR),
    Row("--linear-num-key-heads", "int", 16, T, LINEAR),
    Row("--linear-num-value-heads", "int", 32, T, LINEAR),
    Row("--attention-output-gate", "bool", False, T, "Gated attention"),
    Row("--dsa-indexer-n-heads", "int | None", None, T, INDEXER),
    Row("--dsa-indexer-head-dim", "int | None", None, T, INDEXER),
    Row("--dsa-indexer-topk", "int | None", None, T, INDEXER),
    Row("--dsa-indexer-loss-coeff", "float | None", None, T, INDEXER),
    Row("--dsa-indexer-use-sparse-loss", "bool", False, T, INDEXER),
    Row("--window-size", "str | None", None, T, WINDOWS),
    Row("--window-attn-skip-freq", "str | None", None, T, WINDOWS),
    Row("--softmax-type", "str", "vanilla", T, "Another softmax than the usual one"),
    Row("--qk-l2-norm", "bool", False, T, "Queries and keys of length one"),
    Row("--qk-clip", "bool", False, T, "Clipping of queries and keys"),
    Row("--qk-clip-alpha", "float", 0.5, T, "Clipping of queries and keys"),
    Row("--qk-clip-threshold", "float", 100, T, "Clipping of queries and keys"),
    Row("--log-max-attention-logit", "bool", False, T, "Logging the largest score"),
    Row("--no-rope-freq", "str | None", None, T, "Layers without rotation"),
    Row("--mrope-section", "list[int] | None", None, T, "Rotations of several axes"),
    Row("--glu-linear-offset", "float", 0.0, T, "An offset in the gated MLP"),
    Row("--activation-func-clamp-value", "float | None", None, T, "A clamped activation"),
    Row("--squared-relu", "bool", False, (), "Another activation than SwiGLU"),
    Row("--quick-geglu", "bool", False, (), "Another activation than SwiGLU"),
    Row("--openai-gelu", "bool", False, (), "Another activation than SwiGLU"),
    Row("--use-te-activation-func", "bool", False, T, "Transformer Engine's activations"),
    Row("--use-fused-weighted-squared-relu", "bool", False, T, "Another activation than SwiGLU"),
    Row("--apply-residual-connection-post-layernorm", "bool", False, T, "Residuals of normed states"),
    Row("--embedding-init-method-std", "float | None", None, T, "Random embeddings"),
    Row("--init-model-with-meta-device", "bool", False, T, "Models without memory at first"),
    Row("--disable-bf16-reduced-precision-matmul", "bool", False, T, "Full precision inside bfloat16 products"),
    Row("--fused-single-qkv-rope", "bool", False, T, "One kernel for projection and rotation"),
    Row("--use-kitchen", "bool", False, T, KITCHEN),
    Row("--use-kitchen-attention", "bool", False, T, KITCHEN),
    Row("--kitchen-attention-backend", "str", "sdpa", T, KITCHEN),
    Row("--kitchen-config-file", "str | None", None, (), KITCHEN),
    Row("--te-precision-config-file", "str | None", None, (), QUANTIZED),
    Row("--heterogeneous-layers-config-path", "str | None", None, (), "Layers that differ"),
    Row("--is-hybrid-model", "bool", False, T, MAMBA),
    Row("--mamba-state-dim", "int", 128, T, MAMBA),
    Row("--mamba-head-dim", "int", 64, T, MAMBA),
    Row("--mamba-num-groups", "int", 8, T, MAMBA),
    Row("--mamba-num-heads", "int | None", None, T, MAMBA),
    Row("--disable-mamba-mem-eff-path", "bool", True, f"{T}.use_mamba_mem_eff_path", MAMBA, "use_mamba_mem_eff_path"),
    Row("--flash-decode", "bool", False, T, INFERENCE),
    Row("--inference-rng-tracker", "bool", False, T, INFERENCE),
    Row("--mlp-chunks-for-prefill", "int", 1, T, INFERENCE),
    Row("--symmetric-ar-type", "str | None", None, T, INFERENCE),
    Row("--inference-fuse-tp-communication", "bool", False, T, INFERENCE),
    Row("--batch-invariant-mode", "bool", False, T, "Kernels that do not depend on the batch"),
    Row("--config-logger-dir", "str", "", (T, OPT), "Writing Megatron's settings to a folder"),
    Row("--disable-clone-scatter-output-in-embedding", "bool", True, f"{T}.clone_scatter_output_in_embedding",
        "Embeddings that are not copied", "clone_scatter_output_in_embedding"),
    Row("--encoder-num-layers", "int | None", None, (), "An encoder"),
    Row("--encoder-tensor-model-parallel-size", "int", 0, (), "An encoder"),
    Row("--encoder-pipeline-model-parallel-size", "int", 0, (), "An encoder"),
    Row("--decoder-num-layers", "int | None", None, (), "An encoder"),
    Row("--rerun-mode", "str", "disabled", (), "Running steps again to find errors of the hardware"),
    Row("--enable-ft-package", "bool", False, (), "NVIDIA's fault-tolerance package"),
)  # fmt: skip

MegatronUnbuilt = make_dataclass(
    "MegatronUnbuilt",
    [
        (
            row.name,
            row.type,
            megatron_flag(
                row.default, f"{row.missing.rstrip(',')}.", option=row.option, sets=row.sets,
                status=not_built(row.missing),
            ),
        )
        for row in ROWS
    ],
    bases=(Section,),
    namespace={"__module__": __name__},  # where pickle finds it
    frozen=True,
    kw_only=True,
    init=False,
    repr=False,
    eq=False,
)  # fmt: skip
"""One field per row, in their order."""
