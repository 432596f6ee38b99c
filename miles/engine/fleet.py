"""All engines of a run that are reached over HTTP, and the router before them: started, watched, replaced, updated.

    supervisor thread     starts processes, looks after them every TICK_S, admits them
    trainer's thread      `suspend`, then writes the weights, then `update_weights`
    health threads        one check each; like the two above they may find that an engine is lost
    rollout loop          `client.FleetClient`: sends to the router, waits here while nobody serves

An engine's way:

    start ─► STARTING ── answers ─► gets the weights ─► confirms their version ─► known to the router: SERVING
               ▲                                                                        │
               └── with --use-fault-tolerance ── DOWN ◄── died, hung, missed an update ─┘

No engine is admitted while weights are being written, and one that has not confirmed the current version is never
admitted: whoever serves has the weights of the run. Without fault tolerance the first engine that is lost ends the run
with its last words. What an engine is started with and how it takes weights are given (`Launch`, `Delivery`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from miles.engine import other_router
from miles.engine.member import Member, State, control
from miles.engine.process import ServerProcess, wait_until_it_answers
from miles.errors import EngineError
from miles.weights.delivery import Delivery, Failures, of_each

logger = logging.getLogger(__name__)

# How often the supervisor looks whether a process has ended or has begun to answer.
TICK_S = 0.1
# An engine that ends this often before it serves again is broken, and not unlucky.
MAX_FAILED_STARTS = 3
# How often a router is started anew within ROUTER_WINDOW_S before it counts as broken.
MAX_ROUTER_STARTS, ROUTER_WINDOW_S = 3, 60.0
ROUTER_START_S = 60.0
# Pause before an engine that failed is started again, doubled with each failure.
RESTART_PAUSE_S = 0.5
# How often an external engine that is down is looked at.
REVISIT_S = 2.0

Launch = Callable[[int, str], ServerProcess]
"""(rank, weight version) -> the process of one engine."""


@dataclass(frozen=True)
class Watching:
    """When an engine counts as lost; seconds all."""

    fault_tolerance: bool
    interval_s: float
    timeout_s: float
    first_wait_s: float
    start_timeout_s: float


class Fleet:
    """`start` before use, `close` at the end. `version` is the weight version that engines serve."""

    def __init__(
        self,
        members: Sequence[Member],
        watching: Watching,
        *,
        launch: Launch | None = None,
        delivery: Delivery | None = None,
        router_url: str,
        start_router: Callable[[], ServerProcess] | None = None,
        check_first_update: bool = False,
    ) -> None:
        """`launch` None: engines are not ours to start. `delivery` None: they get weights in another way, or none.
        `start_router` None: the router at `router_url` is not ours either."""
        self.members, self.watching, self.router_url = list(members), watching, router_url
        self.version = "default"
        self._launch, self._delivery, self._start_router = launch, delivery, start_router
        self._check_first_update = check_first_update
        self._tensors: Mapping[str, Tensor] = {}
        self._router: ServerProcess | None = None
        self._router_starts: list[float] = []
        self._router_is_new = False
        self._failure: EngineError | None = None
        # Guards who serves and what they serve; `_writing` keeps new engines out from `suspend` to `update_weights`.
        self._weights = threading.RLock()
        self._changed = threading.Condition()
        self._closing = False
        self._writing = False
        self._offloaded = False
        self._checks = ThreadPoolExecutor(max(1, len(members)), thread_name_prefix="miles-health")
        self._checking: set[Member] = set()
        self._supervisor = threading.Thread(target=self._supervise, name="miles-fleet", daemon=True)

    # ---- as the run sees it ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the router and all engines; returns when all of them serve. Raises EngineError where one cannot."""
        self._supervisor.start()
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._all_serve())
        self.raise_failure()

    @property
    def serving(self) -> list[Member]:
        return [m for m in self.members if m.state is State.SERVING]

    def raise_failure(self) -> None:
        """EngineError where the fleet has been given up."""
        if self._failure is not None:
            raise EngineError(str(self._failure)) from self._failure

    def suspect(self) -> None:
        """A request has failed: look now, not at the next health check."""
        with self._changed:
            for member in self.members:
                member.checked = 0.0
            self._changed.notify_all()

    def state_of_all(self) -> str:
        """One clause per engine, for whoever has waited too long.

        Example: `engine 0 has been starting for 4 s; engine 1 has been down for 9 s: engine 1 (process 71, ...`
        """
        return "; ".join(
            f"{m.name} has been {m.state.value} for {m.seconds_in_state:.0f} s"
            + (f": {m.last_error}" if m.last_error and m.state is not State.SERVING else "")
            for m in self.members
        )

    @property
    def is_ready(self) -> bool:
        """Whether a request that is sent now finds a router and an engine."""
        return bool(self.serving) and not self._router_is_new

    def close(self) -> None:
        """No process of the fleet is left when this returns."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._supervisor.is_alive() and threading.current_thread() is not self._supervisor:
            self._supervisor.join()
        self._checks.shutdown(wait=False, cancel_futures=True)

    # ---- weights ---------------------------------------------------------------------------------------------------

    def suspend(self) -> None:
        """The memory with the weights changes from now on, until `update_weights`; nobody is admitted meanwhile."""
        with self._weights:
            self._writing = True
            if self._delivery is not None:
                self._drop(self._delivery.before_writing(self.serving))

    def release_memory(self) -> None:
        """`--offload-rollout`: engines give their memory back until `update_weights`; none is admitted before."""
        with self._weights:
            self._writing = self._offloaded = True
            self._drop(of_each(self.serving, Member.release_memory))
        self.raise_failure()

    def update_weights(self, tensors: Mapping[str, Tensor], version: str) -> None:
        """Make every engine that serves generate from `tensors` as `version`; engines that cannot are lost.

        EngineError where that ends the run.
        """
        with self._weights:
            first = not self._tensors
            self._tensors, self.version = tensors, version
            if self._delivery is not None:
                self._drop(of_each(self.serving, Member.resume_weights))
                self._drop(self._delivery.deliver(self.serving, tensors, version))
                self._drop(of_each(self.serving, self._confirm))
                self._drop(of_each(self.serving, Member.resume_rest))
            if first and self._check_first_update:
                for error in of_each(self.serving, _compare).values():
                    self._give_up(error)
            self._tell_router_version()
            self._writing = self._offloaded = False
        self.raise_failure()

    def _confirm(self, member: Member) -> None:
        """An engine that has missed an update must not serve the next version."""
        member.version = member.serves_version()
        if member.version != self.version:
            raise EngineError(f"{member.name} ({member.url}) serves version {member.version}, expected {self.version}")

    def _drop(self, failures: Failures) -> None:
        for member, error in failures.items():
            self._lose(member, str(error))

    # ---- the supervisor --------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        try:
            self._renew_router()
            for member in self.members:
                self._begin(member)
            while not self._closing and self._failure is None:
                self._look_at_router()
                for member in self.members:
                    self._look_at(member)
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, TICK_S)
        except Exception as error:
            self._give_up(error if isinstance(error, EngineError) else EngineError(f"the fleet failed: {error!r}"))
            if not isinstance(error, EngineError):
                logger.exception("the fleet's supervisor failed")
        finally:
            if self._start_router is None:  # it goes on without this run
                for member in self.serving:
                    self._unregister(member)
            for member in self.members:
                if member.server is not None:
                    member.server.stop()
            if self._router is not None:
                self._router.stop()

    def _look_at(self, member: Member) -> None:
        if member.state is State.DOWN:
            self._revive(member)
        elif member.server is not None and member.server.has_ended:
            self._lose(member, member.server.last_words())
        elif member.state is State.STARTING:
            self._await_start(member)
        elif self._check_is_due(member):
            member.checked = time.monotonic()
            self._checking.add(member)
            self._checks.submit(self._check, member)

    def _await_start(self, member: Member) -> None:
        answers = member.server.answers() if member.server is not None else _answers(member)
        if answers:
            self._admit(member)
        elif member.seconds_in_state > self.watching.start_timeout_s:
            what = member.server.last_words() if member.server is not None else f"{member.name} ({member.url})"
            self._lose(member, f"waited {self.watching.start_timeout_s:g} s (--engine-start-timeout-s) for {what}")

    def _admit(self, member: Member) -> None:
        """Give it the current weights, and requests only after it has confirmed them."""
        with self._weights:
            try:
                if self._writing:  # the memory holds neither the old weights nor the new ones
                    if self._offloaded and not member.released:
                        member.release_memory()
                    return
                member.resume_weights()
                if self._delivery is not None and self._tensors:
                    failures = self._delivery.deliver([member], self._tensors, self.version)
                    if failures:
                        raise failures[member]
                    self._confirm(member)
                elif self._check_first_update:
                    member.call("/weights_checker", {"action": "snapshot"})
                    member.call("/weights_checker", {"action": "reset_tensors"})
                member.resume_rest()
                self._register(member)
            except EngineError as error:
                self._lose(member, str(error))
                return
            if member.failed_starts or member.last_error:
                logger.warning("%s serves again, weight version %s", member.name, self.version)
            member.failed_starts, member.checked = 0, time.monotonic() + self.watching.first_wait_s
            member.become(State.SERVING)
        self._notify()

    def _lose(self, member: Member, why: str) -> None:
        """Stop sending to it, and end its process. Without fault tolerance that is the end of the run."""
        with self._weights:
            if member.state is State.DOWN:
                return
            before, server = member.state, member.server
            member.become(State.DOWN)
            member.last_error, member.version = why, None
            member.failed_starts += 1
            self._unregister(member)
        if server is not None:
            server.stop()
        if not self.watching.fault_tolerance:
            what = "could not be started" if before is State.STARTING else "was lost"
            self._give_up(EngineError(f"{member.name} {what}: {why}\n{_TOLERANCE}"))
        elif member.failed_starts > MAX_FAILED_STARTS and self._launch is not None:
            self._give_up(EngineError(f"{member.name} failed {member.failed_starts} times in a row. The last: {why}"))
        else:
            logger.warning("%s is lost and will be replaced: %s", member.name, why)
        self._notify()

    def _revive(self, member: Member) -> None:
        if not self.watching.fault_tolerance:
            return
        if self._launch is not None:
            if member.seconds_in_state >= RESTART_PAUSE_S * 2 ** (member.failed_starts - 1):
                self._begin(member)
        elif member.seconds_in_state >= REVISIT_S:
            member.become(State.STARTING)

    def _begin(self, member: Member) -> None:
        if self._launch is not None:
            member.server = self._launch(member.rank, self.version)
            member.url, member.released = member.server.url, False
        member.become(State.STARTING)

    # ---- health ----------------------------------------------------------------------------------------------------

    def _check_is_due(self, member: Member) -> bool:
        due = time.monotonic() - member.checked >= self.watching.interval_s
        return self.watching.fault_tolerance and due and member not in self._checking and not self._writing

    def _check(self, member: Member) -> None:
        """In a thread of its own: an engine that hangs holds up nobody's check."""
        url = member.url
        problem = member.generates(self.watching.timeout_s)
        self._checking.discard(member)
        if problem is not None and member.state is State.SERVING and member.url == url and not self._closing:
            self._lose(member, problem)

    # ---- the router ------------------------------------------------------------------------------------------------

    def _look_at_router(self) -> None:
        if self._router is None or not self._router.has_ended:
            return
        logger.warning("the router is lost and will be started anew: %s", self._router.last_words())
        self._renew_router()

    def _renew_router(self) -> None:
        if self._start_router is None:
            return
        self._router_is_new = True
        now = time.monotonic()
        self._router_starts = [t for t in self._router_starts if now - t < ROUTER_WINDOW_S] + [now]
        if self._router is not None and len(self._router_starts) > MAX_ROUTER_STARTS:
            raise EngineError(f"the router ended {MAX_ROUTER_STARTS} times in a minute: {self._router.last_words()}")
        self._router = self._start_router()
        wait_until_it_answers(self._router, ROUTER_START_S)
        with self._weights:
            for member in self.serving:
                self._register(member)
            if self._tensors:
                self._tell_router_version()
        self._router_is_new = False

    def _register(self, member: Member) -> None:
        if self._start_router is None:
            other_router.register(self.router_url, member.url)
            return
        try:
            control("the router", self.router_url, "/add_worker", {"url": member.url})
        except EngineError:
            if self._router is not None and not self._router.has_ended:
                raise
            # The next router is told of everybody who serves.

    def _unregister(self, member: Member) -> None:
        try:
            if self._start_router is None:
                other_router.unregister(self.router_url, member.url)
            else:
                control("the router", self.router_url, "/remove_worker", {"url": member.url}, timeout_s=5.0)
        except EngineError as error:  # it finds out by itself that nobody answers there
            logger.info("%s", error)

    def _tell_router_version(self) -> None:
        if self._start_router is not None and self._delivery is not None:
            try:
                control("the router", self.router_url, "/weight_version", {"weight_version": self.version})
            except EngineError as error:  # a router that is down is told again when it is back
                logger.info("%s", error)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _give_up(self, failure: EngineError) -> None:
        if self._failure is None:
            self._failure = failure
        self._notify()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _all_serve(self) -> bool:
        return all(m.state is State.SERVING for m in self.members)


_TOLERANCE = "With --use-fault-tolerance engines that are lost are replaced."


def _answers(member: Member) -> bool:
    try:
        member.call("/health", method="GET", timeout_s=5.0)
    except EngineError:
        return False
    return True


def _compare(member: Member) -> None:
    """`--check-weight-update-equal`: the first update must bring back what was there before the tensors were reset."""
    member.call("/weights_checker", {"action": "compare"})
