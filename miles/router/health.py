"""Which engines are well: checks in the background, quarantine, and the way back.

    every `health_interval_s`     GET /health of every engine; `threshold` failures in a row quarantine it
    every HELD_PROBE_S            the engines that are held (quarantined, stale), and those somebody asked for

An engine comes back when it is healthy and reports the expected weight version (`WorkerTable.expected_version`). So an
engine that was away during a weight update serves no request of the next version.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterable

from miles.router.balance import WorkerTable
from miles.router.settings import RouterSettings
from miles.router.upstream import UpstreamError, fetch

logger = logging.getLogger("miles.router")

HEALTH_TIMEOUT_S = 5.0
HELD_PROBE_S = 1.0


async def health_error(url: str) -> str | None:
    """What is wrong with the engine at `url`; None where it is healthy."""
    try:
        status, _ = await fetch(url, "/health", HEALTH_TIMEOUT_S)
    except UpstreamError as error:
        return str(error)
    return None if 200 <= status < 300 else f"answered /health with status {status}"


async def weight_version(url: str) -> str | None:
    """The version that the engine at `url` reports; None where it reports none."""
    try:
        status, body = await fetch(url, "/get_model_info", HEALTH_TIMEOUT_S)
        version = json.loads(body)["weight_version"] if status == 200 else None
    except (UpstreamError, ValueError, KeyError, TypeError):
        return None
    return None if version is None else str(version)


class HealthMonitor:
    """Checks the engines of `table`; `check` is MilesRouter's `_check_worker_health`, `changed` tells who waits."""

    def __init__(
        self,
        table: WorkerTable,
        settings: RouterSettings,
        check: Callable[[str], Awaitable[tuple[str, bool]]],
        changed: Callable[[], None],
    ) -> None:
        self.table, self.settings = table, settings
        self._check, self._changed = check, changed
        self._asked: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    @property
    def running(self) -> bool:
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        """In the running event loop; another call does nothing."""
        if not self.running:
            self._wake = asyncio.Event()
            self._task = asyncio.create_task(self._run(), name="miles-router-health")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def ask(self, urls: Iterable[str]) -> None:
        """Have these engines checked at once."""
        self._asked.update(urls)
        self._wake.set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        round_at = loop.time() + self.settings.health_interval_s
        while True:
            try:
                async with asyncio.timeout_at(min(round_at, loop.time() + HELD_PROBE_S)):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            due = self._asked | set(self.table.held)
            self._asked = set()
            if loop.time() >= round_at:
                due = set(self.table.counts)
                round_at = loop.time() + self.settings.health_interval_s
            await self.check(due)

    async def check(self, urls: Iterable[str]) -> None:
        """Ask these engines now and draw the consequences."""
        await asyncio.gather(*(self._check_one(url) for url in urls))

    async def _check_one(self, url: str) -> None:
        table = self.table
        try:
            _, healthy = await self._check(url)
        except Exception as raised:  # of a subclass, a plug-in's: the monitor goes on
            logger.warning("the health check of %s failed: %s", url, raised)
            healthy = False
        if url not in table.counts:
            return
        if not healthy:
            error = table.errors.get(url, "is not healthy")
            if table.failed(url, error, self.settings.failure_threshold):
                logger.warning("%s is quarantined: %s", url, error)
            return
        version = await weight_version(url)
        if url not in table.counts:
            return
        table.versions[url] = version
        if url in table.dead or url in table.stale:
            await self._back(url, version)
        else:
            table.succeeded(url)
            self._hold_if_stale(url, version)

    def _hold_if_stale(self, url: str, version: str | None) -> None:
        required = self.table.required_version
        if required is not None and version != required:
            self.table.stale.add(url)
            logger.warning("%s is held: it reports weight version %s, expected %s", url, version, required)

    async def _back(self, url: str, version: str | None) -> None:
        """Give a healthy engine requests again if its weights are current."""
        table = self.table
        if table.required_version is None:  # what the others report may be older than their last check
            serving = table.serving
            for other, reported in zip(serving, await asyncio.gather(*map(weight_version, serving)), strict=True):
                table.versions[other] = reported if other in table.counts else None
        expected = table.expected_version()
        if url not in table.counts:
            return
        if expected is not None and version != expected:
            table.dead.discard(url)
            table.stale.add(url)
            table.errors[url] = f"reports weight version {version}, expected {expected}"
            return
        table.readmit(url)
        logger.info("%s gets requests again", url)
        self._changed()
