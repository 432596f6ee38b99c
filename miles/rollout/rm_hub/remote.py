"""The reward of `--rm-type remote_rm`: a server of the user's scores prompt, response and label.

    POST --rm-url  {"prompt": "2+2=?", "response": "4", "label": "4"}   ->   1.0   or   {"score": 1.0, "why": "..."}
"""

from __future__ import annotations

import asyncio
import weakref
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from miles.types import Sample

if TYPE_CHECKING:
    import httpx

# A reward model may queue for minutes; a server that is not there is known at once.
ANSWER_LIMIT_S = 600.0
CONNECT_LIMIT_S = 10.0
# More wait here than drown the server.
MAX_CONNECTIONS = 256
# Characters of an error page that a message repeats.
MAX_SHOWN = 300


class RemoteRewardError(RuntimeError):
    """The server could not be reached, took too long, refused, or did not answer with JSON."""


# A client belongs to its event loop and keeps connections open: making one per sample would cost more than the request.
_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = weakref.WeakKeyDictionary()


def _client() -> httpx.AsyncClient:
    import httpx

    loop = asyncio.get_running_loop()
    if loop not in _clients:
        limits = httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS)
        timeout = httpx.Timeout(ANSWER_LIMIT_S, connect=CONNECT_LIMIT_S, pool=None)
        _clients[loop] = httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False)
    return _clients[loop]


async def remote_rm(args: Namespace, sample: Sample) -> Any:
    """The decoded JSON that the server at `args.rm_url` answers. Raises RemoteRewardError."""
    import httpx

    url = args.rm_url
    if not url:
        raise RemoteRewardError("--rm-type remote_rm needs --rm-url, the address that prompt and response are sent to")
    payload = {"prompt": sample.prompt, "response": sample.response, "label": sample.label}
    try:
        answer = await _client().post(url, json=payload)
    except httpx.TimeoutException as error:
        limit = CONNECT_LIMIT_S if isinstance(error, httpx.ConnectTimeout) else ANSWER_LIMIT_S
        raise RemoteRewardError(f"--rm-url {url} did not answer within {limit:g} s") from error
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise RemoteRewardError(f"--rm-url {url} cannot be reached: {type(error).__name__}: {error}") from error
    if not answer.is_success:
        raise RemoteRewardError(f"--rm-url {url} answered {answer.status_code}: {answer.text[:MAX_SHOWN]}")
    try:
        return answer.json()
    except ValueError as error:
        shown = answer.text[:MAX_SHOWN]
        raise RemoteRewardError(f"--rm-url {url}: expected a number or an object as JSON, got {shown!r}") from error
