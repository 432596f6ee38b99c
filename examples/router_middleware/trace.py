"""A trace of all requests, one JSON line each: path, status, bytes, seconds to the first byte and to the last one.

    miles hooks --miles-router-middleware-paths examples/router_middleware/trace.py:Trace

Written as plain ASGI, so that streamed answers still pass piece by piece. The file is `--trace-file`.
"""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

DEFAULT_FILE = "router_trace.jsonl"


class Trace:
    def __init__(self, app: ASGIApp, *, router: Any) -> None:
        self.app = app
        path = Path(getattr(router.args, "trace_file", DEFAULT_FILE))  # `miles route` has no such flag
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", encoding="utf-8", buffering=1)

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("--trace-file", default=DEFAULT_FILE, help="Where the router's requests are noted.")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        line = {"at": time.time(), "method": scope["method"], "path": scope["path"], "in": 0, "out": 0}

        async def counting_receive() -> Message:
            message = await receive()
            line["in"] += len(message.get("body", b""))
            return message

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                line["status"] = message["status"]
                line["first_byte_s"] = round(time.perf_counter() - began, 6)
            line["out"] += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, counting_receive, counting_send)
        finally:
            line["seconds"] = round(time.perf_counter() - began, 6)
            self.file.write(json.dumps(line) + "\n")
