"""The sessions of one router: what each has recorded, and which tokens its next turn begins with.

A conversation is tokenized once. The tokens of an answered turn are kept beside the digest of its messages; a request
whose messages begin with those of a turn, the answer included, gets exactly these tokens and behind them only what is
new (`continuation`). Where no turn fits (another history, other tools) the conversation is rendered anew.

Sessions are bounded: one that nobody has used for `idle_s` is forgotten, and a router that is full refuses new ones.
Everything here is synchronous and called from one event loop, so requests of one session cannot interleave inside it.
"""

from __future__ import annotations

import time
import uuid
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, PrivateAttr

from miles.rollout.generate_utils.chat_template import continuation, fingerprints, render
from miles.router.session.session_types import SessionRecord

MAX_SESSIONS = 65536
"""Sessions that a router holds at a time; each agent that runs has one."""

IDLE_S = 4 * 3600.0
"""Seconds after which a session that nobody uses is forgotten: its owner has died without deleting it."""


class TooManySessionsError(Exception):
    """There is no room for another session."""


class NaiveTrajectory(BaseModel):
    """One session."""

    records: list[SessionRecord] = []
    context_full: bool = False
    _turns: dict[bytes, list[int]] = PrivateAttr(default_factory=dict)  # digest of the messages -> their tokens
    _used: float = PrivateAttr(default=0.0)
    _in_flight: int = PrivateAttr(default=0)

    def append_session_record(self, record: SessionRecord) -> None:
        """Record an answer, and remember the tokens of each of its choices."""
        self.records.append(record)
        request = record.request
        messages = request.get("messages")
        if not isinstance(messages, list) or not messages:
            return
        for choice in record.response.get("choices") or []:
            ids, said = choice.get("input_token_ids"), output_token_ids(choice)
            if isinstance(ids, list) and said is not None:
                told = [*messages, choice.get("message") or {}]
                self._turns[fingerprints(told, **template_settings(request))[-1]] = ids + said


def output_token_ids(choice: Mapping[str, Any]) -> list[int] | None:
    """The ids of `logprobs.content`; None where one is missing."""
    content = (choice.get("logprobs") or {}).get("content")
    if not isinstance(content, list):
        return None
    ids = [entry.get("token_id") for entry in content]
    return None if any(token is None for token in ids) else ids


def template_settings(request: Mapping[str, Any]) -> dict[str, Any]:
    """What of a request, beside its messages, the chat template depends on: `tools` and `template_kwargs`."""
    tools = request.get("tools") if request.get("tool_choice") != "none" else None
    return {"tools": tools or None, "template_kwargs": request.get("chat_template_kwargs") or None}


class NaiveTrajectoryManager:
    """All sessions by id, as published; methods answer None for a session that is not known.

    Example::

        manager = NaiveTrajectoryManager(args, tokenizer)
        session_id = manager.create_session()
        manager.reused_tokens(session_id, {"messages": [...]})    # None until a turn has been recorded
    """

    def __init__(
        self,
        args: Namespace | None,
        tokenizer: Any,
        *,
        max_sessions: int = MAX_SESSIONS,
        idle_s: float = IDLE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.args, self.tokenizer = args, tokenizer
        self.sessions: dict[str, NaiveTrajectory] = {}  # the one that was used longest ago first
        self._max_sessions, self._idle_s, self._clock = max_sessions, idle_s, clock

    # ---- sessions ------------------------------------------------------------------------------------------------

    def create_session(self) -> str:
        """A new session's id, 32 hexadecimal digits. Raises TooManySessionsError."""
        self._forget_idle()
        if len(self.sessions) >= self._max_sessions:
            raise TooManySessionsError(
                f"{len(self.sessions)} sessions are open, and this router holds {self._max_sessions}. Delete sessions "
                "when they are done: DELETE /sessions/<id>."
            )
        session_id = uuid.uuid4().hex
        self.sessions[session_id] = NaiveTrajectory()
        self._touch(session_id)
        return session_id

    def delete_session_by_id(self, session_id: str) -> bool | None:
        return None if self.sessions.pop(session_id, None) is None else True

    def begin(self, session_id: str) -> NaiveTrajectory | None:
        """A request of this session is on its way; `end` when it is answered. The session is not idle meanwhile."""
        trajectory = self._touch(session_id)
        if trajectory is not None:
            trajectory._in_flight += 1
        return trajectory

    def end(self, session_id: str) -> None:
        trajectory = self._touch(session_id)
        if trajectory is not None:
            trajectory._in_flight -= 1

    def _touch(self, session_id: str) -> NaiveTrajectory | None:
        trajectory = self.sessions.pop(session_id, None)
        if trajectory is not None:
            self.sessions[session_id] = trajectory
            trajectory._used = self._clock()
        return trajectory

    def _forget_idle(self) -> None:
        oldest = self._clock() - self._idle_s
        for session_id, trajectory in list(self.sessions.items()):
            if trajectory._used > oldest:
                return
            if trajectory._in_flight == 0:
                del self.sessions[session_id]

    # ---- records -------------------------------------------------------------------------------------------------

    def get_session_records_by_id(self, session_id: str) -> list[SessionRecord] | None:
        trajectory = self._touch(session_id)
        return None if trajectory is None else trajectory.records

    def append_session_record(self, session_id: str, record: SessionRecord) -> bool | None:
        trajectory = self._touch(session_id)
        if trajectory is None:
            return None
        trajectory.append_session_record(record)
        return True

    # ---- tokens --------------------------------------------------------------------------------------------------

    def calc_prompt_tokens(
        self, session_id: str, messages: list[dict[str, Any]], **settings: Any
    ) -> list[int] | None:
        """The prompt of a conversation, rendered anew; `settings` are those of `template_settings`.

        Raises ChatTemplateError.
        """
        if session_id not in self.sessions:
            return None
        return render(self.tokenizer, messages, **settings)

    def reused_tokens(self, session_id: str, request: Mapping[str, Any]) -> tuple[list[int], int] | None:
        """(prompt, how many of its tokens are those of a recorded turn); None where no turn fits.

        The longest turn that the messages begin with counts. Raises ChatTemplateError.
        """
        trajectory = self.sessions.get(session_id)
        messages = request["messages"]
        if trajectory is None or not trajectory._turns:
            return None
        settings = template_settings(request)
        digests = fingerprints(messages, **settings)
        for count in range(len(messages) - 1, 0, -1):
            ids = trajectory._turns.get(digests[count - 1])
            if ids is None:
                continue
            new = continuation(self.tokenizer, messages, count, ids, **settings)
            return None if new is None else (ids + new, len(ids))
        return None
