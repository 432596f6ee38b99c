"""One engine of a fleet as the run sees it: where it is, what it is doing, and the calls that control it.

Calls block and have a deadline; an EngineError says which engine did not do what, and what it answered.
"""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from miles.engine.guard import bearer
from miles.engine.process import ServerProcess
from miles.errors import EngineError

# How long a control call may take: it waits for a step of the engine to end, and steps are short.
CONTROL_S = 120.0
# How long an engine that was told to stop may still have requests in its batch, and how often that is looked at.
STOP_S, LOOK_S = 60.0, 0.1


class State(enum.Enum):
    """Example: an engine that dies goes SERVING -> DOWN -> STARTING -> SERVING."""

    STARTING = "starting"  # its process runs and does not answer yet
    SERVING = "serving"  # it gets requests
    DOWN = "down"  # it gets none: it died, hung, or missed a weight update


@dataclass(eq=False)
class Member:
    """`server` is None for an engine that someone else started. `version` is the weight version it has confirmed."""

    rank: int
    url: str
    server: ServerProcess | None = None
    state: State = State.STARTING
    version: str | None = None
    last_error: str = ""
    # Whether its memory is given back (`--offload-rollout`).
    released: bool = False
    # Ends of this engine since it last served.
    failed_starts: int = 0
    since: float = field(default_factory=time.monotonic)
    checked: float = 0.0

    @property
    def name(self) -> str:
        return f"engine {self.rank}"

    def become(self, state: State) -> None:
        self.state, self.since = state, time.monotonic()

    @property
    def seconds_in_state(self) -> float:
        return time.monotonic() - self.since

    def call(self, path: str, body: Any = None, *, method: str = "POST", timeout_s: float = CONTROL_S) -> Any:
        """One control call; the decoded JSON, or text where the answer is none."""
        return control(self.name, self.url, path, body, method=method, timeout_s=timeout_s)

    def serves_version(self, timeout_s: float = CONTROL_S) -> str:
        return str(self.call("/get_model_info", method="GET", timeout_s=timeout_s)["weight_version"])

    def release_memory(self) -> None:
        """Give back all device memory. Nothing may be running."""
        self.call("/pause_generation", {"mode": "retract"})
        self.flush_cache()
        self.call("/release_memory_occupation", {})
        self.released = True

    def resume_weights(self) -> None:
        """Take the memory of the weights again; what is in it comes with the next update."""
        if self.released:
            self.call("/resume_memory_occupation", {"tags": ["weights"]})

    def resume_rest(self) -> None:
        """After the update: whatever else generating needs."""
        if self.released:
            self.call("/resume_memory_occupation", {"tags": ["kv_cache", "cuda_graph"]})
            self.released = False

    def flush_cache(self) -> None:
        """Forget prefixes. Refused while the batch is not empty yet, which takes a moment after a stop."""
        deadline = time.monotonic() + STOP_S
        while True:
            try:
                self.call("/flush_cache", {})
                return
            except EngineError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(LOOK_S)

    def generates(self, timeout_s: float) -> str | None:
        """None where one token comes out in time, else what happened."""
        try:
            self.call("/health_generate", method="GET", timeout_s=timeout_s)
        except EngineError as error:
            return str(error)
        return None


def control(
    name: str, url: str, path: str, body: Any = None, *, method: str = "POST", timeout_s: float = CONTROL_S
) -> Any:
    """One control call to the server `name`. The EngineError has a `status` where the server answered."""
    try:
        response = httpx.request(
            method,
            f"{url}{path}",
            json=body if method == "POST" else None,
            headers=bearer(),
            timeout=timeout_s,
            trust_env=False,
        )
    except httpx.TimeoutException as error:
        raise EngineError(f"waited {timeout_s:g} s for {name} ({url}) to answer {path}") from error
    except httpx.HTTPError as error:
        raise EngineError(f"{name} ({url}) gave no answer to {path}: {error or type(error).__name__}") from error
    if response.is_error:
        said = f"HTTP {response.status_code}: {response.text[:500]}"
        raise EngineError(f"{name} ({url}) refused {path}: {said}", status=response.status_code)
    try:
        answer = response.json()
    except ValueError:
        return response.text
    if isinstance(answer, dict) and answer.get("success") is False:
        said = answer.get("message", answer)
        raise EngineError(f"{name} ({url}) refused {path}: {said}", status=response.status_code)
    return answer
