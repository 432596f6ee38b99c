"""The session routes of MilesRouter: an OpenAI server per conversation, which records what it answers.

    POST   /sessions                              {"session_id": 32 hex digits}
    GET    /sessions/{id}                         {"session_id", "records"}
    DELETE /sessions/{id}                         204
    POST   /sessions/{id}/v1/chat/completions     proxied to an engine, recorded
    any    /sessions/{id}/{path}                  proxied, not recorded

Token-in token-out: a request that continues a recorded turn is sent with the exact tokens of that turn (`input_ids`),
never tokenized again. What begins anew is rendered by the engine, or here under
`--miles-router-enable-token-input-for-chat-completions`. The header `x-miles-token-reuse` of an answer says which:
`reused; tokens=N`, `rendered`, `caller` (the request had `input_ids`) or `engine`.

The tokenizer is loaded when the first session is made, in a thread: a router without sessions needs none.
"""

from __future__ import annotations

import asyncio
import json
import time
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from miles.rollout import limits
from miles.rollout.generate_utils.chat_template import ChatTemplateError
from miles.rollout.tokenizer import load_tokenizer
from miles.router.session.naive_trajectory import (
    NaiveTrajectory,
    NaiveTrajectoryManager,
    TooManySessionsError,
    template_settings,
)
from miles.router.session.session_types import GetSessionResponse, SessionRecord
from miles.router.session.translate import NoTokensError, asked, events, full, translated

if TYPE_CHECKING:
    from miles.router.router import MilesRouter

CHAT_PATH = "v1/chat/completions"
HOW_HEADER = "x-miles-token-reuse"

Json = dict[str, Any]


def setup_session_routes(app: FastAPI, router: MilesRouter) -> None:
    """Add the routes; nothing without `hf_checkpoint`, whose tokenizer and chat template they need."""
    if not vars(router.args).get("hf_checkpoint"):
        return
    sessions = _Sessions(router)
    app.state.sessions = sessions
    app.post("/sessions")(sessions.create)
    app.get("/sessions/{session_id}")(sessions.read)
    app.delete("/sessions/{session_id}")(sessions.delete)
    app.post(f"/sessions/{{session_id}}/{CHAT_PATH}")(sessions.chat)
    methods = ["GET", "POST", "PUT", "DELETE", "PATCH"]
    app.api_route("/sessions/{session_id}/{path:path}", methods=methods)(sessions.proxy)


def _error(message: str, status: int) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": status}}, status)


def _unknown_session() -> JSONResponse:
    return JSONResponse({"error": "session not found"}, 404)


class _Sessions:
    """The routes as methods, around one NaiveTrajectoryManager."""

    def __init__(self, router: MilesRouter) -> None:
        self.router, self.args = router, router.args
        self.manager = NaiveTrajectoryManager(router.args, None)
        self._loading = asyncio.Lock()

    # ---- sessions ------------------------------------------------------------------------------------------------

    async def create(self) -> Response:
        async with self._loading:
            if self.manager.tokenizer is None:
                self.manager.tokenizer = await asyncio.to_thread(
                    load_tokenizer, self.args.hf_checkpoint, trust_remote_code=True
                )
        try:
            return JSONResponse({"session_id": self.manager.create_session()})
        except TooManySessionsError as error:
            return _error(str(error), 503)

    async def read(self, session_id: str) -> Response:
        records = self.manager.get_session_records_by_id(session_id)
        if records is None:
            return _unknown_session()
        context_full = self.manager.sessions[session_id].context_full
        body = GetSessionResponse(session_id=session_id, records=records, context_full=context_full)
        return JSONResponse(body.model_dump(exclude=None if context_full else {"context_full"}))

    async def delete(self, session_id: str) -> Response:
        if self.manager.delete_session_by_id(session_id) is None:
            return _unknown_session()
        return Response(status_code=204)

    async def proxy(self, request: Request, session_id: str, path: str) -> Response:
        return self.router._build_proxy_response(await self.router._do_proxy(request, path))

    # ---- chat completions ----------------------------------------------------------------------------------------

    async def chat(self, request: Request, session_id: str) -> Response:
        """One turn: its tokens chosen, asked, recorded, answered."""
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            return _error(f"the body is not JSON: {error}", 400)
        if not isinstance(body, dict):
            return _error(f"the body must be a JSON object, got {type(body).__name__}.", 400)
        trajectory = self.manager.begin(session_id)
        if trajectory is None:
            return _unknown_session()
        try:
            return await self._turn(request, session_id, trajectory, body)
        finally:
            self.manager.end(session_id)

    async def _turn(self, request: Request, session_id: str, trajectory: NaiveTrajectory, body: Json) -> Response:
        ids, how = self._prompt(session_id, body)
        forwarded = asked(body, ids)
        if not fit_context(self.args, forwarded):
            trajectory.context_full = True
            return _answer(body, full(body, int(time.time())), how)
        result = await self.router._do_proxy(request, CHAT_PATH, body=json.dumps(forwarded).encode())
        if result["status_code"] >= 400:
            return self.router._build_proxy_response(result)
        try:
            response = translated(forwarded, json.loads(result["response_body"]), self.manager.tokenizer)
        except (ValueError, NoTokensError) as error:
            return _error(f"the engine's answer cannot be recorded: {error}. Sessions need ids and log-probs.", 500)
        record = SessionRecord(
            timestamp=time.time(),
            method=request.method,
            path=f"/{CHAT_PATH}",
            request=forwarded,
            response=response,
            status_code=result["status_code"],
        )
        if self.manager.append_session_record(session_id, record) is None:
            return _unknown_session()
        return _answer(body, response, how)

    def _prompt(self, session_id: str, body: Json) -> tuple[list[int] | None, str]:
        """(the prompt's tokens, or None where the engine shall render them; where they are from)."""
        messages = body.get("messages")
        if body.get("input_ids") is not None:
            return None, "caller"
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            return None, "engine"  # which says what is wrong
        try:
            reused = self.manager.reused_tokens(session_id, body)
            if reused is not None:
                return reused[0], f"reused; tokens={reused[1]}"
            if vars(self.args).get("miles_router_enable_token_input_for_chat_completions") and messages:
                return self.manager.calc_prompt_tokens(session_id, messages, **template_settings(body)), "rendered"
        except ChatTemplateError:
            pass  # the engine has the same template, and says what is wrong with the messages
        return None, "engine"


def fit_context(args: Namespace, request: Json) -> bool:
    """Cut `max_tokens` of a request to the room that its `input_ids` leave; False where there is none.

    The context is --rollout-max-context-len or the model's, whichever is less. A request whose tokens are not known yet
    is left to its engine.
    """
    own = vars(args).get("rollout_max_context_len")
    most = min((limit for limit in (own, limits.context_length(args)) if limit is not None), default=None)
    ids = request.get("input_ids")
    if most is None or not isinstance(ids, list):
        return True
    room = most - len(ids)
    names = [name for name in ("max_completion_tokens", "max_tokens") if type(request.get(name)) is int]
    for name in names:
        request[name] = min(request[name], room)
    if own is not None and not names:
        request["max_tokens"] = room
    return room > 0


def _answer(request: Json, response: Json, how: str) -> Response:
    headers = {HOW_HEADER: how}
    if request.get("stream"):
        return StreamingResponse(events(request, response), media_type="text/event-stream", headers=headers)
    return JSONResponse(response, headers=headers)
