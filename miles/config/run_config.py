"""`RunConfig`: all sections of one run, and `flat_args`: the same as the Namespace that plug-ins receive."""

from __future__ import annotations

import copy
from argparse import Namespace
from dataclasses import dataclass, field, fields
from typing import Any

from miles.config import sections as s
from miles.config.flags import Section, flags_of
from miles.config.layout import ParallelLayout


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
    megatron: s.MegatronConfig
    hooks: s.HooksConfig
    # Attributes of `args` that are no flags of miles: of plug-ins, of SGLang, of --custom-config-path.
    extras: dict[str, Any] = field(default_factory=dict)
    # Those of them that are `--sglang-<flag>` or `--router-<flag>` and are not declared.
    passed: tuple[str, ...] = ()
    # One line each: substituted defaults, flags without meaning here.
    notices: list[str] = field(default_factory=list, compare=False)
    # Name -> its notice, for the defaults among them.
    substitutions: dict[str, str] = field(default_factory=dict, compare=False)
    # Name -> default, file, command line, custom config, substituted or derived.
    origins: dict[str, str] = field(default_factory=dict, compare=False)

    def section(self, name: str) -> Section:
        section: Section = getattr(self, name)
        return section

    @property
    def layout(self) -> ParallelLayout:
        """Who computes what: with fsdp every process takes a share of the batch, dp_size == world_size.

        So it is without a trainer (--debug-rollout-only), whose sizes are then those of the engines.
        """
        world = self.cluster.world_size
        if self.train.train_backend != "megatron" or self.debug.debug_rollout_only:
            return ParallelLayout(world)
        m = self.megatron
        return ParallelLayout(
            world,
            tensor=m.tensor_model_parallel_size,
            context=self.train.context_parallel_size,
            pipeline=m.pipeline_model_parallel_size,
            expert=m.expert_model_parallel_size,
            expert_tensor=m.expert_tensor_parallel_size,
            virtual=m.num_virtual_stages_per_pipeline_rank,
        )

    def overrides(self, dataclass_name: str) -> dict[str, Any]:
        """What flags and config.json say about the fields of one of Megatron-Core's dataclasses.

        Holds what was given, substituted or follows from something, and the defaults that differ from the field's;
        never None. Values are plain: text in place of Megatron's enumerations and of torch's types.

        Example: `config.overrides("TransformerConfig") == {"num_layers": 2, "layernorm_epsilon": 1e-6, ...}`
        """
        fields_: dict[str, Any] = {}
        for section in s.SECTIONS:
            for flag in flags_of(s.SECTIONS[section]):
                value = getattr(self.section(section), flag.name)
                is_set = flag.deviates or self.origins[flag.name] != "default"
                if value is None or not is_set or flag.status.kind == "no_meaning_here":
                    continue
                for target in flag.sets:
                    owner, _, field_name = target.partition(".")
                    if owner == dataclass_name:
                        fields_[field_name] = copy.copy(value)
        return fields_


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
        virtual_pipeline_model_parallel_size=config.megatron.num_virtual_stages_per_pipeline_rank,
        sglang_tp_size=tp_size,
        sglang_tensor_parallel_size=tp_size,
        sglang_dp_size=engine.sglang_data_parallel_size,
        sglang_pp_size=engine.sglang_pipeline_parallel_size,
        sglang_ep_size=engine.sglang_expert_parallel_size,
    )
    values.update(config.extras)
    return Namespace(**copy.deepcopy(values))
