"""The processes of a Megatron trainer: its process groups, and who speaks for whom.

The ranks of one model copy (tensor, context and pipeline parallel) hold the same samples. What passes yield on the last
stage is handed to the others, so that every rank goes on with the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor

from miles.config.layout import ParallelLayout
from miles.loss.parallel_state import ParallelState
from miles.trainer.ranks import Ranks


def make_groups(ranks: Ranks, layout: ParallelLayout, *, seed: int, timeout_minutes: int) -> Ranks:
    """Make Megatron's process groups among the processes that `ranks` has joined; the same processes, with sums over
    data-parallel ranks and reports from one rank of each model copy."""
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        distributed_timeout_minutes=timeout_minutes,
    )
    model_parallel_cuda_manual_seed(seed)
    assert mpu.get_data_parallel_rank() == layout.dp_rank(ranks.rank)
    return Ranks(
        ranks.rank,
        ranks.size,
        ranks.mesh,
        sum_group=mpu.get_data_parallel_group_gloo(),
        speakers=tuple(rank for rank in range(ranks.size) if layout.reports(rank)),
    )


def parallel_state(vocab_size: int) -> ParallelState:
    """This process under the published names."""
    virtual = mpu.get_virtual_pipeline_model_parallel_world_size()
    return ParallelState(
        dp_rank=mpu.get_data_parallel_rank(),
        dp_src_rank=mpu.get_data_parallel_src_rank(),
        dp_size=mpu.get_data_parallel_world_size(),
        cp_rank=mpu.get_context_parallel_rank(),
        cp_size=mpu.get_context_parallel_world_size(),
        dp_cp_rank=mpu.get_data_parallel_rank(with_context_parallel=True),
        dp_cp_size=mpu.get_data_parallel_world_size(with_context_parallel=True),
        dp_group=mpu.get_data_parallel_group(),
        dp_cp_group=mpu.get_data_parallel_group(with_context_parallel=True),
        dp_cp_group_gloo=mpu.get_data_parallel_group_gloo(with_context_parallel=True),
        cp_group=mpu.get_context_parallel_group(),
        tp_size=mpu.get_tensor_model_parallel_world_size(),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        tp_group=mpu.get_tensor_model_parallel_group(),
        is_pp_last_stage=mpu.is_pipeline_last_stage(),
        vpp_size=virtual or 1,
        microbatch_group_size_per_vp_stage=mpu.get_pipeline_model_parallel_world_size() if virtual else None,
        vocab_size=vocab_size,
    )


def from_last_stage(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of the last pipeline stage, in main memory, on all stages; other stages give none.

    Groups take tensors of both kinds of memory (`Ranks.join`); those in main memory travel with gloo.
    """
    group = mpu.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return [tensor.cpu() for tensor in tensors]
    shapes = told_by_last_stage([[list(t.shape), str(t.dtype).removeprefix("torch.")] for t in tensors])
    dtypes = {kind for _, kind in shapes}
    assert len(dtypes) <= 1, dtypes
    if not shapes:
        return []
    own = torch.cat([t.reshape(-1).cpu() for t in tensors]) if tensors else None
    sizes = [torch.Size(shape).numel() for shape, _ in shapes]
    flat = torch.empty(sum(sizes), dtype=getattr(torch, dtypes.pop())) if own is None else own
    dist.broadcast(flat, mpu.get_pipeline_model_parallel_last_rank(), group=group)
    return [part.view(shape) for part, (shape, _) in zip(flat.split(sizes), shapes)]


def told_by_last_stage(message: Any) -> Any:
    """A message of the last pipeline stage (numbers, names, lists) on all stages. JSON keeps every bit."""
    group = mpu.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return message
    source = mpu.get_pipeline_model_parallel_last_rank()
    text = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
    size = torch.tensor(len(text))
    dist.broadcast(size, source, group=group)
    if not mpu.is_pipeline_last_stage():
        text = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(text, source, group=group)
    return json.loads(bytes(text.numpy()))


def print_rank_0(message: object) -> None:
    """Print on the first rank of all, or where there is only one."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(message, flush=True)
