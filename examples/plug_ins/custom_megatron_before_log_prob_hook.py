"""Say which model computes, actor, reference or critic, and with how many parameters on this rank.

    miles train --config examples/quickstart/carry.yaml --train-backend megatron \
        --custom-megatron-before-log-prob-hook-path examples/plug_ins/custom_megatron_before_log_prob_hook.py:announce

Reference and actor take turns in one model; a reference that was never loaded shows here first. Ranks show warnings
and what is graver, in `ranks/` of the run directory.
"""

from __future__ import annotations

import logging
from argparse import Namespace

import torch

logger = logging.getLogger(__name__)


def announce(args: Namespace, model: list[torch.nn.Module], store_prefix: str) -> None:
    count = sum(parameter.numel() for chunk in model for parameter in chunk.parameters())
    role = "reference" if store_prefix == "ref_" else model[0].role
    logger.warning("rank %d: the %s computes with %d parameters", args.rank, role, count)
