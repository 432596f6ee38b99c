"""Published import path of starting Weights & Biases alone; `tracking_utils` starts all that the flags ask for."""

from __future__ import annotations

from argparse import Namespace

from miles.observe.tracking import init_tracking

__all__ = ["init_wandb_primary", "init_wandb_secondary"]


def init_wandb_primary(args: Namespace) -> None:
    """Start the W&B run of this job and note its id as `args.wandb_run_id`; None without --use-wandb."""
    _start(args, primary=True)


def init_wandb_secondary(args: Namespace, router_addr: str | None = None) -> None:
    """Join the W&B run `args.wandb_run_id` of another process. Engine metrics of `router_addr` are not collected."""
    _start(args, primary=False)


def _start(args: Namespace, *, primary: bool) -> None:
    wandb_alone = Namespace(**{**vars(args), "use_tensorboard": False})
    init_tracking(wandb_alone, primary=primary)
    args.wandb_run_id = wandb_alone.wandb_run_id
