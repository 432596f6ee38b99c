"""The published test helpers: an engine without a model, and a server in a thread."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from miles.errors import FlagError
from miles.utils.test_utils.mock_sglang_server import (
    Counter,
    ProcessResult,
    ProcessResultMetaInfo,
    default_process_fn,
    with_mock_server,
)
from miles.utils.test_utils.uvicorn_thread_server import UvicornThreadServer

FOLDER = str(Path(__file__).resolve().parents[2] / "examples" / "tiny_tools" / "base")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def test_generate_answers_what_the_function_says() -> None:
    meta = ProcessResultMetaInfo(weight_version="7", spec_verify_ct=2)
    with with_mock_server(FOLDER, lambda prompt: ProcessResult(f"{prompt}!", "length", 1, meta)) as server:
        ids = server.tokenizer.encode("ab", add_special_tokens=False)
        answer = httpx.post(f"{server.url}/generate", json={"input_ids": ids}).json()
        assert answer["text"] == "ab!" and server.request_log == [{"input_ids": ids}]
        info = answer["meta_info"]
        assert info["finish_reason"] == {"type": "length", "length": 3}
        assert (info["prompt_tokens"], info["completion_tokens"], info["cached_tokens"]) == (2, 3, 1)
        assert info["weight_version"] == "7" and info["spec_verify_ct"] == 2 and "routed_experts" not in info
        assert [logprob for logprob, _ in info["output_token_logprobs"]] == [0.0, -1 / 128, -2 / 128]
        server.reset_stats()
        assert server.request_log == [] and server.max_concurrent == 0


def test_chats_are_rendered_and_calls_are_parsed() -> None:
    said = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    with with_mock_server(FOLDER, lambda prompt: ProcessResult(said)) as server:
        body = {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL]}
        choice = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()["choices"][0]
        assert server.tokenizer.decode(choice["input_token_ids"]).endswith("<|user|>x<|end|><|assistant|>")
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == ""
        assert choice["message"]["tool_calls"][0] == {
            "id": "call00000", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'},
        }  # fmt: skip
        ids = [entry["token_id"] for entry in choice["logprobs"]["content"]]
        assert server.tokenizer.decode(ids) == said
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_the_function_of_the_default() -> None:
    assert default_process_fn("What is 1+41?").text == "\\boxed{42}"
    assert default_process_fn("?").finish_reason == "stop"


def test_counted_is_how_many_were_inside_at_once() -> None:
    counter = Counter()
    with counter.track(), counter.track():
        pass
    with counter.track():
        pass
    assert counter.max_value == 2
    counter.reset()
    assert counter.max_value == 0


def test_a_server_in_a_thread_starts_and_ends() -> None:
    app = FastAPI()
    app.get("/x")(lambda: 1)
    server = UvicornThreadServer(app, "127.0.0.1", 0)
    server.start()
    assert httpx.get(f"{server.url}/x").json() == 1
    with pytest.raises(FlagError, match="free"):
        UvicornThreadServer(app, "127.0.0.1", server.port).start()
    name = f"serve-{server.port}"
    server.stop()
    server.stop()
    assert not any(thread.name == name for thread in threading.enumerate())
