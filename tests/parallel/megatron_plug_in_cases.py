"""Trainings with plug-ins of Megatron, on two ranks and on one: a table of cases, and the program of a rank.

`megatron_plug_in_cases.py RANK SIZE FOLDER` trains every case that fits `SIZE` and leaves `<case> <rank>.pt`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron_plug_ins
import torch
from parallel_cases import ALL_AT_ONCE, FLAGS, ONE_BY_ONE, STEPS, Lines, Trace, make_model, rollout

from miles.batch import split_batch
from miles.config import parse
from miles.errors import HookError
from miles.hooks import bind
from miles.observe.tracking import Tracker
from miles.trainer.models import Models
from miles.trainer.ranks import Ranks
from miles.trainer.schedule import schedule_of

BUCKET = 1 << 30
ROLLOUTS = 2
TP = ("--tensor-model-parallel-size", "2")
SP = (*TP, "--sequence-parallel")
PP = ("--pipeline-model-parallel-size", "2")
CP = ("--context-parallel-size", "2")


def plug(flag: str, name: str) -> tuple[str, str]:
    return flag, f"{megatron_plug_ins.__file__}:{name}"


def model(name: str) -> tuple[str, str]:
    return plug("--custom-model-provider-path", name)


HOOKS = (
    *plug("--custom-megatron-init-path", "init"),
    *plug("--custom-megatron-before-log-prob-hook-path", "before_log_prob"),
    *plug("--custom-megatron-before-train-step-hook-path", "before_train_step"),
)
PPO = ("--advantage-estimator", "ppo", "--kl-coef", "0.1", "--critic-lr", "1e-2", "--ref-load", "{other}")
PASSES = (*PPO, "--use-dynamic-batch-size", "--max-tokens-per-gpu", "60")
CUSTOM = ("--loss-type", "custom_loss", *plug("--custom-loss-function-path", "loss"))
REDUCER = "--custom-pg-loss-reducer-function-path"


@dataclass(frozen=True)
class Case:
    """`flags` say what is computed, `layout` on which ranks. `as_one` is what one fsdp process gets in the place of
    plug-ins that only Megatron has; None where nothing is compared."""

    flags: tuple[str, ...] = ()
    layout: tuple[str, ...] = ()
    backend: str = "megatron"
    as_one: tuple[str, ...] | None = ()
    tied: bool = True
    layers: int = 2
    rollouts: int = 1
    size: int = 2


CASES: dict[str, Case] = {
    "hooks tp": Case((*HOOKS, *PASSES), SP, as_one=None, rollouts=ROLLOUTS),
    "hooks pp": Case((*HOOKS, *PASSES, *model("gpt_model")), PP, as_one=None, rollouts=ROLLOUTS),
    "hooks dp": Case((*HOOKS, *PASSES), as_one=None, rollouts=ROLLOUTS),
    "hooks fsdp": Case((*HOOKS, *PASSES), as_one=None, rollouts=ROLLOUTS, backend="fsdp"),
    "ppo pp": Case(PPO, PP, as_one=PPO),
    "model tp": Case(model("gpt_model"), SP),
    "model tp, two samples at once": Case((*model("gpt_model"), "--micro-batch-size", "2"), TP, tied=False),
    "model pp": Case(model("gpt_model"), PP),
    "model virtual": Case(model("gpt_model"), (*PP, "--num-layers-per-virtual-pipeline-stage", "1"), layers=4),
    "model cp": Case((*model("gpt_model"), "--micro-batch-size", "4"), CP),
    "model cp, untied": Case((*model("built_in"), "--micro-batch-size", "3"), CP, tied=False),
    "model dp": Case(model("built_in")),
    "model padded": Case((*model("gpt_model"), "--micro-batch-size", "4", "--qkv-format", "bshd"), SP),
    "built-in model padded": Case((*model("built_in"), "--micro-batch-size", "4", "--qkv-format", "bshd"), SP),
    "model critic": Case((*model("gpt_model"), *PPO), SP, as_one=PPO),
    "model custom loss": Case((*model("gpt_model"), *CUSTOM), TP, as_one=CUSTOM),
    "reducer tp": Case(plug(REDUCER, "reducer_of_mpu"), TP, as_one=plug(REDUCER, "reducer_without_mpu")),
    "reducer cp": Case(plug(REDUCER, "reducer_of_mpu"), CP, as_one=plug(REDUCER, "reducer_without_mpu")),
    "loss tp": Case(CUSTOM, TP, as_one=CUSTOM),
    "loss cp": Case(CUSTOM, CP, as_one=CUSTOM),
    "model alone": Case((*model("gpt_model"), "--micro-batch-size", "4"), size=1),
}  # fmt: skip


def run(case: Case, folder: Path, ranks: Ranks | None) -> dict[str, Any]:
    """With `ranks` None, what one fsdp process does with all of it."""
    megatron_plug_ins.SEEN.clear()
    size, backend = (1, "fsdp") if ranks is None else (ranks.size, case.backend)
    given = (case.as_one or ()) if ranks is None else (*ONE_BY_ONE, *case.flags, *case.layout)
    own, other = (make_model(folder, tied=case.tied, seed=seed, layers=case.layers) for seed in (0, 1))
    folders = ("--hf-checkpoint", own, "--actor-num-gpus-per-node", str(size))
    split = ALL_AT_ONCE if ranks is None else ()
    config, args = parse(
        [*FLAGS, "--train-backend", backend, *folders, *split, *(word.format(other=other) for word in given)]
    )
    hooks, trace = bind(args), Trace()
    models = Models(config, args, hooks, ranks)
    schedule = schedule_of(config.optimizer, STEPS * case.rollouts)
    actor = models.trainer(
        args, hooks, Tracker(sinks=[Lines(trace)]), schedule, transport=None, on_step=lambda: None
    )
    assert config.data.global_batch_size is not None
    for rollout_id in range(case.rollouts):
        shards = split_batch(rollout("mixed"), models.actor.parallel.dp_size, balance=False)
        actor.train_shards(rollout_id, shards, config.data.global_batch_size)
    weights = models.actor.weights()
    buckets = weights.buckets(BUCKET) if hasattr(weights, "buckets") else []
    whole = {name: tensor.clone() for bucket in buckets for name, tensor in bucket.items()}
    return {"steps": trace.steps, "weights": whole, "seen": list(megatron_plug_ins.SEEN), "args": id(args)}


def refusal(name: str, folder: Path, ranks: Ranks) -> str:
    try:
        run(Case(model(name)), folder, ranks)
    except HookError as error:
        return str(error)
    return "nothing was refused"


def main(rank: int, size: int, folder: Path) -> None:
    from megatron.core import mpu

    torch.set_num_threads(1)
    ranks = Ranks.join(
        rank, size, folder / f"plug-ins {size}", backend="gloo", cpu_backend="gloo", timeout_s=60, device="cpu"
    )
    for name, case in CASES.items():
        if case.size == size:
            torch.save(run(case, folder, ranks), folder / f"{name} {rank}.pt")
            mpu.destroy_model_parallel()
    for name in megatron_plug_ins.REFUSED if size == 1 else ():
        (folder / f"{name}.txt").write_text(refusal(name, folder, ranks))
        mpu.destroy_model_parallel()
    ranks.leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
