"""Weights of a Megatron-Core model under Hugging Face names, beside a plain copy of the same bytes in memory.

    python benchmarks/megatron_weights.py [--threads 1] [--rounds 7]

Two models of about 100M parameters in bfloat16, one dense (Qwen3) and one with experts (Qwen3-MoE, experts stacked as
the embedded engine reads them), in one process on the CPU. `export` takes every bucket (512 MiB) of an `Exporter` and
drops it; what can be a view of the parameters is one. `taken over` is the same and then a copy of every tensor into
memory that is there, as an engine in another process gets them. The plain copy is `copy_` of one tensor of as many
bytes into memory that is there. All take turns in one process with the allocator of a training process; each figure is
the best of its rounds, in GB of weights per second.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from miles.config import parse
from miles.run.host import keep_freed_memory
from miles.trainer.ranks import Ranks

BUCKET_BYTES = 512 << 20
GOAL = 0.5

COMMON: dict[str, Any] = {
    "vocab_size": 32_000, "hidden_size": 640, "head_dim": 64, "num_attention_heads": 10, "num_key_value_heads": 5,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
MODELS: dict[str, PretrainedConfig] = {
    "dense": Qwen3Config(**COMMON, intermediate_size=1920, num_hidden_layers=12, architectures=["Qwen3ForCausalLM"]),
    "experts": Qwen3MoeConfig(
        **COMMON, intermediate_size=1920, num_hidden_layers=6, num_experts=16, num_experts_per_tok=2,
        moe_intermediate_size=320, mlp_only_layers=[], architectures=["Qwen3MoeForCausalLM"],
    ),
}  # fmt: skip


def best(rounds: int, passes: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Seconds of each, taking turns."""
    found = dict.fromkeys(passes, float("inf"))
    for _ in range(rounds):
        for name, once in passes.items():
            begin = time.perf_counter()
            once()
            found[name] = min(found[name], time.perf_counter() - begin)
    return found


def build(folder: Path, ranks: Ranks) -> tuple[nn.Module, Any]:
    """A model of the megatron backend with any weights, in bfloat16, and its TransformerConfig."""
    from megatron.core import parallel_state as mpu
    from transformers import AutoConfig

    from miles.trainer.megatron.model import Vocabulary, chunks, own_provider
    from miles.trainer.megatron.ranks import make_groups
    from miles.trainer.megatron.settings import MegatronSettings

    flags = ["--hf-checkpoint", str(folder), "--num-rollout", "1", "--rollout-batch-size", "1", "--prompt-data", "none"]
    config, _ = parse([*flags, "--global-batch-size", "1", "--rm-type", "math", "--train-backend", "megatron"])
    settings, hf_config, device = MegatronSettings.of(config), AutoConfig.from_pretrained(folder), torch.device("cpu")
    mpu.destroy_model_parallel()
    make_groups(ranks, settings.layout, seed=0, timeout_minutes=1)
    transformer = settings.transformer_config(hf_config, device)
    vocabulary = Vocabulary.of(hf_config.vocab_size, tensor=1, padded=settings.padded_vocab_size)
    provider = own_provider(transformer, hf_config, vocabulary)
    [chunk] = chunks(transformer, provider, role="actor", seed=0, device=device)
    return chunk.bfloat16(), transformer


def measure(chunk: nn.Module, config: Any, folder: Path, rounds: int) -> tuple[int, dict[str, float]]:
    """Bytes of the weights, and seconds per way."""
    from miles.trainer.megatron.convert import Exporter

    exporter = Exporter(folder, [chunk], config, experts="stacked")
    layout = exporter.layout()
    engine = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
    size = sum(t.numel() * t.element_size() for t in engine.values())
    source, target = torch.zeros(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)

    def export() -> None:
        for _ in exporter.buckets(BUCKET_BYTES):
            pass

    def take_over() -> None:
        for bucket in exporter.buckets(BUCKET_BYTES):
            for name, tensor in bucket.items():
                engine[name].copy_(tensor)

    def copy() -> Tensor:
        return target.copy_(source)

    found = best(rounds, {"plain copy": lambda: (copy(), None)[1], "export": export, "taken over": take_over})
    return size, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    keep_freed_memory()
    worst = float("inf")
    with tempfile.TemporaryDirectory() as name:
        ranks = Ranks.join(
            0, 1, Path(name) / "store", backend="gloo", cpu_backend="gloo", timeout_s=60, device="cpu"
        )
        torch.set_num_threads(options.threads)
        for kind, hf_config in MODELS.items():
            folder = Path(name) / kind
            hf_config.save_pretrained(folder)
            chunk, transformer = build(folder, ranks)
            size, seconds = measure(chunk, transformer, folder, options.rounds)
            rates = {way: size / s / 1e9 for way, s in seconds.items()}
            ratio = rates["export"] / rates["plain copy"]
            worst = min(worst, ratio)
            print(
                f"{kind:8} {size / 2e6:5.0f}M parameters   "
                + "   ".join(f"{way} {rate:6.1f} GB/s" for way, rate in rates.items())
                + f"   export : copy {ratio:.2f}   taken over : copy {rates['taken over'] / rates['plain copy']:.2f}"
            )
        ranks.leave()
    verdict = "reached" if worst >= GOAL else "missed"
    print(f"\nexport at least {GOAL} of the memory-copy bandwidth: {verdict} ({worst:.2f})")
    return 0 if worst >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
