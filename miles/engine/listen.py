"""The listening sockets of servers: engines and the router. Knows nothing about what is served."""

from __future__ import annotations

import socket

from miles.errors import FlagError

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
