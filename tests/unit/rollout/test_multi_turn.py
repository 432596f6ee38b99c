"""The built-in conversation with tools, against an engine that says what it is told to."""

from __future__ import annotations

import asyncio
from argparse import ArgumentParser
from collections.abc import Iterator
from typing import Any

import chat_tools
import pytest
from rollout_chat import TalkingEngine, chat_tokenizer, fresh, state_of

from miles.__main__ import main
from miles.errors import FlagError, HookError
from miles.hooks import call as hooks_call
from miles.rollout import context
from miles.rollout.generate_hub import multi_turn
from miles.rollout.sample import generate_and_rm
from miles.types import GenerateFnInput, Sample

TOKENIZER = chat_tokenizer()
HERE = "tests/unit/rollout/chat_tools.py"
PATH = "miles.rollout.generate_hub.multi_turn.generate"

START = "<|im_start|>system\nadd year<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
CALLS_ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'
CALLS_YEAR = '<tool_call>\n{"name": "year"}\n</tool_call><|im_end|>'
ANSWER_3 = "\n<|im_start|>user\n<tool_response>3</tool_response><|im_end|>\n<|im_start|>assistant\n"
ANSWER_2026 = "\n<|im_start|>user\n<tool_response>2026</tool_response><|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hooks_call, "RETRY_DELAY_S", 0.0)
    chat_tools.calls.clear()
    yield
    context.install(None)


def flags(tool: str = "use", specs: str = "SPECS", parser: str = "qwen25") -> list[str]:
    return [
        "--custom-generate-function-path", PATH, "--generate-tool-call-parser", parser,
        "--generate-tool-specs-path", f"{HERE}:{specs}", "--generate-execute-tool-function-path", f"{HERE}:{tool}",
    ]  # fmt: skip


def talk(
    says: list[Any], *more: str, sample: Sample | None = None, policies: dict[str, str] | None = None, **given: str
) -> tuple[Any, TalkingEngine]:
    """One conversation under these flags; what the generate function made of it."""

    async def go() -> tuple[Any, TalkingEngine]:
        engine = TalkingEngine(TOKENIZER, says)
        state = state_of(engine, *flags(**given), *more, tokenizer=TOKENIZER, policies=policies)
        start = sample or fresh([{"role": "user", "content": "hi"}])
        output = await multi_turn.generate(GenerateFnInput(state, start, {"temperature": 1.0}, False))
        return output.samples, engine

    return asyncio.run(go())


def learned(sample: Sample) -> str:
    """The text of the response that carries loss."""
    response = sample.tokens[len(sample.tokens) - sample.response_length :]
    assert sample.loss_mask is not None
    return TOKENIZER.decode([token for token, mask in zip(response, sample.loss_mask, strict=True) if mask])


def tokens(text: str) -> int:
    return len(TOKENIZER.encode(text, add_special_tokens=False))


def test_an_answer_without_calls_is_the_whole_conversation() -> None:
    sample, engine = talk(["hello<|im_end|>"])
    assert engine.prompts() == [START]
    assert (sample.response, sample.status) == ("hello<|im_end|>", Sample.Status.COMPLETED)
    assert TOKENIZER.decode(sample.tokens) == START + "hello<|im_end|>"
    assert sample.metadata == {"round_number": 1} and chat_tools.calls == []
    sample.validate()


def test_tools_are_called_and_their_answers_carry_no_loss() -> None:
    given = fresh([{"role": "user", "content": "hi"}], label="x")
    sample, engine = talk([CALLS_ADD, CALLS_YEAR, "done<|im_end|>"], sample=given)
    assert chat_tools.calls == [("add", {"a": 1, "b": 2}), ("year", {})]
    first, second = START + CALLS_ADD + ANSWER_3, CALLS_YEAR + ANSWER_2026
    assert engine.prompts() == [START, first, first + second]
    assert TOKENIZER.decode(sample.tokens) == first + second + "done<|im_end|>"
    assert learned(sample) == CALLS_ADD + CALLS_YEAR + "done<|im_end|>"
    assert sample.rollout_log_probs == [-0.25 * mask for mask in sample.loss_mask]
    assert sample.response == CALLS_ADD + ANSWER_3 + second + "done<|im_end|>"
    assert (sample.metadata["round_number"], sample.weight_versions) == (3, ["1", "2", "3"])
    assert sample.non_generation_time > 0 and sample.label == "x"
    assert given.tokens == [] and given.metadata == {}
    sample.validate()


