"""TF32 for the matrix products that stay in float32, in every trainer process.

    miles train --config examples/quickstart/carry.yaml --train-backend megatron \
        --custom-megatron-init-path examples/plug_ins/custom_megatron_init.py:allow_tf32

What must be set once per process, after Megatron's own initialisation and before the model is built, belongs here. It
runs with fsdp, too.
"""

from __future__ import annotations

from argparse import Namespace

import torch


def allow_tf32(args: Namespace) -> None:
    torch.set_float32_matmul_precision("high")
