"""Between published sessions and the chat API of engines: what an engine is asked beside the client's words, and where
its answer says which tokens it read and wrote.

    published (a patched SGLang, the embedded engine)   SGLang 0.5.23
    choices[i].input_token_ids                          choices[i].prompt_token_ids, with return_prompt_token_ids
    logprobs.content[*].token_id                        choices[i].meta_info.output_token_logprobs[*][1]

Records and answers always have the published fields. Streams are made here, too: an engine answers a session at once
(SGLang gives no token ids in streams), and the client gets the answer in the chunks of a stream.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

Json = dict[str, Any]


class NoTokensError(Exception):
    """An answer without token ids, which cannot be recorded."""


def asked(request: Mapping[str, Any], input_ids: list[int] | None) -> Json:
    """The client's request as the engine is sent it: not streamed, with tokens, log-probs and meta_info.

    `input_ids` None lets the engine render the messages.
    """
    body = {key: value for key, value in request.items() if key not in ("stream", "stream_options")}
    body |= {"logprobs": True, "return_meta_info": True}
    if input_ids is not None:
        body["input_ids"] = input_ids
    elif body.get("input_ids") is None:
        body["return_prompt_token_ids"] = True
    return body


def translated(request: Mapping[str, Any], response: Any, tokenizer: Any) -> Json:
    """The answer with the published fields in every choice; `request` is what the engine was sent.

    Raises NoTokensError.
    """
    choices = response.get("choices") if isinstance(response, dict) else None
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        raise NoTokensError("the engine's answer has no choices")
    done = [_choice(request, choice, tokenizer) for choice in choices]
    experts = (response.get("sglext") or {}).get("routed_experts")
    if experts is not None:
        done[0]["meta_info"] = {"routed_experts": experts, **(done[0].get("meta_info") or {})}
    return {**response, "choices": done}


def _choice(request: Mapping[str, Any], choice: Json, tokenizer: Any) -> Json:
    meta = choice.get("meta_info") or {}
    input_ids = choice.get("input_token_ids") or request.get("input_ids") or choice.get("prompt_token_ids")
    if not input_ids:
        raise NoTokensError("choices[].input_token_ids is missing, and so is prompt_token_ids")
    content = _content((choice.get("logprobs") or {}).get("content"), meta.get("output_token_logprobs"), tokenizer)
    message = dict(choice.get("message") or {})
    message["content"] = _without_end(message.get("content"), choice.get("matched_stop"), tokenizer)
    return {**choice, "message": message, "input_token_ids": list(input_ids), "logprobs": {"content": content}}


def _content(content: Any, triples: Any, tokenizer: Any) -> list[Json]:
    """Log-probs of the output with token ids: the engine's own entries, completed from `output_token_logprobs`."""
    if content and all(entry.get("token_id") is not None for entry in content):
        return list(content)
    if triples is None or (content and len(content) != len(triples)):
        if content == []:
            return []
        raise NoTokensError("choices[].logprobs.content has no token_id, and there is no output_token_logprobs")
    if content:
        return [{**entry, "token_id": triple[1]} for entry, triple in zip(content, triples, strict=True)]
    return [_entry(logprob, token, tokenizer) for logprob, token, *_ in triples]


def _entry(logprob: float, token: int, tokenizer: Any) -> Json:
    text = tokenizer.decode([token])
    raw = list(text.encode("utf-8", "replace"))
    return {"token": text, "token_id": token, "logprob": logprob, "bytes": raw, "top_logprobs": []}


def _without_end(content: Any, matched: Any, tokenizer: Any) -> Any:
    """The text of an answer without the token that ended it, which `no_stop_trim` leaves there."""
    if not isinstance(content, str) or type(matched) is not int:
        return content
    end = tokenizer.decode([matched])
    return content.removesuffix(end) if end else content


def full(request: Mapping[str, Any], created: int) -> Json:
    """The answer to a request whose prompt leaves no room for one: nothing was said, the length is the reason."""
    message = {"role": "assistant", "content": ""}
    choice = {"index": 0, "message": message, "logprobs": {"content": []}, "finish_reason": "length"}
    return {
        "id": "chatcmpl-context-full",
        "object": "chat.completion",
        "created": created,
        "model": request.get("model", "default"),
        "choices": [choice],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }


def events(request: Mapping[str, Any], response: Json) -> Iterator[str]:
    """The answer as the server-sent events of a stream, with the usage where `stream_options` ask for it."""
    common: Json = {key: response[key] for key in ("id", "created", "model") if key in response}
    wants_usage = bool((request.get("stream_options") or {}).get("include_usage"))

    def event(choices: list[Json], usage: Any = None) -> str:
        chunk: Json = {**common, "object": "chat.completion.chunk", "choices": choices}
        if wants_usage:
            chunk["usage"] = usage
        return f"data: {json.dumps(chunk)}\n\n"

    for choice in response["choices"]:
        for delta, more in _deltas(choice, bool(request.get("logprobs"))):
            entry: Json = {"index": choice.get("index", 0), "delta": delta, "finish_reason": None}
            yield event([entry | more])
    if wants_usage:
        yield event([], response.get("usage"))
    yield "data: [DONE]\n\n"


def _deltas(choice: Json, logprobs: bool) -> Iterator[tuple[Json, Json]]:
    message = choice["message"]
    nothing: Json = {}
    yield {"role": message.get("role", "assistant"), "content": ""}, nothing
    said = {key: message[key] for key in ("reasoning_content", "content") if message.get(key)}
    if said or logprobs:
        yield said, {"logprobs": choice["logprobs"] if logprobs else None}
    if message.get("tool_calls"):
        calls = [{**call, "index": call.get("index", place)} for place, call in enumerate(message["tool_calls"])]
        yield {"tool_calls": calls}, nothing
    yield nothing, {"finish_reason": choice.get("finish_reason"), "matched_stop": choice.get("matched_stop")}
