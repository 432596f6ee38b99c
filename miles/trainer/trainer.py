"""What a run asks of its trainer, whether it is one process (`actor.TrainActor`) or several (`group.RankGroup`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from miles.batch import TrainBatch
from miles.trainer.actor import Restoring, TrainReport
from miles.trainer.heldout import LossSums


class Trainer(Protocol):
    """`weight_version` is the last one that engines were given, `steps_done` counts optimizer steps of the run."""

    weight_version: int
    steps_done: int

    def train_shards(self, rollout_id: int, shards: Sequence[TrainBatch], global_batch_size: int) -> TrainReport:
        """Train on a rollout, one shard per data-parallel rank."""

    def evaluate_shards(self, sets: Mapping[str, Sequence[TrainBatch]]) -> dict[str, LossSums]:
        """The loss of each evaluation set, given as one shard per data-parallel rank."""

    def update_weights(self) -> int:
        """Hand the weights to the engines under the next version number, which is returned."""

    def restore(self, folder: Path, how: Restoring) -> None:
        """Continue from a checkpoint."""

    def restore_critic(self, folder: Path, *, with_optimizer: bool) -> None:
        """Continue PPO's critic from what `save` wrote of it."""

    def save(
        self, folder: Path, *, with_optimizer: bool, background: bool = False, critic_folder: Path | None = None
    ) -> None:
        """What `restore` reads, under `folder`, which exists and is empty. PPO's critic goes to a folder in it, or to
        `critic_folder`, which exists and is empty, too."""

    def finish_saving(self) -> None:
        """Wait for what `save` writes in the background. Raises what went wrong with it."""

    def saved(self, rollout_id: int, folder: Path, hf_folder: Path | None) -> None:
        """The checkpoint `folder` is complete and in force, and so is the Hugging Face folder that belongs to it."""

    def export_hf(self, folder: Path) -> None:
        """A Hugging Face model folder."""
