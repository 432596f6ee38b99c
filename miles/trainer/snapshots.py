"""Weights beside those in training: the reference model of the KL, and the older policies of `--keep-old-actor`.

Both are snapshots that the one model of a process is pointed at for a pass, not models of their own. A second model
would hold the same number of weights and its own buffers beside them; the snapshot goes through the very same modules,
so that the KL of a policy to itself is no more than rounding; and an engine that reads the trainer's tensors in place
keeps reading them, because no tensor is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from miles.config import RunConfig
from miles.trainer.backend import Backend, Snapshot
from miles.trainer.checkpoints import weights_folder


class Reference:
    """The weights of `--ref-load`, or since the last `--ref-update-interval` those of the actor at that time."""

    def __init__(self, backend: Backend, weights: Snapshot, update_interval: int | None) -> None:
        self.backend, self.weights, self.update_interval = backend, weights, update_interval

    @staticmethod
    def of(config: RunConfig, backend: Backend) -> Reference | None:
        """None for a run without a KL to a reference, and for the critic's role."""
        algorithm, checkpoint = config.algorithm, config.checkpoint
        if not algorithm.use_reference or checkpoint.ref_load is None:
            return None
        folder = weights_folder(checkpoint.ref_load, checkpoint.ref_ckpt_step, flag="--ref-load")
        weights = backend.read_snapshot(folder, flag="--ref-load")
        return Reference(backend, weights, algorithm.ref_update_interval)

    def is_due(self, rollout_id: int) -> bool:
        """Whether the actor becomes the reference after this rollout."""
        return self.update_interval is not None and (rollout_id + 1) % self.update_interval == 0

    def save(self, folder: Path) -> None:
        """Only a reference that moves has to be kept."""
        if self.update_interval is not None:
            write(self.backend, self.weights, folder / "reference")

    def restore(self, folder: Path) -> None:
        if self.update_interval is not None and (folder / "reference").is_dir():
            self.weights = self.backend.read_snapshot(folder / "reference", flag="--load")


class OlderPolicies:
    """Two generations of weights, counted by weight updates: those that the engines served before the last update
    (`old`), and those that they serve (`served`).

    Old log-probs are taken from `old`. In a loop that generates the next rollout while it trains on this one, these are
    the weights that made the samples; in a loop that waits they are one update older than those.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.old = self.served = backend.snapshot()
        self._updated = False  # since the last rollout's training

    def begin_training(self) -> None:
        """The weights are about to become others than those that are served."""
        self._updated = False

    def advance(self) -> None:
        """The engines are about to serve the weights as they are now."""
        self.old, self.served, self._updated = self.served, self.backend.snapshot(), True

    def in_use(self) -> AbstractContextManager[None]:
        return self.backend.using(self.old)

    def save(self, folder: Path) -> None:
        """A resumed run begins with an update. Where the last one has been made already, it is left for that one."""
        write(self.backend, self.old, folder / "old_actor")
        write(self.backend, self.old if self._updated else self.served, folder / "served_actor")

    def restore(self, folder: Path | None) -> None:
        """From a checkpoint that has none, and from no folder, the weights as they are: the policy that is trained."""
        if folder is not None and (folder / "old_actor").is_dir():
            self.old = self.backend.read_snapshot(folder / "old_actor", flag="--load")
            self.served = self.backend.read_snapshot(folder / "served_actor", flag="--load")
        else:
            self.old = self.served = self.backend.snapshot()


@contextmanager
def holding(stored: Mapping[str, Tensor], snapshot: Mapping[str, Tensor]) -> Iterator[None]:
    """Passes inside it run with the values of `snapshot`, by name; `stored` are the model's own, which come back.

    The values are copied: FSDP and Megatron gather from memory that they know, so that pointing a parameter elsewhere
    does nothing.
    """
    own = {name: tensor.detach().clone() for name, tensor in stored.items()}
    with torch.no_grad():
        for name, tensor in stored.items():
            tensor.copy_(snapshot[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in stored.items():
                tensor.copy_(own[name])


def write(backend: Backend, weights: Snapshot, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    backend.write_snapshot(weights, folder)
