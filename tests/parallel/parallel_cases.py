"""What the layouts are compared on: small models, one rollout in three optimizer steps, a table of cases.

The same `run` is called by one process and by every rank of a group. Started as a program it is one such rank:
`parallel_cases.py RANK SIZE FOLDER` runs every case, saves a checkpoint, loads all that are there, and leaves
what came out as `<FOLDER>/*.pt`, written by rank 0.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from miles.batch import TrainBatch, from_published_dict, split_batch
from miles.config import parse
from miles.hooks import bind
from miles.observe.tracking import Tracker
from miles.trainer.actor import Restoring, TrainActor
from miles.trainer.backend import StepResult
from miles.trainer.critic import Critic, critic_optimizer
from miles.trainer.fsdp.backend import FsdpBackend
from miles.trainer.fsdp.model import owned_tensors
from miles.trainer.fsdp.shard import cut_like
from miles.trainer.ranks import Ranks
from miles.trainer.schedule import schedule_of
from miles.trainer.snapshots import holding
from miles.weights.gather import gathered

STEPS, PER_STEP, GROUP = 3, 8, 4
SAMPLES = STEPS * PER_STEP
VOCABULARY = 41

FLAGS = [
    "--num-rollout", "1", "--prompt-data", "x.jsonl", "--rollout-batch-size", "6", "--n-samples-per-prompt", "4",
    "--num-steps-per-rollout", str(STEPS), "--train-backend", "fsdp", "--rm-type", "math", "--lr", "5e-3",
    "--clip-grad", "0.5", "--adam-eps", "1e-4", "--eps-clip", "0.1", "--eps-clip-high", "0.15",
]  # fmt: skip

ALL_AT_ONCE = ("--micro-batch-size", "64")
ONE_BY_ONE = ("--micro-batch-size", "1")
BOTH = (2, 4)
# Replaced by the folder of a model with other weights.
REFERENCE = ("--ref-load", "{reference}")
FEW_TOKENS = ("--use-dynamic-batch-size", "--max-tokens-per-gpu", "30")


@dataclass(frozen=True)
class Case:
    """`flags` hold for every layout; `split` is how ranks cut their micro batches (one process takes all at once).

    `bound` is the largest relative difference; None is what the dtype allows.
    """

    flags: tuple[str, ...] = ()
    split: tuple[str, ...] = ONE_BY_ONE
    tied: bool = True
    rewards: str = "mixed"
    dtype: torch.dtype = torch.float32
    sizes: tuple[int, ...] = (2,)
    bound: float | None = None


def own(name: str) -> str:
    return f"{__file__}:{name}"


CASES: dict[str, Case] = {
    "plain": Case(),
    "float64": Case(dtype=torch.float64, sizes=BOTH),
    "dynamic": Case(split=FEW_TOKENS),
    "dynamic float64": Case(split=FEW_TOKENS, tied=False, dtype=torch.float64, sizes=BOTH),
    "all at once": Case(split=ALL_AT_ONCE),
    "untied": Case(tied=False, split=FEW_TOKENS),
    "per token": Case(("--calculate-per-token-loss",), FEW_TOKENS),
    "per token float64": Case(("--calculate-per-token-loss",), dtype=torch.float64, sizes=BOTH),
    "entropy bonus": Case(("--entropy-coef", "0.01"), FEW_TOKENS),
    "importance": Case(("--use-tis",)),
    "no clipping": Case(("--clip-grad", "0")),
    "a rank without work": Case(split=FEW_TOKENS, rewards="first rank has none", sizes=BOTH),
    "nobody has work": Case(rewards="none in step 1", sizes=BOTH),
    "balanced": Case(("--balance-data", "--num-steps-per-rollout", "1"), FEW_TOKENS, sizes=BOTH),
    "recomputed": Case(("--gradient-checkpointing", "--recompute-loss-function"), FEW_TOKENS),
    "bfloat16": Case(split=(*FEW_TOKENS, "--fsdp-param-dtype", "bfloat16"), tied=False, bound=0.1),
    "custom loss": Case(("--loss-type", "custom_loss", "--custom-loss-function-path", own("from_logits"))),
    "kl loss": Case(("--use-kl-loss", "--kl-loss-coef", "0.1", *REFERENCE), FEW_TOKENS, sizes=BOTH),
    "whitened": Case(("--advantage-estimator", "reinforce_plus_plus_baseline", "--normalize-advantages")),
    "old actor": Case(("--keep-old-actor",), FEW_TOKENS),
    "ppo": Case(("--advantage-estimator", "ppo", "--kl-coef", "0.1", "--critic-lr", "1e-2", *REFERENCE), FEW_TOKENS),
    "sft": Case(("--loss-type", "sft_loss", "--disable-compute-advantages-and-returns"), FEW_TOKENS),
}


@dataclass
class Trace:
    """Per optimizer step the metrics and the gradient before clipping; the metrics of the rollout; final weights."""

    steps: list[dict[str, float]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    rollout: dict[str, float] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


class Watched(FsdpBackend):
    """Notes every gradient."""

    gradients: list[dict[str, Tensor]]

    def optimizer_step(self) -> StepResult:
        named = dict(self.model.named_parameters())
        self.gradients.append({name: whole(p.grad).clone() for name, p in named.items() if p.grad is not None})
        return super().optimizer_step()


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


class Lines:
    """Keeps what is logged."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def log(self, metrics: Mapping[str, Any], step_key: str | None) -> None:
        if step_key == "train/step":
            self.trace.steps.append(dict(metrics))
        else:
            self.trace.rollout |= {k: v for k, v in metrics.items() if k.startswith("rollout/")}

    def close(self) -> None: ...


