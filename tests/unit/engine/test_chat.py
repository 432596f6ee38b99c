"""Chat completions of the embedded engine: over ASGI, and with the plain `openai` client over a real port."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from engine_tiny import CHARACTERS, SPECIAL, run_all

from examples.tiny_tools.make_tokenizer import tokenizer
from miles.engine.embedded import EmbeddedEngine
from miles.engine.embedded.chat import guess_tool_call_parser, token_text
from miles.engine.embedded.server import create_app, serve_in_loop
from miles.engine.protocol import GenerateRequest, SamplingParams

BASE = Path(__file__).resolve().parents[3] / "examples" / "tiny_tools" / "base"
TOKENIZER = tokenizer()
PYTHON = {
    "type": "function",
    "function": {"name": "python", "parameters": {"type": "object", "properties": {"code": {"type": "string"}}}},
}
CALL = '<tool_call>{"name": "python", "arguments": {"code": "print(37*48)"}}</tool_call>'


@pytest.fixture(scope="module")
def tools_engine() -> Iterator[EmbeddedEngine]:
    """The tiny tool model: it has a chat template, and calls tools."""
    engine = EmbeddedEngine.from_folder(BASE, max_running_requests=16, seed=3)
    yield engine
    engine.close()


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def chat(engine: EmbeddedEngine, body: Any, raw: bytes | None = None) -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app=create_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            content = json.dumps(body).encode() if raw is None else raw
            return await client.post("/v1/chat/completions", content=content)

    return asyncio.run(go())


def choice(engine: EmbeddedEngine, **body: Any) -> dict[str, Any]:
    answer = chat(engine, {"messages": [user("37*48=?")], "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    [only] = answer.json()["choices"]
    return only


def talk(engine: EmbeddedEngine, say: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
    async def go() -> Any:
        async with (
            serve_in_loop(create_app(engine), "127.0.0.1", 0) as url,
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        ):
            return await say(client)

    return asyncio.run(go())


# ---- one answer ------------------------------------------------------------------------------------------------------


def test_it_answers_what_generate_says_to_the_rendered_prompt(tools_engine: EmbeddedEngine) -> None:
    prompt = TOKENIZER.encode("<|user|>7+8=?<|end|><|assistant|>", add_special_tokens=False)
    params = SamplingParams(temperature=0.0, max_new_tokens=20)
    [direct] = run_all(tools_engine, [GenerateRequest(input_ids=prompt, return_logprob=True, sampling_params=params)])
    body = {"messages": [user("7+8=?")], "max_tokens": 20, "temperature": 0, "logprobs": True, "rid": "mine"}
    answer = chat(tools_engine, {**body, "return_meta_info": True, "return_token_ids": True, "model": "m"}).json()
    only = answer["choices"][0]
    assert (answer["id"], answer["object"], answer["model"]) == ("mine", "chat.completion", "m")
    assert only["message"] == {"role": "assistant", "content": direct.text}
    assert only["input_token_ids"] == only["prompt_token_ids"] == prompt
    assert only["response_token_ids"] == direct.output_ids
    content = only["logprobs"]["content"]
    assert [entry["token_id"] for entry in content] == direct.output_ids
    assert [entry["logprob"] for entry in content] == pytest.approx(direct.output_logprobs, abs=1e-5)
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == TOKENIZER.decode(direct.output_ids)
    triples = only["meta_info"]["output_token_logprobs"]
    assert [token for _, token, _ in triples] == direct.output_ids
    assert (only["finish_reason"], only["matched_stop"]) == ("stop", 1)
    n = len(direct.output_ids)
    usage = {key: answer["usage"][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")}
    assert usage == {"prompt_tokens": len(prompt), "completion_tokens": n, "total_tokens": len(prompt) + n}
    assert answer["metadata"] == {"weight_version": "default"}


def test_what_is_not_asked_for_is_not_there(tools_engine: EmbeddedEngine) -> None:
    only = choice(tools_engine)
    assert only["logprobs"] is None
    assert not {"meta_info", "prompt_token_ids", "response_token_ids"} & set(only)
    assert "tool_calls" not in only["message"]


def test_input_ids_take_the_place_of_the_template(tools_engine: EmbeddedEngine) -> None:
    ids = TOKENIZER.encode("<|user|>1+1=?<|end|><|assistant|>", add_special_tokens=False)
    given = choice(tools_engine, messages=[user("something else")], input_ids=ids)
    rendered = choice(tools_engine, messages=[user("1+1=?")])
    assert given["input_token_ids"] == ids and given["message"] == rendered["message"]


def test_limits_stops_and_special_tokens(tools_engine: EmbeddedEngine) -> None:
    cut = choice(tools_engine, max_completion_tokens=3, max_tokens=50, ignore_eos=True, return_token_ids=True)
    assert cut["finish_reason"] == "length" and len(cut["response_token_ids"]) == 3
    stopped = choice(tools_engine, messages=[user("7+8=?")], stop="</answer>")
    assert (stopped["finish_reason"], stopped["matched_stop"]) == ("stop", "</answer>")
    assert not stopped["message"]["content"].endswith("</answer>")
    whole = choice(tools_engine, no_stop_trim=True, skip_special_tokens=False)
    assert whole["message"]["content"].endswith("<|end|>")
    least = choice(tools_engine, min_tokens=40, max_tokens=40, return_token_ids=True)
    assert len(least["response_token_ids"]) == 40


def test_n_choices_and_seeds(tools_engine: EmbeddedEngine) -> None:
    body = {"messages": [user("7+8=?")], "n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 8, "ignore_eos": True}
    answer = chat(tools_engine, body).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2] and answer["usage"]["completion_tokens"] == 24
    again = chat(tools_engine, body).json()
    assert [c["message"] for c in again["choices"]] == [c["message"] for c in answer["choices"]]


def test_routed_experts_in_meta_info_or_beside_the_choices(checkpoints: dict[str, Path]) -> None:
    engine = EmbeddedEngine.from_folder(checkpoints["qwen3-moe"], seed=3)
    try:
        body = {"messages": [user("x")], "input_ids": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
        asked = {**body, "return_routed_experts": True}
        beside = chat(engine, asked).json()["sglext"]["routed_experts"]
        answer = chat(engine, {**asked, "return_meta_info": True}).json()
        inside = answer["choices"][0]["meta_info"]["routed_experts"]
        assert "sglext" not in answer
        layers, top_k, int32 = 2, 2, 4
        assert {len(base64.b64decode(experts)) for experts in (beside, inside)} == {
            (3 + 4 - 1) * layers * top_k * int32
        }
    finally:
        engine.close()


def test_contents_of_parts_developers_and_answers_without_content(tools_engine: EmbeddedEngine) -> None:
    parts = choice(tools_engine, messages=[{"role": "user", "content": [{"type": "text", "text": "1+1=?"}]}])
    assert TOKENIZER.decode(parts["input_token_ids"]) == "<|user|>1+1=?<|end|><|assistant|>"
    call = {"id": "c", "type": "function", "function": {"name": "python", "arguments": '{"code": "print(1)"}'}}
    history = [
        user("a"),
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c", "content": "1"},
    ]
    text = TOKENIZER.decode(choice(tools_engine, messages=history, tools=[PYTHON])["input_token_ids"])
    assert text == (
        "<|system|>python(code)<|end|><|user|>a<|end|><|assistant|>"
        '<tool_call>{"name": "python", "arguments": {"code": "print(1)"}}</tool_call><|end|>'
        "<|tool|>1<|end|><|assistant|>"
    )


# ---- tools -----------------------------------------------------------------------------------------------------------


def test_tool_calls_are_parsed_where_tools_are_offered(tools_engine: EmbeddedEngine) -> None:
    only = choice(tools_engine, tools=[PYTHON])
    assert only["finish_reason"] == "tool_calls" and only["message"]["content"] == ""
    [call] = only["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert json.loads(call["function"]["arguments"]) == {"code": "print(37*48)"}


def test_without_tools_or_with_tool_choice_none_a_call_is_text(tools_engine: EmbeddedEngine) -> None:
    ids = choice(tools_engine, tools=[PYTHON])["input_token_ids"]
    for tools in ({}, {"tools": [PYTHON], "tool_choice": "none"}):
        only = choice(tools_engine, input_ids=ids, **tools)
        assert only["message"] == {"role": "assistant", "content": CALL} and only["finish_reason"] == "stop"
    none = choice(tools_engine, tools=[PYTHON], tool_choice="none")
    assert "<|system|>" not in TOKENIZER.decode(none["input_token_ids"])


def test_a_call_that_was_cut_off_is_text(tools_engine: EmbeddedEngine) -> None:
    only = choice(tools_engine, tools=[PYTHON], max_tokens=10)
    assert only["finish_reason"] == "length" and only["message"]["content"].startswith("<tool_call>")


def test_the_format_is_guessed_from_the_template() -> None:
    assert guess_tool_call_parser(TOKENIZER) == "qwen25"
    assert guess_tool_call_parser(type("T", (), {"chat_template": "x <|python_tag|> y"})()) == "llama3"
    assert guess_tool_call_parser(None) is None


def test_half_a_character_keeps_its_bytes() -> None:
    ids = TOKENIZER.encode("é", add_special_tokens=False)
    assert len(ids) == 2 and b"".join(token_text(TOKENIZER, i)[1] for i in ids) == "é".encode()
    assert token_text(TOKENIZER, ids[0])[0] == "\ufffd"


# ---- streams ---------------------------------------------------------------------------------------------------------


def events(engine: EmbeddedEngine, **body: Any) -> list[Any]:
    answer = chat(engine, {"messages": [user("7+8=?")], "temperature": 0, "stream": True, **body})
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_stream_says_the_same_piece_by_piece(tools_engine: EmbeddedEngine) -> None:
    whole = choice(tools_engine, messages=[user("7+8=?")], logprobs=True)
    parts = events(tools_engine, logprobs=True, stream_options={"include_usage": True})
    usage = parts.pop()
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == len(whole["logprobs"]["content"])
    deltas = [part["choices"][0] for part in parts]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(d["delta"].get("content", "") for d in deltas) == whole["message"]["content"]
    tokens = [entry["token_id"] for d in deltas for entry in (d["logprobs"] or {"content": []})["content"]]
    assert tokens == [entry["token_id"] for entry in whole["logprobs"]["content"]]
    assert len(deltas) > 4, "expected several pieces"
    assert [d["finish_reason"] for d in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    assert len({part["id"] for part in parts}) == 1


def test_tool_calls_in_a_stream_come_whole(tools_engine: EmbeddedEngine) -> None:
    deltas = [p["choices"][0] for p in events(tools_engine, messages=[user("37*48=?")], tools=[PYTHON])]
    assert not any(d["delta"].get("content") for d in deltas)
    [calls] = [d["delta"]["tool_calls"] for d in deltas if "tool_calls" in d["delta"]]
    assert calls[0]["index"] == 0 and calls[0]["function"]["name"] == "python"
    assert deltas[-1]["finish_reason"] == "tool_calls"


def test_choices_of_a_stream_are_told_apart(tools_engine: EmbeddedEngine) -> None:
    parts = events(tools_engine, n=2, temperature=1.0, seed=1, max_tokens=6, ignore_eos=True)
    for index in (0, 1):
        mine = [c for part in parts for c in part["choices"] if c["index"] == index]
        assert mine[0]["delta"].get("role") == "assistant" and mine[-1]["finish_reason"] == "length"


def test_a_refused_stream_is_answered_with_its_status(tools_engine: EmbeddedEngine) -> None:
    answer = chat(tools_engine, {"messages": [user("x")], "stream": True, "max_tokens": 5000})
    assert answer.status_code == 400 and "context length" in answer.json()["error"]["message"]


# ---- the plain client ------------------------------------------------------------------------------------------------


def test_the_async_client_with_tools_and_streams(tools_engine: EmbeddedEngine) -> None:
    async def say(client: openai.AsyncOpenAI) -> None:
        models = await client.models.list()
        assert models.data[0].id == str(BASE)
        assert (await client.models.retrieve(str(BASE))).owned_by == "miles"
        with pytest.raises(openai.NotFoundError, match="no model 'other'"):
            await client.models.retrieve("other")
        messages: list[Any] = [user("37*48=?")]
        first = await client.chat.completions.create(model="m", messages=messages, tools=[PYTHON], temperature=0)
        message = first.choices[0].message
        assert message.tool_calls and message.tool_calls[0].function.name == "python"
        messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "1776"}]
        stream = await client.chat.completions.create(
            model="m", messages=messages, tools=[PYTHON], temperature=0, stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == "<answer>1776</answer>"
        with pytest.raises(openai.BadRequestError, match="top_logprobs"):
            await client.chat.completions.create(model="m", messages=messages, logprobs=True, top_logprobs=2)

    talk(tools_engine, say)


def test_the_sync_client(tools_engine: EmbeddedEngine) -> None:
    async def say(client: openai.AsyncOpenAI) -> None:
        def ask() -> str | None:
            with openai.OpenAI(base_url=client.base_url, api_key="none", max_retries=0) as sync:
                answer = sync.chat.completions.create(model="m", messages=[user("7+8=?")], temperature=0)
                return answer.choices[0].message.content

        assert (await asyncio.to_thread(ask) or "").startswith("<answer>")

    talk(tools_engine, say)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_aborts_its_request(tools_engine: EmbeddedEngine, stream: bool) -> None:
    async def say(client: openai.AsyncOpenAI) -> None:
        asking = asyncio.create_task(
            client.chat.completions.create(model="m", messages=[user("1")], stream=stream, extra_body={"rid": "gone"})
        )
        tools_engine.pause("in_place")
        while tools_engine.num_unfinished == 0:
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        tools_engine.resume()
        async with asyncio.timeout(20):
            while tools_engine.num_unfinished:
                await asyncio.sleep(0.01)

    talk(tools_engine, say)


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages: expected a list of at least one message"),
    ({"messages": None}, "messages: expected a list"),
    ({"messages": "hi"}, "messages: expected a list"),
    ({"messages": ["hi"]}, "messages[0]: expected an object"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role: expected one of system"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content: expected text"),
    ({"messages": [{"role": "user"}]}, "messages[0].content: expected text, got nothing"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "is not text"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "is not text"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"name": "x"}]}]}, "messages[0].tool_calls"),
    ({"n": 0}, "n must be >= 1"),
    ({"n": "two"}, "n: expected a whole number"),
    ({"max_tokens": -1}, "max_tokens must be >= 0"),
    ({"max_completion_tokens": -5}, "max_tokens must be >= 0"),
    ({"max_tokens": "many"}, "max_tokens: expected a whole number"),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens must be in [0, max_tokens (3)]"),
    ({"max_tokens": 100000}, "max_tokens 100000 exceeds context length"),
    ({"temperature": -1}, "temperature must be"),
    ({"temperature": "hot"}, "temperature: expected a number"),
    ({"top_p": 0}, "top_p must be in"),
    ({"top_k": 0}, "top_k must be"),
    ({"seed": 2**70}, "seed must fit"),
    ({"stop": 5}, "stop: expected a string"),
    ({"logprobs": "yes"}, "logprobs: expected true or false"),
    ({"stream": 1}, "stream: expected true or false"),
    ({"top_logprobs": 3, "logprobs": True}, "the sampled token only"),
    ({"top_logprobs": 3}, "together with logprobs"),
    ({"tools": "python"}, "tools: expected a list"),
    ({"tools": [{"type": "function"}]}, "tools: expected a list"),
    ({"tools": [PYTHON], "tool_choice": "required"}, "tool_choice: expected 'auto' or 'none'"),
    ({"response_format": {"type": "json_object"}}, "'response_format' is not built into this engine"),
    ({"frequency_penalty": 0.5}, "'frequency_penalty' is not built into this engine"),
    ({"input_ids": []}, "input_ids: expected a list of token ids"),
    ({"input_ids": [1, "x"]}, "input_ids: expected a list of token ids"),
    ({"input_ids": [10**9]}, "outside the vocabulary"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "'chat_template' is not taken from requests"),
    ({"chat_template_kwargs": 3}, "chat_template_kwargs: expected an object"),
    ({"stream": True, "return_meta_info": True}, "return_meta_info is not supported with streaming"),
    ({"return_routed_experts": True}, "mixture-of-experts"),
    ({"max_tokns": 3}, "unknown field 'max_tokns'. Did you mean 'max_tokens'?"),
    ({"model": 3}, "model: expected a string"),
]


@pytest.mark.parametrize(("more", "sentence"), BAD, ids=lambda value: str(value)[:40])
def test_bad_requests_are_answered_with_a_sentence(
    tools_engine: EmbeddedEngine, more: dict[str, Any], sentence: str
) -> None:
    answer = chat(tools_engine, {"messages": [user("x")], **more})
    assert answer.status_code == 400, answer.text
    assert sentence in answer.json()["error"]["message"]


@pytest.mark.parametrize("raw", [b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 100000])
def test_bodies_that_are_no_object(tools_engine: EmbeddedEngine, raw: bytes) -> None:
    answer = chat(tools_engine, None, raw)
    assert answer.status_code == 400 and "body" in answer.json()["error"]["message"]


def test_lone_halves_of_characters_do_no_harm(tools_engine: EmbeddedEngine) -> None:
    answer = chat(tools_engine, None, b'{"messages": [{"role": "user", "content": "\\ud83d"}], "max_tokens": 2}')
    assert answer.status_code == 200


def test_a_model_without_a_chat_template_says_so(engine: EmbeddedEngine) -> None:
    answer = chat(engine, {"messages": [user("1")]})
    assert answer.status_code == 400 and "Send 'input_ids' beside the messages" in answer.json()["error"]["message"]
    ids = [len(SPECIAL) + CHARACTERS.index(c) for c in "1+2="]
    assert chat(engine, {"messages": [user("1")], "input_ids": ids, "max_tokens": 3}).status_code == 200
