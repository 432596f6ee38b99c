"""What a run is: one frozen dataclass per subject, one field per flag.

    place      run, cluster, fault_tolerance, network         where and how it runs
    rollout    rollout, data, eval, reward, rollout_buffer    prompt -> scored samples
    training   train, optimizer, checkpoint, mtp              batch -> gradients
    algorithm  algorithm                                      advantages and loss
    serving    engine, router, pd                             what generates
    watching   tracking, debug, ci                            what a run tells
    megatron   megatron                                       Megatron's own flags
    hooks      hooks                                          plug-in paths, from the catalogue

Each field declares its default, help, check and whether this version can honour it (`miles.config.flags`). What depends
on several fields is worked out once, in `miles.config.resolve`, before a section is built; nothing changes afterwards.
"""

from __future__ import annotations

from miles.config.flags import Flag, Section, flags_of
from miles.config.sections.algorithm import AlgorithmConfig
from miles.config.sections.hooks import DeclaredHooks, HooksConfig
from miles.config.sections.megatron import MegatronConfig
from miles.config.sections.place import ClusterConfig, FaultToleranceConfig, NetworkConfig, RunSettings
from miles.config.sections.rollout import DataConfig, EvalConfig, RewardConfig, RolloutBufferConfig, RolloutConfig
from miles.config.sections.serving import EngineConfig, PDConfig, RouterConfig
from miles.config.sections.training import CheckpointConfig, MTPConfig, OptimizerConfig, TrainConfig
from miles.config.sections.watching import CIConfig, DebugConfig, TrackingConfig

SECTIONS: dict[str, type[Section]] = {
    "run": RunSettings,
    "rollout": RolloutConfig,
    "data": DataConfig,
    "reward": RewardConfig,
    "algorithm": AlgorithmConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "checkpoint": CheckpointConfig,
    "eval": EvalConfig,
    "hooks": DeclaredHooks,
    "tracking": TrackingConfig,
    "debug": DebugConfig,
    "engine": EngineConfig,
    "cluster": ClusterConfig,
    "rollout_buffer": RolloutBufferConfig,
    "router": RouterConfig,
    "fault_tolerance": FaultToleranceConfig,
    "network": NetworkConfig,
    "mtp": MTPConfig,
    "pd": PDConfig,
    "ci": CIConfig,
    "megatron": MegatronConfig,
}
"""Section name -> class, in the order of `--help`."""

FLAGS: dict[str, Flag] = {flag.name: flag for section in SECTIONS.values() for flag in flags_of(section)}
"""Every flag by its name, which is unique across sections."""

__all__ = [
    "FLAGS",
    "SECTIONS",
    "AlgorithmConfig",
    "CIConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "DataConfig",
    "DebugConfig",
    "EngineConfig",
    "EvalConfig",
    "FaultToleranceConfig",
    "HooksConfig",
    "MTPConfig",
    "MegatronConfig",
    "NetworkConfig",
    "OptimizerConfig",
    "PDConfig",
    "RewardConfig",
    "RolloutBufferConfig",
    "RolloutConfig",
    "RouterConfig",
    "RunSettings",
    "TrackingConfig",
    "TrainConfig",
]
