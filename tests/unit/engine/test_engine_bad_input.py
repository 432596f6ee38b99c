"""Whatever is sent: an answer in JSON with a sentence, and an engine that goes on, with nothing left behind.

Requests enter the application as a server hands them over (ASGI), so that thousands of them take seconds.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miles.engine.embedded import EmbeddedEngine
from miles.engine.embedded.http import Limits
from miles.engine.embedded.server import create_app

BODY = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 3}}
LIMITS = Limits(body_bytes=100_000, queued_requests=64)


@dataclass
class Answer:
    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    chunks: list[bytes] = field(default_factory=list)

    @property
    def message(self) -> str:
        error = json.loads(self.body)["error"]
        assert error["code"] == self.status and error["type"] in ("invalid_request_error", "server_error")
        return str(error["message"])


async def call(
    app: FastAPI,
    path: str,
    body: bytes | object = b"",
    *,
    method: str = "POST",
    content_type: str = "application/json",
    hang_up_after: int | None = None,
    chunk: int = 1 << 16,
) -> Answer:
    """One request. `hang_up_after`: the client is gone when this many events of the answer have reached it."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    parts = [raw[i : i + chunk] for i in range(0, len(raw), chunk)] or [b""]
    answer, gone = Answer(), asyncio.Event()
    if hang_up_after == 0:
        asyncio.get_running_loop().call_later(0.01, gone.set)
    left = iter(enumerate(parts, 1))

    async def receive() -> dict[str, Any]:
        number, part = next(left, (0, b""))
        if number:
            return {"type": "http.request", "body": part, "more_body": number < len(parts)}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answer.status, answer.headers = message["status"], dict(message["headers"])
        else:
            answer.body += message.get("body", b"")
            answer.chunks.append(message.get("body", b""))
            if len(answer.chunks) == hang_up_after:
                gone.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", content_type.encode()), (b"content-length", str(len(raw)).encode())],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await app(scope, receive, send)
    return answer


@pytest.fixture
def app(engine: EmbeddedEngine) -> FastAPI:
    return create_app(engine, limits=LIMITS)


async def emptied(engine: EmbeddedEngine) -> None:
    """Nothing is left inside: whoever hung up is aborted between two steps."""
    while engine.num_unfinished:
        await asyncio.sleep(0.001)
    assert engine._scheduler.running == [] and not engine._streams


def params(**given: object) -> dict[str, object]:
    return {"input_ids": [5], "sampling_params": given}


