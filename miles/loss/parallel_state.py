"""Where a process stands among the others of a training group, under the published field names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@dataclass
class ParallelState:
    """Ranks, sizes and groups of one process; what losses and other plug-ins receive as `parallel_state`.

    `dp_*` leave context parallelism out, `dp_cp_*` include it. A group is None where no process group exists (one
    process without torch.distributed): sizes are then 1 and nothing needs reducing. Mutable, because backends with
    pipeline or device-mesh specifics set further attributes.

    `vocab_size` is the number of tokens that exist, where the projection has more rows: a vocabulary that is cut over
    `tp_size` ranks is padded to equal parts, and the rows at its end belong to no token. None: every row is one.

    Example, the second of two data-parallel processes: `dp_rank=1, dp_size=2, dp_cp_rank=1, dp_cp_size=2`, all other
    sizes 1.
    """

    dp_rank: int = 0
    dp_src_rank: int = 0
    dp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    dp_cp_rank: int = 0
    dp_cp_size: int = 1
    dp_group: ProcessGroup | None = None
    dp_cp_group: ProcessGroup | None = None
    dp_cp_group_gloo: ProcessGroup | None = None
    cp_group: ProcessGroup | None = None
    tp_size: int = 1
    tp_rank: int = 0
    tp_group: ProcessGroup | None = None
    is_pp_last_stage: bool = True
    vpp_size: int = 1
    microbatch_group_size_per_vp_stage: int | None = None
    dp_mesh: DeviceMesh | None = None
    vocab_size: int | None = None

    @property
    def speaks(self) -> bool:
        """Whether this process writes what those that hold the same samples would all write."""
        return self.tp_rank == 0 and self.cp_rank == 0 and self.is_pp_last_stage

    @staticmethod
    def single_process() -> ParallelState:
        """One process that trains alone, with no process group."""
        return ParallelState()
