"""What Megatron layouts are compared on: the rollout of `parallel_cases` in three optimizer steps, a table of cases.

Started as a program it is one rank: `megatron_cases.py RANK SIZE FOLDER` runs every case of its size and leaves what
came out as `<FOLDER>/<case>.pt`, written by rank 0.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron_models import FAMILIES, MOE, forget, make_folder
from parallel_cases import FLAGS, ONE_BY_ONE, REFERENCE, STEPS, Lines, Trace, rollout
from torch import Tensor

from miles.backends.training_utils.loss import get_log_probs_and_entropy
from miles.batch import TrainBatch, split_batch
from miles.config import RunConfig, parse
from miles.hooks import bind
from miles.loss.parallel_state import ParallelState
from miles.loss.reduce import Reducer
from miles.observe.tracking import Tracker
from miles.trainer.backend import Backend
from miles.trainer.models import Models
from miles.trainer.ranks import Ranks
from miles.trainer.schedule import schedule_of

LAYERS, EXPERTS, TOP_K = MOE["num_hidden_layers"], MOE["num_experts"], MOE["num_experts_per_tok"]

FEW_TOKENS = ("--use-dynamic-batch-size", "--max-tokens-per-gpu", "40")
TWO = ("--micro-batch-size", "2")

MEGATRON = ("--train-backend", "megatron", "--distributed-timeout-minutes", "2")
FSDP = ("--train-backend", "fsdp", "--micro-batch-size", "64")


def tp(size: int, *, sequence: bool = False) -> tuple[str, ...]:
    return ("--tensor-model-parallel-size", str(size), *(["--sequence-parallel"] if sequence else []))


def pp(size: int, virtual: int | None = None) -> tuple[str, ...]:
    more = ["--num-virtual-stages-per-pipeline-rank", str(virtual)] if virtual else []
    return ("--pipeline-model-parallel-size", str(size), *more)


def cp(size: int) -> tuple[str, ...]:
    return ("--context-parallel-size", str(size))


def ep(size: int) -> tuple[str, ...]:
    return ("--expert-model-parallel-size", str(size), "--expert-tensor-parallel-size", "1")


FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
SELECTIVE = ("--recompute-granularity", "selective")
PADDED = ("--qkv-format", "bshd")
R2, R3 = ("--use-routing-replay",), ("--use-rollout-routing-replay",)
PPO = ("--advantage-estimator", "ppo", "--kl-coef", "0.1", "--critic-lr", "1e-2", *REFERENCE)
KL = ("--use-kl-loss", "--kl-loss-coef", "0.1", *REFERENCE)
GSPO = ("--advantage-estimator", "gspo", "--use-opsm", "--opsm-delta", "0.02")
CUSTOM = ("--loss-type", "custom_loss", "--custom-loss-function-path", f"{__file__}:published_loss")


@dataclass(frozen=True)
class Case:
    """`layout` and `split` are Megatron's alone; `flags` hold for the run that it is compared with, too."""

    size: int
    model: str = "qwen3"
    layout: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    split: tuple[str, ...] = FEW_TOKENS
    bound: float = 1e-5


