"""Megatron's flags against the dataclasses of the Megatron-Core that is installed: every field, every default."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from miles.config.flags import Flag
from miles.config.sections import FLAGS

TARGETS = [(flag, target) for flag in FLAGS.values() for target in flag.sets]

WITHOUT_FLAG: dict[str, set[str]] = {
    "functions and objects, which no flag can name": {
        *("timers", "finalize_model_grads_func", "grad_scale_func", "no_sync_func", "grad_sync_func"),
        *("param_sync_func", "init_method", "output_layer_init_method", "embedding_init_method", "activation_func"),
        *("quant_recipe", "_cpu_offloading_context"),
    },
    "what the backend works out from other flags": {
        *("params_dtype", "pipeline_dtype", "autocast_dtype", "enable_autocast", "variable_seq_lengths"),
        *("calculate_per_token_loss", "moe_enable_routing_replay", "attention_backend", "overlap_p2p_comm"),
        *("batch_p2p_comm", "batch_p2p_sync", "deallocate_pipeline_outputs", "perform_initialization"),
        *("attention_softmax_in_fp32", "masked_softmax_fusion", "persist_layer_norm", "check_for_nan_in_grad"),
        *("softmax_scale", "cpu_offloading", "cpu_offloading_activations", "cpu_offloading_weights"),
        *("cpu_offloading_double_buffering", "use_inference_optimized_layers", "test_mode", "mtp_standalone"),
        *("fp16", "apply_query_key_layer_scaling", "mtp_num_layers", "mtp_loss_scaling_factor"),
        *("barrier_with_L1_time", "decoupled_weight_decay", "store_param_remainders", "preserve_fp32_weights"),
        "fp8_recipe",  # of the optimizer: None without fp8
    },
    "without an option in Megatron's launch parser": {
        *("async_tensor_model_parallel_allreduce", "num_microbatches_with_partial_activation_checkpoints"),
        *("tp_comm_atomic_ag", "tp_comm_atomic_rs", "tp_comm_overlap_disable_qkv", "tp_comm_overlap_disable_fc1"),
        *("use_ring_exchange_p2p", "activation_func_fp8_input_store", "fp8_dot_product_attention"),
        *("fp8_multi_head_attention", "tp_only_amax_red", "cuda_graph_use_single_mempool"),
        *("cuda_graph_retain_backward_graph", "disable_parameter_transpose_cache", "inference_sampling_seed"),
        *("heterogeneous_block_specs", "hetereogenous_dist_checkpoint"),
    },
}
"""Why -> fields of Megatron-Core that no flag sets."""


@pytest.fixture(scope="module")
def fields() -> dict[str, dict[str, Any]]:
    """Class -> field -> default, with torch's types and Megatron's enumerations as their text."""
    pytest.importorskip("megatron.core")
    from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
    from megatron.core.optimizer.optimizer_config import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    return {
        cls.__name__: {f.name: _default(f) for f in dataclasses.fields(cls)}
        for cls in (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig)
    }


def _default(field: Any) -> Any:
    value = field.default_factory() if field.default is dataclasses.MISSING else field.default
    return {"torch.float32": "fp32"}.get(str(value), value)


@pytest.mark.parametrize(("flag", "target"), TARGETS, ids=[f"{f.option}-{t}" for f, t in TARGETS])
def test_a_flag_has_the_default_of_its_field_or_says_why_not(
    flag: Flag, target: str, fields: dict[str, dict[str, Any]]
) -> None:
    owner, _, name = target.partition(".")
    assert name in fields[owner], f"{owner} has no {name}"
    agrees = flag.default == fields[owner][name] or (flag.default is None and fields[owner][name] in (None, 0))
    # One default may agree with one class and deviate from another: OptimizerConfig.bf16, TransformerConfig.bf16.
    if len(flag.sets) == 1:
        assert agrees != bool(flag.deviates), f"{flag.default!r} here, {fields[owner][name]!r} there"
    else:
        assert agrees or flag.deviates


def test_every_field_has_a_flag_or_a_reason(fields: dict[str, dict[str, Any]]) -> None:
    set_by_flags = {target for _, target in TARGETS}
    reasons = [name for names in WITHOUT_FLAG.values() for name in names]
    assert len(reasons) == len(set(reasons))
    missing = {f"{owner}.{name}" for owner, names in fields.items() for name in names} - set_by_flags
    assert {m.partition(".")[2] for m in missing} - set(reasons) == set()
    everything = {name for names in fields.values() for name in names}
    assert set(reasons) <= everything  # a field that is gone is gone from the table


def test_a_reason_is_given_only_where_there_is_a_field() -> None:
    assert not [flag.option for flag in FLAGS.values() if flag.deviates and not flag.sets]


def test_a_model_of_the_table_can_be_built(fields: dict[str, dict[str, Any]], tmp_path: Any) -> None:
    """What `overrides` yields is what the dataclasses take."""
    from config_helpers import settings_of_model
    from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
    from megatron.core.optimizer.optimizer_config import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = settings_of_model(
        tmp_path, "Qwen3MoeForCausalLM", "--tensor-model-parallel-size", "2", "--sequence-parallel",
        "--expert-model-parallel-size", "2", "--recompute-granularity", "full", "--recompute-method", "uniform",
        "--recompute-num-layers", "1", "--overlap-grad-reduce", "--no-bf16", "--lr", "1e-4", "--weight-decay", "0.1",
    )  # fmt: skip
    model = TransformerConfig(**config.overrides("TransformerConfig"))
    assert (model.num_layers, model.num_moe_experts, model.moe_ffn_hidden_size, model.kv_channels) == (4, 4, 32, 16)
    assert model.layernorm_epsilon == 1e-6 and model.gated_linear_unit and not model.add_bias_linear
    optimizer = OptimizerConfig(**config.overrides("OptimizerConfig"))
    assert (optimizer.lr, optimizer.weight_decay, optimizer.adam_beta2, optimizer.use_distributed_optimizer) == (
        1e-4, 0.1, 0.95, True,
    )  # fmt: skip
    assert DistributedDataParallelConfig(**config.overrides("DistributedDataParallelConfig")).overlap_grad_reduce
