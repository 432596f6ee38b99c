"""A Hugging Face folder to a model that trains on packed rows. Errors here are about the folder, so they name it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils.logging import disable_progress_bar

from miles.errors import CheckpointError
from miles.trainer.fsdp import attention, norm

# Standard deviation of a new critic's projection.
VALUE_HEAD_STD = 0.02


def load_model(
    folder: str, *, dtype: torch.dtype, gradient_checkpointing: bool, flag: str = "--hf-checkpoint"
) -> PreTrainedModel:
    """The causal language model in `folder`, in training mode, weights in `dtype`. Errors name `flag`."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{flag} {folder}: expected a Hugging Face model folder with a config.json, found "
            + ("none in that folder." if path.is_dir() else "no such folder.")
        )
    disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation=attention.NAME, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{flag} {folder}: transformers cannot load it as a causal language model: "
            f"{type(error).__name__}: {reason[0] if reason else ''}"
        ) from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{flag} {folder}: {len(names)} weights of a {type(model).__name__} are not in its files, such as "
            f"{names[0]}; they would be random numbers. Copy the folder of the model again."
        )
    head = model.get_output_embeddings()
    if head is None or head.bias is not None:
        raise CheckpointError(
            f"{flag} {folder}: {type(model).__name__} has no plain output projection. Expected a causal "
            "language model such as Llama, Qwen2 or Qwen3."
        )
    for parameter in model.parameters():
        # Out of the mapped file into memory of its own, which begins at a line of the cache: matrix products of the
        # same numbers at other addresses may differ in the last bit.
        parameter.data = parameter.data.clone()
    norm.use_in(model)
    if gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def use_value_head(model: PreTrainedModel, seed: int) -> None:
    """Replace the projection to the vocabulary by one to a single number, drawn from N(0, 0.02) with bias 0."""
    old = model.get_output_embeddings().weight
    head = torch.nn.utils.skip_init(torch.nn.Linear, old.shape[1], 1, dtype=old.dtype, device=old.device)
    weight = torch.randn(1, old.shape[1], generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        head.weight.copy_(weight * VALUE_HEAD_STD)
        head.bias.zero_()
    model.config.tie_word_embeddings = False
    model.set_output_embeddings(head)


def stored_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every stored tensor once, under its first name: parameters (tied ones are not repeated), persistent buffers."""
    seen: set[int] = set()
    stored: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            stored[name] = tensor
    return stored


def owned_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """The same as tensors without gradient, which share the model's memory."""
    return {name: tensor.detach() for name, tensor in stored_tensors(model).items()}


def on_disk(model: PreTrainedModel, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of `owned_tensors`, not cut, under the names that Hugging Face folders have: transformers keeps experts
    stacked in one tensor, files know them one by one."""
    stacked = any(tensor.dim() == 3 and ".experts." in name for name, tensor in whole.items())
    return revert_weight_conversion(model, whole) if stacked else whole


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """What a checkpoint notes about its model."""
    return {"architecture": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}