# What is sent to /generate -> what the sentence says.
WRONG: dict[str, tuple[object, str]] = {
    "no JSON": (b"{nope", "the body is not JSON: Expecting property name"),
    "half of it": (b'{"text": "1', "the body is not JSON"),
    "an array": ([1], "must be a JSON object, got list"),
    "a form": (b"text=1", "the body is not JSON"),
    "nothing": (b"", "expected exactly one of 'text' and 'input_ids'"),
    "bytes that are no text": (b'{"text": "\xff\xfe"}', "can't decode byte 0xff"),
    "UTF-16": ('{"text": "1"}'.encode("utf-16"), "the body is not JSON"),
    "half a surrogate pair": (b'{"text": "\\ud800"}', "surrogates not allowed"),
    "half a surrogate pair in a name": (b'{"text": "1", "\\uDfff": 1}', "surrogates not allowed"),
    "deep nesting": (b'{"text": ' + b"[" * 40_000, "nested too deeply"),
    "NaN": (b'{"text": "1", "sampling_params": {"temperature": NaN}}', "NaN is no JSON number"),
    "Infinity": (b'{"text": "1", "sampling_params": {"temperature": 1e999}}', "must be a finite number >= 0, got inf"),
    "a number of 5000 digits": (b'{"text": "1", "n": ' + b"1" * 5000 + b"}", "the body is not JSON: Exceeds the limit"),
    "unknown field": ({"text": "1", "inputs": 1}, "unknown field 'inputs'"),
    "a name of 50,000 characters": ({"text": "1", "x" * 50_000: 1}, "unknown field 'xxx"),
    "unknown parameter": (params(temprature=1), "Did you mean 'temperature'"),
    "parameters of a wrong type": ({"input_ids": [5], "sampling_params": [3]}, "sampling_params: expected an object"),
    "n=0": (params(n=0), "n must be >= 1, got 0"),
    "n of a billion": (params(n=10**9), "one body may ask for at most 65536 answers"),
    "n of 10**400": (params(n=10**400), "one body may ask for at most 65536 answers"),
    "n above the limit": (params(n=65), "the server is full: 0 requests are inside and at most 64 may be"),
    "negative max_new_tokens": (params(max_new_tokens=-1), "max_new_tokens must be >= 0, got -1"),
    "text for a number": (params(max_new_tokens="9"), "max_new_tokens: expected a whole number, got '9'"),
    "many stops": (params(stop=["a"] * 2000), "stop: at most 1024 strings, got 2000"),
    "a stop that is no string": (params(stop=[None]), "stop: expected a string or a list of strings"),
    "token above the vocabulary": ({"input_ids": [4000]}, "token 4000 is outside the vocabulary of 47 tokens"),
    "negative token": ({"input_ids": [5, -1]}, "token -1 is outside the vocabulary"),
    "token of 10**30": ({"input_ids": [10**30]}, "is outside the vocabulary"),
    "true as a token": ({"input_ids": [True]}, "input_ids: expected whole numbers"),
    "half a token": ({"input_ids": [1.5]}, "input_ids: expected whole numbers"),
    "no tokens": ({"input_ids": []}, "expected a list of token ids, at least one, got []"),
    "empty prompt": ({"text": ""}, "the prompt has no tokens"),
    "an empty prompt in a batch": ({"text": ["1", ""]}, "the prompt has no tokens"),
    "both prompts": ({"text": "1", "input_ids": [1]}, "expected exactly one of"),
    "too long": ({"input_ids": [5] * 20_000}, "prompt of 20000 tokens fills the context length 128"),
    "much too long a text": ({"text": "1" * 90_000}, "90000 characters do not fit the context length of 128 tokens"),
    "a number as rid": ({"input_ids": [5], "rid": 7}, "rid: expected a string, got 7"),
    "logprob_start_len": (
        {"input_ids": [5], "return_logprob": True, "logprob_start_len": 9},
        "logprob_start_len 9 is beyond",
    ),
    "images": ({"text": "1", "image_data": "http://x"}, "'image_data' is not built into this engine"),
    "stream of nonsense": ({"text": "1", "stream": 3}, "stream: expected true or false, got 3"),
    "a stream that is refused": ({"input_ids": [4000], "stream": True}, "token 4000 is outside the vocabulary"),
    "a body beyond the limit": (b" " * 200_000, "the body is larger than 100000 bytes"),
}
STATUS = {"n above the limit": 503, "a body beyond the limit": 413}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_are_explained(app: FastAPI, engine: EmbeddedEngine, case: str) -> None:
    body, message = WRONG[case]

    async def scenario() -> None:
        answer = await call(app, "/generate", body)
        assert answer.status == STATUS.get(case, 400)
        assert message in answer.message and len(answer.body) < 1000
        await emptied(engine)
        assert (await call(app, "/generate", BODY)).status == 200

    asyncio.run(scenario())


CONTROL: dict[str, tuple[str, object, str]] = {
    "unknown field": ("/pause_generation", {"mod": "abort"}, "unknown field 'mod'. Did you mean 'mode'?"),
    "a wrong word": ("/pause_generation", {"mode": "off"}, "mode: expected 'abort', 'retract' or 'in_place', got"),
    "a missing field": ("/update_weights_from_disk", {}, "model_path: this field must be given"),
    "a number as text": ("/update_weights_from_disk", {"model_path": 7}, "model_path: expected a valid string, got 7"),
    "text as a flag": ("/abort_request", {"abort_all": "yes"}, "abort_all: expected a valid boolean, got"),
    "nobody to abort": ("/abort_request", {}, "give 'rid', or 'abort_all': true"),
    "an unknown tag": ("/release_memory_occupation", {"tags": ["gpu"]}, "tags.0: expected 'kv_cache', 'weights' or"),
    "an unknown action": ("/weights_checker", {"action": "look"}, "action: expected 'snapshot'"),
    "a negative size": ("/get_weights_by_name", {"name": "x", "truncate_size": -1}, "truncate_size: expected greater"),
    "deep nesting": ("/pause_generation", b'{"mode": ' + b"[" * 40_000, "nested too deeply"),
    "lists that differ": (
        "/update_weights_from_distributed",
        {"names": ["a"], "dtypes": [], "shapes": []},
        "1 names, 0 dtypes and 0 shapes",
    ),
    "no dtype": (
        "/update_weights_from_distributed",
        {"names": ["a"], "dtypes": ["nn"], "shapes": [[1]]},
        "'nn' is no dtype",
    ),
    "a huge shape": (
        "/update_weights_from_distributed",
        {"names": ["model.norm.weight"], "dtypes": ["float32"], "shapes": [[10**12]]},
        "model.norm.weight: expected shape [32], got [1000000000000]",
    ),
}


