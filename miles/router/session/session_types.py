"""What a session has recorded, as its routes answer it: the published types, which the rollout side reads, too."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class SessionRecord(BaseModel):
    """One chat completion of a session.

    `response["choices"][i]` has `input_token_ids`, and `logprobs.content[*]` has `token_id` and `logprob`, whatever the
    engine calls them. `request` is what the engine was sent; with `input_ids` where the prompt's tokens were given.

    Example::

        SessionRecord(timestamp=1.7e9, method="POST", path="/v1/chat/completions", status_code=200,
                      request={"messages": [...], "input_ids": [12, 9, ...]}, response={"choices": [...]})
    """

    timestamp: float
    method: str
    path: str
    request: dict[str, Any]
    response: dict[str, Any]
    status_code: int


class GetSessionResponse(BaseModel):
    """Answer of GET /sessions/{id}; records in the order in which they were answered.

    `context_full`: a request was answered without an engine, because its prompt left no room for an answer. It is no
    record, and part of the answer only where it is true.
    """

    session_id: str
    records: list[SessionRecord]
    context_full: bool = False
