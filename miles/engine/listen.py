"""Addresses of this machine and listening sockets of servers. Knows nothing about what is served."""

from __future__ import annotations

import os
import socket

from miles.errors import FlagError

MILES_HOST_IP_ENV = "MILES_HOST_IP"
"""Environment variable that names this machine's address where it has several."""

BACKLOG = 2048
"""Connections that may wait for the event loop to accept them."""


def bind_port(host: str, port: int, *, flag: str) -> socket.socket:
    """A listening socket; FlagError naming `flag` where the port is taken or not allowed. Port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else "ports go from 0 to 65535"
        raise FlagError(
            flag,
            given=port,
            expected=f"a port that is free on {host} ({reason})",
            remedy="Choose another port, or stop the program that listens on it.",
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Example: `http://127.0.0.1:30000`, `http://[::1]:30000`"""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def get_host_info() -> tuple[str, str]:
    """(host name, address that other machines reach this one by). MILES_HOST_IP, where set, is the address."""
    name = socket.gethostname()
    if chosen := os.environ.get(MILES_HOST_IP_ENV):
        return name, chosen
    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        # Connecting a UDP socket sends nothing: it asks the routing table which own address would be used.
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((target, 9))
            except OSError:
                continue
            return name, str(probe.getsockname()[0])
    return name, "127.0.0.1"