@pytest.mark.parametrize("case", CONTROL)
def test_wrong_control_requests_are_explained(app: FastAPI, case: str) -> None:
    path, body, message = CONTROL[case]
    answer = asyncio.run(call(app, path, body))
    assert answer.status == 400 and message in answer.message


def test_places_that_are_not_there(app: FastAPI) -> None:
    async def scenario() -> None:
        assert (await call(app, "/nothing")).message == "POST /nothing: Not Found."
        wrong_method = await call(app, "/generate", method="DELETE")
        assert wrong_method.status == 405 and wrong_method.message == "DELETE /generate: Method Not Allowed."
        assert (await call(app, "/abort_request", {"rid": "nobody"})).status == 200

    asyncio.run(scenario())


def test_a_json_body_counts_whatever_its_content_type(app: FastAPI) -> None:
    """curl says that it sends a form, unless it is told otherwise."""
    answer = asyncio.run(call(app, "/generate", BODY, content_type="application/x-www-form-urlencoded"))
    assert answer.status == 200


def test_an_error_of_the_server_is_json_as_well(app: FastAPI, engine: EmbeddedEngine) -> None:
    def broken() -> bool:
        raise ZeroDivisionError("boom")

    engine.flush_cache = broken  # type: ignore[method-assign]

    async def scenario() -> None:
        with pytest.raises(ZeroDivisionError):  # for the log of the web server
            await call(app, "/flush_cache")

    asyncio.run(scenario())
    app.router.routes.clear()


def test_a_body_that_stops_is_given_up(engine: EmbeddedEngine) -> None:
    app = create_app(engine, limits=Limits(body_patience_s=0.05))
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not sent:
            sent.append(1)
            return {"type": "http.request", "body": b'{"te', "more_body": True}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": [], "query_string": b""}
    asyncio.run(app(scope, receive, send))
    assert sent[1]["status"] == 408 and b"no byte came for 0.05 s" in sent[2]["body"]


# ---- streams and clients that hang up --------------------------------------------------------------------------------


