"""MilesRouter under its published name: what middlewares and session routes find on it, and how a run starts it.

The parts do the work: `forward` carries requests, `balance` holds the workers, `health` checks them, `app` has the
endpoints. Plug-ins may read and change the published tables; they are the ones that the parts use.
"""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any
from urllib.parse import quote

import httpx
from fastapi import Request, Response
from fastapi.responses import JSONResponse

from miles.router.app import bad_request, create_app, json_object
from miles.router.balance import WorkerTable, WorkerUrlError, worker_url
from miles.router.doors import bound_middlewares
from miles.router.forward import Forwarder
from miles.router.health import HealthMonitor, health_error
from miles.router.message import Message
from miles.router.metrics import prometheus
from miles.router.settings import RouterSettings

# Of an answer that is kept whole and sent anew: the server makes these.
_MADE_ANEW = ("content-length", "transfer-encoding")


class MilesRouter:
    """One address in front of several engines. Raises HookReport where a middleware cannot be used.

    `args` is the run's Namespace; of it `RouterSettings` reads the limits, `hf_checkpoint` turns on the session
    routes, and middlewares may read everything.

    Example::

        router = MilesRouter(Namespace(miles_router_middleware_paths=["my.middleware.Cache"]))
        uvicorn.run(router.app)
    """

    def __init__(self, args: Namespace, verbose: bool = False) -> None:
        self.args, self.verbose = args, verbose
        self.max_weight_version: int | None = None  # published, and never set there either
        self.settings = RouterSettings.of(args)
        self.table = WorkerTable()
        self.forwarder = Forwarder(self.table, self.settings)
        self.health = HealthMonitor(
            self.table, self.settings, lambda url: self._check_worker_health(url), self.forwarder.changed
        )
        self._client: httpx.AsyncClient | None = None
        kind = type(self)
        straight = kind.proxy is MilesRouter.proxy and kind._do_proxy is MilesRouter._do_proxy
        self.app = create_app(self, self._forward if straight else None)
        for hook in bound_middlewares(args):
            self.app.hooks[hook.target] = hook
            self.app.add_middleware(hook.target, router=self)

    # ---- what plug-ins read and change

    @property
    def worker_request_counts(self) -> dict[str, int]:
        """Requests in flight per worker, in the order in which they were added."""
        return self.table.counts

    @worker_request_counts.setter
    def worker_request_counts(self, counts: dict[str, int]) -> None:
        self.table.counts = counts

    @property
    def worker_failure_counts(self) -> dict[str, int]:
        """Failures in a row per worker."""
        return self.table.failures

    @worker_failure_counts.setter
    def worker_failure_counts(self, counts: dict[str, int]) -> None:
        self.table.failures = counts

    @property
    def dead_workers(self) -> set[str]:
        """The workers in quarantine."""
        return self.table.dead

    @dead_workers.setter
    def dead_workers(self, urls: set[str]) -> None:
        self.table.dead = urls

    @property
    def weight_version(self) -> str | None:
        """The version that workers have to report to serve; where the run names none, the newest known one."""
        return self.table.expected_version()

    @property
    def client(self) -> httpx.AsyncClient:
        """An HTTP client for middlewares, made when it is first asked for; the router itself does not use it."""
        if self._client is None:
            limits = httpx.Limits(max_connections=self.settings.max_connections)
            timeout = httpx.Timeout(self.settings.timeout_s)
            self._client = httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False)
        return self._client

    # ---- life

    def start(self) -> None:
        """Begin the health checks; needs the event loop that serves."""
        self.health.start()

    async def stop(self) -> None:
        await self.health.stop()
        self.forwarder.close()
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def require_weight_version(self, version: str) -> None:
        """From now on only workers that report `version` serve. Returns when all were asked once."""
        self.table.require(version)
        await self.health.check(list(self.table.counts))

    def metrics(self) -> str:
        return prometheus(self.table, self.forwarder)

    # ---- workers

    async def _check_worker_health(self, url: str) -> tuple[str, bool]:
        """One check now: the url, and whether GET /health succeeds within 5 s."""
        error = await health_error(url)
        if error is not None and url in self.table.counts:
            self.table.errors[url] = error
        return url, error is None

    def _use_url(self) -> str:
        """The worker of the next request, counted as in flight until `_finish_url`.

        RuntimeError where all are held; ValueError where there is none.
        """
        if not self.table.counts:
            raise ValueError("No worker is registered: POST /add_worker?url=http://HOST:PORT adds one.")
        url = self.table.pick()
        if url is None:
            raise RuntimeError("No healthy workers available in the pool")
        return url

    def _finish_url(self, url: str) -> None:
        self.table.finish(url)

    async def add_worker(self, request: Request) -> Response:
        """POST /add_worker: idempotent. A worker that is known and held is checked at once."""
        try:
            url = await _url_of(request)
        except WorkerUrlError as error:
            return bad_request(str(error))
        self.table.add(url)
        self.start()
        self.health.ask([url])
        self.forwarder.changed()
        return JSONResponse({"status": "success", "worker_urls": self.table.counts})

    async def remove_worker(self, request: Request) -> Response:
        """POST /remove_worker: requests that the worker has go on. Unknown workers are no error."""
        try:
            url = await _url_of(request)
        except WorkerUrlError as error:
            return bad_request(str(error))
        self.table.remove(url)
        self.forwarder.forget(url)
        return JSONResponse({"status": "success", "worker_urls": self.table.counts})

    async def list_workers(self, request: Request) -> Response:
        return JSONResponse({"urls": list(self.table.counts)})

    # ---- requests

    async def _forward(self, scope: Any, receive: Any, send: Any) -> None:
        if not self.health.running:
            self.start()
        await self.forwarder(scope, receive, send)

    async def proxy(self, request: Request, path: str) -> Response:
        """One request, its answer kept whole. Paths that no route has do not come here: they are streamed."""
        return self._build_proxy_response(await self._do_proxy(request, path))

    async def _do_proxy(
        self, request: Request, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """Send a request to a worker and keep the whole answer.

        `path` has no leading slash. `body` and `headers` take the place of the request's. Returns `request_body`
        (bytes), `response_body` (bytes), `status_code` and `headers` (dict, names in lower case).
        """
        if body is None:
            body = await request.body()
        given = request.headers.items() if headers is None else headers.items()
        raw = [
            (name.lower().encode("latin-1"), str(value).encode("latin-1"))
            for name, value in given
            if name.lower() not in ("content-length", "accept-encoding", "transfer-encoding")
        ]
        scope = {
            **request.scope,
            "path": request.url.path,
            "raw_path": ("/" + quote(path.lstrip("/"), safe="/:@!$&'()*+,;=~%")).encode(),
            "headers": raw,
        }
        unread = [{"type": "http.request", "body": body, "more_body": False}]
        answer: dict[str, Any] = {}
        parts: list[bytes] = []

        async def receive() -> Message:
            return unread.pop() if unread else await request.receive()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.update(message)
            else:
                parts.append(message.get("body", b""))

        await self._forward(scope, receive, send)
        return {
            "request_body": body,
            "response_body": b"".join(parts),
            "status_code": answer["status"],
            "headers": {name.decode("latin-1"): value.decode("latin-1") for name, value in answer["headers"]},
        }

    def _build_proxy_response(self, result: dict[str, Any]) -> Response:
        """The response of what `_do_proxy` returned: bytes as they are, other bodies as JSON."""
        content = result["response_body"]
        headers = {name: value for name, value in result["headers"].items() if name.lower() not in _MADE_ANEW}
        if not isinstance(content, (bytes, str)):
            content = json.dumps(content)
            headers = {name: value for name, value in headers.items() if name.lower() != "content-encoding"}
        return Response(content, result["status_code"], headers)


async def _url_of(request: Request) -> str:
    """The `url` or `worker_url` of the query, else of the JSON body. Raises WorkerUrlError."""
    for given in (request.query_params, await json_object(request)):
        url = given.get("url") or given.get("worker_url")
        if url:
            return worker_url(url)
    raise WorkerUrlError("no worker is named: give url=http://HOST:PORT in the query, or as JSON.")


def run_router(args: Namespace) -> None:
    """Serve at `args.sglang_router_ip` and `args.sglang_router_port` until the process is told to end."""
    from miles.router.serve import serve

    serve(MilesRouter(args), args.sglang_router_ip or "127.0.0.1", args.sglang_router_port)
