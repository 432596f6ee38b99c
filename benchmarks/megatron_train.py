"""The megatron backend beside the fsdp backend: tokens per second of forward and backward passes, in one process.

    python benchmarks/megatron_train.py [--samples 64] [--threads 2] [--rounds 5]

Both sides train the same Qwen3 on the same packed micro batches (groups of eight samples that share a prompt,
log-normal response lengths), with log-probs at response positions; no optimizer step is taken. They take turns in one
process, and the ratio is the median over the rounds. On a CPU the model has 1M parameters in float32; on a GPU 0.4
billion in bfloat16.

The losses of both must agree.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.utils.logging import disable_progress_bar

from miles.batch import PackedBatch, TrainBatch, by_tokens, from_published_dict, pack
from miles.config import parse
from miles.hooks import bind
from miles.run.host import keep_freed_memory
from miles.trainer.backend import Backend, MicroLoss, ModelOutput
from miles.trainer.fsdp.backend import FsdpBackend
from miles.trainer.models import Models
from miles.trainer.ranks import Ranks, own_device

GOAL = 0.7
GROUP = 8
SMALL = {
    "vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "intermediate_size": 384, "max_position_embeddings": 2048,
}  # fmt: skip
LARGE = {
    "vocab_size": 32768, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "max_position_embeddings": 8192,
}  # fmt: skip


def make_model(folder: str, device: torch.device) -> None:
    torch.manual_seed(0)
    on_cpu = device.type == "cpu"
    config = Qwen3Config(**(SMALL if on_cpu else LARGE), tie_word_embeddings=True)
    dtype = torch.float32 if on_cpu else torch.bfloat16
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)


def make_batch(samples: int, device: torch.device) -> TrainBatch:
    random = np.random.default_rng(0)
    vocabulary, middle, longest = (2048, 96, 1024) if device.type == "cpu" else (32768, 512, 4096)
    responses = np.exp(random.normal(np.log(middle), 0.8, samples)).astype(int).clip(4, longest).tolist()
    prompts = [random.integers(0, vocabulary, middle // 2).tolist() for _ in range(-(-samples // GROUP))]
    of_sample = [prompts[i // GROUP] for i in range(samples)]
    return from_published_dict(
        {
            "tokens": [p + random.integers(0, vocabulary, n).tolist() for p, n in zip(of_sample, responses)],
            "response_lengths": responses,
            "loss_masks": [[1] * n for n in responses],
        }
    )


def make_backends(folder: str, rendezvous: Path, device: torch.device) -> dict[str, Backend]:
    flags = ["--hf-checkpoint", folder, "--num-rollout", "1", "--rollout-batch-size", "1", "--global-batch-size", "1"]
    config, args = parse([*flags, "--prompt-data", "none", "--rm-type", "math", "--train-backend", "megatron"])
    ranks = Ranks.join(
        0, 1, rendezvous, backend="nccl" if device.type == "cuda" else "gloo", cpu_backend="gloo", timeout_s=60,
        device=device.type,
    )  # fmt: skip
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return {
        "fsdp": FsdpBackend(folder, config.train, config.optimizer, dtype=dtype),
        "megatron": Models(config, args, bind(args), ranks).actor,
    }


def passes(backend: Backend, micros: Sequence[PackedBatch]) -> float:
    """The loss; the gradients stay where they are."""

    def loss(micro: PackedBatch, output: ModelOutput) -> MicroLoss:
        current = output.log_probs(micro, temperature=1.0, with_entropy=True, chunk_tokens=None)
        assert current.entropy is not None
        return MicroLoss(-(current.log_probs.sum() + 0.01 * current.entropy.sum()) / 1e4, {})

    backend.zero_grad()
    return sum(float(result.loss) for result in backend.forward_backward(micros, loss))


def seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    keep_freed_memory()
    device = own_device()
    budget = 4096 if device.type == "cpu" else 16384
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, device)
        backends = make_backends(folder, Path(folder) / "store", device)
        batch = make_batch(options.samples, device)
        rows = np.arange(len(batch))
        micros = [
            pack(batch, part, device=device, share_prompts=True)
            for part in by_tokens(rows, batch.total_lengths, budget)
        ]
        losses = {name: passes(backend, micros) for name, backend in backends.items()}
        times: dict[str, list[float]] = {name: [] for name in backends}
        for _ in range(options.rounds):
            for name, backend in backends.items():
                times[name].append(seconds(lambda backend=backend: passes(backend, micros), device))
    tokens = int(batch.total_lengths.sum())
    ratio = median(f / m for f, m in zip(times["fsdp"], times["megatron"], strict=True))
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{options.threads} threads"
    print(f"{tokens} tokens in {len(micros)} micro batches, {where}")
    for name, spent in times.items():
        print(f"  {name:9} {tokens / median(spent):>10.0f} tokens/s   loss {losses[name]:.6f}")
    print(f"  megatron / fsdp, tokens per second: {ratio:.2f} (goal {GOAL})")
    difference = abs(losses["fsdp"] - losses["megatron"]) / abs(losses["fsdp"])
    assert difference < (1e-5 if device.type == "cpu" else 1e-2), f"losses differ by {difference}"
    return 0 if ratio >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
