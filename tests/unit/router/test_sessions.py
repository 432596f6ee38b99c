"""The session routes on a real MilesRouter, in front of a worker that says what it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import json
from argparse import Namespace
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from null_workers import Request, Worker, Writer, response, worker

from examples.tiny_tools.make_tokenizer import tokenizer
from miles.engine.embedded.server import serve_in_loop
from miles.router.router import MilesRouter
from miles.router.session.session_types import GetSessionResponse

TOKENIZER = tokenizer()
FOLDER = str(Path(__file__).resolve().parents[3] / "examples" / "tiny_tools" / "base")
END = TOKENIZER.convert_tokens_to_ids("<|end|>")


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


@dataclass
class Engine:
    """Answers chats with `says` in order; a text ends with <|end|>. `style`: whose fields tell the tokens."""

    says: list[str]
    style: str = "sglang"
    asked: list[dict[str, Any]] = field(default_factory=list)

    async def __call__(self, request: Request, writer: Writer) -> None:
        if not request.target.startswith("/v1/chat/completions"):
            writer.write(response(json.dumps({"target": request.target, "method": request.method}).encode()))
            return
        body = json.loads(request.body)
        self.asked.append(body)
        if not body["messages"]:
            error = {"object": "error", "message": "Messages cannot be empty.", "code": 400}
            writer.write(response(json.dumps(error).encode(), 400))
            return
        prompt = body.get("input_ids") or ids_of(
            TOKENIZER.apply_chat_template(
                body["messages"], tokenize=False, add_generation_prompt=True, tools=body.get("tools")
            )
        )
        said = self.says.pop(0)
        writer.write(response(json.dumps(self.answer(body, prompt, said)).encode()))

    def answer(self, body: dict[str, Any], prompt: list[int], said: str) -> dict[str, Any]:
        output = [*ids_of(said), END]
        content = [{"token": TOKENIZER.decode([i]), "logprob": -0.25, "bytes": [], "top_logprobs": []} for i in output]
        shown = said + ("<|end|>" if body.get("no_stop_trim") else "")
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": shown},
            "logprobs": {"content": content} if body.get("logprobs") else None,
            "finish_reason": "stop",
            "matched_stop": END,
        }
        if self.style == "published":
            choice["input_token_ids"] = prompt
            choice["logprobs"]["content"] = [{**e, "token_id": i} for e, i in zip(content, output, strict=True)]
        if self.style == "sglang":
            choice["prompt_token_ids"] = prompt if body.get("return_prompt_token_ids") else None
            choice["meta_info"] = {
                "output_token_logprobs": [[-0.25, token, None] for token in output],
                "weight_version": "7",
                "finish_reason": {"type": "stop", "matched": END},
            }
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(output), "total_tokens": 0}
        return {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


@dataclass
class Stage:
    client: httpx.AsyncClient
    engine: Engine
    worker: Worker
    url: str

    async def session(self) -> str:
        return (await self.client.post("/sessions")).json()["session_id"]

    async def chat(self, session: str, messages: list[Any], **more: Any) -> httpx.Response:
        return await self.client.post(f"/sessions/{session}/v1/chat/completions", json={"messages": messages, **more})

    async def records(self, session: str) -> list[Any]:
        answer = (await self.client.get(f"/sessions/{session}")).json()
        return GetSessionResponse.model_validate(answer).records


@contextlib.asynccontextmanager
async def stage(says: Sequence[str] = (), style: str = "sglang", **args: Any) -> AsyncIterator[Stage]:
    engine = Engine(list(says), style)
    router = MilesRouter(Namespace(hf_checkpoint=FOLDER, **args))
    async with worker(engine) as made, serve_in_loop(router.app, "127.0.0.1", 0) as url:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            await client.post("/add_worker", params={"url": made.url})
            yield Stage(client, engine, made, url)
        await router.stop()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# ---- the life of a session -------------------------------------------------------------------------------------------


def test_made_read_and_deleted() -> None:
    async def go() -> None:
        async with stage() as s:
            session = await s.session()
            assert len(session) == 32 and set(session) <= set("0123456789abcdef")
            answer = await s.client.get(f"/sessions/{session}")
            assert answer.json() == {"session_id": session, "records": []}
            deleted = await s.client.delete(f"/sessions/{session}")
            assert (deleted.status_code, deleted.content) == (204, b"")
            for method in ("GET", "DELETE"):
                gone = await s.client.request(method, f"/sessions/{session}")
                assert (gone.status_code, gone.json()) == (404, {"error": "session not found"})
            chat = await s.chat(session, [user("hi")])
            assert chat.status_code == 404 and s.engine.asked == []

    asyncio.run(go())


@pytest.mark.parametrize("style", ["sglang", "published"])
def test_recorded_with_the_published_fields(style: str) -> None:
    async def go() -> None:
        async with stage(["<answer>56</answer>"], style) as s:
            session = await s.session()
            answer = await s.chat(session, [user("7*8=?")], temperature=0.5)
            assert answer.headers["x-miles-token-reuse"] == "engine"
            [record] = await s.records(session)
            assert (record.method, record.path, record.status_code) == ("POST", "/v1/chat/completions", 200)
            assert record.response == answer.json() and record.request == s.engine.asked[0]
            asked = {"logprobs": True, "return_meta_info": True, "return_prompt_token_ids": True}
            assert record.request == {"messages": [user("7*8=?")], "temperature": 0.5, **asked}
            choice = record.response["choices"][0]
            assert TOKENIZER.decode(choice["input_token_ids"]) == "<|user|>7*8=?<|end|><|assistant|>"
            content = choice["logprobs"]["content"]
            assert [entry["token_id"] for entry in content] == [*ids_of("<answer>56</answer>"), END]
            assert {entry["logprob"] for entry in content} == {-0.25}

    asyncio.run(go())


def test_routed_experts_are_found_where_either_engine_puts_them() -> None:
    async def go() -> None:
        async with stage(["a"]) as s:
            plain = s.engine.answer

            def with_experts(*given: Any) -> dict[str, Any]:
                return {**plain(*given), "sglext": {"routed_experts": "AAAA"}}

            s.engine.answer = with_experts  # type: ignore[method-assign]
            session = await s.session()
            answer = await s.chat(session, [user("?")], return_routed_experts=True)
            assert answer.json()["choices"][0]["meta_info"]["routed_experts"] == "AAAA"
            assert s.engine.asked[0]["return_routed_experts"] is True

    asyncio.run(go())


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_later_turns_begin_with_the_tokens_of_earlier_ones() -> None:
    async def go() -> None:
        async with stage(["one", "two", "three"]) as s:
            session = await s.session()
            messages: list[Any] = [user("a")]
            ids: list[int] = []
            for turn in range(3):
                answer = (await s.chat(session, messages)).json()["choices"][0]
                asked = s.engine.asked[turn].get("input_ids")
                if turn:
                    assert asked[: len(ids)] == ids
                    assert TOKENIZER.decode(asked[len(ids) :]) == f"<|user|>q{turn - 1}<|end|><|assistant|>"
                ids = answer["input_token_ids"] + [entry["token_id"] for entry in answer["logprobs"]["content"]]
                messages = [*messages, answer["message"], user(f"q{turn}")]

    asyncio.run(go())


def test_an_answer_ends_before_the_token_that_ended_it() -> None:
    async def go() -> None:
        async with stage(["one", "two"]) as s:
            session = await s.session()
            first = await s.chat(session, [user("a")], no_stop_trim=True, skip_special_tokens=False)
            assert first.json()["choices"][0]["message"]["content"] == "one"
            assert first.json()["choices"][0]["logprobs"]["content"][-1]["token_id"] == END
            second = await s.chat(session, [user("a"), said("one"), user("b")])
            assert second.headers["x-miles-token-reuse"].startswith("reused; tokens=")

    asyncio.run(go())


@pytest.mark.parametrize("flag", [True, False])
def test_what_begins_anew_is_rendered_here_under_the_flag(flag: bool) -> None:
    async def go() -> None:
        async with stage(["one"], miles_router_enable_token_input_for_chat_completions=flag) as s:
            answer = await s.chat(await s.session(), [user("a")])
            asked = s.engine.asked[0]
            assert answer.headers["x-miles-token-reuse"] == ("rendered" if flag else "engine")
            assert (asked.get("input_ids") == ids_of("<|user|>a<|end|><|assistant|>")) is flag
            assert ("return_prompt_token_ids" in asked) is not flag

    asyncio.run(go())


def test_the_callers_own_tokens_are_sent_as_they_are() -> None:
    async def go() -> None:
        async with stage(["one"], miles_router_enable_token_input_for_chat_completions=True) as s:
            answer = await s.chat(await s.session(), [user("a")], input_ids=[5, 6, 7])
            assert s.engine.asked[0]["input_ids"] == [5, 6, 7] and answer.headers["x-miles-token-reuse"] == "caller"
            assert answer.json()["choices"][0]["input_token_ids"] == [5, 6, 7]

    asyncio.run(go())


def test_concurrent_requests_of_one_session_are_all_recorded() -> None:
    async def go() -> None:
        async with stage([str(i) for i in range(20)]) as s:
            session = await s.session()
            await asyncio.gather(*(s.chat(session, [user(f"q{i}")]) for i in range(20)))
            records = await s.records(session)
            assert {r.request["messages"][0]["content"] for r in records} == {f"q{i}" for i in range(20)}

    asyncio.run(go())


# ---- the context -----------------------------------------------------------------------------------------------------


def test_max_tokens_is_cut_to_the_room_and_a_full_context_needs_no_engine() -> None:
    async def go() -> None:
        flags = {"miles_router_enable_token_input_for_chat_completions": True, "rollout_max_context_len": 30}
        async with stage(["one"], **flags) as s:
            session = await s.session()
            prompt = len(ids_of("<|user|>a<|end|><|assistant|>"))
            answer = (await s.chat(session, [user("a")], max_tokens=100)).json()
            assert s.engine.asked[0]["max_tokens"] == 30 - prompt
            messages = [user("a"), answer["choices"][0]["message"], user("b" * 40)]
            full = (await s.chat(session, messages, max_tokens=5)).json()["choices"][0]
            assert (full["finish_reason"], full["message"]["content"]) == ("length", "")
            assert len(s.engine.asked) == 1 and len(await s.records(session)) == 1
            assert (await s.client.get(f"/sessions/{session}")).json()["context_full"] is True

    asyncio.run(go())


# ---- streams, openai, other paths ------------------------------------------------------------------------------------


def test_a_stream_is_recorded_and_told_in_chunks() -> None:
    async def go() -> None:
        async with stage(["<answer>56</answer>"]) as s:
            session = await s.session()
            async with openai.AsyncOpenAI(base_url=f"{s.url}/sessions/{session}/v1", api_key="none") as client:
                usage = {"include_usage": True}
                stream = await client.chat.completions.create(
                    model="m", messages=[user("7*8=?")], stream=True, stream_options=usage, logprobs=True
                )
                chunks = [chunk async for chunk in stream]
            deltas = [chunk.choices[0] for chunk in chunks[:-1]]
            assert deltas[0].delta.role == "assistant"
            assert "".join(choice.delta.content or "" for choice in deltas) == "<answer>56</answer>"
            assert deltas[-1].finish_reason == "stop" and chunks[-1].usage is not None and not chunks[-1].choices
            assert "stream" not in s.engine.asked[0] and len(await s.records(session)) == 1

    asyncio.run(go())


def test_other_paths_pass_through_without_a_record() -> None:
    async def go() -> None:
        async with stage() as s:
            session = await s.session()
            for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
                answer = await s.client.request(method, f"/sessions/{session}/v1/models")
                assert answer.json() == {"target": "/v1/models", "method": method}
            assert await s.records(session) == []

    asyncio.run(go())


def test_no_session_routes_without_a_tokenizer() -> None:
    paths = [getattr(route, "path", "") for route in MilesRouter(Namespace()).app.routes]
    assert not any(path.startswith("/sessions") for path in paths)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "sentence"),
    [(b"{", "the body is not JSON"), (b"[1]", "must be a JSON object"), (b"", "the body is not JSON")],
)
def test_bodies_that_are_no_request(body: bytes, sentence: str) -> None:
    async def go() -> None:
        async with stage() as s:
            answer = await s.client.post(f"/sessions/{await s.session()}/v1/chat/completions", content=body)
            assert answer.status_code == 400 and sentence in answer.json()["error"]["message"]

    asyncio.run(go())


@pytest.mark.parametrize("messages", [[], "hi", [1], [{"role": "user", "content": 5}], None])
def test_messages_that_cannot_be_rendered_are_left_to_the_engine(messages: Any) -> None:
    async def go() -> None:
        async with stage(miles_router_enable_token_input_for_chat_completions=True) as s:
            plain = s.engine.__class__.__call__

            async def refuse(request: Request, writer: Writer) -> None:
                if "chat" in request.target:
                    writer.write(response(b'{"error": {"message": "no"}}', 400))
                else:
                    await plain(s.engine, request, writer)

            s.worker.answer = refuse
            session = await s.session()
            answer = await s.chat(session, messages)
            assert (answer.status_code, answer.json()) == (400, {"error": {"message": "no"}})
            assert await s.records(session) == []

    asyncio.run(go())


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ({"choices": []}, "no choices"),
        ({"choices": [{"message": said("x"), "logprobs": None, "input_token_ids": [1]}]}, "no token_id"),
        ({"choices": [{"message": said("x"), "logprobs": {"content": []}}]}, "input_token_ids is missing"),
        ([], "no choices"),
    ],
)
def test_an_answer_without_tokens_is_an_error_and_no_record(answer: Any, sentence: str) -> None:
    async def go() -> None:
        async with stage() as s:

            async def without(request: Request, writer: Writer) -> None:
                writer.write(response(json.dumps(answer).encode()))

            s.worker.answer = without
            session = await s.session()
            got = await s.chat(session, [user("a")])
            assert got.status_code == 500 and sentence in got.json()["error"]["message"]
            assert await s.records(session) == []

    asyncio.run(go())


def test_a_session_deleted_meanwhile_is_gone() -> None:
    async def go() -> None:
        async with stage(["one"]) as s:
            session, plain = await s.session(), s.engine

            async def slow(request: Request, writer: Writer) -> None:
                await s.client.delete(f"/sessions/{session}")
                await plain(request, writer)

            s.worker.answer = slow
            assert (await s.chat(session, [user("a")])).status_code == 404

    asyncio.run(go())


def test_a_client_that_hangs_up_aborts_its_request() -> None:
    async def go() -> None:
        async with stage() as s:
            arrived = asyncio.Event()

            async def never(request: Request, writer: Writer) -> None:
                arrived.set()
                await asyncio.Event().wait()

            s.worker.answer = never
            session = await s.session()
            asking = asyncio.create_task(s.chat(session, [user("a")]))
            await arrived.wait()
            asking.cancel()
            await asyncio.wait_for(s.worker.lost.wait(), 20)

    asyncio.run(go())
