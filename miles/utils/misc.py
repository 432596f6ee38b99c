"""Published path of small helpers: plug-in loading, singletons, periodic actions; and four that only plug-ins use."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Iterable
from typing import TypeVar

from miles.hooks import FunctionRegistry, function_registry, load_function
from miles.rollout.singleton import SingletonMeta
from miles.run.periodic import should_run_periodic_action

__all__ = [
    "FunctionRegistry",
    "SingletonMeta",
    "as_completed_async",
    "exec_command",
    "function_registry",
    "get_current_node_ip",
    "get_free_port",
    "load_function",
    "should_run_periodic_action",
]

T = TypeVar("T")
LAST_PORT = 65535


def exec_command(cmd: str, capture_output: bool = False) -> str | None:
    """Run a bash command line and return its output if that is captured. CalledProcessError where it fails."""
    print(f"+ {cmd}", flush=True)
    done = subprocess.run(["bash", "-c", cmd], check=True, capture_output=capture_output, text=True)
    return done.stdout if capture_output else None


def get_current_node_ip() -> str:
    """The address under which other machines reach this one; loopback where there is no network."""
    if os.environ.get("MILES_HOST_IP"):
        return os.environ["MILES_HOST_IP"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: connecting a datagram socket only chooses the local address.
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


def get_free_port(start_port: int = 10000, consecutive: int = 1) -> int:
    """The first port from `start_port` on that is free together with the `consecutive - 1` ports after it."""
    for first in range(start_port, LAST_PORT - consecutive + 2):
        if all(_is_free(port) for port in range(first, first + consecutive)):
            return first
    raise OSError(f"no {consecutive} free ports in a row from {start_port} on")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


async def as_completed_async(tasks: Iterable[Awaitable[T]]) -> AsyncIterator[T]:
    """The results of `tasks`, each as soon as it is there."""
    for task in asyncio.as_completed(tasks):
        yield await task
