"""An ASGI app behind a real port, in a thread of the test that needs it."""

from __future__ import annotations

import threading
from typing import Any

import uvicorn

from miles.engine.listen import bind_port

START_TIMEOUT_S = 30.0


class UvicornThreadServer:
    """Serves `app` between `start` and `stop`; port 0 takes a free one, which `port` and `url` then say.

    Example::

        server = UvicornThreadServer(app, host="127.0.0.1", port=0)
        server.start()
        httpx.get(f"{server.url}/health")
        server.stop()
    """

    def __init__(self, app: Any, host: str, port: int) -> None:
        self._app, self.host, self.port = app, host, port
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        """Returns when requests are answered. FlagError where the port is taken, RuntimeError where the app fails."""
        listener = bind_port(self.host, self.port, flag="port")
        self.port = listener.getsockname()[1]
        ready = threading.Event()
        config = uvicorn.Config(self._app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
        self._server = _Server(config, ready)
        self._thread = threading.Thread(
            target=self._server.run, args=([listener],), name=f"serve-{self.port}", daemon=True
        )
        self._thread.start()
        if not ready.wait(START_TIMEOUT_S) or not self._server.started:
            self.stop()
            raise RuntimeError(f"the app at {self.url} did not start within {START_TIMEOUT_S:g} s")

    def stop(self) -> None:
        """End the server and its thread; nothing where it does not run."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join()
        self._server = self._thread = None


class _Server(uvicorn.Server):
    """uvicorn that tells when it has started, or has failed to."""

    def __init__(self, config: uvicorn.Config, ready: threading.Event) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: Any = None) -> None:
        try:
            await super().startup(sockets)
        finally:
            self._ready.set()
