"""Between messages and token ids: what a chat template makes of a conversation, and what of it is new.

    cleaned        OpenAI messages as templates expect them (SGLang's rules)
    render         the token ids of a whole conversation, ready for an answer
    continuation   the ids of what follows a recorded answer: token-in token-out never tokenizes a turn twice
    fingerprints   one digest per prefix of a conversation, equal where a later request repeats an earlier one

The embedded engine renders with these, and so do sessions (`miles/router/session`).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]

# Stands for an answer while the template is asked what it writes behind it; letters only, which no template touches.
_MARK = "milesanswerstandshere"


class ChatTemplateError(ValueError):
    """A conversation that this tokenizer's chat template cannot render, with a sentence for whoever sent it."""


class NotTextError(ChatTemplateError):
    """A message holds something else than text: an image, audio, a file."""


def cleaned(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages as templates expect them: text contents, arguments of tool calls as objects, nothing that is null.

    Raises NotTextError for contents with images and the like.
    """
    result = []
    for message in messages:
        clean = {key: value for key, value in message.items() if value is not None}
        clean["content"] = text_of(message.get("content"))
        if clean.get("tool_calls"):
            clean["tool_calls"] = [_with_object_arguments(call) for call in clean["tool_calls"]]
        else:
            clean.pop("tool_calls", None)
        result.append(clean)
    return result


def text_of(content: Any) -> str:
    """The text of a message's content: a string, null, or a list of parts of type text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content.encode("utf-8", "replace").decode("utf-8")  # JSON may hold halves of characters
    parts = []
    for part in content if isinstance(content, list) else [content]:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise NotTextError(f"messages: content of type {kind!r} is not text.")
        parts.append(text_of(part["text"]))
    return " ".join(parts)


def _with_object_arguments(call: Any) -> Any:
    """A tool call whose arguments are an object, which is what templates write as JSON."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    return {**call, "function": {**function, "arguments": _parsed(function.get("arguments"))}}


def _parsed(arguments: Any) -> Any:
    """The object that a text of JSON says; anything else as it is."""
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        value = json.loads(arguments) if arguments else {}
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of the conversation and the beginning of the next answer. Raises ChatTemplateError."""
    return encoded(tokenizer, _rendered(tokenizer, cleaned(messages), tools, template_kwargs))


def encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _rendered(tokenizer: Any, messages: list[Message], tools: Any, kwargs: Mapping[str, Any] | None) -> str:
    """The text that the template writes; whatever it raises becomes a ChatTemplateError."""
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, tools=tools, **(kwargs or {})
        )
    except Exception as error:  # a template is a program of the model's author, and raises what it likes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not getattr(tokenizer, "chat_template", None):
            reason = "its tokenizer has none. Send 'input_ids' beside the messages"
        raise ChatTemplateError(f"the model's chat template refuses these messages: {reason}") from error
    return text


def continuation(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    answered: int,
    ids: Sequence[int],
    *,
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int] | None:
    """What the template writes behind the answer `messages[answered - 1]`, of which `ids` are the tokens so far.

    `ids` (recorded prompt and output) + the value are the prompt of the next turn: the end of the answered turn if
    `ids` lack it, what the template puts between turns, the new messages, the beginning of the next answer. The
    template is asked with the real conversation, in which a mark takes the place of the answer; so it does not matter
    what it does to earlier turns. None where the end of the answer cannot be found in what it writes: no special token
    ends a turn, or it leaves answers out. Raises ChatTemplateError.
    """
    marked = cleaned(copy.deepcopy(list(messages)))
    mark = _MARK
    while any(mark in json.dumps(message, default=str) for message in marked):
        mark += "e"
    answer = marked[answered - 1]
    answer["content"] = mark
    if answer.get("tool_calls"):  # some templates leave the content of such an answer out
        answer["tool_calls"] = [copy.deepcopy(call) for call in answer["tool_calls"]]
        answer["tool_calls"][-1]["function"]["arguments"] = {mark: mark}
    text = _rendered(tokenizer, marked, tools, template_kwargs)
    place = text.rfind(mark)
    if place < 0:
        return None
    tail = encoded(tokenizer, text[place + len(mark) :])
    special = special_ids(tokenizer)
    if ids and ids[-1] in special and ids[-1] in tail:
        return tail[tail.index(ids[-1]) + 1 :]
    # The answer was cut off, or ended by a token of its own: the end of the turn is still to be written.
    ends = [i for i, token in enumerate(tail) if token == tokenizer.eos_token_id]
    ends = ends or [i for i, token in enumerate(tail) if token in special]
    return tail[ends[0] :] if ends else None


def special_ids(tokenizer: Any) -> set[int]:
    """Every control token of the tokenizer."""
    return {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}


def fingerprints(
    messages: Sequence[Mapping[str, Any]], *, tools: Any = None, template_kwargs: Mapping[str, Any] | None = None
) -> list[bytes]:
    """For every n the digest of the first n + 1 messages, and of what else the prompt depends on.

    Two answers are equal when they say the same and call the same tools with the same arguments: clients leave out ids,
    nulls and reasoning when they send an answer back.
    """
    state = hashlib.blake2b(_json([tools or None, dict(template_kwargs or {})]), digest_size=16)
    digests = []
    for message in messages:
        state.update(_json(_canonical(message)))
        digests.append(state.copy().digest())
    return digests


def _canonical(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    with contextlib.suppress(NotTextError):  # then it is compared as it is
        content = text_of(content)
    calls = []
    for call in message.get("tool_calls") or []:
        function = (call.get("function") if isinstance(call, Mapping) else None) or {}
        calls.append([function.get("name"), _parsed(function.get("arguments"))])
    own = [] if message.get("role") == "assistant" else [message.get("name"), message.get("tool_call_id")]
    return [message.get("role"), content, calls, *own]


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()
