"""The token in front of control endpoints, for servers that listen beyond this machine.

On loopback there is no guard. Elsewhere, whoever may reach the port could add workers or load weights; so all endpoints
but those that only generate or report want `Authorization: Bearer <token>`. The token of a run is in the environment
variable MILES_API_TOKEN of all its processes; a server that finds none makes one and prints it once.

    app = Guard(app, token=token_of_process(), open_paths=("/generate", "/health", "/sessions/*"))
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
import re
import secrets
import sys
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

TOKEN_VARIABLE = "MILES_API_TOKEN"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """An ASGI application in front of another: without the token only `open_paths` are answered, others 401.

    In those, `*` stands for one part between slashes. What is not named needs the token: endpoints that are added
    later are guarded from the first day.
    """

    def __init__(self, app: App, *, token: str, open_paths: Collection[str]) -> None:
        assert token, "a guard needs a token"
        self.app = app
        self._expected = b"bearer " + token.encode()
        self._exact = frozenset(path for path in open_paths if "*" not in path)
        self._patterns = [re.compile(re.escape(path).replace(r"\*", "[^/]+")) for path in open_paths if "*" in path]

    def needs_token(self, path: str) -> bool:
        """A slash more at the end makes no difference, because servers may treat both alike."""
        path = path.rstrip("/") or "/"
        return path not in self._exact and not any(pattern.fullmatch(path) for pattern in self._patterns)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and self.needs_token(scope["path"]):
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            kind, _, secret = given.partition(b" ")
            if not hmac.compare_digest(kind.lower() + b" " + secret.strip(), self._expected):
                await _refuse(scope, send)
                return
        await self.app(scope, receive, send)


def bearer() -> dict[str, str]:
    """The header for calls to engines and routers of others, where MILES_API_TOKEN is set; `{}` where it is not.

    SGLang's `--api-key` takes the same header.
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    return {"authorization": f"Bearer {token}"} if token else {}


async def _refuse(scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    message = (
        f"{scope['path']} needs the token of this run: send the header `Authorization: Bearer <token>`. The token is "
        f"in the environment variable {TOKEN_VARIABLE}, or was printed when the server started."
    )
    body = json.dumps({"error": {"message": message, "code": 401}}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"www-authenticate", b"Bearer"),
    ]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`, an address or `localhost`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token_of_process() -> str:
    """The token of MILES_API_TOKEN; without one, a new token, printed once and kept there for child processes."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        token = os.environ[TOKEN_VARIABLE] = secrets.token_urlsafe(32)
        print(f"Control endpoints need this token ({TOKEN_VARIABLE}): {token}", file=sys.stderr, flush=True)
    return token
