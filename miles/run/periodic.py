"""When things that happen every so many rollouts (saving, evaluating) are due."""

from __future__ import annotations


def should_run_periodic_action(
    rollout_id: int,
    interval: int | None,
    num_rollout_per_epoch: int | None = None,
    num_rollout: int | None = None,
) -> bool:
    """Whether the action is due after rollout `rollout_id` (from 0): every `interval` rollouts, at the end of each
    epoch, and after the last rollout. Never without an interval.

    Example: `[i for i in range(10) if should_run_periodic_action(i, 4, None, 10)]` is `[3, 7, 9]`.
    """
    if interval is None:
        return False
    done = rollout_id + 1
    ends_epoch = num_rollout_per_epoch is not None and done % num_rollout_per_epoch == 0
    return done % interval == 0 or done == num_rollout or ends_epoch
