"""Rollout functions that hand over finished samples with something wrong, for the tests of what training makes of it.

Two groups of four samples: prompts of 2 tokens, responses of 3 to 10, half of the rewards 1.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from miles.types import Group, Sample

GROUPS, SIZE = 2, 4


def finished(index: int) -> Sample:
    response = [5 + (index + t) % 9 for t in range(3 + index)]
    return Sample(
        index=index,
        group_index=index // SIZE,
        prompt="1+1=?",
        tokens=[3, 4, *response],
        response="2",
        response_length=len(response),
        reward=float(index % 2),
        rollout_log_probs=[-0.5] * len(response),
        loss_mask=[1] * len(response),
        status=Sample.Status.COMPLETED,
    )


def rollout(change: Callable[[Sample], None], *which: int) -> Callable[..., list[Group]]:
    """A rollout function whose samples of these indices (all without any) went through `change`."""

    def generate(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> list[Group]:
        groups = [[finished(SIZE * g + i) for i in range(SIZE)] for g in range(GROUPS)]
        for sample in (s for group in groups for s in group):
            if not which or sample.index in which:
                change(sample)
        return groups

    return generate


def without_response(sample: Sample) -> None:
    vars(sample).update(tokens=sample.tokens[:2], response_length=0, response="", loss_mask=[], rollout_log_probs=[])


good = rollout(lambda s: None)
reward_nan = rollout(lambda s: setattr(s, "reward", math.nan), 5)
reward_text = rollout(lambda s: setattr(s, "reward", "good"), 2)
no_log_probs = rollout(lambda s: setattr(s, "rollout_log_probs", None))
one_without_log_probs = rollout(lambda s: setattr(s, "rollout_log_probs", None), 6)
short_log_probs = rollout(lambda s: s.rollout_log_probs.pop(), 1)
long_mask = rollout(lambda s: s.loss_mask.append(1), 3)
mask_of_halves = rollout(lambda s: setattr(s, "loss_mask", [0.5] * s.response_length), 4)
response_of_everything = rollout(lambda s: setattr(s, "response_length", len(s.tokens)), 7)
one_empty = rollout(without_response, 2)
all_empty = rollout(without_response)
all_removed = rollout(lambda s: setattr(s, "remove_sample", True))
