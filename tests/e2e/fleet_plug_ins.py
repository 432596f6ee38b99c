"""Rewards that end a server of the run while requests are on their way, and a middleware that counts them."""

from __future__ import annotations

import importlib.util
import json
import signal
from argparse import Namespace
from pathlib import Path
from typing import Any

import psutil
from starlette.middleware.base import BaseHTTPMiddleware

from examples.agentic.agent import solve
from miles.types import Sample

CARRY = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "carry.py"
spec = importlib.util.spec_from_file_location("carry_of_the_quickstart", CARRY)
assert spec is not None and spec.loader is not None
carry = importlib.util.module_from_spec(spec)
spec.loader.exec_module(carry)

# The first answer of the second rollout: the others of its group, and other groups, are being generated.
AT_SAMPLE = 16
_done: set[str] = set()


def servers(command: str) -> list[psutil.Process]:
    """The child processes of this one that run `miles <command>`."""
    return [p for p in psutil.Process().children(recursive=True) if {"miles", command} <= set(p.cmdline())]


async def _reward(args: Namespace, sample: Sample, command: str, number: signal.Signals) -> float:
    if sample.index is not None and sample.index >= AT_SAMPLE and args.run_dir not in _done:
        _done.add(args.run_dir)
        servers(command)[0].send_signal(number)
    return float(await carry.reward(args, sample))


async def kills_an_engine(args: Namespace, sample: Sample) -> float:
    return await _reward(args, sample, "serve", signal.SIGKILL)


async def stops_an_engine(args: Namespace, sample: Sample) -> float:
    """A process that is stopped neither answers nor ends."""
    return await _reward(args, sample, "serve", signal.SIGSTOP)


async def kills_the_router(args: Namespace, sample: Sample) -> float:
    return await _reward(args, sample, "route", signal.SIGKILL)


_agents: dict[str, int] = {}


async def _agent(kills: str, base_url: str, **given: Any) -> None:
    """The example's agent. The tenth one to begin kills a server first, while others are in the middle."""
    router = base_url.partition("/sessions/")[0]
    _agents[router] = _agents.get(router, 0) + 1
    if _agents[router] == 10:
        servers(kills)[0].kill()
    await solve(base_url=base_url, **given)


async def agent_that_kills_the_router(
    *, base_url: str, prompt: list[dict[str, Any]], request_kwargs: dict[str, Any]
) -> None:
    await _agent("route", base_url, prompt=prompt, request_kwargs=request_kwargs)


async def agent_that_kills_an_engine(
    *, base_url: str, prompt: list[dict[str, Any]], request_kwargs: dict[str, Any]
) -> None:
    await _agent("serve", base_url, prompt=prompt, request_kwargs=request_kwargs)


class Counting(BaseHTTPMiddleware):
    """Notes every request to /generate, and the weight version of its answer, in a file beside the run."""

    def __init__(self, app: Any, *, router: Any) -> None:
        super().__init__(app)
        self.path = Path(router.args.run_dir) / "seen.jsonl"

    async def dispatch(self, request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        if request.url.path == "/generate":
            with self.path.open("a") as file:
                file.write(json.dumps({"status": response.status_code}) + "\n")
        return response
