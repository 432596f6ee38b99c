"""Routing replay inside of a Megatron model: which experts a pass takes, and how to make it take given ones.

Each router asks its `RouterReplay` for the top k. Ours takes what is prescribed for a token and leaves the others to
the router (`FREE`); it notes what was taken. A rank's routers see a part of it all: the layers of its pipeline stage,
the tokens of its context-parallel chunks, and with sequence parallelism its tensor-parallel share of those.

    forward pass of a chunk    `follow` prescribes, `taken` collects (gathered over tensor-parallel ranks)
    recomputation              the same choice again, in the order of the forward passes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor

from miles.trainer.backend import RoutingShape
from miles.trainer.routing import FREE

TopK = Callable[..., tuple[Tensor, Tensor]]


class Replay(RouterReplay):  # type: ignore[misc]
    """One router's. Between passes it takes what the router likes, and keeps nothing."""

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: TopK | None = None,
    ) -> tuple[Tensor, Tensor]:
        """scores [tokens, experts] -> (scores [tokens, k], experts int64 [tokens, k]) of the experts to take."""
        assert default_compute_topk is not None
        if self.router_replay_action == RouterReplayAction.REPLAY_BACKWARD and self.replay_backward_list:
            chosen = self.replay_backward_list.pop(0).to(scores.device)
            return scores.gather(1, chosen), chosen
        _, chosen = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.target_topk_idx is not None:
            chosen = torch.where(self.target_topk_idx >= 0, self.target_topk_idx, chosen)
        self.record_indices(chosen)
        return scores.gather(1, chosen), chosen


class Routers:
    """The routers of one model chunk, by the number of their layer in the whole model, counted from 0."""

    def __init__(self, chunk: Any, shape: RoutingShape, *, recomputed: bool, sequence_parallel: bool) -> None:
        self.shape, self.sequence_parallel = shape, sequence_parallel
        # Passes of the forward kind whose backward pass will route again.
        self._recomputed = recomputed
        self.replays: dict[int, Replay] = {}
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                # In Megatron's list of them ours takes the place of the one that the router made.
                known = RouterReplay.global_router_replay_instances
                if module.router_replay in known:
                    known.remove(module.router_replay)
                module.router_replay = self.replays[module.layer_number - 1] = Replay()

    def follow(self, known: Tensor | None, places: Tensor) -> None:
        """Until `taken`: token t of the rank takes `known[places[t]]` [P, layers, k], where that is not `FREE` and the
        place not -1."""
        if known is not None:
            known = self._own(torch.where((places >= 0)[:, None, None], known[places.clamp(min=0)], FREE))
        for layer, replay in self.replays.items():
            replay.target_topk_idx = None if known is None else known[:, layer].contiguous()
            replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)

    def taken(self, places: Tensor, size: int, *, training: bool, wanted: bool) -> Tensor | None:
        """int32 [size, layers, k] where it is wanted: what the pass since `follow` took, `FREE` at tokens and layers of
        other ranks. With recomputation, the backward pass takes the same again."""
        shape = (size, self.shape.num_layers, self.shape.top_k)
        taken = torch.full(shape, FREE, dtype=torch.int32, device=places.device) if wanted else None
        real = places >= 0
        for layer, replay in self.replays.items():
            chosen = replay.get_recorded_indices()
            if training and self._recomputed:
                replay.replay_backward_list.append(chosen)
            replay.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
            replay.target_topk_idx = replay.recorded_topk_idx = None
            if taken is not None:
                taken[places[real], layer] = self._whole(chosen)[real].to(torch.int32)
        return taken

    def forget(self) -> None:
        """After the last backward pass of a step."""
        for replay in self.replays.values():
            replay.clear_indices()
            replay.clear_router_replay_action()

    def _own(self, known: Tensor) -> Tensor:
        """This tensor-parallel rank's part of [S, ...], as sequence parallelism cuts it."""
        if not self.sequence_parallel:
            return known
        return known.chunk(mpu.get_tensor_model_parallel_world_size())[mpu.get_tensor_model_parallel_rank()]

    def _whole(self, chosen: Tensor) -> Tensor:
        if not self.sequence_parallel:
            return chosen
        parts = [torch.empty_like(chosen) for _ in range(mpu.get_tensor_model_parallel_world_size())]
        dist.all_gather(parts, chosen.contiguous(), group=mpu.get_tensor_model_parallel_group())
        return torch.cat(parts)
