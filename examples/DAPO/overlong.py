"""DAPO's overlong reward shaping: responses that come near the length limit lose reward, those cut off at it most.

    R_length = 0                                            length <= L_max - L_cache
               ((L_max - L_cache) - length) / L_cache       up to L_max            (Yu et al., "DAPO", arXiv:2503.14476,
               -1                                           beyond L_max            section 3.4, equation 13)

added to the reward for being right, before rewards are compared inside their group:

    --custom-reward-post-process-path examples/DAPO/overlong.py:shaped_rewards

Why a post-process and not a reward: dynamic sampling drops groups that are all right or all wrong, and that must be
judged by being right alone. Settings, from --custom-config-path: `overlong_buffer_len` (L_cache) and
`overlong_penalty_factor`; L_max is --rollout-max-response-len.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import numpy as np

from miles.utils.types import Sample

# Keeps the division finite where a group's rewards are almost equal, as in GRPO.
EPSILON = 1e-6


def shaped_rewards(args: Namespace, samples: list[Sample]) -> tuple[list[float], list[float]]:
    """(raw, rewards): being right as it was scored, and with the penalty, relative to the group's mean and spread."""
    raw = [float(sample.get_reward_value(args)) for sample in samples]
    shaped = np.array([r + penalty(args, sample.response_length) for r, sample in zip(raw, samples)])
    rewards = np.zeros(len(samples))
    groups: dict[Any, list[int]] = {}
    for row, sample in enumerate(samples):
        position = ("position", row // args.n_samples_per_prompt) if sample.group_index is None else None
        groups.setdefault(position or sample.group_index, []).append(row)
    for rows in groups.values():
        spread = shaped[rows].std(ddof=1) if len(rows) > 1 else 0.0
        rewards[rows] = (shaped[rows] - shaped[rows].mean()) / (spread + EPSILON)
    return raw, rewards.tolist()


def penalty(args: Namespace, length: int) -> float:
    """The soft punishment of a response of `length` tokens, from 0 down to -overlong_penalty_factor."""
    limit, cache, factor = settings(args)
    return factor * float(np.clip(((limit - cache) - length) / cache, -1.0, 0.0))


def settings(args: Namespace) -> tuple[int, int, float]:
    """(L_max, L_cache, factor). Raises ValueError with the name of the setting that is wrong."""
    given = vars(args)
    limit, cache, factor = given["rollout_max_response_len"], given.get("overlong_buffer_len"), 1.0
    if limit is None:
        raise ValueError("--rollout-max-response-len: overlong shaping needs a limit.")
    if not isinstance(cache, int) or isinstance(cache, bool) or not 1 <= cache <= limit:
        raise ValueError(
            f"overlong_buffer_len: expected a whole number from 1 to --rollout-max-response-len {limit}, "
            f"got {cache!r}. It is set in --custom-config-path."
        )
    factor = given.get("overlong_penalty_factor", factor)
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not factor >= 0:
        raise ValueError(f"overlong_penalty_factor: expected a number >= 0, got {factor!r}.")
    return limit, cache, float(factor)