CASES: dict[str, Case] = {
    # every model, as Hugging Face has it
    **{name: Case(1, name) for name in FAMILIES},
    # what one process can do
    "plain optimizer": Case(1, layout=("--no-use-distributed-optimizer",)),
    "recomputed": Case(1, layout=FULL),
    "recomputed in part": Case(1, layout=SELECTIVE, flags=("--recompute-loss-function",)),
    "padded rows": Case(1, layout=PADDED, split=TWO),
    "padded rows, custom loss": Case(1, layout=PADDED, flags=CUSTOM, split=TWO),
    "custom loss": Case(1, flags=CUSTOM),
    "bfloat16": Case(1, layout=("--bf16",), bound=0.1),
    "kl loss": Case(1, flags=KL),
    "old actor": Case(1, flags=("--keep-old-actor",)),
    "ppo": Case(1, flags=PPO),
    "sft": Case(1, flags=("--loss-type", "sft_loss", "--disable-compute-advantages-and-returns")),
    "record": Case(1, "moe and dense", flags=R2),
    "replay": Case(1, "moe and dense", FULL, R3),
    # two
    "tp": Case(2, layout=tp(2)),
    "tp tied": Case(2, "qwen3 tied", tp(2)),
    "tp llama": Case(2, "llama tied", tp(2)),
    "tp qwen2": Case(2, "qwen2", tp(2, sequence=True)),
    "sp": Case(2, layout=tp(2, sequence=True)),
    "sp recomputed": Case(2, layout=(*tp(2, sequence=True), *FULL)),
    "sp padded rows": Case(2, layout=(*tp(2, sequence=True), *PADDED), split=TWO),
    "sp entropy, tis": Case(2, layout=tp(2, sequence=True), flags=("--entropy-coef", "0.01", "--use-tis")),
    "tp custom loss": Case(2, layout=tp(2), flags=CUSTOM),
    "sp ppo": Case(2, layout=tp(2, sequence=True), flags=PPO),
    "pp": Case(2, layout=pp(2)),
    "pp tied": Case(2, "qwen3 tied", pp(2)),
    "pp one by one": Case(2, layout=pp(2), split=ONE_BY_ONE),
    "pp ppo": Case(2, "qwen3 tied", pp(2), PPO),
    "pp kl loss": Case(2, layout=pp(2), flags=KL),
    "pp custom loss": Case(2, layout=pp(2), flags=CUSTOM),
    "vpp": Case(2, layout=pp(2, 2)),
    "vpp tied, recomputed": Case(2, "qwen3 tied", (*pp(2, 2), *FULL)),
    "dp": Case(2),
    "dp plain optimizer": Case(2, layout=("--no-use-distributed-optimizer",)),
    "dp overlapped": Case(2, layout=("--overlap-grad-reduce", "--overlap-param-gather"), split=ONE_BY_ONE),
    "dp whitened": Case(2, flags=("--advantage-estimator", "reinforce_plus_plus_baseline", "--normalize-advantages")),
    "dp per token": Case(2, flags=("--calculate-per-token-loss",)),
    "cp": Case(2, layout=cp(2)),
    "cp one by one": Case(2, layout=cp(2), split=ONE_BY_ONE),
    "cp gspo, opsm": Case(2, layout=cp(2), flags=GSPO),
    "cp ppo": Case(2, layout=cp(2), flags=PPO),
    "cp custom loss": Case(2, layout=cp(2), flags=CUSTOM),
    "cp per token": Case(2, "qwen2", cp(2), ("--calculate-per-token-loss", "--entropy-coef", "0.01")),
    "ep": Case(2, "moe", ep(2)),
    "ep plain optimizer": Case(2, "moe", (*ep(2), "--no-use-distributed-optimizer"), split=ONE_BY_ONE),
    "ep replay": Case(2, "moe", ep(2), R3),
    "ep record": Case(2, "moe", ep(2), R2),
    "sp moe": Case(2, "moe", tp(2, sequence=True)),
    "sp replay": Case(2, "moe and dense", (*tp(2, sequence=True), *FULL), R3),
    "sp record": Case(2, "moe", tp(2, sequence=True), R2),
    "cp replay": Case(2, "moe", cp(2), R3),
    "cp record": Case(2, "moe and dense", cp(2), R2),
    "pp replay": Case(2, "moe and dense", pp(2), R3),
    "pp record": Case(2, "moe", (*pp(2), *FULL), R2),
    "vpp replay": Case(2, "moe and dense", (*pp(2, 2), *FULL), R3),
    # four
    "sp x dp": Case(4, layout=tp(2, sequence=True)),
    "tp x pp": Case(4, "qwen3 tied", (*tp(2), *pp(2))),
    "tp x cp": Case(4, layout=(*tp(2, sequence=True), *cp(2))),
    "pp x cp": Case(4, layout=(*pp(2), *cp(2))),
    "sp x vpp": Case(4, "llama", (*tp(2, sequence=True), *pp(2, 2))),
    "cp x dp": Case(4, layout=cp(2), flags=KL),
    "pp x dp ppo": Case(4, layout=pp(2), flags=PPO),
    "tp 4": Case(4, "llama tied", tp(4, sequence=True)),
    "sp x ep": Case(4, "moe", (*tp(2, sequence=True), *ep(2)), R3),
    "pp x ep": Case(4, "moe and dense", (*pp(2), *ep(2)), R3),
    "cp x ep": Case(4, "moe", (*cp(2), *ep(2)), R2),
}


