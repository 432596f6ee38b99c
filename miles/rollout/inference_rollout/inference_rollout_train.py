"""Published names of the training rollout; the work is in `miles.rollout.loop`."""

from __future__ import annotations

import asyncio
from argparse import Namespace

from miles.engine.client import get
from miles.rollout.loop import generate_rollout as generate_rollout_async
from miles.rollout.loop import mark_started
from miles.rollout.loop import submit_groups as submit_generate_tasks
from miles.rollout.state import GenerateState
from miles.types import Group

__all__ = ["abort", "generate_rollout_async", "get_worker_urls", "submit_generate_tasks"]


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
