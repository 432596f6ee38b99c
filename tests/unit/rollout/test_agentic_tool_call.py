"""Agentic generation: agents talk to sessions of a real MilesRouter, in front of the published mock engine."""

from __future__ import annotations

import asyncio
import base64
import itertools
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import agent_plug_ins
import httpx
import numpy as np
import pytest
from rollout_chat import fresh

from examples.tiny_tools.make_tokenizer import tokenizer
from miles.config import parse
from miles.engine.client import HttpEngineClient
from miles.errors import FlagError, HookError
from miles.hooks import bind
from miles.hooks import call as hooks_call
from miles.rollout import context
from miles.rollout.generate_hub import agentic_tool_call
from miles.rollout.generate_hub.agentic_tool_call import build_chat_request_kwargs
from miles.rollout.generate_utils.openai_endpoint_utils import (
    OpenAIEndpointTracer,
    compute_samples_from_openai_records,
)
from miles.rollout.sample import generate_and_rm
from miles.rollout.state import GenerateState
from miles.router.router import MilesRouter
from miles.router.session.session_types import SessionRecord
from miles.types import GenerateFnInput, Sample
from miles.utils.test_utils.mock_sglang_server import ProcessResult, ProcessResultMetaInfo, with_mock_server
from miles.utils.test_utils.uvicorn_thread_server import UvicornThreadServer

TOKENIZER = tokenizer()
ROOT = Path(__file__).resolve().parents[3]
FOLDER = str(ROOT / "examples" / "tiny_tools" / "base")
AGENTS = str(Path(__file__).parent / "agent_plug_ins.py")
PATH = "miles.rollout.generate_hub.agentic_tool_call.generate"
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call><|end|>'
SYSTEM = "<|system|>add(a)<|end|>"


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hooks_call, "RETRY_DELAY_S", 0.0)
    agent_plug_ins.seen.clear()
    yield
    context.install(None)


class Engine:
    """The mock engine behind a router; it says `says` in order."""

    def __init__(self, says: list[Any], **router_args: Any) -> None:
        self.says = iter(says)
        self.versions = itertools.count(3)
        self.router = MilesRouter(Namespace(hf_checkpoint=FOLDER, **router_args))

    def process(self, prompt: str) -> ProcessResult:
        said = next(self.says)
        text, finish, more = said if isinstance(said, tuple) else (said, "stop", {})
        meta = ProcessResultMetaInfo(weight_version=str(next(self.versions)), **more)
        return ProcessResult(text=text, finish_reason=finish, meta_info=meta)

    def __enter__(self) -> Engine:
        self._mock = with_mock_server(FOLDER, self.process)
        self.mock = self._mock.__enter__()
        self.server = UvicornThreadServer(self.router.app, "127.0.0.1", 0)
        self.server.start()
        httpx.post(f"{self.server.url}/add_worker", params={"url": self.mock.url}).raise_for_status()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.stop()
        self._mock.__exit__(None, None, None)

    @property
    def sessions(self) -> dict[str, Any]:
        return self.router.app.state.sessions.manager.sessions

    def state(self, agent: str, *flags: str, **policies: str) -> GenerateState:
        _, args = parse(
            ["--hf-checkpoint", FOLDER, "--prompt-data", "p", "--num-rollout", "1", "--rollout-batch-size", "2",
             "--num-steps-per-rollout", "1", "--rm-type", "math", "--custom-generate-function-path", PATH,
             "--custom-agent-function-path", f"{AGENTS}:{agent}", "--use-miles-router", *flags]
        )  # fmt: skip
        args.sglang_router_ip, args.sglang_router_port = "127.0.0.1", self.server.port
        args.num_layers, args.moe_router_topk = 2, 1
        context.install(None)
        hooks = bind(args, policies=policies, error_budget=1.0)
        context.install(context.RunContext(hooks, HttpEngineClient(self.server.url)))
        return GenerateState(args)


