"""What plug-ins import of `megatron.training`, which the package megatron-core lacks.

Where Megatron-LM is not installed, `import megatron.training` in a plug-in gives this (`miles.hooks.foreign`).
"""

from miles.backends.megatron_utils.training.global_vars import get_args
from miles.backends.megatron_utils.training.utils import print_rank_0

__all__ = ["get_args", "print_rank_0"]
