"""The embedded engine: a model folder, or a trainer's live weights, behind an awaitable `generate`.

    caller's event loop                              engine thread
    ------------------------------------             ------------------------------------------------
    generate() -> outbox of this loop
      after SETTLE_PASSES passes: inbox  ----------> between steps: run what is in the inbox
                                                     Scheduler.step()  (scheduler.py)
    futures resolve  <------------------------------ results of this step
      after SETTLE_PASSES passes: inbox  ----------> settled: the next step may start

consumes   requests from any number of event loops and threads
waits for  the inbox when idle (no processor time then); the home loop, shortly, after each step that ended a request
unblocks   whoever awaits `generate`

Why loops settle: all requests that a caller submits in one go, and all that follow from one step's results, join the
same next step. A caller whose own behaviour is deterministic therefore gets the same batches, and bitwise the same
tokens, in every run. The home loop is the first that submitted; other loops get their results without being waited for.

Later users: the fleet (`engine/fleet.py`) holds engines by this interface or by URL; pause with `retract` or `in_place`
is what asynchronous training needs around a weight update; requests then carry one weight-version span per update.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from miles.engine.embedded.cache import KVCache
from miles.engine.embedded.checker import WeightsChecker
from miles.engine.embedded.control import EngineControl, cast
from miles.engine.embedded.exact import ExactCache, ExactModel
from miles.engine.embedded.loading import affordable_tokens, end_of_sequence_ids, in_passing_thread, load_tokenizer
from miles.engine.embedded.memory import Memory, Source
from miles.engine.embedded.model import DecoderModel, load_config, load_tensors
from miles.engine.embedded.replies import Delivery, Progress, Reply
from miles.engine.embedded.scheduler import Running, Scheduler
from miles.engine.protocol import GenerateRequest, GenerateResult
from miles.errors import EngineError

__all__ = ["EmbeddedEngine", "end_of_sequence_ids", "in_passing_thread"]

T = TypeVar("T")

SETTLE_PASSES = 12
"""Passes of an event loop in which the consequences of a result may become new requests."""

SETTLE_TIMEOUT_S = 5.0
"""How long the engine waits for a home loop that does not turn (a plug-in blocks it)."""

FIRST_TOKEN_S = 0.05
"""How long the engine waits for readers of streams to take their first token."""

BURST_STEPS = 16
"""Most steps between two looks at the inbox's lock; a request that ends or an inbox entry cuts a burst short."""