def published_loss(
    args: Namespace, parallel_state: ParallelState, batch: dict[str, Any], logits: Tensor, reduce: Reducer
) -> tuple[Tensor, dict[str, Tensor]]:
    """A policy loss in published style: the helpers take care of what is cut where."""
    found = get_log_probs_and_entropy(
        logits,
        args=args,
        parallel_state=parallel_state,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=True,
        max_seq_lens=batch["max_seq_lens"],
    )
    now, old = torch.cat(found["log_probs"]), torch.cat(batch["log_probs"])
    loss = reduce(-torch.exp(now - old) * torch.cat(batch["advantages"])) - 0.01 * reduce(torch.cat(found["entropy"]))
    return loss + 0 * logits.sum(), {"loss": loss.detach(), "ratio": reduce(torch.exp(now - old)).detach()}


def batch_of(config: RunConfig) -> TrainBatch:
    """The rollout, with experts of an engine where they are replayed."""
    batch = rollout("mixed")
    if config.algorithm.use_rollout_routing_replay:
        rng = np.random.default_rng(3)
        sizes = (config.megatron.num_layers or LAYERS, TOP_K)
        batch.rollout_routed_experts = [
            np.stack([rng.permuted(np.tile(np.arange(EXPERTS), (LAYERS, 1)), axis=1)[:, :TOP_K] for _ in range(n - 1)])
            .astype(np.int32)
            for n in batch.total_lengths.tolist()
        ]
        assert batch.rollout_routed_experts[0].shape[1:] == sizes
    return batch


def run(case: Case, folder: Path, ranks: Ranks | None) -> Trace:
    """Train with Megatron on these ranks, or with fsdp in this process where there are none."""
    backend = FSDP if ranks is None else (*MEGATRON, *case.layout, *case.split)
    flags = [word.format(reference=folder / f"{case.model} reference") for word in case.flags]
    size = 1 if ranks is None else case.size
    place = ("--hf-checkpoint", str(folder / case.model), "--actor-num-gpus-per-node", str(size))
    config, args = parse([*without_backend(FLAGS), *backend, *place, *flags])
    trace = Trace()
    hooks = bind(args)
    models = Models(config, args, hooks, ranks)
    schedule = schedule_of(config.optimizer, STEPS)
    tracker = Tracker(sinks=[Lines(trace)])
    actor = models.trainer(args, hooks, tracker, schedule, transport=None, on_step=lambda: None)
    data = config.data
    shards = split_batch(batch_of(config), config.layout.dp_size, balance=data.balance_data)
    actor.train_shards(0, shards, data.global_batch_size or 0)
    trace.weights = whole(actor.backend)
    if ranks is not None:
        forget([*models.actor.model_chunks, *(models.critic.model_chunks if models.critic is not None else ())])
    return trace


def whole(backend: Backend) -> dict[str, Tensor]:
    """The weights in whole tensors, on rank 0."""
    buckets = backend.weights().buckets(9000)
    return {name: tensor.detach().clone() for bucket in buckets for name, tensor in bucket.items()}


def without_backend(flags: list[str]) -> list[str]:
    at = flags.index("--train-backend")
    return flags[:at] + flags[at + 2 :]


def make_models(folder: Path) -> None:
    for model in FAMILIES:
        make_folder(folder / model, model)
        make_folder(folder / f"{model} reference", model, seed=1)


def main(rank: int, size: int, folder: Path, names: list[str]) -> None:
    from megatron.core import parallel_state as mpu

    torch.set_num_threads(1)
    ranks = Ranks.join(
        rank, size, folder / f"store{size}", backend="gloo", cpu_backend="gloo", timeout_s=60, device="cpu"
    )
    for name in names or [name for name, case in CASES.items() if case.size == size]:
        trace = run(CASES[name], folder, ranks)
        if rank == 0:
            torch.save(vars(trace), folder / f"{name}.pt")
        mpu.destroy_model_parallel()
    ranks.leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
