"""Running tool calls, writing their answers as the chat template does, and several turns as one sample."""

from __future__ import annotations

import asyncio
import copy
from argparse import Namespace
from typing import Any

import pytest
from chat_tools import use
from rollout_chat import chat_tokenizer, fresh

from miles.rollout.generate_utils.sample_utils import merge_samples
from miles.rollout.generate_utils.tool_call_parsers import ToolCall
from miles.rollout.generate_utils.tool_call_utils import (
    execute_tool_calls,
    tokenize_tool_responses,
    update_sample_with_tool_responses,
)
from miles.types import Sample

TOKENIZER = chat_tokenizer()


def message(content: str, name: str = "add") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "call00000", "content": content, "name": name}


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


# ---- execute -------------------------------------------------------------------------------------------------------


def test_calls_run_in_order_and_are_answered_by_name() -> None:
    made = [ToolCall(0, "add", '{"a": 1, "b": 2}'), ToolCall(1, "year", "")]
    assert asyncio.run(execute_tool_calls(made, use)) == [
        {"role": "tool", "tool_call_id": "call00000", "content": "3", "name": "add"},
        {"role": "tool", "tool_call_id": "call00001", "content": "2026", "name": "year"},
    ]


def test_calls_of_openai_clients_keep_their_ids() -> None:
    call = Namespace(id="abc", function=Namespace(name="year", arguments="{}"))
    (answer,) = asyncio.run(execute_tool_calls([call], use))
    assert (answer["tool_call_id"], answer["content"]) == ("abc", "2026")


@pytest.mark.parametrize("arguments", ["{", "[1]", "null"])
def test_arguments_that_are_no_object_are_told_to_the_model(arguments: str) -> None:
    call = Namespace(id="abc", function=Namespace(name="add", arguments=arguments))
    (answer,) = asyncio.run(execute_tool_calls([call], use))
    assert answer["content"] == "error: the arguments of add are not a JSON object"


def test_tools_return_text() -> None:
    async def number(name: str, params: dict[str, Any]) -> Any:
        return 3

    with pytest.raises(AssertionError, match="tool year returned int, expected str"):
        asyncio.run(execute_tool_calls([ToolCall(0, "year", "{}")], number))


# ---- tokens --------------------------------------------------------------------------------------------------------


def test_tokens_are_what_the_template_adds() -> None:
    assert TOKENIZER.decode(tokenize_tool_responses([message("3"), message("é")], TOKENIZER)) == (
        "<|im_start|>user\n<tool_response>3</tool_response><|im_end|>\n"
        "<|im_start|>user\n<tool_response>é</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_template_that_renders_the_past_anew_is_refused() -> None:
    forgetful = chat_tokenizer("{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}")
    with pytest.raises(AssertionError, match="is no prefix of what comes after"):
        tokenize_tool_responses([message("3")], forgetful)


@pytest.mark.parametrize(
    ("said", "between"),
    [("add<|im_end|>", "\n"), ("add<|im_end|>\n", ""), ("add", "")],
    ids=["stopped at the end of the turn", "wrote the line break itself", "did not end its turn"],
)
def test_answers_follow_the_turn_as_in_the_template(said: str, between: str) -> None:
    sample = fresh(tokens=[7, *ids(said)], response=said, response_length=len(ids(said)))
    sample.loss_mask, sample.rollout_log_probs = [1] * sample.response_length, [-1.0] * sample.response_length
    before = copy.deepcopy(sample)
    update_sample_with_tool_responses(sample, [message("3")], TOKENIZER)
    added = between + "<|im_start|>user\n<tool_response>3</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert sample.tokens == before.tokens + ids(added)
    assert sample.response == before.response + added
    assert sample.loss_mask == before.loss_mask + [0] * len(ids(added))
    assert sample.rollout_log_probs == before.rollout_log_probs + [0.0] * len(ids(added))
    sample.validate()


def test_a_conversation_reads_as_the_template_renders_it() -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "wait"}]
    start = TOKENIZER.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    sample = fresh(tokens=ids(start + "wait<|im_end|>"), response="wait<|im_end|>", response_length=5)
    tool = message("3")
    update_sample_with_tool_responses(sample, [tool], TOKENIZER)
    whole = TOKENIZER.apply_chat_template([*talk, tool], tokenize=False, add_generation_prompt=True)
    assert TOKENIZER.decode(sample.tokens) == whole


def test_samples_without_mask_and_log_probs_get_them() -> None:
    sample = fresh(tokens=[7, 8], response="x", response_length=1)
    update_sample_with_tool_responses(sample, [message("\ud83d")], TOKENIZER)
    assert sample.loss_mask is not None and sample.loss_mask[:2] == [1, 0]
    assert "<tool_response>?</tool_response>" in sample.response
    sample.validate()


# ---- merge ---------------------------------------------------------------------------------------------------------


def turn(prompt: str, said: str, **fields: Any) -> Sample:
    n = len(ids(said))
    return fresh(
        prompt, tokens=ids(prompt + said), response=said, response_length=n, status=Sample.Status.COMPLETED,
        rollout_log_probs=[-0.5] * n, weight_versions=["1"], **fields,
    )  # fmt: skip


def test_turns_become_one_sample() -> None:
    a, b = turn("q", "ab"), turn("qab+", "c", loss_mask=[1])
    b.remark = "kept"  # type: ignore[attr-defined]
    b.spec_info.completion_token_num, b.prefix_cache_info.cached_tokens = 3, 2
    merged = merge_samples([a, b, turn("qab+c-", "d")], TOKENIZER)
    assert (merged.prompt, merged.response, merged.response_length) == ("qab+c-", "ab+c-d", 6)
    assert merged.tokens == ids("qab+c-d") and merged.loss_mask == [1, 1, 0, 1, 0, 1]
    assert merged.rollout_log_probs == [-0.5, -0.5, 0.0, -0.5, 0.0, -0.5]
    assert merged.weight_versions == ["1", "1", "1"]
    assert (merged.spec_info.completion_token_num, merged.prefix_cache_info.cached_tokens) == (3, 2)
    assert merged.remark == "kept"  # type: ignore[attr-defined]
    assert merge_samples([a], TOKENIZER) is a


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"label": "other"}, "label mismatch"),
        ({"metadata": {"x": 1}}, "metadata mismatch"),
        ({"tokens": ids("Qab+c")}, "b.tokens must start with a.tokens"),
        ({"tokens": ids("qabc")}, "obs_len must be > 0"),
        ({"prompt": "other"}, "b.prompt must start with a.prompt"),
        ({"loss_mask": [1, 1]}, "loss_mask length"),
    ],
)
def test_turns_that_do_not_belong_together(change: dict[str, Any], problem: str) -> None:
    b = turn("qab+", "c")
    vars(b).update(change)
    with pytest.raises(AssertionError, match=problem):
        merge_samples([turn("q", "ab"), b], TOKENIZER)


def test_only_the_last_turn_may_be_cut_short() -> None:
    a, b = turn("q", "ab"), turn("qab+", "c")
    b.status = Sample.Status.TRUNCATED
    assert merge_samples([a, b], TOKENIZER).status == Sample.Status.TRUNCATED
    a.status = Sample.Status.TRUNCATED
    with pytest.raises(AssertionError, match="only the last turn"):
        merge_samples([a, b], TOKENIZER)


