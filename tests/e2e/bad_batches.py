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


# ---- odd, and right ------------------------------------------------------------------------------------------------


def very_unequal(sample: Sample) -> None:
    """Of samples that stand side by side, which go to different data-parallel ranks, one is ten times as long."""
    responds(sample, 2 if sample.index % 2 == 0 else 30 + sample.index)


def one_token(sample: Sample) -> None:
    responds(sample, 1)


def masked_in_part(sample: Sample) -> None:
    """Of one half nothing counts, of the other not the beginning."""
    counts = sample.index % 4 > 1
    sample.loss_mask = [int(counts and t > 0) for t in range(sample.response_length)]


def every_second_removed(sample: Sample) -> None:
    sample.remove_sample = sample.index % 2 == 1


def responds(sample: Sample, length: int) -> None:
    response = [5 + (3 * sample.index + t * t) % 9 for t in range(length)]
    vars(sample).update(
        tokens=[*sample.tokens[:2], *response],
        response_length=length,
        loss_mask=[1] * length,
        rollout_log_probs=[-0.5] * length,
    )


ODD = (very_unequal, every_second_removed, lambda s: setattr(s, "remove_sample", True), one_token, masked_in_part)


def odd(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> list[Group]:
    """One oddity per rollout, in the order of `ODD`."""
    return rollout(ODD[rollout_id % len(ODD)])(args, rollout_id, data_source, evaluation)
