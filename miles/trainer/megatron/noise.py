"""Warnings that Megatron-Core and PyTorch give in every run of this backend, and that ask nothing of its user.

Importing anything of `miles.trainer.megatron` silences these, word for word (`quiet`), in this process; whatever else
they warn of is shown.
"""

from __future__ import annotations

import re
import warnings

import torch

NOISE: tuple[tuple[type[Warning], str, str], ...] = (
    (UserWarning, "Apex is not installed. Falling back to Torch Norm", "norms are those of `layers`"),
    (UserWarning, "full scope is deprecated. Use empty cuda_graph_scope", "the default of Megatron's own launch flag"),
    (
        UserWarning,
        "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed.",
        "Megatron's optimizer asks each of its shards whether it has one",
    ),
    (
        UserWarning,
        "`sequence_parallel` is set to `True`, but tensor model parallel size is 1. Disabling sequence parallel.",
        "experts that are whole, beside layers that are not",
    ),
    (
        UserWarning,
        "If you are using transformer_engine as the transformer implementation, the core_attn is from",
        "attention is that of `layers`",
    ),
    (FutureWarning, "`torch.distributed.reduce_scatter_tensor` is deprecated.", "Megatron-Core calls it"),
    (FutureWarning, "`torch.distributed.all_gather_into_tensor` is deprecated.", "Megatron-Core calls it"),
)
"""Category, how the message begins, and why it says nothing."""

WITHOUT_GPU: tuple[tuple[type[Warning], str, str], ...] = (
    (
        UserWarning,
        "When using sequence parallelism it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS",
        "a setting of a GPU's driver",
    ),
    (
        UserWarning,
        "When using async grad allreduce it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS",
        "a setting of a GPU's driver",
    ),
)


def quiet() -> None:
    """Silence them from here on."""
    for category, beginning, _ in NOISE + (() if torch.cuda.is_available() else WITHOUT_GPU):
        warnings.filterwarnings("ignore", message=re.escape(beginning), category=category)