def make_model(folder: Path, *, tied: bool, seed: int = 0, layers: int = 2) -> str:
    path = folder / f"{'tied' if tied else 'untied'} {seed}{'' if layers == 2 else f' of {layers} layers'}"
    if not path.exists():
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, intermediate_size=48, max_position_embeddings=128,
            tie_word_embeddings=tied, eos_token_id=1,
        )  # fmt: skip
        Qwen3ForCausalLM(config).save_pretrained(path)
    return str(path)


def rollout(rewards: str) -> TrainBatch:
    """Groups of four of very unequal lengths; one removed sample, one with masked tokens in the middle."""
    rng = torch.Generator().manual_seed(7)

    def ids(count: int) -> list[int]:
        return torch.randint(2, VOCABULARY, (count,), generator=rng).tolist()

    prompts = [p for _ in range(SAMPLES // GROUP) for p in [ids(6)] * GROUP]
    responses = [ids(2 + (7 * i) % 19) for i in range(SAMPLES)]
    values = torch.randn(SAMPLES, generator=rng)
    if rewards == "first rank has none":
        values[0::2] = 0.0  # the rows of rank 0 of two, and of ranks 0 and 2 of four
    if rewards == "none in step 1":
        values[PER_STEP : 2 * PER_STEP] = 0.0
    masks = [[1] * len(r) for r in responses]
    masks[9] = [0] * len(masks[9])
    masks[10][1:3] = [0, 0]
    noise = [(-3.7 + 0.3 * torch.randn(len(r), generator=rng)).tolist() for r in responses]
    return from_published_dict(
        {
            "tokens": [p + r for p, r in zip(prompts, responses)],
            "response_lengths": [len(r) for r in responses],
            "rewards": values.tolist(),
            "raw_reward": values.tolist(),
            "truncated": [i % 3 == 0 for i in range(SAMPLES)],
            "sample_indices": [*range(SAMPLES)],
            "loss_masks": masks,
            "rollout_log_probs": noise,
        }
    )


def from_logits(args: Namespace, parallel_state: Any, batch: dict[str, Any], logits: Tensor, reduce: Any) -> Any:
    """The policy loss as a custom loss."""
    end, values = 0, []
    for i, (tokens, total, length) in enumerate(
        zip(batch["unconcat_tokens"], batch["total_lengths"], batch["response_lengths"])
    ):
        end += total
        log_p = logits[0, end - length - 1 : end - 1].log_softmax(-1)
        now = log_p.gather(-1, tokens[-length:, None])[:, 0]
        ratio = torch.exp(now - batch["log_probs"][i])
        values.append(-ratio * batch["advantages"][i])
    loss = reduce(torch.cat(values))
    return loss, {"loss": loss.detach(), "ratio": reduce(torch.ones_like(torch.cat(values)))}


def make_actor(case: Case, folder: Path, ranks: Ranks, trace: Trace) -> tuple[TrainActor, Watched]:
    split = ALL_AT_ONCE if ranks.size == 1 else case.split
    folders = ("--hf-checkpoint", make_model(folder, tied=case.tied), "--actor-num-gpus-per-node", str(ranks.size))
    flags = [word.format(reference=make_model(folder, tied=case.tied, seed=1)) for word in case.flags]
    config, args = parse([*FLAGS, *folders, *split, *flags])
    backend = Watched(str(config.rollout.hf_checkpoint), config.train, config.optimizer, ranks, dtype=case.dtype)
    backend.gradients = trace.gradients
    backend.use_schedule(schedule_of(config.optimizer, STEPS))
    tracker, hooks = Tracker(sinks=[Lines(trace)]), bind(args)
    critic = None
    if config.algorithm.use_critic:
        own = critic_optimizer(config.optimizer)
        values = FsdpBackend(
            str(config.rollout.hf_checkpoint), config.train, own, ranks, dtype=case.dtype, role="critic", seed=5
        )
        critic = Critic(values, config, args, hooks, tracker)
    actor = TrainActor(
        backend, config, args, hooks, tracker, transport=None, on_step=lambda: None, critic=critic
    )
    return actor, backend


def run(case: Case, folder: Path, ranks: Ranks) -> Trace:
    """Train; what is whole only on rank 0 is empty on others."""
    trace = Trace()
    actor, backend = make_actor(case, folder, ranks, trace)
    train(actor, case, ranks)
    trace.weights = together(backend.weights())
    return trace


def train(actor: TrainActor, case: Case, ranks: Ranks) -> None:
    data = actor.config.data
    assert data.global_batch_size is not None
    shards = split_batch(rollout(case.rewards), ranks.size, balance=data.balance_data)
    actor.train_shards(0, shards, data.global_batch_size)


def together(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, on rank 0."""
    buckets = gathered(tensors, bucket_bytes=9000)
    return {name: tensor.clone() for bucket in buckets for name, tensor in bucket.items()}


# ---- checkpoints -----------------------------------------------------------------------------------------------------

UNTIED = Case(tied=False, split=FEW_TOKENS)


def everything(backend: FsdpBackend) -> dict[str, Tensor]:
    """Weights, moments and the step of the schedule."""
    moments = together(backend._moments())
    return {**together(backend.weights()), **moments, "schedule": torch.tensor(backend.scheduler.num_steps)}


def save(folder: Path, ranks: Ranks) -> dict[str, Tensor]:
    """Train a rollout and leave `<folder>/from <size>`; what was saved, in whole tensors."""
    actor, backend = make_actor(UNTIED, folder, ranks, Trace())
    train(actor, UNTIED, ranks)
    target = folder / f"from {ranks.size}"
    target.mkdir(exist_ok=True)
    actor.save(target, with_optimizer=True)
    return everything(backend)


def load(source: Path, folder: Path, ranks: Ranks) -> dict[str, Tensor]:
    """What is there after `source` has been loaded."""
    actor, backend = make_actor(UNTIED, folder, ranks, Trace())
    actor.restore(source, Restoring(steps_done=STEPS))
    return everything(backend)


def other_weights(folder: Path, ranks: Ranks) -> dict[str, bool]:
    """Log-probs of the rows of a shard under a model's own weights, under others, and under its own again."""
    actor, backend = make_actor(UNTIED, folder, ranks, Trace())
    shard = split_batch(rollout("mixed"), ranks.size, balance=False)[ranks.rank]
    micros = actor._micro_batches(shard, np.arange(len(shard)))

    def log_probs(of: FsdpBackend) -> Tensor:
        return torch.cat(of.forward_only(micros, actor._read_log_probs))

    stored, own = owned_tensors(backend.model), log_probs(backend)
    torch.manual_seed(3)
    wholes = {name: torch.randn(tensor.shape) * 0.1 for name, tensor in stored.items()}
    with holding(stored, {name: cut_like(wholes[name], tensor) for name, tensor in stored.items()}):
        inside, held = log_probs(backend), together(backend.weights())
    return {
        "others differ": not torch.allclose(inside, own, atol=1e-2),
        "own again": torch.equal(log_probs(backend), own),
        "held": ranks.rank != 0 or all(torch.equal(held[name], wholes[name]) for name in wholes),
    }


# ---- a rank ----------------------------------------------------------------------------------------------------------


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.join(
        rank, size, folder / f"store{size}", backend="gloo", cpu_backend="gloo", timeout_s=60, device="cpu"
    )
    for name, case in CASES.items():
        if size in case.sizes:
            keep(vars(run(case, folder, ranks)), folder / f"{size} {name}.pt", rank)
    keep(other_weights(folder, ranks), folder / f"{size} held.pt", rank)
    keep(save(folder, ranks), folder / f"saved by {size}.pt", rank)
    for source in [folder / f"from {n}" for n in (1, 2, 4) if n <= size]:
        keep(load(source, folder, ranks), folder / f"{source.name} by {size}.pt", rank)
    ranks.leave()


def keep(what: dict[str, Any], path: Path, rank: int) -> None:
    if rank == 0:
        torch.save(what, path)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