def work(
    says: list[Any], agent: str = "uses_tools", *flags: str, sample: Sample | None = None, **policies: str
) -> tuple[Any, Engine]:
    with Engine(says) as engine:

        async def go() -> Any:
            state = engine.state(agent, *flags, **{k.replace("_", "-"): v for k, v in policies.items()})
            params = {"max_new_tokens": 50, "temperature": 1.0, "spaces_between_special_tokens": False, "stop": None}
            start = sample or fresh("1+2=?", metadata={"a": 1})
            return (await agentic_tool_call.generate(GenerateFnInput(state, start, params, False))).samples

        made = asyncio.run(go())
        assert not engine.sessions, "a session was not deleted"
        return made, engine


def learned(sample: Sample) -> str:
    response = sample.tokens[len(sample.tokens) - sample.response_length :]
    assert sample.loss_mask is not None
    return TOKENIZER.decode([token for token, mask in zip(response, sample.loss_mask, strict=True) if mask])


# ---- one conversation ------------------------------------------------------------------------------------------------


def test_a_conversation_with_a_tool_is_one_sample() -> None:
    sample, engine = work([CALL, "<answer>3</answer><|end|>"])
    assert TOKENIZER.decode(sample.tokens) == (
        f"{SYSTEM}<|user|>1+2=?<|end|><|assistant|>{CALL}<|tool|>3<|end|><|assistant|><answer>3</answer><|end|>"
    )
    assert learned(sample) == f"{CALL}<answer>3</answer><|end|>"
    assert sample.response == f"{CALL}<|tool|>3<|end|><|assistant|><answer>3</answer><|end|>"
    assert sample.status == Sample.Status.COMPLETED and sample.weight_versions == ["3", "4"]
    assert sample.metadata == {"a": 1, "round_number": 2}
    assert sample.rollout_log_probs is not None and sample.rollout_log_probs[:3] == [0.0, -1 / 128, -2 / 128]
    sample.validate()
    first, second = engine.mock.request_log
    n = len(sample.tokens) - len(TOKENIZER.encode("<answer>3</answer><|end|>"))
    assert "input_ids" not in first and second["input_ids"] == sample.tokens[:n]


def test_the_agent_is_told_everything_by_keyword() -> None:
    _, engine = work(["<answer>3</answer><|end|>"])
    [seen] = agent_plug_ins.seen
    assert seen["base_url"].startswith(f"{engine.server.url}/sessions/")
    assert seen["prompt"] == "1+2=?" and seen["metadata"] == {"a": 1}
    assert seen["request_kwargs"] == {"max_tokens": 50, "temperature": 1.0, "logprobs": True, "logprob_start_len": 0}
    assert engine.mock.request_log[0]["max_tokens"] == 50


def test_a_synchronous_agent_works_in_a_thread() -> None:
    sample, _ = work(["a<|end|>", "b<|end|>"], "asks_twice_in_a_thread")
    assert learned(sample) == "a<|end|>b<|end|>" and "sure?" in sample.response


def test_one_sample_per_answer() -> None:
    samples, _ = work([CALL, "x<|end|>"], "uses_tools", "--generate-multi-samples")
    assert [learned(s) for s in samples] == [CALL, "x<|end|>"]
    assert samples[1].tokens[: len(samples[0].tokens)] == samples[0].tokens
    assert [s.weight_versions for s in samples] == [["3"], ["4"]]


def test_an_agent_that_begins_anew_needs_samples_of_their_own() -> None:
    samples, _ = work(["a<|end|>", "b<|end|>"], "changes_the_subject", "--generate-multi-samples")
    assert len(samples) == 2
    with pytest.raises(HookError, match="do not continue those of answer 1") as error:
        work(["a<|end|>", "b<|end|>"], "changes_the_subject")
    assert "--generate-multi-samples" in str(error.value) and "agent_plug_ins.py" in str(error.value)


