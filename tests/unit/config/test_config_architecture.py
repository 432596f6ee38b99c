"""config.json in the words of Megatron's flags."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_helpers import model_folder, refusal, settings, settings_of_model, value_of

from miles.config import megatron
from miles.config.architecture import ARCHITECTURES


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "has", lambda module: module == "megatron.core")


COMMON = {
    "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2,
    "group_query_attention": True, "kv_channels": 16, "max_position_embeddings": 128, "vocab_size": 53,
    "normalization": "RMSNorm", "norm_epsilon": 1e-6, "swiglu": True, "add_bias_linear": False,
    "position_embedding_type": "rope", "rotary_base": 1e6, "rotary_percent": 1.0, "attention_dropout": 0.0,
    "hidden_dropout": 0.0, "untie_embeddings_and_output_weights": False, "padded_vocab_size": 128,
    "add_qkv_bias": False, "qk_layernorm": False, "num_experts": None,
}  # fmt: skip

OWN = {
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {"add_qkv_bias": True},
    "Qwen3ForCausalLM": {"qk_layernorm": True},
    "Qwen3MoeForCausalLM": {
        "qk_layernorm": True, "num_experts": 4, "moe_layer_freq": 1, "moe_ffn_hidden_size": 32, "moe_router_topk": 2,
        "moe_router_pre_softmax": False, "moe_router_score_function": "softmax",
        "moe_token_dispatcher_type": "alltoall",
    },
}  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_a_model_says(architecture: str, tmp_path: Path) -> None:
    config = settings_of_model(tmp_path, architecture)
    for name, expected in {**COMMON, **OWN[architecture]}.items():
        assert value_of(config, name) == expected, name
    assert config.origins["num_layers"] == "derived"


CHANGED = [
    ("LlamaForCausalLM", {"head_dim": None}, {"kv_channels": 16}),
    ("LlamaForCausalLM", {"num_key_value_heads": ...}, {"num_query_groups": 4, "group_query_attention": False}),
    ("LlamaForCausalLM", {"rope_parameters": ..., "rope_theta": 5e5}, {"rotary_base": 5e5}),
    ("LlamaForCausalLM", {"rope_parameters": ...}, {"rotary_base": 10000}),
    ("LlamaForCausalLM", {"tie_word_embeddings": ...}, {"untie_embeddings_and_output_weights": True}),
    (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
        {"use_rope_scaling": True, "rope_scaling_factor": 32.0},
    ),
    (
        "Qwen2ForCausalLM",
        {"rope_parameters": ..., "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rotary_seq_len_interpolation_factor": 2.0, "rotary_base": 1e4},
    ),
    ("Qwen2ForCausalLM", {"head_dim": 99}, {"kv_channels": 16}),
    ("Qwen3ForCausalLM", {"head_dim": ...}, {"kv_channels": 128}),
    ("Qwen3MoeForCausalLM", {"head_dim": ...}, {"kv_channels": 16}),
    ("Qwen3MoeForCausalLM", {"norm_topk_prob": False}, {"moe_router_pre_softmax": True}),
    ("Qwen3MoeForCausalLM", {"mlp_only_layers": [0]}, {"moe_layer_freq": [0, 1, 1, 1]}),
    ("Qwen3MoeForCausalLM", {"decoder_sparse_step": 2}, {"moe_layer_freq": [0, 1, 0, 1]}),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "changed", "expected"), CHANGED)
def test_numbers_that_are_written_in_several_ways(
    architecture: str, changed: dict[str, object], expected: dict[str, object], tmp_path: Path
) -> None:
    config = settings_of_model(tmp_path, architecture, **changed)
    for name, value in expected.items():
        assert value_of(config, name) == value, name


UNSUPPORTED = [
    (
        "GPT2LMHeadModel",
        {},
        "GPT2LMHeadModel; known are LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3Moe",
    ),
    ("LlamaForCausalLM", {"hidden_act": "gelu"}, "hidden_act 'gelu'; expected 'silu'"),
    ("LlamaForCausalLM", {"attention_bias": True}, "attention_bias: only queries, keys and values can have biases"),
    ("LlamaForCausalLM", {"mlp_bias": True}, "mlp_bias"),
    ("Qwen2ForCausalLM", {"use_sliding_window": True}, "layers with sliding-window attention"),
    ("Qwen3ForCausalLM", {"layer_types": ["sliding_attention"]}, "layers with sliding-window attention"),
    (
        "Qwen3ForCausalLM",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        "rope_type 'yarn'; expected default",
    ),
    (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 2.0}},
        "rope scaling llama3 with high_freq_factor 2.0",
    ),
]


@pytest.mark.parametrize(("architecture", "changed", "sentence"), UNSUPPORTED)
def test_models_that_only_a_provider_can_build(
    architecture: str, changed: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    flags = ["--train-backend", "megatron", "--hf-checkpoint", model_folder(tmp_path, architecture, **changed)]
    text = refusal(*flags)
    assert f"--train-backend megatron cannot train this model: {sentence}" in text
    assert "--custom-model-provider-path" in text and "--train-backend fsdp" in text
    config = settings_of_model(tmp_path, architecture, "--custom-model-provider-path", "my.model", **changed)
    assert config.megatron.num_layers is None  # the provider knows


def test_a_number_that_is_missing(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "LlamaForCausalLM", intermediate_size=...)
    assert "config.json has no intermediate_size." in refusal("--train-backend", "megatron", "--hf-checkpoint", folder)


def test_contradictions_are_named_all_at_once(tmp_path: Path) -> None:
    text = refusal(
        "--train-backend", "megatron", "--hf-checkpoint", model_folder(tmp_path, "Qwen3ForCausalLM"),
        "--hidden-size", "128", "--num-layers", "4", "--norm-epsilon", "1e-5", "--rotary-base", "10000",
        "--untie-embeddings-and-output-weights", "--num-experts", "8",
    )  # fmt: skip
    lines = text.splitlines()
    assert lines[:5] == [
        "--hidden-size 128: config.json says 64",
        "--norm-epsilon 1e-05: config.json says 1e-06",
        "--untie-embeddings-and-output-weights: config.json says false",
        "--num-experts 8: config.json says none",
        "--rotary-base 10000.0: config.json says 1000000.0",
    ]
    assert lines[5].startswith("Leave out what describes the model") and len(lines) == 6


def test_what_agrees_may_be_given_and_what_a_run_may_choose_too(tmp_path: Path) -> None:
    config = settings_of_model(
        tmp_path, "Qwen2ForCausalLM", "--hidden-size", "64", "--swiglu", "--disable-bias-linear", "--add-qkv-bias",
        "--normalization", "RMSNorm", "--group-query-attention", "--num-query-groups", "2", "--rotary-base", "1000000",
        "--position-embedding-type", "rope", "--max-position-embeddings", "64", "--vocab-size", "53",
    )  # fmt: skip
    assert config.megatron.max_position_embeddings == 64
    assert config.origins["hidden_size"] == "command line"


def test_with_fsdp_config_json_fills_nothing(tmp_path: Path) -> None:
    config = settings("--hf-checkpoint", model_folder(tmp_path, "Qwen3ForCausalLM"))
    assert config.megatron.hidden_size is None and config.train.padded_vocab_size is None
