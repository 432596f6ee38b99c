"""Generate functions that measure engines: the text does not matter, its length does."""

from __future__ import annotations

import random
from argparse import Namespace
from typing import Any

from miles.rollout.sglang_rollout import generate
from miles.types import Sample

# Published range of response lengths, [from, to).
MIN_TOKENS, MAX_TOKENS = 32 * 1024, 64 * 1024


async def generate_with_random_osl(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """A response of a random length that no end-of-sequence token cuts short."""
    length = random.randrange(MIN_TOKENS, MAX_TOKENS)
    return await generate(args, sample, {**sampling_params, "ignore_eos": True, "max_new_tokens": length})