def test_a_malformed_call_ends_the_conversation_as_text() -> None:
    sample, _ = talk(['<tool_call>\n{"name": "add", "arguments": {"a": \n</tool_call><|im_end|>'])
    assert sample.status == Sample.Status.COMPLETED and sample.metadata["round_number"] == 1


def test_tools_are_used_after_the_last_turn_too() -> None:
    sample, engine = talk([CALLS_ADD, CALLS_YEAR], "--generate-max-turns", "2")
    assert len(engine.requests) == 2
    assert sample.response.endswith(ANSWER_2026) and sample.status == Sample.Status.COMPLETED


@pytest.mark.parametrize(("finish", "status"), [("length", "truncated"), ("abort", "aborted")])
def test_an_answer_that_was_cut_short_ends_the_conversation(finish: str, status: str) -> None:
    sample, _ = talk([CALLS_ADD, (CALLS_YEAR, finish)])
    assert sample.status.value == status
    assert chat_tools.calls == [("add", {"a": 1, "b": 2})]
    assert sample.response.endswith(CALLS_YEAR)


def test_a_full_context_truncates() -> None:
    room = tokens(START + CALLS_ADD + ANSWER_3 + CALLS_YEAR) + 10
    sample, engine = talk([CALLS_ADD, CALLS_YEAR], "--rollout-max-context-len", str(room))
    assert sample.status == Sample.Status.TRUNCATED
    limits = [request["sampling_params"]["max_new_tokens"] for request in engine.requests]
    assert limits == [room - len(request["input_ids"]) for request in engine.requests]
    sample.validate()


@pytest.mark.parametrize("more", [[], ["--generate-multi-samples"]])
def test_a_prompt_that_fills_the_context_keeps_its_place_without_response(more: list[str]) -> None:
    made, engine = talk([], "--rollout-max-context-len", "20", *more)
    (sample,) = made if more else [made]
    assert engine.requests == []
    assert (sample.status, sample.response_length, sample.loss_mask) == (Sample.Status.TRUNCATED, 0, [])
    sample.validate()


def test_one_sample_per_turn() -> None:
    samples, _ = talk([CALLS_ADD, "done<|im_end|>"], "--generate-multi-samples")
    assert [s.response for s in samples] == [CALLS_ADD, "done<|im_end|>"]
    assert [TOKENIZER.decode(s.tokens) for s in samples] == [
        START + CALLS_ADD, START + CALLS_ADD + ANSWER_3 + "done<|im_end|>",
    ]  # fmt: skip
    for s in samples:
        assert s.loss_mask == [1] * s.response_length and s.metadata == {}
        s.validate()
    assert samples[0].metadata is not samples[1].metadata


def test_the_last_of_several_samples_tells_how_it_ended() -> None:
    room = tokens(START + CALLS_ADD) + 10
    samples, _ = talk([CALLS_ADD], "--generate-multi-samples", "--rollout-max-context-len", str(room))
    assert [s.status for s in samples] == [Sample.Status.TRUNCATED]


def test_an_aborted_rollout_starts_no_further_turn() -> None:
    class Aborting(TalkingEngine):
        async def generate(self, payload: dict[str, Any]) -> dict[str, Any]:
            self.state.aborted = True
            return await super().generate(payload)

    async def go() -> Any:
        engine = Aborting(TOKENIZER, [CALLS_ADD])
        engine.state = state_of(engine, *flags(), "--custom-rm-path", f"{HERE}:fails", tokenizer=TOKENIZER)
        return await generate_and_rm(engine.state, fresh([{"role": "user", "content": "hi"}]), {})

    assert asyncio.run(go()).status == Sample.Status.ABORTED


