"""Say which model computes log-probabilities, and with how many parameters on this rank.

    miles hooks \
        --custom-megatron-before-log-prob-hook-path examples/plug_ins/custom_megatron_before_log_prob_hook.py:announce

Reference and actor take turns in one model; a reference that was never loaded shows here first.
"""

from __future__ import annotations

import logging
from argparse import Namespace

import torch

logger = logging.getLogger(__name__)


def announce(args: Namespace, model: list[torch.nn.Module], store_prefix: str) -> None:
    count = sum(parameter.numel() for chunk in model for parameter in chunk.parameters())
    logger.info("%s computes log-probs with %d parameters", "reference" if store_prefix == "ref_" else "actor", count)