class EmbeddedEngine(EngineControl):
    """Generates for many callers at once from one model on one device.

    `EmbeddedEngine.from_folder(dir)` loads a checkpoint; the constructor takes a config and tensors, for instance a
    trainer's own parameters, which it refers to and never copies (see `update_weights`).

    Example::

        engine = EmbeddedEngine.from_folder("runs/x/hf", seed=0)
        result = await engine.generate(GenerateRequest(text="859+467=?"))
        result.to_json()["text"]
    """

    def __init__(
        self,
        hf_config: Any,
        tensors: Mapping[str, Tensor],
        tokenizer: Any | None,
        *,
        max_running_requests: int = 256,
        max_total_tokens: int | None = None,
        context_length: int | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        weight_version: str = "default",
        model_path: str = "",
        eos_token_ids: frozenset[int] | None = None,
        exact: bool = False,
    ) -> None:
        """`exact` (`--true-on-policy-mode`): float32, log-probs bit for bit those of the trainer."""
        if max_running_requests < 1:
            raise ValueError(f"max_running_requests must be >= 1, got {max_running_requests}")
        self._dtype = dtype = torch.float32 if exact else dtype
        self.hf_config, self.tokenizer, self.model_path, self.seed = hf_config, tokenizer, model_path, seed
        self.model = (ExactModel if exact else DecoderModel)(hf_config, cast(tensors, dtype))
        self.weight_shapes = {name: tuple(tensor.shape) for name, tensor in self.model.named.items()}
        self.context_length = min(context_length or self.model.shape.context_length, self.model.shape.context_length)
        self._scheduler = Scheduler(
            self.model,
            tokenizer,
            max_running_requests=max_running_requests,
            max_total_tokens=max_total_tokens or affordable_tokens(self.model, max_running_requests),
            context_length=self.context_length,
            eos_ids=eos_token_ids if eos_token_ids is not None else end_of_sequence_ids(hf_config, tokenizer),
            seed=seed,
            weight_version=weight_version,
            cache_class=ExactCache if exact else KVCache,
        )
        self._memory = Memory(self._scheduler, lambda read: self.model.load(cast(read, dtype)))
        self._memory.weights_taken(lambda: tensors)
        self.checker = WeightsChecker(self.model)
        self._replies: dict[Running, Reply] = {}
        self._streams: dict[Running, Progress] = {}  # those that are told of every token
        self._outboxes: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
        self._outboxes_lock = threading.Lock()
        self._home: asyncio.AbstractEventLoop | None = None
        self._inbox: list[Callable[[], None]] = []
        self._inbox_filled = threading.Condition()
        self._settled = True  # the home loop has drawn its conclusions from the last results
        self._home_stuck = False  # it did not in time, and is not waited for until it turns again
        self._closed = False
        self._thread: threading.Thread | None = None

    @classmethod
    def from_folder(
        cls,
        model_dir: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        read: Source | None = None,
        **options: Any,
    ) -> EmbeddedEngine:
        """Load a Hugging Face folder (config, safetensors, tokenizer). CheckpointError says what is wrong with it.

        With `read`, the weights are what it returns, as of a memory that is shared, and the folder has the rest.
        """
        hf_config, tokenizer = load_config(model_dir), load_tokenizer(model_dir)
        tensors = read() if read is not None else load_tensors(model_dir, dtype=dtype, device=device)
        eos = end_of_sequence_ids(hf_config, tokenizer, model_dir)
        engine = cls(
            hf_config, tensors, tokenizer, dtype=dtype, model_path=str(model_dir), eos_token_ids=eos, **options
        )
        engine._memory.weights_taken(read or engine._folder(model_dir))  # these tensors themselves would be kept
        return engine

    # ---- generate ------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Run one request to its end; cancelling the caller aborts it.

        BadRequestError for a request that this model cannot take, EngineError if a step fails.
        """
        reply = self._begin(request)
        try:
            return await reply.future
        except asyncio.CancelledError:
            self._abandon(reply)
            raise

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[GenerateResult, None]:
        """Partial results while the request runs (`finish_reason` None), each with all tokens so far, then the result
        of `generate`. Closing the generator, or cancelling whoever reads it, aborts the request.

        Example::

            async with contextlib.aclosing(engine.stream(request)) as results:
                async for result in results:
                    print(result.text, result.finish_reason)

        Text grows at its end only, and never shows a part of a stop string. Raises as `generate` does.
        """
        progress = Progress(request, self.tokenizer, lambda: self.weight_version)
        reply = self._begin(request, progress)
        try:
            while not reply.future.done():
                await progress.news.wait()
                progress.news.clear()
                if not reply.future.done() and (partial := progress.partial()) is not None:
                    yield partial
            yield reply.future.result()
        finally:
            if not reply.future.done():
                self._abandon(reply)

    def _begin(self, request: GenerateRequest, progress: Progress | None = None) -> Reply:
        loop = asyncio.get_running_loop()
        reply = Reply(request, loop, loop.create_future(), progress)

        def start() -> None:
            if reply.cancelled:
                return
            try:
                if self._closed:
                    raise EngineError("the engine is closed.")
                self._memory.check()
                running = self._scheduler.submit(request)
                self._replies[running] = reply
                if progress is not None:
                    progress.running = running
                    self._streams[running] = progress
            except Exception as error:
                known = isinstance(error, EngineError)
                refusal = error if known else EngineError(f"the request failed: {type(error).__name__}: {error}")
                self._hand_over(loop, [(reply, refusal)])

        self._post_after_settling(loop, start)
        return reply

    def _abandon(self, reply: Reply) -> None:
        """Nobody waits for it any more: free its place at the next step."""
        reply.cancelled = True
        reply.future.cancel()
        with contextlib.suppress(EngineError):  # a closed engine has nothing left to abort
            self._post(
                [lambda: self._scheduler.abort(lambda r: r.request is reply.request, "Cancelled by the caller")]
            )

    @property
    def num_unfinished(self) -> int:
        """Requests inside the engine."""
        return len(self._replies)

    @property
    def num_running(self) -> int:
        """Requests that have a slot; the others wait for one."""
        return len(self._scheduler.running)

    @property
    def num_steps(self) -> int:
        """Steps done since the start."""
        return self._scheduler.num_steps

    def close(self) -> None:
        """End the engine's thread. Requests that still run fail with EngineError."""
        if self._thread is None or self._closed:
            self._closed = True
            return

        def close() -> None:
            with self._inbox_filled:
                self._closed = True
            self._fail_all(EngineError("the engine was closed."))

        self._call(close)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # ---- callers' side -------------------------------------------------------------------------------------------

    def _post_after_settling(self, loop: asyncio.AbstractEventLoop, command: Callable[[], None]) -> None:
        """Queue a command of this loop; the loop's commands of one moment reach the engine together."""
        with self._outboxes_lock:
            if self._home is None or self._home.is_closed():
                self._home, self._settled = loop, True
            outbox = self._outboxes.get(loop)
            if outbox is not None:
                outbox.append(command)
                return
            self._outboxes[loop] = [command]
        _after_passes(loop, SETTLE_PASSES, lambda: self._flush_outbox(loop))

    def _flush_outbox(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._outboxes_lock:
            commands = self._outboxes.pop(loop, [])
        if self._closed:
            for command in commands:
                command()
        elif commands:
            self._post(commands, impatient=loop is not self._home)

    def _post(self, commands: list[Callable[[], None]], *, impatient: bool = False) -> None:
        """Put commands into the inbox, from any thread. Impatient: steps need not wait for the home loop."""
        with self._inbox_filled:
            if self._closed:
                raise EngineError("the engine is closed.")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="miles-embedded-engine", daemon=True)
                self._thread.start()
            self._inbox.extend(commands)
            self._settled |= impatient
            self._inbox_filled.notify()

    def _post_control(self, command: Callable[[], None]) -> None:
        """Put a command behind everything that was submitted before it, by any loop."""
        with self._outboxes_lock:
            pending = [entry for outbox in self._outboxes.values() for entry in outbox]
            self._outboxes.clear()
        self._post([*pending, command])

    def submit(self, command: Callable[[], T]) -> Future[T]:
        """Run a command in the engine's thread, between two steps. No step runs meanwhile.

        A trainer on the same cores runs its own work here: OpenMP gives every thread that computes a team of its own,
        and with more teams than cores all of them sleep between operations, which costs a small model half its speed.
        """
        done: Future[T] = Future()

        def run() -> None:
            if not done.set_running_or_notify_cancel():
                return  # whoever asked has gone away
            try:
                done.set_result(command())
            except BaseException as error:
                done.set_exception(error)

        if threading.current_thread() is self._thread:
            run()
        else:
            self._post_control(run)
        return done

    def _call(self, command: Callable[[], T]) -> T:
        """Run a command between two steps and wait for its value."""
        return self.submit(command).result()

    # ---- the engine's thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed:
            try:
                for command in self._take_inbox():
                    command()
                if self._may_step():
                    self._burst()
                self._deliver()
            except Exception as error:
                failure = EngineError(f"the engine failed while generating: {type(error).__name__}: {error}")
                failure.__cause__ = error
                self.last_error = str(failure)
                self._fail_all(failure)
        for command in self._inbox:  # what came in while it closed; nothing can come after
            command()

    def _may_step(self) -> bool:
        settled = self._settled or self._home is None or not self._home.is_running()
        return settled and self._has_work()

    def _has_work(self) -> bool:
        return self._scheduler.has_work and not (self._paused or self._suspended) and self._memory.ready

    def _take_inbox(self) -> list[Callable[[], None]]:
        """What came in since the last step. Sleeps while there is nothing to do, or the home loop has yet to settle."""
        with self._inbox_filled:
            patience_s = SETTLE_TIMEOUT_S if self._has_work() else None
            if not self._inbox_filled.wait_for(lambda: self._inbox or self._may_step(), patience_s):
                self._settled = self._home_stuck = True
            commands, self._inbox = self._inbox, []
            return commands

    def _burst(self) -> None:
        """Steps until a request ends, somebody calls, or BURST_STEPS are done."""
        for _ in range(BURST_STEPS):
            self._scheduler.step()
            if self._scheduler.finished or self._inbox or self._streams or not self._scheduler.has_work:
                return

    def _deliver(self) -> None:
        """Hand the results of finished requests to the loops that wait for them, and tell streams of new tokens."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Delivery]] = {}
        for running in self._scheduler.finished:
            reply = self._replies[running]
            if not reply.cancelled:
                by_loop.setdefault(reply.loop, []).append((reply, self._scheduler.result(running)))
        for running in self._scheduler.finished:
            del self._replies[running]
            self._streams.pop(running, None)
        self._scheduler.finished = []
        if self._streams:
            self._tell_streams()
        for loop, deliveries in by_loop.items():
            self._hand_over(loop, deliveries)

    def _tell_streams(self) -> None:
        """Wake readers for their new tokens. A first token is waited for until its reader has it: a small model would
        be done before a busy loop turns, and the whole answer come as one chunk."""
        deadline = time.monotonic() + FIRST_TOKEN_S
        for running, progress in self._streams.items():
            if running.logprobs:
                with contextlib.suppress(RuntimeError):  # the reader's loop is closed
                    progress.tell(self._replies[running].loop)
        for running, progress in self._streams.items():
            if running.logprobs and not progress.first_shown.is_set():
                progress.first_shown.wait(max(0.0, deadline - time.monotonic()))
                progress.first_shown.set()  # once, whether it came or not

    def _fail_all(self, error: EngineError) -> None:
        self._scheduler.fail_all()
        replies, self._replies, self._streams = list(self._replies.values()), {}, {}
        for reply in replies:
            self._hand_over(reply.loop, [(reply, error)])

    def _hand_over(self, loop: asyncio.AbstractEventLoop, deliveries: list[Delivery]) -> None:
        if loop is self._home and loop.is_running() and not self._home_stuck:
            self._settled = False
        try:
            loop.call_soon_threadsafe(self._resolve, loop, deliveries)
        except RuntimeError:  # the callers' loop is closed: nobody waits for these
            self._settled = True

    def _resolve(self, loop: asyncio.AbstractEventLoop, deliveries: list[Delivery]) -> None:
        """In the callers' loop: wake those who wait, let what follows happen, then let the engine go on."""
        for reply, result in deliveries:
            reply.resolve(result)
        if loop is self._home:
            _after_passes(loop, SETTLE_PASSES, lambda: self._settle(loop))

    def _settle(self, loop: asyncio.AbstractEventLoop) -> None:
        self._flush_outbox(loop)
        with self._inbox_filled:
            self._settled, self._home_stuck = True, False
            self._inbox_filled.notify()


def _after_passes(loop: asyncio.AbstractEventLoop, passes: int, action: Callable[[], None]) -> None:
    """Call `action` after this many passes of the loop's ready queue."""
    if passes == 0:
        action()
    else:
        loop.call_soon(_after_passes, loop, passes - 1, action)
