"""From a Hugging Face folder into the local parameters of a Megatron-Core model: each rank reads its own slices.

Names and shapes of the whole model are compared with the folder before anything is read, by every rank alike, so that
all of them end with the same message.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from miles.errors import CheckpointError
from miles.trainer.megatron.convert.folder import Folder, HfModel
from miles.trainer.megatron.convert.layout import ModelLayout, local_parameters, plainly
from miles.trainer.megatron.convert.rules import Parameter, Place

# Problems that one message lists; of more it gives the number.
PROBLEMS_SHOWN = 20
# What old folders hold beside weights: computed from config.json.
IGNORED_ENDINGS = (".rotary_emb.inv_freq", ".self_attn.bias", ".self_attn.masked_bias")
OUTPUT_NAME = "lm_head.weight"


def load_hf(
    folder: str | Path,
    chunks: Sequence[nn.Module],
    config: TransformerConfig,
    *,
    flag: str = "--hf-checkpoint",
    own_head: bool = False,
) -> None:
    """Fill the parameters of this rank's model chunks (one per virtual stage, in their order), in place.

    Values are cast to the dtype of the parameters; rows that pad the vocabulary become 0. With `own_head` (a critic)
    the output layer stays as it is. CheckpointError, which names `flag` and the folder, lists every tensor that is
    missing, unexpected or of another shape; ValueError where the model itself has other parameters than its
    configuration says.
    """
    layout = ModelLayout(HfModel.of(folder, flag), chunks, config, own_head=own_head)
    with Folder(folder, flag) as opened, torch.no_grad():
        check_names(opened, layout)
        for parameter, tensor in matched(layout, chunks).values():
            fill(tensor, parameter, layout, opened)


def read_hf(
    folder: str | Path,
    chunks: Sequence[nn.Module],
    config: TransformerConfig,
    *,
    flag: str = "--ref-load",
    own_head: bool = False,
) -> dict[str, Tensor]:
    """What `load_hf` would fill in, as new tensors on the CPU by the names of `local_parameters`.

    Each has shape and dtype of its parameter. The model is not touched. Raises what `load_hf` raises.
    """
    layout = ModelLayout(HfModel.of(folder, flag), chunks, config, own_head=own_head)
    found = {}
    with Folder(folder, flag) as opened, torch.no_grad():
        check_names(opened, layout)
        for name, (parameter, tensor) in matched(layout, chunks).items():
            found[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            fill(found[name], parameter, layout, opened)
    return found


def matched(layout: ModelLayout, chunks: Sequence[nn.Module]) -> dict[str, tuple[Parameter, Tensor]]:
    """This rank's parameters beside what the layout says of them. ValueError where the two differ."""
    found, wrong = compared(layout, chunks)
    if wrong:
        raise ValueError(
            f"The Megatron model is not a {layout.model.family.architecture} of its own configuration:\n  "
            + "\n  ".join(wrong)
        )
    return found


def differences(
    folder: str | Path, chunks: Sequence[nn.Module], config: TransformerConfig, *, own_head: bool = False
) -> list[str]:
    """A line for each parameter of this rank's chunks that the model of `config` and the folder has otherwise, or not,
    or has beside them. Empty where the chunks are such a model. CheckpointError for folders without a table."""
    layout = ModelLayout(HfModel.of(folder, "--hf-checkpoint"), chunks, config, own_head=own_head)
    return compared(layout, chunks)[1]


def compared(
    layout: ModelLayout, chunks: Sequence[nn.Module]
) -> tuple[dict[str, tuple[Parameter, Tensor]], list[str]]:
    """This rank's parameters beside what the layout says of them, and a line for each difference."""
    found, wrong, expected = {}, [], layout.here()
    for name, tensor in local_parameters(chunks).items():
        parameter = expected.pop(plainly(name), None)
        if parameter is None:
            wrong += [] if layout.is_head(name) else [f"{name} {list(tensor.shape)} has no counterpart"]
            continue
        shape = parameter.shape(layout.tensor_size(parameter))
        if tuple(tensor.shape) != shape:
            wrong.append(f"{name}: {list(tensor.shape)}, expected {list(shape)}")
        found[name] = parameter, tensor
    return found, wrong + [f"{name} is missing" for name in expected]


def fill(target: Tensor, parameter: Parameter, layout: ModelLayout, folder: Folder) -> None:
    """This rank's slices of the folder's tensors into `target`."""
    rank, size = layout.tensor_rank(parameter), layout.tensor_size(parameter)
    places, axis = stored_places(parameter, folder), parameter.axis
    segments = parameter.segments(rank, size)
    if sum(segment.length for segment in segments) < target.shape[axis]:
        target.zero_()
    for segment in segments:
        part = folder.read(places[segment.part], segment, axis)
        target.narrow(axis, segment.local, segment.length).copy_(part)


def stored_places(parameter: Parameter, folder: Folder) -> list[Place]:
    """Experts one by one, as folders have them, or stacked, where the folder has the stacked tensor."""
    return parameter.places(stacked=parameter.stacked in folder.shapes)


def check_names(folder: Folder, layout: ModelLayout) -> None:
    """CheckpointError where the folder does not hold exactly the tensors of the whole model."""
    problems, expected = [], set()
    for parameter in layout.parameters:
        for place in stored_places(parameter, folder):
            if place.tensor in expected:
                continue
            expected.add(place.tensor)
            found = folder.shapes.get(place.tensor)
            if found is None:
                problems.append(f"{place.tensor}: not in the folder")
            elif found != place.shape:
                problems.append(f"{place.tensor}: {list(found)} in the folder, {list(place.shape)} in the model")
    allowed = {OUTPUT_NAME} if layout.model.tied or layout.own_head else set()
    problems += [
        f"{name}: not in the model"
        for name in folder.shapes
        if name not in expected | allowed and not name.endswith(IGNORED_ENDINGS)
    ]
    if problems:
        more = len(problems) - PROBLEMS_SHOWN
        shown = problems[:PROBLEMS_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        own = "its config.json" if folder.flag == "--hf-checkpoint" else "the config.json of --hf-checkpoint"
        raise CheckpointError(
            f"{folder.flag} {folder.path}: the weights are not those of the model that is trained "
            f"({layout.model.family.architecture}):\n  "
            + "\n  ".join(shown)
            + f"\nGive a folder whose *.safetensors are those of {own}."
        )
