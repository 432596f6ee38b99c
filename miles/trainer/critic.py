"""PPO's critic: a model that learns the value of each state of a response.

    values     one pass before training: V of the state that each response token was chosen in
    learn      value_loss on the returns of generalized advantage estimation, in the optimizer steps of the actor

It starts from the actor's folder, with the projection to the vocabulary replaced by one to a number, and has weights,
optimizer and learning rate of its own. It lives in the actor's process and is driven by it (`TrainActor.train`), so
that values and returns need no exchange between processes.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

import numpy as np
from torch import Tensor

from miles.batch import PackedBatch, TrainBatch
from miles.batch.ragged import IntArray
from miles.config import OptimizerConfig, RunConfig
from miles.hooks import Hooks
from miles.loss.dispatch import compute_loss
from miles.loss.types import LossInputs, LossPlugins
from miles.observe.tracking import Tracker
from miles.trainer.actor import TrainActor
from miles.trainer.backend import Backend, MicroLoss, ModelOutput


def critic_optimizer(optimizer: OptimizerConfig) -> OptimizerConfig:
    """The critic's optimizer: the actor's, with `--critic-lr` and `--critic-lr-warmup-iters`."""
    assert optimizer.critic_lr is not None
    return replace(
        optimizer, lr=optimizer.critic_lr, lr_warmup_iters=optimizer.critic_lr_warmup_iters, lr_warmup_fraction=None
    )


class Critic(TrainActor):
    """Micro-batches, steps and metrics are those of `TrainActor`; the loss is the value loss, and plug-ins of the
    policy loss are not called. Its backend has role "critic"."""

    prefix = "critic-"

    def __init__(self, backend: Backend, config: RunConfig, args: Namespace, hooks: Hooks, tracker: Tracker) -> None:
        algorithm = replace(
            config.algorithm, use_kl_loss=False, kl_coef=0.0, use_routing_replay=False, use_rollout_routing_replay=False
        )
        own = replace(config, algorithm=algorithm, rollout=replace(config.rollout, keep_old_actor=False))
        super().__init__(backend, own, args, hooks, tracker, transport=None, on_step=lambda: None)
        self.settings = replace(self.settings, loss_type="value_loss")
        self.plugins = LossPlugins(args=args, parallel_state=backend.parallel)

    def evaluate(self, shard: TrainBatch) -> None:
        """Fill the column `values`."""
        with self.timers.context("values"):
            self._pass(shard, "values", np.arange(len(shard)), read_values)

    def learn(
        self, rollout_id: int, shard: TrainBatch, steps: list[IntArray], global_batch_size: int
    ) -> dict[str, float]:
        """One optimizer step per step of the actor; the metrics of the last one."""
        self._skip = self._zero_rows(shard) | shard.failed
        with self.timers.context("critic_train"):
            if self.config.algorithm.reset_optimizer_states:
                self.backend.reset_optimizer()
            metrics: dict[str, float] = {}
            for step_id, rows in enumerate(steps):
                metrics = self._step(rollout_id, step_id, shard, rows, global_batch_size, len(steps))
        return metrics

    def _built_in_loss(
        self, shard: TrainBatch, micro: PackedBatch, output: ModelOutput, columns: dict[str, Tensor], scale: float
    ) -> MicroLoss:
        inputs = LossInputs.of_values(micro, output.values(micro), columns)
        result = compute_loss(inputs, self.settings, self.plugins, scale)
        return MicroLoss(result.loss, result.metrics)


def read_values(micro: PackedBatch, output: ModelOutput) -> Tensor:
    return output.values(micro).float()
