"""One weight update of engines in other processes, whatever carries the weights.

    stop and forget prefixes ──► send ──► confirm the version ──► go on

Every step is done by all engines at the same time. One that fails a step takes no further part and stays stopped: it
must not serve, and the fleet replaces it. The others go on without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from miles.errors import EngineError
from miles.weights.delivery import Failures, of_each

if TYPE_CHECKING:
    from miles.engine.member import Member

# How long an engine may take for one part of its weights.
UPDATE_S = 600.0


class Round:
    """Who still takes part in this update, and why the others do not."""

    def __init__(self, members: Sequence[Member], timeout_s: float = UPDATE_S) -> None:
        self.members, self.timeout_s = list(members), timeout_s
        self.failures: Failures = {}

    def each(self, act: Callable[[Member], None]) -> None:
        """`act` for all who take part; those that fail with EngineError drop out."""
        self.drop(of_each(self.members, act))

    def call(self, path: str, body: Mapping[str, Any]) -> None:
        """One request to all who take part."""
        self.each(lambda member: _post(member, path, body, self.timeout_s))

    def drop(self, failures: Failures) -> None:
        self.failures |= failures
        self.members = [member for member in self.members if member not in failures]

    def begin(self) -> None:
        """Weights come in parts from now on. A session that an earlier update left open is closed first."""

        def begin(member: Member) -> None:
            try:
                _post(member, "/begin_weight_update", {}, self.timeout_s)
            except EngineError:
                _post(member, "/end_weight_update", {}, self.timeout_s)
                _post(member, "/begin_weight_update", {}, self.timeout_s)

        self.each(begin)

    def end(self) -> None:
        self.call("/end_weight_update", {})


def update(
    members: Sequence[Member], version: str, send: Callable[[Round], None], timeout_s: float = UPDATE_S
) -> Failures:
    """Stop the engines, let `send` bring the weights, and let those go on that confirm `version`.

    Running requests wait with what they have and go on under the new weights.
    """

    def confirm(member: Member) -> None:
        served = member.serves_version()
        if served != version:
            raise EngineError(f"{member.name} ({member.url}) serves version {served} after an update to {version}.")
        member.call("/continue_generation", {})

    now = Round(members, timeout_s)
    now.call("/pause_generation", {"mode": "retract"})
    now.each(lambda member: member.flush_cache())
    if now.members:
        send(now)
    now.each(confirm)
    return now.failures


def _post(member: Member, path: str, body: Mapping[str, Any], timeout_s: float) -> None:
    member.call(path, dict(body), timeout_s=timeout_s)
