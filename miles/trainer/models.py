"""The models of one process, the actor's and for PPO the critic's, and the trainer that is made of them.

The same for a trainer that is one process (`run.trainers`) and for each rank of one in several (`worker`).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace

from miles.config import RunConfig
from miles.hooks import Hooks
from miles.observe.tracking import Tracker
from miles.trainer.actor import TrainActor
from miles.trainer.critic import Critic, critic_optimizer
from miles.trainer.fsdp.backend import FsdpBackend
from miles.trainer.ranks import Ranks
from miles.trainer.schedule import Schedule
from miles.weights import WeightTransport


class Models:
    """Loaded, and not ready to train yet. `ranks` is None in a trainer that is one process."""

    def __init__(self, config: RunConfig, ranks: Ranks | None = None) -> None:
        self.config = config
        folder, train, optimizer = str(config.rollout.hf_checkpoint), config.train, config.optimizer
        self.actor = FsdpBackend(folder, train, optimizer, ranks)
        self.critic: FsdpBackend | None = None
        if config.algorithm.use_critic:
            own = critic_optimizer(optimizer)
            self.critic = FsdpBackend(folder, train, own, ranks, role="critic", seed=config.run.seed)

    def trainer(
        self,
        args: Namespace,
        hooks: Hooks,
        tracker: Tracker,
        schedule: Schedule,
        *,
        transport: WeightTransport | None,
        on_step: Callable[[], None],
    ) -> TrainActor:
        """`schedule` is the actor's; the critic's has another rate and warm-up, and the same length."""
        self.actor.use_schedule(schedule)
        critic = None
        if self.critic is not None:
            own = critic_optimizer(self.config.optimizer)
            self.critic.use_schedule(replace(schedule, max_lr=own.lr, warmup=own.lr_warmup_iters))
            critic = Critic(self.critic, self.config, args, hooks, tracker)
        return TrainActor(
            self.actor, self.config, args, hooks, tracker, transport=transport, on_step=on_step, critic=critic
        )
