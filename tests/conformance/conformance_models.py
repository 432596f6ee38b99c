"""The two models of the conformance tests, random and tiny: a dense Qwen3 and one with experts, a token per character.

Both are in float32, so that log-probs can be held against Hugging Face's. Random weights with a large deviation have
opinions: greedy answers are no ties. The chat template is plain text, as the tokenizer has no words.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz+=?;.,:| "
SPECIAL = ["<pad>", "<eos>", "<user>", "<assistant>"]
VOCAB = len(CHARACTERS) + len(SPECIAL)
PAD, EOS = 0, 1
CONTEXT = 1024
TEMPLATE = (
    "{% for m in messages %}{{ '<' + ('assistant' if m['role'] == 'assistant' else 'user') + '>' + m['content'] + "
    "'<eos>' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
LAYERS, TOP_K = SHAPE["num_hidden_layers"], EXPERTS["num_experts_per_tok"]


def write_model(folder: Path, kind: str, seed: int) -> Path:
    """`kind` is dense or moe. Returns the Hugging Face folder."""
    torch.manual_seed(seed)
    if kind == "dense":
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    else:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **EXPERTS))
    model.generation_config.eos_token_id = EOS
    model.to(torch.float32).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    vocab = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    # The name under which every version of transformers finds the class.
    text = config.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
    config.write_text(text)


def write_all(root: Path) -> Path:
    """`dense0`, `dense1`, `moe0`, `moe1`: two sets of weights for each model."""
    for kind in ("dense", "moe"):
        for seed in (0, 1):
            if not (root / f"{kind}{seed}" / "config.json").exists():
                write_model(root / f"{kind}{seed}", kind, seed)
    return root
