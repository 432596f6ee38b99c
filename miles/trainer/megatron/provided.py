"""Models of `--custom-model-provider-path`: what their providers build on, and what is asked of them.

    get_args                           the run's `args`, one object for all plug-ins of this process
    core_transformer_config_from_args  Megatron's configuration of the run's model
    get_model_provider_func            builds the model that the run would have without the flag
    adopt                              from what a provider returned to what the backend trains

The first three are found by plug-ins under `miles.backends.megatron_utils`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from transformers import AutoConfig

from miles.config import RunConfig
from miles.config.sections import SECTIONS
from miles.errors import UsageError
from miles.trainer.megatron import convert
from miles.trainer.megatron.model import Provider, Role, ValueHead, own_provider
from miles.trainer.megatron.settings import MegatronSettings
from miles.trainer.ranks import Ranks, own_device

# Of the configuration of a provider's model: what must be as the process groups are.
LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
    "params_dtype",
)
# What the backend asks of a chunk, beside the call itself.
ATTRIBUTES = ("config", "vocab_size", "set_input_tensor", "share_embeddings_and_output_weights", "decoder")
EXPECTED = (
    "expected Megatron-Core's GPTModel, or a module with its attributes and its forward(input_ids, position_ids, "
    "attention_mask, labels=, packed_seq_params=, loss_mask=)"
)
# Parameters of another shape that one message lists.
SHOWN = 5


class ProviderError(UsageError):
    """A provider returned a model that this run cannot train. The message goes on from "it"."""


# ---- what providers build on -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    config: RunConfig
    args: Namespace


_run: _Run | None = None


def announce(config: RunConfig, args: Namespace) -> None:
    """Once per process, before plug-ins are called: the run that the functions below speak of."""
    global _run
    _run = _Run(config, args)
    try:
        from megatron.training import global_vars
    except ImportError:  # megatron-core alone
        return
    if hasattr(global_vars, "set_args"):  # Megatron-LM: its functions and its plug-ins ask there
        global_vars.set_args(args)


def get_args() -> Namespace:
    """The `args` of this trainer process: the object that its other plug-ins are called with."""
    return _announced().args


def core_transformer_config_from_args(
    args: Namespace, config_class: type[TransformerConfig] | None = None
) -> TransformerConfig:
    """Megatron's configuration of the model of --hf-checkpoint under the run's flags. Attributes of `args` that a
    plug-in has changed count as it left them. `config_class` is a subclass that is made instead."""
    settings = _settings_of(args)
    kind = config_class or TransformerConfig
    return settings.transformer_config(AutoConfig.from_pretrained(settings.folder), own_device(), kind)


def get_model_provider_func(args: Namespace, role: Role = "actor") -> Provider:
    """`provide(pre_process=True, post_process=True, vp_stage=None)`: a GPTModel that runs with and without GPUs, with
    attention over packed rows. With role "critic" its last stage projects to values. Never calls the plug-in of
    --custom-model-provider-path, which may build on it."""
    settings = _settings_of(args)
    hf_config = AutoConfig.from_pretrained(settings.folder)
    config = settings.transformer_config(hf_config, own_device())
    build = own_provider(config, hf_config, settings.vocabulary(hf_config))

    def provide(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> nn.Module:
        model = build(pre_process=pre_process, post_process=post_process, vp_stage=vp_stage)
        if role == "critic" and post_process:
            model.output_layer = ValueHead(config, torch.device("cpu"), args.seed)
        return model

    return provide


def _announced() -> _Run:
    if _run is None:
        raise UsageError(
            "this process trains no Megatron model: get_args, core_transformer_config_from_args and "
            "get_model_provider_func are for plug-ins that a trainer with --train-backend megatron calls. Call them "
            "inside of the plug-in, not where its file is imported."
        )
    return _run


def _settings_of(args: Namespace) -> MegatronSettings:
    """Of the run, with what differs in `args`."""
    config, given = _announced().config, vars(args)
    sections: dict[str, Any] = {}
    origins = dict(config.origins)
    for name in SECTIONS:
        section: Any = config.section(name)
        own = {field.name: getattr(section, field.name) for field in fields(section)}
        changed = {name: given[name] for name, value in own.items() if name in given and given[name] != value}
        if changed:
            sections[name] = replace(section, **changed)
            origins |= dict.fromkeys(changed, "plug-in")
    return MegatronSettings.of(replace(config, **sections, origins=origins))


# ---- what is asked of their models -----------------------------------------------------------------------------------


def adopt(
    models: Sequence[Any], ours: TransformerConfig, folder: str | Path, ranks: Ranks, *, own_head: bool
) -> TransformerConfig:
    """The configuration of a provider's model chunks, which the pipeline's schedule and the optimizer follow.

    `ours` is that of the model that the run would have without the provider: its parameters, cut in the same way, are
    those that weights of `folder` go to. With `own_head` (a critic) the output layer is not the folder's. ProviderError
    where the chunks have others. Every rank must call this.
    """
    for model in models:
        missing = [name for name in ATTRIBUTES if not hasattr(model, name)]
        if missing:
            kind = f"{type(model).__module__}.{type(model).__name__}"
            raise ProviderError(f"returned a {kind} without {', '.join(missing)}; {EXPECTED}")
    config = models[0].config
    wrong = [
        f"config.{name} {theirs!r}, this run has {getattr(ours, name)!r}"
        for name in LAYOUT
        if (theirs := getattr(config, name, None)) != getattr(ours, name)
    ]
    rows, parts = AutoConfig.from_pretrained(folder).vocab_size, ours.tensor_model_parallel_size
    if models[0].vocab_size < rows or models[0].vocab_size % parts:
        wrong.append(f"vocab_size {models[0].vocab_size}, expected a multiple of {parts} from {rows} on")
    if not wrong:
        wrong = convert.differences(folder, models, ours, own_head=own_head)
    if wrong:
        more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        listed = "\n  ".join([*wrong[:SHOWN], *more])
        raise ProviderError(
            f"returned a {type(models[0]).__name__} that is not the model of --hf-checkpoint {folder} on this layout:\n"
            f"  {listed}\nexpected the parameters of that model, by Megatron's names and shapes"
        )
    is_frozen = not all(parameter.requires_grad for model in models for parameter in model.parameters())
    some_rank_is = bool(ranks.largest(int(is_frozen)))
    for model in models:
        own = model.config
        # Checkpoints hold all layers in one tensor, but for optimizers that know only some of them.
        own.hetereogenous_dist_checkpoint |= some_rank_is
        own.finalize_model_grads_func = finalize_model_grads
        own.variable_seq_lengths = True
        own.pipeline_dtype = own.params_dtype
    return config
