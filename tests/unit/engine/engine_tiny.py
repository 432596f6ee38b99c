"""Tiny random checkpoints with a character tokenizer, as Hugging Face folders, and a few helpers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from miles.engine.embedded import EmbeddedEngine
from miles.engine.protocol import GenerateRequest, GenerateResult, SamplingParams

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz+=?;., "
SPECIAL = ["<pad>", "<eos>", "<think>", "</think>"]
VOCAB = len(CHARACTERS) + len(SPECIAL)
CONTEXT = 128

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "initializer_range": 0.3,  # random models with opinions, so that greedy answers are not ties
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
ARCHITECTURES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**COMMON)),
    "llama-mha-bias-rope3": (
        LlamaForCausalLM,
        LlamaConfig(**(COMMON | {"num_key_value_heads": 4, "attention_bias": True, "rope_scaling": LLAMA3_ROPE})),
    ),
    "llama-linear": (LlamaForCausalLM, LlamaConfig(**COMMON, rope_scaling={"rope_type": "linear", "factor": 2.0})),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**COMMON, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=True)),
    "qwen3-moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**COMMON, **EXPERTS, norm_topk_prob=True)),
    "qwen3-moe-mixed": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**(COMMON | EXPERTS | {"num_hidden_layers": 3, "num_experts_per_tok": 3}), mlp_only_layers=[1]),
    ),
    "qwen3-yarn": (Qwen3ForCausalLM, Qwen3Config(**COMMON, head_dim=8, rope_scaling=YARN_ROPE)),
}


REQUEST_FIELDS = ("logprob_start_len", "return_text_in_logprobs", "return_routed_experts")


def save_tokenizer(folder: Path) -> None:
    vocab = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<think>", "</think>"],
    )
    fast.save_pretrained(folder)


def make_checkpoint(folder: Path, kind: str = "qwen3", seed: int = 0) -> Path:
    model_class, config = ARCHITECTURES[kind]
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def request(ids: list[int], rid: str | None = None, **options: object) -> GenerateRequest:
    """A request with log-probs; options are sampling parameters, or fields of the request."""
    own = {name: options.pop(name) for name in REQUEST_FIELDS if name in options}
    own |= {"rid": rid} if rid else {}
    return GenerateRequest(
        input_ids=ids, return_logprob=True, sampling_params=SamplingParams.from_payload(options), **own
    )


async def generate_all(engine: EmbeddedEngine, requests: list[GenerateRequest]) -> list[GenerateResult]:
    return list(await asyncio.gather(*(engine.generate(r) for r in requests)))


def run_all(engine: EmbeddedEngine, requests: list[GenerateRequest]) -> list[GenerateResult]:
    return asyncio.run(generate_all(engine, requests))