@pytest.mark.parametrize(("finish", "status"), [("length", Sample.Status.TRUNCATED), ("abort", Sample.Status.ABORTED)])
def test_the_last_answer_says_how_the_sample_ends(finish: str, status: Sample.Status) -> None:
    sample, _ = work([CALL, ("half", finish, {})])
    assert sample.status == status and learned(sample) == f"{CALL}half"


def test_an_agent_may_go_on_after_an_answer_that_was_cut_off() -> None:
    sample, _ = work([("half", "length", {}), "whole<|end|>"], "asks_twice_in_a_thread")
    assert sample.status == Sample.Status.COMPLETED and learned(sample) == "halfwhole<|end|>"
    assert "half<|end|><|user|>sure?" in sample.response


def experts(tokens: int) -> dict[str, str]:
    array = np.arange((tokens - 1) * 2, dtype="<i4")
    return {"routed_experts": base64.b64encode(array.tobytes()).decode()}


def test_the_experts_of_the_last_answer_cover_the_conversation() -> None:
    plain, _ = work([CALL, "x<|end|>"])
    first = len(TOKENIZER.encode(f"{SYSTEM}<|user|>1+2=?<|end|><|assistant|>{CALL}"))
    says = [(CALL, "stop", experts(first)), ("x<|end|>", "stop", experts(len(plain.tokens)))]
    sample, engine = work(says, "uses_tools", "--use-rollout-routing-replay", "--use-routing-replay")
    assert sample.rollout_routed_experts.shape == (len(sample.tokens) - 1, 2, 1)
    assert sample.rollout_routed_experts.dtype == np.int32
    assert all(request["return_routed_experts"] for request in engine.mock.request_log)
    sample.validate()


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_an_agent_without_a_request_is_its_own_fault() -> None:
    with pytest.raises(HookError, match="made no chat completion that was answered") as error:
        work([], "says_nothing")
    assert "--custom-agent-function-path" in str(error.value) and "says_nothing" in str(error.value)


def test_a_failing_agent_gets_a_card_and_leaves_no_session() -> None:
    with Engine(["a"]) as engine:

        async def go() -> None:
            state = engine.state("fails_after_an_answer")
            await agentic_tool_call.generate(GenerateFnInput(state, fresh("x"), {}, False))

        with pytest.raises(HookError, match="the sandbox is gone") as error:
            asyncio.run(go())
        assert "agent_plug_ins.py" in str(error.value) and not engine.sessions


def test_each_attempt_has_a_session_of_its_own() -> None:
    sample, _ = work(["a<|end|>", "b<|end|>"], "fails_once", custom_agent_function="retry:2")
    assert learned(sample) == "b<|end|>"
    first, second = (entry["base_url"] for entry in agent_plug_ins.seen)
    assert first != second


def test_an_aborted_rollout_cancels_the_agent() -> None:
    with Engine(["a"]) as engine:

        async def go() -> Sample:
            state = engine.state("never_ends")
            working = asyncio.create_task(generate_and_rm(state, fresh("x"), {}))
            while not agent_plug_ins.seen:
                await asyncio.sleep(0.01)
            state.aborted = True
            sample: Sample = await asyncio.wait_for(working, 20)
            return sample

        sample = asyncio.run(go())
        assert sample.status == Sample.Status.ABORTED and not engine.sessions


def test_a_full_context_ends_the_sample_truncated() -> None:
    said = len(TOKENIZER.encode(f"{SYSTEM}<|user|>1+2=?<|end|><|assistant|>{CALL}"))
    with Engine([CALL], rollout_max_context_len=said + 4) as engine:  # the tool's answer alone fills it

        async def go() -> Any:
            state = engine.state("uses_tools")
            return (await agentic_tool_call.generate(GenerateFnInput(state, fresh("1+2=?"), {}, False))).samples

        sample = asyncio.run(go())
        assert sample.status == Sample.Status.TRUNCATED and learned(sample) == CALL
        assert len(engine.mock.request_log) == 1


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("partial_rollout", True, "not supported by agentic_tool_call"),
        ("use_miles_router", False, "records conversations with its session routes"),
        ("custom_agent_function_path", None, "the agent that agentic_tool_call needs"),
    ],
)
def test_settings_that_make_it_impossible(name: str, value: Any, sentence: str) -> None:
    with Engine([]) as engine:

        async def go() -> None:
            state = engine.state("uses_tools")
            setattr(state.args, name, value)
            await agentic_tool_call.generate(GenerateFnInput(state, fresh("x"), {}, False))

        with pytest.raises(FlagError, match=sentence):
            asyncio.run(go())


