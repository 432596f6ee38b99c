"""Plug-ins of the trainer's side: one that counts, some that fail on one rank."""

from __future__ import annotations

import math
import os
import random
import signal
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miles.utils.tracking_utils import log


class Counter:
    """A rollout-data post-process that remembers what it has seen, and logs it."""

    def __init__(self) -> None:
        self.rollouts: list[int] = []

    def __call__(self, args: Namespace, rollout_id: int, rollout_data: dict[str, Any]) -> None:
        if rollout_id == 0:  # another run of this process may have been here before
            self.rollouts = []
        self.rollouts.append(rollout_id)
        log(args, {"train/rollouts_seen": len(self.rollouts), "train/step": 1000 + rollout_id}, "train/step")

    def state_dict(self) -> dict[str, Any]:
        return {"rollouts": self.rollouts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rollouts = list(state["rollouts"])


counter = Counter()


def fails_on_rank_1(args: Namespace, rollout_id: int, rollout_data: dict[str, Any]) -> None:
    if rollout_id == 1 and args.rank == 1:
        raise ZeroDivisionError("rank 1 divides")


def fails(args: Namespace, rollout_id: int, rollout_data: dict[str, Any]) -> None:
    raise ZeroDivisionError("everybody divides")


def breaks_on_rank_1(args: Namespace, rollout_id: int, rollout_data: dict[str, Any]) -> None:
    """Advantages of rank 1 that are not finite."""
    if args.rank == 1:
        for row in rollout_data["advantages"]:
            row += math.nan


def draws(args: Namespace, rollout_id: int, rollout_data: dict[str, Any]) -> None:
    """Leaves random numbers, as a plug-in would draw them that augments samples."""
    Path(args.run_dir, f"drawn_{args.rank}").write_text(f"{random.random()} {np.random.random()}")


def killed_on_rank_1(args: Namespace, rollout_id: int, rollout_data: dict[str, Any]) -> None:
    if rollout_id == 1 and args.rank == 1:
        print("famous last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def waits(args: Namespace, rollout_id: int, rollout_data: dict[str, Any]) -> None:
    """In rollout 1 rank 1 waits for a file `go`, and rank 0 for rank 1, in a collective."""
    if rollout_id != 1:
        return
    Path(args.run_dir, f"pid_{args.rank}").write_text(str(os.getpid()))
    while args.rank == 1 and not Path(args.run_dir, "go").exists():
        time.sleep(0.05)


# ---- before the train step of Megatron -------------------------------------------------------------------------------


def step_fails_on_rank_0(args: Namespace, *_: Any) -> None:
    _fails_on(0, args)


def step_fails_on_rank_1(args: Namespace, *_: Any) -> None:
    _fails_on(1, args)


def _fails_on(rank: int, args: Namespace) -> None:
    """The other rank goes on, and waits for this one in a collective."""
    if args.rank == rank:
        Path(args.run_dir, "failed").touch()
        raise ZeroDivisionError(f"rank {rank} divides")


def killed_in_the_backward_pass_on_rank_1(args: Namespace, rollout_id: int, step_id: int, model: Any, *_: Any) -> None:
    if args.rank == 1:
        _first_weight(model).register_hook(lambda _: _dies())


def breaks_a_gradient_on_rank_1(args: Namespace, rollout_id: int, step_id: int, model: Any, *_: Any) -> None:
    """The loss is finite."""
    if args.rank == 1:
        _first_weight(model).register_hook(lambda gradient: gradient * math.nan)


def _first_weight(model: Any) -> torch.Tensor:
    return next(p for p in model[0].parameters() if p.requires_grad)


def _dies() -> None:
    print("famous last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def loss_in_which_rank_1_dies(
    args: Namespace, parallel_state: Any, batch: dict[str, Any], logits: torch.Tensor, reduce: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Rank 0 waits for it inside of the plug-in, which then fails, too."""
    if args.rank == 1:
        _dies()
    torch.distributed.all_reduce(logits.detach().sum(), group=parallel_state.cp_group)
    raise AssertionError("rank 1 has come")