def events(answer: Answer) -> list[Any]:
    lines = [line for line in answer.body.decode().split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_streams_are_server_sent_events(app: FastAPI) -> None:
    async def scenario() -> None:
        asked = BODY | {"return_logprob": True, "sampling_params": {"max_new_tokens": 9, "temperature": 0}}
        whole = json.loads((await call(app, "/generate", asked)).body)
        answer = await call(app, "/generate", asked | {"stream": True})
        assert answer.status == 200 and answer.headers[b"content-type"].startswith(b"text/event-stream")
        *partial, last = events(answer)
        assert last["output_ids"] == whole["output_ids"] and last["text"] == whole["text"]
        for one in partial:
            assert one["meta_info"]["finish_reason"] is None
            assert len(one["meta_info"]["output_token_logprobs"]) == len(one["output_ids"])

    asyncio.run(scenario())


def test_streams_of_a_batch_say_whose_tokens_they_are(app: FastAPI) -> None:
    asked = {"input_ids": [[5, 6], [7]], "stream": True, "sampling_params": {"max_new_tokens": 9, "ignore_eos": True}}
    found = events(asyncio.run(call(app, "/generate", asked)))
    assert {event["index"] for event in found} == {0, 1}
    for index, prompt_tokens in enumerate((2, 1)):
        *_, last = [event for event in found if event["index"] == index]
        assert last["meta_info"]["prompt_tokens"] == prompt_tokens and len(last["output_ids"]) == 9


def test_a_failure_in_mid_stream_is_an_event(app: FastAPI, engine: EmbeddedEngine) -> None:
    step, steps = engine._scheduler.step, iter(range(100))

    def fail_later() -> None:
        if next(steps) == 4:
            raise RuntimeError("boom")
        step()

    engine._scheduler.step = fail_later  # type: ignore[method-assign]
    asked = {"input_ids": [5], "stream": True, "sampling_params": {"max_new_tokens": 90, "ignore_eos": True}}
    *_, last = events(asyncio.run(call(app, "/generate", asked)))
    assert last["error"]["code"] == 500 and "RuntimeError: boom" in last["error"]["message"]
    assert engine.last_error is not None and "RuntimeError: boom" in engine.last_error


HANG_UPS = {
    "waiting for an answer": ({}, 0),
    "in the queue of a paused engine": ({"paused": True}, 0),
    "in mid-stream": ({"stream": True}, 2),
    "before the first event": ({"stream": True, "paused": True}, 0),
}


@pytest.mark.parametrize("case", HANG_UPS)
def test_a_client_that_hangs_up_frees_its_place(app: FastAPI, engine: EmbeddedEngine, case: str) -> None:
    options, after = HANG_UPS[case]
    asked = {"input_ids": [[5, 6], [7]], "sampling_params": {"max_new_tokens": 120, "ignore_eos": True}}
    asked |= {name: value for name, value in options.items() if name == "stream"}

    async def scenario() -> None:
        if "paused" in options:
            await asyncio.to_thread(engine.pause, "in_place")
        await call(app, "/generate", asked, hang_up_after=after)
        await emptied(engine)

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_full_server_says_so_and_recovers(app: FastAPI, engine: EmbeddedEngine) -> None:
    async def scenario() -> None:
        await asyncio.to_thread(engine.pause, "in_place")
        held = [asyncio.create_task(call(app, "/generate", BODY | {"stream": i % 2 == 0})) for i in range(64)]
        while engine.num_unfinished < 64:
            await asyncio.sleep(0.001)
        refused = await call(app, "/generate", BODY)
        assert refused.status == 503 and "64 requests are inside and at most 64 may be" in refused.message
        assert (await call(app, "/generate", BODY | {"stream": True})).status == 503
        await asyncio.to_thread(engine.resume)
        assert [answer.status for answer in await asyncio.gather(*held)] == [200] * 64
        assert (await call(app, "/generate", BODY)).status == 200

    asyncio.run(asyncio.wait_for(scenario(), 30))


# ---- many of them ----------------------------------------------------------------------------------------------------


def barrage(count: int) -> Iterator[tuple[str, object, int | None]]:
    """Path, body, and when the client hangs up: the same sequence every time."""
    rng = random.Random(0)
    wrong = [body for name, (body, _) in WRONG.items() if not (isinstance(body, bytes) and len(body) > 30_000)]
    for i in range(count):
        kind = i % 8
        if kind < 4:
            yield "/generate", rng.choice(wrong), None
        elif kind < 6:
            path, body, _ = rng.choice(list(CONTROL.values()))
            yield path, body, None
        elif kind == 6:
            yield "/generate", BODY | {"stream": rng.random() < 0.5}, rng.choice([0, 1, None])
        else:
            yield "/abort_request", {"rid": f"nobody-{i}"}, None


def memory() -> int:
    """Resident bytes of this process."""
    return int(psutil.Process().memory_info().rss)


async def send_all(app: FastAPI, count: int) -> None:
    requests = list(barrage(count))
    for start in range(0, count, 50):
        await asyncio.gather(*(call(app, p, b, hang_up_after=h) for p, b, h in requests[start : start + 50]))


def test_nothing_is_left_of_ten_thousand_of_them(app: FastAPI, engine: EmbeddedEngine) -> None:
    async def scenario() -> None:
        await send_all(app, 1000)  # what is made once is made now
        await emptied(engine)
        gc.collect()
        tasks, objects, resident = len(asyncio.all_tasks()), len(gc.get_objects()), memory()
        await send_all(app, 9000)
        await emptied(engine)
        await asyncio.sleep(0)
        gc.collect()
        assert len(asyncio.all_tasks()) == tasks
        assert len(gc.get_objects()) - objects < 1000
        assert memory() - resident < 50 << 20
        assert (await call(app, "/generate", BODY)).status == 200
        state = json.loads((await call(app, "/get_server_info", method="GET")).body)
        assert state["num_unfinished_requests"] == state["num_requests_in_server"] == 0

    asyncio.run(asyncio.wait_for(scenario(), 300))


# ---- properties over the description ---------------------------------------------------------------------------------


def strategy(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of a JSON schema, of the kinds that the description uses."""
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    if "anyOf" in schema:
        return st.one_of([strategy(one) for one in schema["anyOf"]])
    kinds = schema.get("type", "null")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    return st.one_of([plain(kind, schema) for kind in kinds])


def plain(kind: str, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    if kind == "object":
        known = {name: strategy(one) for name, one in schema.get("properties", {}).items()}
        required = {name: known[name] for name in schema.get("required", ())}
        optional = {name: one for name, one in known.items() if name not in required}
        return st.fixed_dictionaries(required, optional=optional)
    if kind == "array":
        return st.lists(strategy(schema["items"]), min_size=schema.get("minItems", 0), max_size=3)
    if kind == "integer":
        low, high = schema.get("minimum", -5), schema.get("maximum", 200)
        return st.integers(max(low, -(10**20)), min(high, 10**20)) | st.integers(max(low, 0), min(high, 60))
    simple = {
        "string": st.text(max_size=12),
        "boolean": st.booleans(),
        "number": st.floats(schema.get("minimum", 0), schema.get("maximum", 2), allow_nan=False),
        "null": st.none(),
    }
    return simple[kind]


def body_schema(app: FastAPI, path: str) -> dict[str, Any]:
    content = app.openapi()["paths"][path]["post"]["requestBody"]["content"]
    schema: dict[str, Any] = content["application/json"]["schema"]
    return schema


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)
PROPERTY = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# Endpoints that answer 200 with weights of the machine, wait for others, or end what the test does.
LEFT_OUT = ("/update_weights_from_disk", "/init_weights_update_group", "/v1/chat/completions")


def bodies_of(app: FastAPI, path: str) -> st.SearchStrategy[Any]:
    """Mostly what the description promises to take, now and then with a wrong part, now and then anything."""
    right = strategy(body_schema(app, path))
    names = sorted(body_schema(app, path).get("properties") or {"x": {}})
    spoiled = st.builds(lambda body, name, junk: body | {name: junk}, right, st.sampled_from(names), JUNK)
    return right | spoiled | JUNK


def check(answer: Answer) -> None:
    assert answer.status in (200, 400, 503)
    if answer.status != 200:
        assert answer.message


@pytest.fixture
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def test_generate_answers_whatever_the_description_allows(
    app: FastAPI, engine: EmbeddedEngine, loop: asyncio.Runner
) -> None:
    @PROPERTY
    @given(bodies_of(app, "/generate"))
    def holds(body: object) -> None:
        check(loop.run(call(app, "/generate", body)))

    holds()
    loop.run(emptied(engine))
    assert loop.run(call(app, "/generate", BODY)).status == 200


def test_control_endpoints_answer_whatever_the_description_allows(
    app: FastAPI, engine: EmbeddedEngine, loop: asyncio.Runner
) -> None:
    described = [
        path
        for path, methods in app.openapi()["paths"].items()
        if "requestBody" in methods.get("post", {}) and path not in (*LEFT_OUT, "/generate")
    ]
    assert len(described) > 12

    @PROPERTY
    @given(st.sampled_from(described).flatmap(lambda path: st.tuples(st.just(path), bodies_of(app, path))))
    def holds(asked: tuple[str, object]) -> None:
        path, body = asked
        check(loop.run(call(app, path, body)))

    holds()
    for path in ("/resume_memory_occupation", "/continue_generation"):
        assert loop.run(call(app, path, {})).status == 200
    answer = loop.run(call(app, "/generate", BODY))
    assert answer.status == 200 or "has no weights" in answer.message
