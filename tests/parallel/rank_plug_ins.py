"""Plug-ins of the trainer's side: one that counts, some that fail on one rank."""

from __future__ import annotations

import math
import os
import signal
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

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
