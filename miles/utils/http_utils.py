"""Published import path of the HTTP helpers; `post` and `get` live in `miles.engine.calls`, ports and processes here.

Plug-ins and launch scripts import these names from here; the core does not.
"""

from __future__ import annotations

import multiprocessing
import random
import socket
from argparse import Namespace

from miles.engine.calls import get, post, set_max_connections
from miles.engine.listen import MILES_HOST_IP_ENV, get_host_info

__all__ = [
    "MILES_HOST_IP_ENV",
    "find_available_port",
    "get",
    "get_host_info",
    "init_http_client",
    "is_port_available",
    "post",
    "terminate_process",
]

def is_port_available(port: int) -> bool:
    """Whether a server could listen on this TCP port now, on all addresses."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except (OSError, OverflowError):
            return False
    return True


def find_available_port(base_port: int) -> int:
    """A free TCP port a random distance above `base_port`; OSError where none is left below 65536."""
    port = base_port + random.randint(100, 1000)
    while port < 65536:
        if is_port_available(port):
            return port
        port += 42 if port < 60000 else 1
    raise OSError(f"no free port between {base_port} and 65535")


def init_http_client(args: Namespace) -> None:
    """Bound the connections by what the engines can run at the same time. Calling `post` without it works too."""
    if not args.rollout_num_gpus:
        return
    engines = max(args.rollout_num_gpus // args.rollout_num_gpus_per_engine, 1)
    set_max_connections(args.sglang_server_concurrency * engines)


def terminate_process(process: multiprocessing.Process, timeout: float = 1.0) -> None:
    """Ask a child process to end, and kill it after `timeout` seconds."""
    if not process.is_alive():
        return
    process.terminate()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
