"""A Hugging Face model cut over ranks with PyTorch's FSDP2: each rank keeps its rows of every parameter.

    per layer   gathered before its forward and its backward pass, gradients reduced and scattered after it
    the rest    embeddings, last norm and the output projection: gathered from the forward pass to the end of the
                backward pass, because the loss multiplies with the projection itself, outside of any module

The entry of a forward pass is the method `hidden_states`, which FSDP knows as one (`register_fsdp_forward_method`). A
gradient that the loss adds to the projection arrives in the same parameter as that of the embedding it may be tied to.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from miles.weights.gather import rows_of


def shard(model: PreTrainedModel, mesh: DeviceMesh, *, param_dtype: torch.dtype | None, cpu_offload: bool) -> None:
    """Cut `model` over `mesh`, in place. Passes compute in `param_dtype` (None: as stored); gradients are always
    summed in the dtype that the parameters are stored in."""
    stored = next(model.parameters()).dtype
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=stored),
        "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    }
    blocks = set(model._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, **options)
    model.hidden_states = types.MethodType(_hidden_states, model)  # type: ignore[assignment]
    root = fully_shard(model, reshard_after_forward=False, **options)
    register_fsdp_forward_method(model, "hidden_states")
    # An expert that no token of one rank has chosen has no gradient there, and has one elsewhere.
    root.set_reduce_scatter_unused_params(True)


def _hidden_states(self: PreTrainedModel, **inputs: Any) -> Tensor:
    """[1, P, D], the last hidden states."""
    out: Tensor = self.base_model(**inputs).last_hidden_state
    return out


def reshard(model: torch.nn.Module) -> None:
    """Let go of every gathered parameter: after passes that no backward pass follows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def cut_like(whole: Tensor, shards: Tensor) -> Tensor:
    """This rank's rows of `whole`, cut as `shards` are; `whole` itself where those are not cut."""
    if not isinstance(shards, DTensor):
        return whole
    mesh = shards.device_mesh
    begin, end = rows_of(whole.shape[0], mesh.size(), mesh.get_rank())
    own = whole[begin:end].to(shards.device).clone()
    return DTensor.from_local(own, mesh, shards.placements, shape=whole.shape, stride=whole.stride(), run_check=False)
