"""What a run is: typed sections, from which flags, YAML files, `--help` and the `args` of plug-ins derive.

Imports nothing heavy: `miles --help` and `miles check` go through here.
"""

from miles.config.parse import parse, parse_args
from miles.config.run_config import RunConfig
from miles.config.sections import (
    AlgorithmConfig,
    CheckpointConfig,
    CIConfig,
    ClusterConfig,
    DataConfig,
    DebugConfig,
    EngineConfig,
    EvalConfig,
    FaultToleranceConfig,
    HooksConfig,
    MegatronConfig,
    MTPConfig,
    NetworkConfig,
    OptimizerConfig,
    PDConfig,
    RewardConfig,
    RolloutBufferConfig,
    RolloutConfig,
    RouterConfig,
    RunSettings,
    TrackingConfig,
    TrainConfig,
)

__all__ = [
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
    "RunConfig",
    "RunSettings",
    "TrackingConfig",
    "TrainConfig",
    "parse",
    "parse_args",
]