# ---- the pieces ------------------------------------------------------------------------------------------------------


def test_sampling_parameters_as_fields_of_a_chat_completion() -> None:
    given = {
        "temperature": 0.7, "top_p": 1.0, "top_k": -1, "max_new_tokens": 9, "min_new_tokens": 2, "sampling_seed": 4,
        "stop": None, "stop_token_ids": [7], "skip_special_tokens": False, "no_stop_trim": True,
        "spaces_between_special_tokens": False, "messages": [], "model": "x", "unknown": 1,
    }  # fmt: skip
    assert build_chat_request_kwargs(given) == {
        "temperature": 0.7, "top_p": 1.0, "top_k": -1, "max_tokens": 9, "min_tokens": 2, "seed": 4,
        "stop_token_ids": [7], "skip_special_tokens": False, "no_stop_trim": True, "logprobs": True,
        "logprob_start_len": 0,
    }  # fmt: skip


def record(finish: str, prompt: list[int], sent: list[int] | None = None) -> SessionRecord:
    content = [{"token_id": 9, "logprob": -0.5}, {"token_id": 1, "logprob": -0.25}]
    choice = {"input_token_ids": prompt, "logprobs": {"content": content}, "finish_reason": finish}
    request = {} if sent is None else {"input_ids": sent}
    return SessionRecord(
        timestamp=0.0, method="POST", path="/v1/chat/completions", request=request, response={"choices": [choice]},
        status_code=200,
    )  # fmt: skip


def test_a_record_becomes_a_copy_of_the_sample_with_its_tokens() -> None:
    given = fresh("p", label="3", metadata={"k": [1]})
    records = [record(finish, [5, 6], sent=[5, 6]) for finish in ("stop", "tool_calls", "length", "abort")]
    samples = compute_samples_from_openai_records(given, records, TOKENIZER)
    assert [s.status.value for s in samples] == ["completed", "completed", "truncated", "aborted"]
    assert all((s.tokens, s.response_length, s.loss_mask) == ([5, 6, 9, 1], 2, [1, 1]) for s in samples)
    assert samples[0].rollout_log_probs == [-0.5, -0.25] and samples[0].response == TOKENIZER.decode([9, 1])
    assert samples[0].label == "3" and samples[0].metadata is not given.metadata and given.tokens == []


def test_other_tokens_than_the_ones_sent_are_refused() -> None:
    with pytest.raises(ValueError, match="2 tokens that are not the 3"):
        compute_samples_from_openai_records(fresh("p"), [record("stop", [5, 6], sent=[5, 6, 7])], TOKENIZER)


def test_a_tracer_opens_reads_and_deletes_a_session() -> None:
    with Engine(["a<|end|>"]) as engine:

        async def go() -> list[SessionRecord]:
            tracer = await OpenAIEndpointTracer.create(
                Namespace(sglang_router_ip="127.0.0.1", sglang_router_port=engine.server.port)
            )
            assert tracer.base_url == f"{engine.server.url}/sessions/{tracer.session_id}"
            async with httpx.AsyncClient() as client:
                body = {"messages": [{"role": "user", "content": "x"}]}
                (await client.post(f"{tracer.base_url}/v1/chat/completions", json=body)).raise_for_status()
            return await tracer.collect_records()

        [only] = asyncio.run(go())
        assert isinstance(only, SessionRecord) and not engine.sessions
