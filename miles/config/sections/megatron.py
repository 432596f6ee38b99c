"""Megatron's own flags, as launch scripts spell them: one section for `--train-backend megatron`.

    megatron_model      the decoder and its experts, filled from config.json
    megatron_trainer    parallelism, precision, memory, optimizer, checkpoints
    megatron_unbuilt    what is refused

Only the section as a whole is instantiated, so its parts have no constructors of their own (`--help` must stay quick).
A row says which field of Megatron-Core's dataclasses a flag sets; `RunConfig.overrides` gathers them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from miles.config.flags import Section
from miles.config.sections.megatron_model import MegatronExperts, MegatronModel
from miles.config.sections.megatron_trainer import (
    MegatronNumerics,
    MegatronOptimizer,
    MegatronParallel,
    MegatronRest,
)

if TYPE_CHECKING:

    class MegatronUnbuilt(Section): ...

else:
    from miles.config.sections.megatron_unbuilt import MegatronUnbuilt


@dataclass(frozen=True, kw_only=True)
class MegatronConfig(
    # Fields stand in the order of the last base first.
    MegatronUnbuilt, MegatronRest, MegatronOptimizer, MegatronNumerics, MegatronExperts, MegatronModel,
    MegatronParallel,
):  # fmt: skip
    """The attributes have Megatron's names.

    Example: `config.megatron.tensor_model_parallel_size == 2`, `config.megatron.num_query_groups == 8`
    """
