"""One prompt to scored samples: generate, then reward; the whole of it for one group.

The order is published and plug-ins depend on it: a finished sample is left alone; the semaphore is held while the
generate function runs and released before the reward; a group reward runs when every member is done.

A score that failed under a tolerant policy marks its sample (`mark_failed`); from then on no plug-in sees the sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from miles.hooks import Hook
from miles.hooks.values import BadReturn
from miles.rollout.generate_hub import single_turn
from miles.rollout.state import GenerateState
from miles.tasks import gather_or_cancel
from miles.types import Failure, GenerateFnInput, Group, Sample, is_failed

T = TypeVar("T")


async def generate_and_rm_group(
    state: GenerateState, group: Group, sampling_params: dict[str, Any], evaluation: bool = False
) -> Group:
    """Generate and score every member; the order of the group is kept. Returned unchanged if the rollout is aborted."""
    if state.aborted:
        return group
    done = await gather_or_cancel(
        generate_and_rm(state, sample, state.params_for(sample, position, sampling_params), evaluation)
        for position, sample in enumerate(group)
    )
    if state.args.group_rm and not state.aborted:
        await score_batch(state, flat(valid(done)), only_unscored=False)
    return done


async def generate_and_rm(
    state: GenerateState, sample: Any, sampling_params: dict[str, Any], evaluation: bool = False
) -> Any:
    """Generate one sample and score it. Returns the sample, or the list that a multi-sample function made of it."""
    args = state.args
    if is_failed(sample):  # came back with its group, which goes on without it
        return sample
    masks = args.partial_rollout and args.mask_offpolicy_in_partial_rollout and sample.response_length > 0
    earlier = list(sample.tokens) if masks else None
    if masks:
        sample.loss_mask = [0] * sample.response_length
    if sample.status in (Sample.Status.COMPLETED, Sample.Status.TRUNCATED):
        assert sample.response is not None
        if not args.group_rm:
            assert sample.reward is not None, f"finished sample {sample.index} has no reward"
        return sample

    async with state.generate_fn_semaphore:
        if state.aborted:
            sample.status = Sample.Status.ABORTED
            return sample
        produced = await _generate(state, sample, sampling_params, evaluation)
    if isinstance(produced, Failure):
        return mark_failed(sample, produced)
    if earlier is not None:
        _mask_what_was_added(produced, earlier)
    if args.group_rm:
        return produced

    if isinstance(produced, list):
        if all(s.status != Sample.Status.ABORTED for s in produced):
            await score_batch(state, produced, only_unscored=True)
    elif produced.status != Sample.Status.ABORTED and produced.reward is None:
        _accept(produced, await state.context.reward(args).call_async(args, produced))
    return produced


def _mask_what_was_added(sample: Sample, earlier: list[int]) -> None:
    """Ones for the tokens that a generate function has added without a mask of its own to those of `earlier`.

    A function that began anew has no earlier tokens in its response: all of it is trained.
    """
    mask, length = sample.loss_mask, sample.response_length
    if mask is None or len(mask) == length or any(mask):
        return
    continued = len(mask) < length and sample.tokens[: len(earlier)] == earlier
    sample.loss_mask = mask + [1] * (length - len(mask)) if continued else None


async def _generate(
    state: GenerateState, sample: Sample, sampling_params: dict[str, Any], evaluation: bool
) -> Sample | list[Sample] | Failure:
    given = GenerateFnInput(state, sample, sampling_params, evaluation)
    hook = state.context.hook("custom_generate_function", state.args)
    if hook is None:
        return (await single_turn.generate(given)).samples
    output = await hook.call_async(given)
    if isinstance(output, Failure):
        return output
    if isinstance(output.samples, list) and state.args.partial_rollout:
        hook.reject(
            BadReturn(
                "type",
                f"returned a list of {len(output.samples)} samples under --partial-rollout, expected one Sample",
                "several samples of one prompt cannot be continued: leave out --partial-rollout",
            ),
            given,
            sample=sample,
        )
    return output.samples


async def score_batch(state: GenerateState, samples: list[Sample], *, only_unscored: bool) -> None:
    """One batched reward call; `only_unscored` leaves samples alone that have a reward already."""
    todo = [s for s in samples if s.reward is None] if only_unscored else samples
    hook: Hook = state.context.reward(state.args)
    for sample, value in zip(todo, await hook.call_batch_async(state.args, todo), strict=True):
        _accept(sample, value)


def _accept(sample: Sample, value: Any) -> None:
    if isinstance(value, Failure):
        mark_failed(sample, value)
    else:
        sample.reward = value


def mark_failed(sample: Sample, failure: Failure) -> Sample:
    """Take `sample` out of training: no reward, no loss, no part in any statistic."""
    sample.reward, sample.status, sample.remove_sample = None, Sample.Status.FAILED, True
    sample.failure = failure  # type: ignore[attr-defined]
    return sample


def valid(group: Iterable[Any]) -> list[Any]:
    """The members that plug-ins and statistics may see; of a list of samples those that are left.

    A group in which nothing has failed is returned itself: plug-ins may change it in place.
    """
    if isinstance(group, list) and not any(map(is_failed, flat(group))):
        return group
    members = []
    for entry in group:
        if not isinstance(entry, list):
            members += [] if is_failed(entry) else [entry]
        elif not any(map(is_failed, entry)):
            members.append(entry)
        elif left := [s for s in entry if not is_failed(s)]:
            members.append(left)
    return members


def flat(group: Iterable[Any]) -> list[Sample]:
    """All samples of a group: multi-sample generate functions put lists where samples stand."""
    return [s for entry in group for s in (entry if isinstance(entry, list) else [entry])]


def first_sample(group: Group) -> Sample:
    """The sample that a group is sorted and logged by (entries of multi-sample groups are lists)."""
    entry: Any = group[0]
    return entry[0] if isinstance(entry, list) else entry
