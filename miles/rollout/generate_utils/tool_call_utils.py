"""From tool calls to what is appended to a sample: run the tools, write their answers as the chat template would.

    parser ──► execute_tool_calls ──► tool messages ──► update_sample_with_tool_responses
                    │ one after the other                   tokens with loss mask 0 and log-prob 0.0
                    └── the user's function

The names and signatures are published; plug-ins with a loop of their own use them beside `generate_endpoint_utils`.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from miles.rollout.generate_utils.tool_call_parsers import create_tool_call_parser
from miles.types import Sample

__all__ = [
    "create_tool_call_parser",
    "execute_tool_calls",
    "tokenize_tool_responses",
    "update_sample_with_tool_responses",
]

_DUMMY_USER = {"role": "user", "content": "dummy"}

Message = dict[str, Any]
ExecuteOne = Callable[[str, dict[str, Any]], Awaitable[str]]


async def execute_tool_calls(tool_calls: Sequence[Any], execute_one: ExecuteOne) -> list[Message]:
    """Run the calls in order; one message of role `tool` per call.

    Takes what parsers return and the tool calls of OpenAI's client. `execute_one(name, params)` returns text
    (AssertionError otherwise). Arguments that are no JSON object are answered to the model, not executed.
    """
    return [await _execute(call, position, execute_one) for position, call in enumerate(tool_calls)]


async def _execute(call: Any, position: int, execute_one: ExecuteOne) -> Message:
    function = getattr(call, "function", None)
    if function is not None:
        name, arguments, call_id = function.name, function.arguments, call.id
    else:
        # Nine letters and digits: some templates refuse other ids.
        name, arguments, call_id = call.name, call.parameters, f"call{position:05d}"
    try:
        params = json.loads(arguments) if arguments else {}
    except (ValueError, RecursionError):
        params = None
    if isinstance(params, dict):
        answer = await execute_one(name, params)
        assert isinstance(answer, str), f"tool {name} returned {type(answer).__name__}, expected str"
    else:
        answer = f"error: the arguments of {name} are not a JSON object"
    return {"role": "tool", "tool_call_id": call_id, "content": answer, "name": name}


def update_sample_with_tool_responses(sample: Sample, tool_messages: list[Message], tokenizer: Any) -> None:
    """Append the answers to the response of `sample`: no loss, log-prob 0.0, and the prompt of the next turn.

    A template may write something between the end of a turn and the next message (ChatML: a line break), which an
    engine that stops at the end of the turn has not generated; it is part of what is appended.
    """
    ids = tokenize_tool_responses(tool_messages, tokenizer)
    ids = _after_end_of_turn(sample.tokens, tool_messages, tokenizer) + ids
    n = sample.response_length
    sample.loss_mask = (sample.loss_mask if sample.loss_mask is not None else [1] * n) + [0] * len(ids)
    sample.rollout_log_probs = (sample.rollout_log_probs or [0.0] * n) + [0.0] * len(ids)
    sample.tokens = sample.tokens + ids
    sample.response += tokenizer.decode(ids)
    sample.response_length = n + len(ids)


def tokenize_tool_responses(tool_messages: list[Message], tokenizer: Any) -> list[int]:
    """The ids that the chat template adds for these messages and the start of the next turn.

    AssertionError where the template writes the messages before them differently once these follow.
    """
    before = _rendered(_conversation(tool_messages), tokenizer, add_generation_prompt=False)
    everything = _conversation(tool_messages) + [_as_text(message) for message in tool_messages]
    after = _rendered(everything, tokenizer, add_generation_prompt=True)
    assert after.startswith(before), (
        "the chat template renders a conversation anew when tool messages follow: what was said before is no prefix of "
        f"what comes after.\nbefore: {before!r}\nafter:  {after!r}"
    )
    return _ids(after[len(before) :], tokenizer)


def _after_end_of_turn(tokens: list[int], tool_messages: list[Message], tokenizer: Any) -> list[int]:
    """What the template writes behind the special token that ends a turn, if `tokens` end with that token."""
    turn = _ids(_rendered(_conversation(tool_messages), tokenizer, add_generation_prompt=False), tokenizer)
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    last = max((i for i, token in enumerate(turn) if token in special), default=None)
    if last is None or not tokens or tokens[-1] != turn[last]:
        return []
    return turn[last + 1 :]


def _conversation(tool_messages: list[Message]) -> list[Message]:
    return [_DUMMY_USER, _build_dummy_assistant(tool_messages)]


def _build_dummy_assistant(tool_responses: list[Message]) -> Message:
    """An assistant's turn that has made the calls that `tool_responses` answer; templates insist on one."""
    calls = [
        {
            "id": response.get("tool_call_id", f"call{position:05d}"),
            "type": "function",
            "function": {"name": response.get("name", "dummy"), "arguments": {}},
        }
        for position, response in enumerate(tool_responses)
    ]
    return {"role": "assistant", "content": " ", "reasoning_content": " ", "tool_calls": calls}


def _as_text(message: Message) -> Message:
    """The message with a content that a tokenizer takes: tools may return halves of characters."""
    return {**message, "content": message["content"].encode("utf-8", "replace").decode("utf-8")}


def _rendered(messages: list[Message], tokenizer: Any, *, add_generation_prompt: bool) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    return text


def _ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
