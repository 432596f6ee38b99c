"""Published names of the training rollout; the work is in `miles.rollout.loop`."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Callable

from miles.engine.calls import get
from miles.rollout.loop import generate_rollout, mark_started, submit_groups
from miles.rollout.state import GenerateState
from miles.types import Group, RolloutFnTrainOutput

__all__ = ["abort", "generate_rollout_async", "get_worker_urls", "submit_generate_tasks"]


async def generate_rollout_async(
    state: GenerateState, rollout_id: int, data_source: Callable[[int], list[Group]]
) -> tuple[RolloutFnTrainOutput, list[Group]]:
    """One training rollout: its output, and the aborted groups. `data_source` gives that many groups."""
    return await generate_rollout(state, rollout_id, data_source)


def submit_generate_tasks(state: GenerateState, samples: list[Group]) -> list[asyncio.Task[Group]]:
    """One task per group, on the running event loop."""
    return submit_groups(state, samples)


async def abort(state: GenerateState, pendings: set[asyncio.Task[Group]], rollout_id: int) -> list[Group]:
    """Stop the engines, wait for `pendings`; with `--partial-rollout` return their groups."""
    state.aborted = True
    await state.context.client.abort_all()
    groups = list(await asyncio.gather(*pendings))
    if not state.args.partial_rollout:
        return []
    mark_started(groups, rollout_id)
    return groups


async def get_worker_urls(args: Namespace) -> list[str]:
    """Base URLs of the engines behind the router."""
    answer = await get(f"http://{args.sglang_router_ip}:{args.sglang_router_port}/list_workers")
    return list(answer["urls"])