def test_tools_of_the_prompt_data_serve_where_the_flag_is_not_given() -> None:
    async def go(metadata: dict[str, Any]) -> TalkingEngine:
        engine = TalkingEngine(TOKENIZER, [CALLS_YEAR, "done"])
        without = [f for f in flags() if "specs" not in f and "SPECS" not in f]
        state = state_of(engine, *without, tokenizer=TOKENIZER)
        sample = fresh([{"role": "user", "content": "hi"}], metadata=metadata)
        await multi_turn.generate(GenerateFnInput(state, sample, {}, False))
        return engine

    tools = [chat_tools.SPECS[1]]
    assert asyncio.run(go({"tools": tools})).prompts()[0].startswith("<|im_start|>system\nyear<|im_end|>")
    with pytest.raises(FlagError, match=r"--generate-tool-specs-path: expected a list of OpenAI tool specifications"):
        asyncio.run(go({}))


# ---- tools that fail -----------------------------------------------------------------------------------------------


def test_a_tool_that_raises_is_named_with_its_line() -> None:
    says = ['<tool_call>{"name": "add", "arguments": {"b": 0}}</tool_call>']
    with pytest.raises(HookError, match=r"chat_tools\.py:\d+") as caught:
        talk(says, tool="fails")
    failure = caught.value.failure
    assert failure.flag == "--generate-execute-tool-function-path"
    assert (failure.kind, "division by zero" in failure.message) == ("exception", True)


@pytest.mark.parametrize(("tool", "problem"), [("returns_a_number", "returned int 7, expected text")])
def test_a_tool_that_returns_no_text(tool: str, problem: str) -> None:
    with pytest.raises(HookError, match=problem):
        talk([CALLS_ADD], tool=tool)


def test_a_tool_may_be_retried() -> None:
    sample, _ = talk([CALLS_ADD, "done"], tool="fails_once", policies={"generate-execute-tool-function": "retry:1"})
    assert len(chat_tools.calls) == 2
    assert "<tool_response>4</tool_response>" in sample.response


@pytest.mark.parametrize(("tool", "text"), [("use_in_thread", "add in a thread"), ("returns_half_a_character", "?")])
def test_odd_tools(tool: str, text: str) -> None:
    sample, _ = talk([CALLS_ADD, "done"], tool=tool)
    assert f"<tool_response>{text}</tool_response>" in sample.response


def test_specifications_of_another_shape_are_named() -> None:
    with pytest.raises(HookError, match=r"holds \{'name': 'add'\}, which is no OpenAI tool specification") as caught:
        talk([], specs="NO_SPECS")
    assert caught.value.failure.flag == "--generate-tool-specs-path"


# ---- settings ------------------------------------------------------------------------------------------------------


def test_the_published_flags() -> None:
    parser = ArgumentParser()
    multi_turn.generate.add_arguments(parser)  # type: ignore[attr-defined]
    assert vars(parser.parse_args([])) == {
        "generate_max_turns": 16, "generate_tool_specs_path": None, "generate_tool_call_parser": None,
        "generate_execute_tool_function_path": None, "generate_multi_samples": False,
    }  # fmt: skip


BASE = ["train", "--config", "tests/e2e/tiny.yaml"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (flags()[:2], "needs --generate-execute-tool-function-path and --generate-tool-call-parser."),
        ([*flags(), "--partial-rollout"], "--partial-rollout: miles.rollout.generate_hub.multi_turn.generate cannot"),
        ([*flags(), "--generate-max-turns", "0"], "--generate-max-turns: expected a whole number >= 1, got 0."),
        (flags(parser="qwen26"), "--generate-tool-call-parser: expected one of qwen25, qwen, hermes, llama3, got"),
        (flags(tool="nowhere"), "expected  async def (name: str, params: dict[str, Any]) -> str"),
        (flags(specs="use"), "--generate-tool-specs-path"),
    ],
)
def test_wrong_settings_are_found_before_the_start(
    more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*BASE, *more]) == 2
    assert message in capsys.readouterr().err


def test_partial_rollout_is_refused_by_the_function_itself() -> None:
    async def go() -> None:
        state = state_of(TalkingEngine(TOKENIZER, []), *flags(), tokenizer=TOKENIZER)
        state.args.partial_rollout = True
        await multi_turn.generate(GenerateFnInput(state, fresh(), {}, False))

    with pytest.raises(FlagError, match="Partial rollout is not supported"):
        asyncio.run(go())
