"""What config.json of a checkpoint says in the words of Megatron's flags.

`flags_of_model` reads one architecture after another from a table; what it cannot say in Megatron's words is refused.
`fill_architecture` puts the values into a draft, and refuses explicit flags that contradict them, all at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from miles.config import model_folder
from miles.config.draft import Draft
from miles.errors import FlagError

Numbers = dict[str, Any]
"""config.json as it was read."""

DEFAULT_ROPE_THETA = 10000.0
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron-Core takes for granted about the rotary scaling of Llama 3.1."""


class Unsupported(Exception):
    """A value of config.json that no flag of Megatron can say. The message is the end of a sentence."""


# ---- one architecture after another --------------------------------------------------------------------------------


def _decoder(c: Numbers) -> dict[str, Any]:
    """What Llama, Qwen2 and Qwen3 have in common."""
    heads = c["num_attention_heads"]
    groups = c.get("num_key_value_heads") or heads
    if c.get("hidden_act", "silu") != "silu":
        raise Unsupported(f"hidden_act {c['hidden_act']!r}; expected 'silu'")
    for name in ("attention_bias", "mlp_bias"):
        if c.get(name):
            raise Unsupported(f"{name}: only queries, keys and values can have biases, as in Qwen2")
    if c.get("use_sliding_window") or "sliding_attention" in (c.get("layer_types") or ()):
        raise Unsupported("layers with sliding-window attention")
    return {
        "num_layers": c["num_hidden_layers"],
        "hidden_size": c["hidden_size"],
        "ffn_hidden_size": c["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "group_query_attention": groups != heads,
        "kv_channels": c.get("head_dim") or c["hidden_size"] // heads,
        "max_position_embeddings": c.get("max_position_embeddings"),
        "vocab_size": c["vocab_size"],
        "normalization": "RMSNorm",
        "norm_epsilon": c.get("rms_norm_eps", 1e-6),
        "apply_layernorm_1p": False,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "untie_embeddings_and_output_weights": not c.get("tie_word_embeddings", False),
        "attention_dropout": c.get("attention_dropout", 0.0),
        "hidden_dropout": 0.0,
        "num_experts": None,
        "position_embedding_type": "rope",
        "rotary_interleaved": False,
        **_rotary(c),
    }


def _rotary(c: Numbers) -> dict[str, Any]:
    """transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling."""
    rope = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    values = {
        "rotary_base": rope.get("rope_theta") or c.get("rope_theta") or DEFAULT_ROPE_THETA,
        "rotary_percent": rope.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1.0,
        "use_rope_scaling": False,
        "rotary_seq_len_interpolation_factor": None,
    }
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "llama3":
        differing = [name for name, value in LLAMA3_SCALING.items() if rope.get(name, value) != value]
        if differing:
            raise Unsupported(f"rope scaling llama3 with {', '.join(f'{n} {rope[n]}' for n in differing)}")
        return values | {"use_rope_scaling": True, "rope_scaling_factor": float(rope.get("factor", 8.0))}
    if kind == "linear":
        return values | {"rotary_seq_len_interpolation_factor": float(rope["factor"])}
    if kind != "default":
        raise Unsupported(f"rope_type {kind!r}; expected default, linear or llama3")
    return values


def _llama(c: Numbers) -> dict[str, Any]:
    return _decoder(c)


def _qwen2(c: Numbers) -> dict[str, Any]:
    # head_dim and attention_bias are no settings of it: the width follows from the heads, the biases are always there.
    own = {k: v for k, v in c.items() if k not in ("head_dim", "attention_bias")}
    return _decoder(own) | {"add_qkv_bias": True}


def _qwen3(c: Numbers) -> dict[str, Any]:
    return _decoder({"head_dim": 128} | c) | {"qk_layernorm": True}


def _qwen3_moe(c: Numbers) -> dict[str, Any]:
    layers, dense, step = range(c["num_hidden_layers"]), c.get("mlp_only_layers") or (), c.get("decoder_sparse_step", 1)
    sparse = [int(i not in dense and (i + 1) % step == 0) for i in layers]
    return (
        _decoder(c)
        | {
            "qk_layernorm": True,
            # transformers 5 writes the second name, earlier versions the first.
            "num_experts": c["num_experts"] if "num_experts" in c else c["num_local_experts"],
            "moe_layer_freq": 1 if all(sparse) else sparse,
            "moe_ffn_hidden_size": c["moe_intermediate_size"],
            "moe_router_topk": c["num_experts_per_tok"],
            # Weights of the chosen experts that sum to one are a softmax over their logits alone.
            "moe_router_pre_softmax": not c.get("norm_topk_prob", False),
            "moe_router_score_function": "softmax",
            "moe_shared_expert_intermediate_size": None,
        }
    )  # fmt: skip


ARCHITECTURES: dict[str, Callable[[Numbers], dict[str, Any]]] = {
    "LlamaForCausalLM": _llama,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
}
"""Name in config.json -> its reader."""

FREE = {"hidden_dropout", "attention_dropout", "max_position_embeddings", "group_query_attention"}
"""What a run may choose otherwise than config.json says; the weights stay the same."""


def flags_of_model(config: Numbers) -> dict[str, Any]:
    """Values of Megatron's flags by name; None where config.json says that there is no such thing.

    Raises Unsupported for what Megatron's flags cannot say, KeyError for a number that is missing.

    Example: `flags_of_model({"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 2, ...})["num_layers"] == 2`
    """
    name = _architecture(config)
    if name not in ARCHITECTURES:
        raise Unsupported(f"{name}; known are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name](config)


def _architecture(config: Numbers) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "no architecture"


# ---- into the draft ------------------------------------------------------------------------------------------------


def fill_architecture(draft: Draft) -> None:
    """Fill the flags that describe the model; refuse those that contradict the checkpoint."""
    folder = draft["hf_checkpoint"]
    config = model_folder.config_of(folder) if folder is not None else None
    if config is None:
        return
    try:
        values = flags_of_model(config)
    except KeyError as error:
        raise FlagError(f"--hf-checkpoint {folder}", given=f"config.json has no {error.args[0]}.") from None
    except Unsupported as unsupported:
        if draft["custom_model_provider_path"] is not None:
            return
        raise FlagError(
            f"--hf-checkpoint {folder}",
            given=f"--train-backend megatron cannot train this model: {unsupported}.",
            remedy="Give a --custom-model-provider-path that builds it, or use --train-backend fsdp.",
        ) from None
    _refuse_contradictions(draft, values, folder)
    for name, value in values.items():
        if not draft.given(name):
            draft.derive(name, value)


def _refuse_contradictions(draft: Draft, values: dict[str, Any], folder: str) -> None:
    wrong = [
        f"{draft.shown(name)}: config.json says {'none' if value is None else json.dumps(value)}"
        for name, value in values.items()
        if draft.given(name) and name not in FREE and draft[name] != value
    ]
    if wrong:
        flag_text, _, rest = "\n".join(wrong).partition(": ")
        raise FlagError(flag_text, given=f"{rest}\nLeave out what describes the model: it is read from {folder}.")
