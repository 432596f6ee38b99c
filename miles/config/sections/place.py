"""Where a run happens: the run itself, its machines, its network."""

# ruff: noqa: RUF009  (`flag` declares a field; it makes no value that instances would share)

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from miles.config.flags import (
    PATH,
    PATH_WITHOUT_BRACES,
    Section,
    above,
    at_least,
    between,
    flag,
    more_than,
    no_meaning_here,
    not_built,
)

ONE_MACHINE = "Training on several machines"
TRAINER_STAYS = "the trainer keeps its memory; engines give theirs back (--offload-rollout)."
BESIDE_ACTOR = "the critic is trained in the actor's processes."


@dataclass(frozen=True, kw_only=True)
class RunSettings(Section):
    """The run as a whole.

    Example: `RunSettings(run_dir="runs/quickstart", seed=0, deterministic=True, hook_policy={"custom-rm": "drop"})`
    """

    config: str | None = flag(
        None, "YAML file of flags; the command line wins over it.", check=PATH, common=True, compare=False
    )
    run_dir: str | None = flag(
        None, "Folder for the record of the run; runs/<timestamp> when unset.", check=PATH_WITHOUT_BRACES, common=True
    )
    launcher: Literal["auto", "local", "ray"] = flag(
        "auto",
        "Who starts the processes of the run.",
        status=not_built("The Ray launcher", when=lambda v: v == "ray"),
    )
    seed: int = flag(1234, "Seed of the training side; the engine's seed is made from it.", common=True)
    deterministic: bool = flag(False, "Make two runs on a CPU bitwise equal.", common=True)
    max_staleness: int = flag(
        0,
        "How many weight versions a rollout may lag behind the trainer; 0 is the synchronous loop.",
        check=at_least(0),
        status=not_built("Asynchronous training"),
    )
    hook_policy: dict[str, str] = flag(
        {}, "What happens when a plug-in fails, per plug point: raise, drop, mask or retry:N (custom-rm=drop)."
    )
    hook_form: dict[str, str] = flag({}, "Which form a plug-in has, where its signature fits several.")
    hook_timeout_s: float = flag(
        1800.0, "Seconds that one call of a plug-in may take, except whole rollouts; 0: no limit.", check=at_least(0)
    )
    hook_error_budget: float = flag(
        0.05, "Tolerated failures of a rollout, as a fraction of its plug-in calls.", check=between(0, 1)
    )
    nan_policy: Literal["skip", "stop"] = flag(
        "skip", "What becomes of an optimizer step without a finite loss or gradient; its samples are kept either way."
    )
    quiet: bool = flag(False, "Print errors and the result, nothing else.")
    progress: Literal["auto", "bar", "plain", "none"] = flag("auto", "How progress is shown on the terminal.")
    custom_config_path: str | None = flag(
        None,
        "YAML mapping whose keys become attributes of `args`, over everything else; for settings of plug-ins.",
        check=PATH,
    )


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(Section):
    """Machines and devices of trainer and engines."""

    actor_num_nodes: int = flag(
        1, "Nodes of the trainer.", check=at_least(1), status=not_built(ONE_MACHINE, when=above(1))
    )
    actor_num_gpus_per_node: int = flag(
        8,
        "Processes of the trainer on each of its nodes, one GPU each; without GPUs they share the cores.",
        check=at_least(1),
        common=True,
    )
    critic_num_nodes: int | None = flag(
        None, "Nodes of the critic; as the actor when unset.", check=at_least(1), status=no_meaning_here(BESIDE_ACTOR)
    )
    critic_num_gpus_per_node: int | None = flag(
        None,
        "GPUs per node of the critic; as the actor when unset.",
        check=at_least(1),
        status=no_meaning_here(BESIDE_ACTOR),
    )
    rollout_num_gpus: int | None = flag(
        None, "GPUs of all engines together; without GPUs, engines that share the cores.", check=at_least(0)
    )
    rollout_num_gpus_per_engine: int = flag(
        1,
        "GPUs of one engine, which is its tensor-parallel size.",
        check=at_least(1),
    )
    num_gpus_per_node: int = flag(
        8,
        "GPUs of one machine on the side of the engines.",
        check=at_least(1),
        status=no_meaning_here("the engine runs on one device of this machine."),
    )
    colocate: bool = flag(False, "Let trainer and engines share their GPUs.")
    offload: bool = flag(False, "Short for --offload-train --offload-rollout.")
    offload_train: bool | None = flag(
        None, "Release the trainer's memory while rolling out.", status=no_meaning_here(TRAINER_STAYS)
    )
    offload_rollout: bool | None = flag(None, "Release the engines' memory while training.")
    distributed_backend: str = flag("nccl", "Communication library of the trainer's processes: nccl or gloo.")
    distributed_timeout_minutes: int = flag(
        10, "Minutes after which a trainer process that waits for the others gives up.", check=at_least(1)
    )

    @property
    def world_size(self) -> int:
        """Trainer processes = actor_num_nodes * actor_num_gpus_per_node."""
        return self.actor_num_nodes * self.actor_num_gpus_per_node


@dataclass(frozen=True, kw_only=True)
class FaultToleranceConfig(Section):
    """Watching engines and replacing dead ones."""

    use_fault_tolerance: bool = flag(
        False, "Run engines in processes of their own, watch them, and start those anew that die or hang."
    )
    rollout_health_check_interval: float = flag(
        30.0, "Seconds between two health checks of an engine.", check=more_than(0)
    )
    rollout_health_check_timeout: float = flag(30.0, "Seconds that a health check may take.", check=more_than(0))
    rollout_health_check_first_wait: float = flag(
        0, "Seconds without health checks after an engine has started.", check=at_least(0)
    )
    engine_start_timeout_s: float = flag(
        1200.0, "Seconds until an engine that is starting must answer.", check=more_than(0)
    )


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(Section):
    """How requests travel."""

    http_proxy: str | None = flag(
        None, "HTTP proxy.", status=no_meaning_here("requests to engines stay on this machine.")
    )
    use_distributed_post: bool = flag(
        False,
        "Send requests from helper processes on every node.",
        status=no_meaning_here("requests to the engine stay inside this process."),
    )
