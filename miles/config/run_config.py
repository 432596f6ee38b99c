"""`RunConfig`: all sections of one run, and `flat_args`: the same as the Namespace that plug-ins receive."""

from __future__ import annotations

import copy
from argparse import Namespace
from dataclasses import dataclass, field, fields
from typing import Any

from miles.config import sections as s
from miles.config.flags import Section


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run is. Core functions take the section they need; plug-ins get `args`.

    Two configs are equal where all settings are, wherever they came from.

    Example: `config.data.samples_per_rollout == 128`, `config.origins["lr"] == "file"`
    """

    run: s.RunSettings
    cluster: s.ClusterConfig
    train: s.TrainConfig
    rollout: s.RolloutConfig
    fault_tolerance: s.FaultToleranceConfig
    data: s.DataConfig
    eval: s.EvalConfig
    algorithm: s.AlgorithmConfig
    optimizer: s.OptimizerConfig
    checkpoint: s.CheckpointConfig
    tracking: s.TrackingConfig
    router: s.RouterConfig
    debug: s.DebugConfig
    engine: s.EngineConfig
    network: s.NetworkConfig
    reward: s.RewardConfig
    rollout_buffer: s.RolloutBufferConfig
    mtp: s.MTPConfig
    pd: s.PDConfig
    ci: s.CIConfig
    hooks: s.HooksConfig
    # Attributes of `args` that are no flags of miles: of plug-ins, of SGLang, of --custom-config-path.
    extras: dict[str, Any] = field(default_factory=dict)
    # One line each: substituted defaults, flags without meaning here.
    notices: list[str] = field(default_factory=list, compare=False)
    # Name -> its notice, for the defaults among them.
    substitutions: dict[str, str] = field(default_factory=dict, compare=False)
    # Name -> default, file, command line, custom config, substituted or derived.
    origins: dict[str, str] = field(default_factory=dict, compare=False)

    def section(self, name: str) -> Section:
        section: Section = getattr(self, name)
        return section


def flat_args(config: RunConfig) -> Namespace:
    """Every field of every section under its published name, and what the published validation adds to that.

    Plain, deep-copyable and writable: it belongs to the plug-ins. The core never reads it back.
    """
    values: dict[str, Any] = {}
    for name in s.SECTIONS:
        section = config.section(name)
        values.update({f.name: getattr(section, f.name) for f in fields(section)})  # type: ignore[arg-type]
    del values["offload"]
    engine, tp_size = config.engine, config.cluster.rollout_num_gpus_per_engine
    values.update(
        use_critic=config.algorithm.use_critic,
        rank=0,
        world_size=config.cluster.world_size,
        sglang_tp_size=tp_size,
        sglang_tensor_parallel_size=tp_size,
        sglang_dp_size=engine.sglang_data_parallel_size,
        sglang_pp_size=engine.sglang_pipeline_parallel_size,
        sglang_ep_size=engine.sglang_expert_parallel_size,
    )
    values.update(config.extras)
    return Namespace(**copy.deepcopy(values))
