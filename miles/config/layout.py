"""How the trainer's processes are divided among the kinds of parallelism: which rank does what, as arithmetic.

Nothing here talks to a process group; whether a layout fits the model and the machine is left to
`miles.config.megatron`. The order of the axes is Megatron's default, the fastest first:

    dense part     tensor, context, data, pipeline
    expert part    expert tensor, expert, expert data, pipeline
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the axes, and the place of a rank on each.

    Example: `ParallelLayout(world_size=8, tensor=2, pipeline=2)` has `dp_size == 2`; its rank 6 has
    `tp_rank(6) == 0`, `dp_rank(6) == 1`, `pp_rank(6) == 1`.
    """

    world_size: int
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    expert: int = 1
    # Processes that share one expert's matrices; as `tensor` when None.
    expert_tensor: int | None = None
    # Chunks of layers per pipeline stage; None without interleaving.
    virtual: int | None = None

    def __post_init__(self) -> None:
        assert self.world_size % self.unit == 0, self

    # ---- sizes

    @property
    def model_size(self) -> int:
        """Processes that hold one copy of the dense part = tensor * context * pipeline."""
        return self.tensor * self.context * self.pipeline

    @property
    def etp_size(self) -> int:
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def unit(self) -> int:
        """World sizes that these sizes allow are its multiples: both parts must divide the processes evenly."""
        return math.lcm(self.model_size, self.etp_size * self.expert * self.pipeline)

    @property
    def dp_size(self) -> int:
        """Shares that a batch is cut into = world_size // (tensor * context * pipeline)."""
        return self.world_size // self.model_size

    @property
    def expert_dp_size(self) -> int:
        """Copies of each expert = world_size // (expert_tensor * expert * pipeline)."""
        return self.world_size // (self.etp_size * self.expert * self.pipeline)

    # ---- the place of a rank

    def tp_rank(self, rank: int) -> int:
        return rank % self.tensor

    def cp_rank(self, rank: int) -> int:
        return rank // self.tensor % self.context

    def dp_rank(self, rank: int) -> int:
        return rank // (self.tensor * self.context) % self.dp_size

    def pp_rank(self, rank: int) -> int:
        return rank // (self.world_size // self.pipeline)

    def etp_rank(self, rank: int) -> int:
        return rank % self.etp_size

    def ep_rank(self, rank: int) -> int:
        return rank // self.etp_size % self.expert

    def expert_dp_rank(self, rank: int) -> int:
        return rank // (self.etp_size * self.expert) % self.expert_dp_size

    def is_first_stage(self, rank: int) -> bool:
        return self.pp_rank(rank) == 0

    def is_last_stage(self, rank: int) -> bool:
        """Whether the rank computes the loss."""
        return self.pp_rank(rank) == self.pipeline - 1

    def reports(self, rank: int) -> bool:
        """Whether the rank speaks for its data-parallel share: one per share, on the last stage."""
        return self.tp_rank(rank) == 0 and self.cp_rank(rank) == 0 and self.is_last_stage(rank)
