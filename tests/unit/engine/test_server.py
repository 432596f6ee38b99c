"""SGLang's endpoints in front of the embedded engine, over ASGI and over a real port."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from engine_tiny import make_checkpoint, run_all

from miles.engine.calls import get, post
from miles.engine.client import HttpEngineClient
from miles.engine.embedded import EmbeddedEngine
from miles.engine.embedded.command import main
from miles.engine.embedded.server import create_app, serve_in_loop
from miles.engine.protocol import GenerateRequest, SamplingParams
from miles.errors import EngineError, FlagError


def call(engine: EmbeddedEngine, method: str, path: str, body: object = None, **options: object) -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app=create_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            return await client.request(method, path, json=body, **options)

    return asyncio.run(go())


GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}


def test_generate_answers_like_sglang(engine: EmbeddedEngine) -> None:
    body = {"input_ids": [5, 6, 7], "sampling_params": GREEDY, "return_logprob": True, "rid": "mine"}
    answer = call(engine, "POST", "/generate", body).json()
    [direct] = run_all(
        engine, [GenerateRequest(input_ids=[5, 6, 7], sampling_params=SamplingParams.from_payload(GREEDY))]
    )
    meta = answer["meta_info"]
    assert answer["output_ids"] == direct.output_ids and answer["text"] == direct.text
    assert meta["id"] == "mine"
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (3, 6)
    assert meta["finish_reason"] == {"type": "length", "length": 6}
    assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": 6}]
    assert [token for _, token, _ in meta["output_token_logprobs"]] == answer["output_ids"]


def test_text_batches_and_n(engine: EmbeddedEngine) -> None:
    batch = call(engine, "POST", "/generate", {"text": ["1+2=", "3+4="], "sampling_params": GREEDY}).json()
    single = call(engine, "POST", "/generate", {"text": "3+4=", "sampling_params": GREEDY}).json()
    assert batch[1]["output_ids"] == single["output_ids"]
    pair = call(engine, "POST", "/generate", {"text": "1+2=", "sampling_params": GREEDY | {"n": 2}}).json()
    assert len(pair) == 2 and pair[0]["output_ids"] == pair[1]["output_ids"]


def test_scoring_over_http(engine: EmbeddedEngine) -> None:
    body = {
        "input_ids": [5, 6, 7, 8],
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 1,
    }
    answer = call(engine, "POST", "/generate", body).json()
    scored = answer["meta_info"]["input_token_logprobs"]
    assert [entry[1] for entry in scored] == [6, 7, 8] and scored[0][0] is None and scored[1][0] < 0
    assert answer["output_ids"] == []


BAD = {
    "parameter": ({"text": "1", "sampling_params": {"temprature": 1}}, "Did you mean 'temperature'"),
    "too long": (
        {"input_ids": [5] * 100, "sampling_params": {"max_new_tokens": 100}},
        "prompt of 100 tokens + max_new_tokens 100 exceeds context length 128",
    ),
    "one of a batch": ({"input_ids": [[5], [4000]]}, "token 4000 is outside the vocabulary"),
    "no prompt": ({}, "expected exactly one of 'text' and 'input_ids'"),
    "experts": ({"input_ids": [5], "return_routed_experts": True}, "this one is dense"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_bodies_get_400_and_a_sentence(engine: EmbeddedEngine, case: str) -> None:
    body, message = BAD[case]
    answer = call(engine, "POST", "/generate", body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    deadline = time.monotonic() + 5
    while engine.num_unfinished and time.monotonic() < deadline:  # the good half of a batch is aborted between steps
        time.sleep(0.005)
    assert engine.num_unfinished == 0


def test_a_body_that_is_no_json_object(engine: EmbeddedEngine) -> None:
    assert (
        call(engine, "POST", "/generate", [1]).json()["error"]["message"].startswith("the body must be a JSON object")
    )
    answer = call(engine, "POST", "/generate", content=b"{nope")
    assert answer.status_code == 400 and "not JSON" in answer.json()["error"]["message"]


def test_a_failed_engine_answers_500(engine: EmbeddedEngine) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("boom")

    engine.model.forward = broken  # type: ignore[method-assign, assignment]
    answer = call(engine, "POST", "/generate", {"input_ids": [5]})
    assert answer.status_code == 500
    assert "RuntimeError: boom" in answer.json()["error"]["message"]


def test_information_and_router_endpoints(engine: EmbeddedEngine) -> None:
    assert call(engine, "GET", "/health").status_code == 200
    assert call(engine, "GET", "/health_generate").status_code == 200
    info = call(engine, "GET", "/get_model_info").json()
    assert info["model_path"] == engine.model_path and info["weight_version"] == "default"
    assert info["architectures"] == ["Qwen3ForCausalLM"]
    assert call(engine, "GET", "/get_server_info").json() == call(engine, "GET", "/server_info").json()
    assert call(engine, "GET", "/get_weight_version").json() == {"weight_version": "default"}
    assert call(engine, "GET", "/list_workers").json() == {"urls": ["http://engine"]}
    assert call(engine, "GET", "/workers").json()["workers"][0]["url"] == "http://engine"
    assert call(engine, "GET", "/nothing").status_code == 404


def test_control_endpoints(engine: EmbeddedEngine, tmp_path: Path) -> None:
    for method in ("GET", "POST"):
        assert call(engine, method, "/flush_cache").status_code == 200
    assert call(engine, "POST", "/pause_generation", {"mode": "in_place"}).status_code == 200
    assert engine.paused
    assert call(engine, "POST", "/continue_generation", {}).status_code == 200
    assert not engine.paused
    refused = call(engine, "POST", "/pause_generation", {"mode": "x"}).json()["error"]["message"]
    assert refused == "mode: expected 'abort', 'retract' or 'in_place', got \"x\"."
    assert "give 'rid'" in call(engine, "POST", "/abort_request", {}).text
    assert call(engine, "POST", "/abort_request", {"abort_all": True}).status_code == 200

    other = make_checkpoint(tmp_path / "other", seed=5)
    body = {"model_path": str(other), "weight_version": 7}
    before = call(engine, "POST", "/generate", {"input_ids": [5, 6], "sampling_params": GREEDY}).json()
    answer = call(engine, "POST", "/update_weights_from_disk", body)
    assert answer.status_code == 200 and answer.json()["success"] is True
    after = call(engine, "POST", "/generate", {"input_ids": [5, 6], "sampling_params": GREEDY}).json()
    assert after["meta_info"]["weight_version"] == "7"
    assert after["output_ids"] != before["output_ids"]
    refused = call(engine, "POST", "/update_weights_from_disk", {"model_path": str(tmp_path / "nowhere")})
    assert refused.status_code == 400 and "no *.safetensors" in refused.json()["message"]


def test_over_a_real_port_with_the_http_client(engine: EmbeddedEngine) -> None:
    async def scenario() -> None:
        async with serve_in_loop(create_app(engine), "127.0.0.1", 0) as url:
            client = HttpEngineClient(url)
            assert await client.healthy()
            body = {"input_ids": [5, 6], "sampling_params": GREEDY, "return_logprob": True}
            answers = await asyncio.gather(*(client.generate(body) for _ in range(20)))
            assert len({tuple(a["output_ids"]) for a in answers}) == 1
            assert await get(f"{url}/list_workers") == {"urls": [url]}
            assert (await post(f"{url}/generate", body))["output_ids"] == answers[0]["output_ids"]
            with pytest.raises(EngineError, match=r"HTTP 400: unknown field 'inputids'") as caught:
                await client.generate({"inputids": [1]})
            assert caught.value.status == 400
            long = asyncio.create_task(client.generate(body | {"sampling_params": {"max_new_tokens": 120}, "rid": "x"}))
            await client.pause("in_place")
            await client.resume()
            await client.abort_all()
            assert (await long)["meta_info"]["finish_reason"]["type"] in ("abort", "stop", "length")
            await client.flush_cache()
            assert await client.weight_version() == "default"
        assert not await client.healthy()

    asyncio.run(scenario())


def test_a_client_that_hangs_up_aborts_its_request(engine: EmbeddedEngine) -> None:

    async def scenario() -> None:
        async with serve_in_loop(create_app(engine), "127.0.0.1", 0) as url:
            engine.pause("in_place")
            async with httpx.AsyncClient() as client:
                with pytest.raises(httpx.ReadTimeout):
                    await client.post(f"{url}/generate", json={"input_ids": [5]}, timeout=0.2)
            for _ in range(200):
                if engine.num_unfinished == 0:
                    return
                await asyncio.sleep(0.02)
            raise AssertionError("the request was not aborted")

    asyncio.run(scenario())


def test_a_busy_port_names_the_flag(engine: EmbeddedEngine) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]

        async def scenario() -> None:
            async with serve_in_loop(create_app(engine), "127.0.0.1", port):
                pass

        with pytest.raises(FlagError, match=rf"--sglang-router-port: expected a port that is free .*, got {port}"):
            asyncio.run(scenario())


def test_serve_answers_bad_settings_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        assert main(["--model", str(tmp_path), "--port", str(port)]) == 2
    assert "miles serve: --port: expected a port that is free on 127.0.0.1" in capsys.readouterr().err
    assert main(["--model", str(tmp_path / "nowhere"), "--port", "0"]) == 2
    assert "expected a Hugging Face model folder with config.json" in capsys.readouterr().err
    assert main(["--model", str(tmp_path), "--max-running-requests", "0"]) == 2
    assert "--max-running-requests: expected a number >= 1, got 0" in capsys.readouterr().err


def test_serve_runs_until_it_is_interrupted(checkpoints: dict[str, Path]) -> None:
    code = "import sys; from miles.engine.embedded.command import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--model", str(checkpoints["llama"]), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        assert process.stdout is not None
        url = re.search(r"http://\S+", process.stdout.readline())[0]
        deadline = time.monotonic() + 20
        while True:
            try:
                answer = httpx.post(f"{url}/generate", json={"text": "1+2=", "sampling_params": GREEDY}, timeout=20)
                break
            except httpx.ConnectError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert answer.json()["meta_info"]["completion_tokens"] == 6
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()
