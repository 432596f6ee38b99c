"""The architectures that have a table, by their name in `config.json`."""

from __future__ import annotations

from miles.trainer.megatron.convert.families.llama import LLAMA
from miles.trainer.megatron.convert.families.qwen2 import QWEN2
from miles.trainer.megatron.convert.families.qwen3 import QWEN3
from miles.trainer.megatron.convert.families.qwen3_moe import QWEN3_MOE

FAMILIES = {family.architecture: family for family in (LLAMA, QWEN2, QWEN3, QWEN3_MOE)}
