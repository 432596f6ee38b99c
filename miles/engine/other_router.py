"""Registering engines with a router that someone else started: SGLang's Rust router, old or new, or a MilesRouter.

Newer Rust routers list and change workers under /workers, where each has an id; older ones, and MilesRouter, know
/add_worker and /remove_worker.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from miles.engine.member import control
from miles.errors import EngineError

NAME = "the router"
# A router that does not answer in this time will not do so later.
PATIENCE_S = 30.0


def register(router_url: str, url: str) -> None:
    """Raises EngineError with what the router said to both forms."""
    try:
        _call(router_url, "/workers", {"url": url, "worker_type": "regular"})
    except EngineError as newer:
        try:
            _call(router_url, f"/add_worker?url={quote(url, safe='')}")
        except EngineError as older:
            raise EngineError(f"{older}; and before: {newer}") from older


def unregister(router_url: str, url: str) -> None:
    listed = _call(router_url, "/workers", method="GET")
    workers = listed.get("workers", []) if isinstance(listed, dict) else []
    for worker in workers:
        if worker.get("url") == url and "id" in worker:
            _call(router_url, f"/workers/{worker['id']}", method="DELETE")
            return
    _call(router_url, f"/remove_worker?url={quote(url, safe='')}")


def _call(router_url: str, path: str, body: Any = None, method: str = "POST") -> Any:
    return control(NAME, router_url, path, body, method=method, timeout_s=PATIENCE_S)
