"""Groups that came back: at most a quarter of a batch, fewest attempts first, and none for the third time.

    miles train --config examples/quickstart/carry.yaml \
        --rollout-function-path examples/plug_ins/rollout_function.py:generate_rollout \
        --buffer-filter-path examples/plug_ins/buffer_filter.py:a_few_again

Without it, groups that nobody can solve would fill every rollout. The buffer is the live list: what leaves it must be
removed from it, whether it is returned or thrown away.
"""

from __future__ import annotations

from argparse import Namespace

from miles.types import Sample

LARGEST_SHARE = 0.25
MOST_ATTEMPTS = 2


def a_few_again(
    args: Namespace, rollout_id: int | None, buffer: list[list[Sample]], num_samples: int
) -> list[list[Sample]]:
    waiting = sorted((group for group in buffer if attempts(group) <= MOST_ATTEMPTS), key=attempts)
    count = max(1, int(num_samples * LARGEST_SHARE))
    buffer[:] = waiting[count:]
    return waiting[:count]


def attempts(group: list[Sample]) -> int:
    return group[0].metadata.get("attempts", 0)
