"""The models of one process, the actor's and for PPO the critic's, and the trainer that is made of them.

The same for a trainer that is one process (`run.trainers`) and for each rank of one in several (`worker`). Before a
model is loaded, `--custom-megatron-init-path` is called, once per process.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from miles.config import OptimizerConfig, RunConfig
from miles.hooks import Hooks
from miles.hooks.values import BadReturn
from miles.observe.tracking import Tracker
from miles.trainer.actor import TrainActor
from miles.trainer.backend import Backend
from miles.trainer.critic import Critic, critic_optimizer
from miles.trainer.ranks import Ranks
from miles.trainer.schedule import Schedule
from miles.weights import WeightTransport


class Models:
    """Loaded, and not ready to train yet. `ranks` is None for one process that is the driver's own."""

    def __init__(self, config: RunConfig, args: Namespace, hooks: Hooks, ranks: Ranks | None = None) -> None:
        self.config = config
        make = MAKERS[config.train.train_backend](config, args, hooks, ranks)
        if hooks.custom_megatron_init is not None:
            hooks.custom_megatron_init(args)
        self.actor = make("actor", config.optimizer)
        self.critic: Backend | None = None
        if config.algorithm.use_critic:
            self.critic = make("critic", critic_optimizer(config.optimizer))

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


Role = Literal["actor", "critic"]
Make = Callable[[Role, OptimizerConfig], Backend]


def fsdp(config: RunConfig, args: Namespace, hooks: Hooks, ranks: Ranks | None) -> Make:
    from miles.trainer.fsdp.backend import FsdpBackend

    folder = str(config.rollout.hf_checkpoint)
    return lambda role, optimizer: FsdpBackend(
        folder, config.train, optimizer, ranks, role=role, seed=config.run.seed
    )


def megatron(config: RunConfig, args: Namespace, hooks: Hooks, ranks: Ranks | None) -> Make:
    """Megatron's process groups are made before plug-ins are called."""
    from miles.trainer.megatron import provided
    from miles.trainer.megatron.backend import MegatronBackend
    from miles.trainer.megatron.ranks import make_groups
    from miles.trainer.megatron.settings import MegatronSettings

    assert ranks is not None, "Megatron needs a process group"
    seed, minutes = config.run.seed, config.cluster.distributed_timeout_minutes
    settings, own = MegatronSettings.of(config), make_groups(ranks, config.layout, seed=seed, timeout_minutes=minutes)
    provided.announce(config, args)

    def make(role: Role, optimizer: OptimizerConfig) -> Backend:
        hook = hooks.custom_model_provider
        try:
            return MegatronBackend(settings, optimizer, own, role=role, seed=seed, provider=hook)
        except provided.ProviderError as error:
            assert hook is not None
            hook.reject(BadReturn("type", str(error)))

    return make


MAKERS: dict[str, Callable[[RunConfig, Namespace, Hooks, Ranks | None], Make]] = {"fsdp": fsdp, "megatron": megatron}
"""By `--train-backend`."""
