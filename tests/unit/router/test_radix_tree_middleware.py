"""RadixTreeMiddleware in a router, with the quickstart's tokenizer, and samples that are filled from it."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from null_workers import Request, Writer, response, worker
from router_runs import routing

from miles.engine.client import HttpEngineClient
from miles.errors import EngineError
from miles.rollout.generate_hub import single_turn
from miles.rollout.generate_utils.radix_tree import uses_radix_tree
from miles.rollout.tokenizer import load_tokenizer
from miles.router.middleware_hub import radix_tree_middleware
from miles.router.middleware_hub.radix_tree_middleware import postprocess_sample_with_radix_tree
from miles.types import GenerateFnInput, Sample

BASE = str(Path(__file__).resolve().parents[3] / "examples/quickstart/base")
PATH = "miles.router.middleware_hub.radix_tree_middleware.RadixTreeMiddleware"
SETTINGS: dict[str, Any] = {"hf_checkpoint": BASE, "miles_router_middleware_paths": [PATH]}
TOKENIZER = load_tokenizer(BASE)


def engine_answer(text: str, logp: float = -0.5, reason: str = "stop", version: str = "3") -> dict[str, Any]:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    return {
        "text": text,
        "output_ids": ids,
        "meta_info": {
            "finish_reason": {"type": reason},
            "output_token_logprobs": [[logp, token, None] for token in ids],
            "weight_version": version,
            "prompt_tokens": 1,
            "completion_tokens": len(ids),
            "cached_tokens": 0,
        },
    }


def engine(*answers: dict[str, Any]):  # type: ignore[no-untyped-def]
    """A worker that gives these answers in turn, the last one for ever."""
    left = list(answers)

    async def answer(request: Request, writer: Writer) -> None:
        writer.write(response(json.dumps(left.pop(0) if len(left) > 1 else left[0]).encode()))

    return answer


def test_what_was_generated_is_known_afterwards() -> None:
    async def main() -> None:
        async with worker(engine(engine_answer("4"))) as one, routing(one, **SETTINGS) as (router, client):
            body = b'{ "text": "2+2=",  "extra": 1.0 }'
            got = await client.post("/generate", content=body)
            assert got.json() == engine_answer("4") and one.requests[0].body == body  # as it was sent
            known = (await client.post("/retrieve_from_text", json={"text": "2+2=4+1"})).json()
            prompt, rest = TOKENIZER.encode("2+2="), TOKENIZER.encode("+1")
            assert known["tokens"] == prompt + TOKENIZER.encode("4") + rest
            assert known["loss_mask"] == [0] * len(prompt) + [1] + [0] * len(rest)
            assert known["rollout_logp"] == [0.0] * len(prompt) + [-0.5] + [0.0] * len(rest)
            assert known["token_length"] == known["loss_mask_length"] == len(known["tokens"])
            assert known["response"] == "2+2=4+1"
            assert router.radix_tree.get_stats()["total_entries"] == 2

    asyncio.run(main())


def test_the_tokens_of_the_request_count_not_those_of_the_text() -> None:
    """A prompt of tokens that the tokenizer would make otherwise: later turns get exactly these."""

    async def main() -> None:
        async with worker(engine(engine_answer("4"))) as one, routing(one, **SETTINGS) as (_, client):
            plus, equals = (
                TOKENIZER.encode("+", add_special_tokens=False),
                TOKENIZER.encode("=", add_special_tokens=False),
            )
            odd = [*plus, *plus, *equals]
            await client.post("/generate", json={"input_ids": odd})
            known = (await client.post("/retrieve_from_text", json={"text": TOKENIZER.decode(odd) + "4"})).json()
            assert known["tokens"][:3] == odd and known["loss_mask"] == [0, 0, 0, 1]

    asyncio.run(main())


def test_aborted_answers_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radix_tree_middleware, "FIRST_PAUSE_S", 0.001)
    aborted = engine_answer("1", reason="abort")

    async def main() -> None:
        finished = engine(aborted, aborted, engine_answer("4"))
        async with worker(finished) as one, routing(one, **SETTINGS) as (_, client):
            got = await client.post("/generate", json={"text": "2+2="})
            assert got.json()["text"] == "4" and len(one.requests) == 3
            assert len({r.body for r in one.requests}) == 1
        async with worker(engine(aborted)) as one, routing(one, **SETTINGS) as (router, client):
            got = await client.post("/generate", json={"text": "2+2="})
            assert got.json() == aborted and len(one.requests) == radix_tree_middleware.ATTEMPTS
            assert router.radix_tree.get_stats()["total_entries"] == 0

    asyncio.run(main())


def test_no_attempt_begins_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radix_tree_middleware, "DEADLINE_S", 0.0)

    async def main() -> None:
        async with worker(engine(engine_answer("1", reason="abort"))) as one, routing(one, **SETTINGS) as (_, client):
            assert (await client.post("/generate", json={"text": "2+2="})).status_code == 200
            assert len(one.requests) == 1

    asyncio.run(main())


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"text": ["a", "b"]}', b'{"text": ""}', b'{"input_ids": [[1], [2]]}', b'{"input_ids": [-1]}',
     b'{"text": "a", "stream": true}', b'{"input_ids": [true]}', b'{"text": 7}'],
)  # fmt: skip
def test_what_it_does_not_understand_passes(body: bytes) -> None:
    async def main() -> None:
        async with worker(engine({"ok": 1})) as one, routing(one, **SETTINGS) as (router, client):
            assert (await client.post("/generate", content=body)).json() == {"ok": 1}
            assert one.requests[0].body == body
            assert router.radix_tree.get_stats()["total_entries"] == 0

    asyncio.run(main())


@pytest.mark.parametrize(
    "answer", [{}, {"text": "4"}, {"text": 4, "meta_info": {"finish_reason": "stop"}}, {"meta_info": 3}, {"text": None}]
)
def test_odd_answers_pass(answer: dict[str, Any]) -> None:
    async def main() -> None:
        async with worker(engine(answer)) as one, routing(one, **SETTINGS) as (_, client):
            assert (await client.post("/generate", json={"text": "2+2="})).json() == answer

    asyncio.run(main())


@pytest.mark.parametrize("body", [b"", b"{", b'{"text": 3}', b'{"text": ""}', b"[]"])
def test_retrieve_wants_a_text(body: bytes) -> None:
    async def main() -> None:
        async with routing(**SETTINGS) as (_, client):
            got = await client.post("/retrieve_from_text", content=body)
            assert got.status_code == 400 and "text" in got.json()["error"]["message"]

    asyncio.run(main())


# ---- samples -----------------------------------------------------------------------------------------------------


def run_args(url: str, **more: Any) -> Namespace:
    ip, port = url.removeprefix("http://").rstrip("/").split(":")
    given = {
        "sglang_router_ip": ip,
        "sglang_router_port": int(port),
        "use_miles_router": True,
        "partial_rollout": False,
        "use_rollout_routing_replay": False,
        "rollout_max_response_len": 8,
        "rollout_max_context_len": None,
        "sglang_speculative_algorithm": None,
        "sglang_context_length": None,
        **SETTINGS,
    }
    return Namespace(**{**given, **more})


@pytest.mark.parametrize(
    ("paths", "uses"),
    [([PATH], True), (["x.Y", PATH.replace(".Radix", ":Radix")], True), (["my.C"], False), ("", False), (None, False)],
)
def test_the_path_in_the_list_turns_it_on(paths: Any, uses: bool) -> None:
    args = run_args("http://h:1", miles_router_middleware_paths=paths)
    assert uses_radix_tree(args) is uses
    for off in ({"use_miles_router": False}, {"partial_rollout": True}):
        assert not uses_radix_tree(Namespace(**{**vars(args), **off}))


def test_single_turn_fills_the_sample_from_the_tree() -> None:
    async def main() -> None:
        async with worker(engine(engine_answer("4"))) as one, routing(one, **SETTINGS) as (router, client):
            args = run_args(str(client.base_url))
            context = Namespace(client=HttpEngineClient(str(client.base_url)))
            state: Any = Namespace(args=args, tokenizer=TOKENIZER, processor=None, context=context)
            sample = Sample(index=1, prompt="2+2=")
            given = GenerateFnInput(state=state, sample=sample, sampling_params={"max_new_tokens": 4}, evaluation=False)
            (filled,) = [(await single_turn.generate(given)).samples]
            prompt, ids = TOKENIZER.encode("2+2="), TOKENIZER.encode("4", add_special_tokens=False)
            assert filled.tokens == prompt + ids and filled.response == "4"
            assert (filled.response_length, filled.loss_mask, filled.rollout_log_probs) == (1, [1], [-0.5])
            assert filled.status == Sample.Status.COMPLETED and filled.weight_versions == ["3"]
            assert router.radix_tree.cache_hits > 0

    asyncio.run(main())


def test_a_response_that_the_tree_lacks_is_an_error() -> None:
    async def main() -> None:
        async with routing(**SETTINGS) as (_, client):
            args = run_args(str(client.base_url))
            with pytest.raises(EngineError, match="does not know the 1 tokens"):
                await postprocess_sample_with_radix_tree(args, Sample(prompt="2+2="), engine_answer("4"))

    asyncio.run(main())
