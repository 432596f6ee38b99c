"""Published import path of the thread that asks engines whether they live.

It watches the engine client of a rollout manager and says what it finds (`healthy`, and a line in the log); restarting
engines belongs to whoever owns their processes. An engine inside the run's own process ends with the run, so runs on
one machine do not start a monitor.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from argparse import Namespace
from typing import Any

from miles.rollout.loop_thread import run

__all__ = ["RolloutHealthMonitor"]

logger = logging.getLogger(__name__)


class RolloutHealthMonitor:
    """Checks every `args.rollout_health_check_interval` seconds, from `args.rollout_health_check_first_wait` seconds
    after each `resume` on. Starts paused.

        thread "miles-health"   waits for resume, then for its interval;  unblocked by resume, pause and stop;
                                produces `healthy`, a warning when an engine stops answering
    """

    def __init__(self, rollout_manager: Any, args: Namespace) -> None:
        self.rollout_manager, self.args = rollout_manager, args
        self.healthy: bool | None = None  # None until the first check
        self._changed = threading.Condition()
        self._resumed = 0  # how often; so that a pause and a resume during a wait are not missed
        self._paused, self._stopped = True, False
        self._thread: threading.Thread | None = None

    def start(self) -> bool:
        """False where the manager has no engines to ask (`--debug-train-only`)."""
        if self.rollout_manager.client is None:
            return False
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="miles-health", daemon=True)
            self._thread.start()
        return True

    def stop(self) -> None:
        """End the thread; a check that is under way is waited for."""
        self._set(stopped=True)
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def pause(self) -> None:
        """No checks until `resume`, for instance while engines are offloaded."""
        self._set(paused=True)

    def resume(self) -> None:
        self._set(paused=False)

    def is_checking_enabled(self) -> bool:
        return self._thread is not None and not self._paused

    def _set(self, *, paused: bool | None = None, stopped: bool = False) -> None:
        with self._changed:
            self._stopped = self._stopped or stopped
            if paused is not None:
                self._paused = paused
                self._resumed += not paused
            self._changed.notify_all()

    def _watch(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or not self._paused)
                turn = self._resumed
            wait_s = self.args.rollout_health_check_first_wait
            while self._still(turn, wait_s):
                self._check()
                wait_s = self.args.rollout_health_check_interval
            if self._stopped:
                return

    def _still(self, turn: int, wait_s: float) -> bool:
        """Whether, after `wait_s`, checks are to go on as they did since resume number `turn`."""
        with self._changed:

            def over() -> bool:
                return self._stopped or self._paused or self._resumed != turn

            return not self._changed.wait_for(over, timeout=wait_s)

    def _check(self) -> None:
        client = self.rollout_manager.client
        try:
            healthy = run(asyncio.wait_for(client.healthy(), self.args.rollout_health_check_timeout))
        except TimeoutError:
            healthy = False
        if not healthy and self.healthy is not False:
            logger.warning("the engine at %s does not answer its health check", client.base_url)
        self.healthy = healthy
