"""Built-in rewards, and the published dispatcher `async_rm`.

`built_in_rm` is what scores a sample when `--custom-rm-path` is not set: it takes the reward plug-in's place, so that
time limits, failure policies and error cards are the same for both.
"""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Awaitable, Callable
from typing import Any

from miles.errors import FlagError, HookError
from miles.rollout import context
from miles.rollout.rm_hub.f1 import f1_score
from miles.types import Failure, Sample

__all__ = ["async_rm", "batched_async_rm", "built_in_rm", "f1_score", "remote_rm"]


async def remote_rm(args: Namespace, sample: Sample) -> Any:
    """POST {prompt, response, label} to `--rm-url`; the decoded JSON (a number or a dict) is the reward."""
    import httpx

    payload = {"prompt": sample.prompt, "response": sample.response, "label": sample.label}
    async with httpx.AsyncClient(timeout=None) as client:
        response = await client.post(args.rm_url, json=payload)
        response.raise_for_status()
        return response.json()


async def _f1(args: Namespace, sample: Sample) -> float:
    return f1_score(sample.response, sample.label)[0]


async def _random(args: Namespace, sample: Sample) -> int:
    return random.randint(0, 1)


REWARDS: dict[str, Callable[[Namespace, Sample], Awaitable[Any]]] = {
    "f1": _f1,
    "random": _random,
    "remote_rm": remote_rm,
}


async def built_in_rm(args: Namespace, sample: Sample) -> Any:
    """The reward that `metadata["rm_type"]` or `--rm-type` names."""
    of_sample = sample.metadata.get("rm_type") if isinstance(sample.metadata, dict) else None
    name = (of_sample or args.rm_type or "").strip()
    known = ", ".join(sorted(REWARDS))
    if not name:
        raise FlagError(
            "--rm-type", given="reward model type is not specified.",
            remedy=f"Give --custom-rm-path your.module:function, or --rm-type with one of: {known}.",
        )  # fmt: skip
    if name not in REWARDS:
        raise NotImplementedError(f"--rm-type {name!r} is not implemented; built in are: {known}.")
    return await REWARDS[name](args, sample)


async def async_rm(args: Namespace, sample: Sample, **kwargs: Any) -> Any:
    """Score one sample: `--custom-rm-path`, else the built-in reward. Plug-ins call this from their own code."""
    value = await context.current(args).reward(args).call_async(args, sample)
    return _or_raise(value)


async def batched_async_rm(
    args: Namespace, samples: list[Sample], inplace_set_reward_field: bool = False, **kwargs: Any
) -> list[Any] | None:
    """Score several samples at once; `inplace_set_reward_field` writes `sample.reward` and returns None."""
    if inplace_set_reward_field:
        for sample in samples:
            assert sample.reward is None, f"Overriding the reward {sample.reward!r} of sample {sample.index}"
    values = [_or_raise(v) for v in await context.current(args).reward(args).call_batch_async(args, samples)]
    if not inplace_set_reward_field:
        return values
    for sample, value in zip(samples, values, strict=True):
        sample.reward = value
    return None


def _or_raise(value: Any) -> Any:
    """A plug-in that scores for itself must not see a failure as a value."""
    if isinstance(value, Failure):
        raise HookError(value, f"{value.flag} {value.path} failed at {value.location}: {value.message}")
    return value
