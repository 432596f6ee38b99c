"""SGLang's /v1/chat/completions as types: what a request may say, and the OpenAI objects that answer it.

    body (JSON) --ChatRequest.from_payload--> ChatRequest --an engine--> GenerateResult(s) --completion--> JSON

Names and defaults are those of SGLang 0.5.23; what only SGLang has beside OpenAI's API is asked for by its own names:
`return_meta_info`, `return_prompt_token_ids`, `return_token_ids`, `return_routed_experts`. Every answer carries two
fields which the published sessions read: `choices[i].input_token_ids` and `logprobs.content[*].token_id`.

This file knows nothing about templates, tokenizers or sockets (`embedded/chat.py` does), and imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from miles.engine.protocol import (
    BadRequestError,
    GenerateRequest,
    GenerateResult,
    Json,
    SamplingParams,
    _flag,
    _show,
    _unknown,
    _whole,
)

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

# Name in the chat API -> name among the sampling parameters.
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "min_tokens": "min_new_tokens",
    "stop": "stop",
    "stop_token_ids": "stop_token_ids",
    "seed": "sampling_seed",
    "n": "n",
    "ignore_eos": "ignore_eos",
    "skip_special_tokens": "skip_special_tokens",
    "no_stop_trim": "no_stop_trim",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "repetition_penalty": "repetition_penalty",
    "regex": "regex",
    "ebnf": "ebnf",
    "stop_regex": "stop_regex",
    "logit_bias": "logit_bias",
    "custom_params": "custom_params",
}
_RENAMED = {ours: theirs for theirs, ours in _SAMPLING.items() if theirs != ours} | {"max_new_tokens": "max_tokens"}

_OWN = (
    "messages", "model", "input_ids", "tools", "tool_choice", "chat_template_kwargs", "max_tokens",
    "max_completion_tokens", "logprobs", "top_logprobs", "stream", "stream_options", "return_meta_info",
    "return_routed_experts", "return_prompt_token_ids", "return_token_ids", "rid",
)  # fmt: skip

# What changes nothing of an answer: labels, and `logprob_start_len`, which SGLang's chat API takes and does not know
# (published agents send it; /generate has the log-probs of prompts).
_LABELS = (
    "logprob_start_len",
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "extra_key", "cache_salt",
    "session_id", "separate_reasoning", "stream_reasoning",
)  # fmt: skip

# Fields that only a full engine has, each with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "response_format": (None, {"type": "text"}),
    "parallel_tool_calls": (None, True),
    "return_hidden_states": (None, False),
    "continue_final_message": (None, False),
    "reasoning_effort": (None,),
    "functions": (None, []),
    "function_call": (None, "auto", "none"),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "web_search_options": (None,),
    "verbosity": (None,),
    "lora_path": (None,),
    "session_params": (None, {}),
    "custom_logit_processor": (None,),
    "priority": (None,),
    "return_cached_tokens_details": (None, False),
    "return_spec_tokens_details": (None, False),
}
_REFUSED_TEMPLATE_KWARGS = (
    "chat_template", "conversation", "tools", "documents", "tokenize", "add_generation_prompt", "return_dict",
    "return_tensors", "continue_final_message", "padding", "truncation", "max_length", "tokenizer_kwargs",
    "return_assistant_tokens_mask",
)  # fmt: skip


@dataclass(frozen=True)
class ChatRequest:
    """One chat completion. With `input_ids` the prompt is what the caller has tokenized, and no template is asked.

    Example::

        ChatRequest.from_payload({"messages": [{"role": "user", "content": "7+8=?"}], "max_tokens": 8})
    """

    messages: list[Json]
    sampling: SamplingParams
    model: str = "default"
    input_ids: list[int] | None = None
    tools: list[Json] | None = None
    tool_choice: str = "auto"  # or "none"
    chat_template_kwargs: Json = field(default_factory=dict)
    logprobs: bool = False
    stream: bool = False
    include_usage: bool = False
    return_meta_info: bool = False
    return_routed_experts: bool = False
    return_prompt_token_ids: bool = False
    return_token_ids: bool = False
    rid: str | None = None

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> ChatRequest:
        """Check one body; BadRequestError names the field that is wrong, or that this engine does not know."""
        _check_names(payload)
        flags = {name: _flag(name, payload[name]) for name in _FLAGS if payload.get(name) is not None}
        request = cls(
            messages=_messages(payload.get("messages")),
            sampling=_sampling(payload),
            model=_text("model", payload, "default"),
            input_ids=_input_ids(payload.get("input_ids")),
            tools=_tools(payload.get("tools")),
            tool_choice=_tool_choice(payload.get("tool_choice")),
            chat_template_kwargs=_template_kwargs(payload.get("chat_template_kwargs")),
            include_usage=_include_usage(payload.get("stream_options")),
            rid=_text("rid", payload, None),
            **flags,
        )
        request._check_top_logprobs(payload.get("top_logprobs"))
        request._check_stream()
        return request

    def _check_stream(self) -> None:
        for name in ("return_meta_info", "return_prompt_token_ids", "return_token_ids"):
            if self.stream and getattr(self, name):
                raise BadRequestError(f"{name} is not supported with streaming. Leave out stream, or {name}.")

    def _check_top_logprobs(self, value: object) -> None:
        if value is None:
            return
        count = _whole("top_logprobs", value)
        if count < 0 or (count and not self.logprobs):
            raise BadRequestError(f"top_logprobs: expected a number >= 0, together with logprobs, got {count}.")
        if count:
            raise BadRequestError(
                f"top_logprobs: this engine reports the log-prob of the sampled token only, got {count}. Leave it out."
            )

    def generate_requests(self, prompt_ids: list[int], rid: str) -> list[GenerateRequest]:
        """What the engine is asked: one request per choice."""
        n = self.sampling.n
        return [
            GenerateRequest(
                input_ids=prompt_ids,
                sampling_params=self.sampling,
                rid=rid if n == 1 else f"{rid}_{i}",
                return_logprob=self.logprobs,
                return_routed_experts=self.return_routed_experts,
            )
            for i in range(n)
        ]


_FLAGS = (
    "logprobs", "stream", "return_meta_info", "return_routed_experts", "return_prompt_token_ids", "return_token_ids",
)  # fmt: skip


def _check_names(payload: Mapping[str, Any]) -> None:
    known = [*_OWN, *_SAMPLING, *_LABELS, *_NEUTRAL]
    for name, value in payload.items():
        if name not in known:
            raise BadRequestError(_unknown("field", str(name), known))
        if name in _NEUTRAL and value not in _NEUTRAL[name]:
            raise BadRequestError(f"{name!r} is not built into this engine (got {_show(value)}). Leave it out.")


def _sampling(payload: Mapping[str, Any]) -> SamplingParams:
    """The sampling parameters; errors call them by their names in this API."""
    params = {ours: payload[theirs] for theirs, ours in _SAMPLING.items() if payload.get(theirs) is not None}
    limits = [payload.get(name) for name in ("max_completion_tokens", "max_tokens")]
    params["max_new_tokens"] = next((limit for limit in limits if limit is not None), None)
    try:
        return SamplingParams.from_payload(params)
    except BadRequestError as error:
        raise in_chat_words(error) from None


def in_chat_words(error: BadRequestError) -> BadRequestError:
    """An engine's refusal that calls sampling parameters by their names in this API."""
    text = str(error)
    for ours, theirs in _RENAMED.items():
        text = text.replace(ours, theirs)
    return BadRequestError(text)


def _messages(value: object) -> list[Json]:
    if not isinstance(value, list) or not value:
        raise BadRequestError(f"messages: expected a list of at least one message, got {_show(value)}.")
    for place, message in enumerate(value):
        where = f"messages[{place}]"
        if not isinstance(message, dict):
            raise BadRequestError(f"{where}: expected an object with role and content, got {_show(message)}.")
        role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
        if role not in ROLES:
            raise BadRequestError(f"{where}.role: expected one of {', '.join(ROLES)}, got {_show(role)}.")
        if not isinstance(content, (str, list, type(None))):
            raise BadRequestError(f"{where}.content: expected text or a list of text parts, got {_show(content)}.")
        if content is None and role != "assistant":
            raise BadRequestError(f"{where}.content: expected text, got nothing.")
        if calls is not None and not (isinstance(calls, list) and all(_is_call(call) for call in calls)):
            raise BadRequestError(
                f'{where}.tool_calls: expected a list of {{"function": {{"name": ..., "arguments": ...}}}}, '
                f"got {_show(calls)}."
            )
    return value


def _is_call(call: object) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _input_ids(value: object) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(type(token) is int for token in value):
        raise BadRequestError(f"input_ids: expected a list of token ids, at least one, got {_show(value)}.")
    return value


def _tools(value: object) -> list[Json] | None:
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(_is_call(tool) for tool in value):
        raise BadRequestError(
            f'tools: expected a list of {{"type": "function", "function": {{"name": ...}}}}, got {_show(value)}.'
        )
    return value


def _tool_choice(value: object) -> str:
    if value is None or value == "auto":
        return "auto"
    if value == "none":
        return "none"
    raise BadRequestError(
        f"tool_choice: expected 'auto' or 'none', got {_show(value)}. Calls that must be made need constrained "
        "decoding, which this engine has not."
    )


def _template_kwargs(value: object) -> Json:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise BadRequestError(f"chat_template_kwargs: expected an object, got {_show(value)}.")
    refused = next((name for name in value if name in _REFUSED_TEMPLATE_KWARGS), None)
    if refused is not None:
        raise BadRequestError(f"chat_template_kwargs: {refused!r} is not taken from requests.")
    return value


def _include_usage(value: object) -> bool:
    if value is None:
        return False
    if not isinstance(value, dict):
        raise BadRequestError(f"stream_options: expected an object, got {_show(value)}.")
    return bool(value.get("include_usage"))


def _text(name: str, payload: Mapping[str, Any], default: Any) -> Any:
    value = payload.get(name)
    if value is not None and not isinstance(value, str):
        raise BadRequestError(f"{name}: expected a string, got {_show(value)}.")
    return default if value is None else value


# ---- answers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spoken:
    """What one choice says: its text without tool calls, the calls, and its tokens as text and bytes.

    Example: `Spoken("<think>…</think>", [{"id": "call_1", "index": 0, "type": "function", "function": {...}}])`
    """

    content: str
    tool_calls: list[Json] = field(default_factory=list)

    def end(self, result: GenerateResult) -> Json:
        """How a finished answer ended; `tool_calls` where it ended by itself and holds some."""
        assert result.finish_reason is not None
        kind = result.finish_reason.type
        reason = "tool_calls" if kind == "stop" and self.tool_calls else kind
        return {"finish_reason": reason, "matched_stop": result.finish_reason.matched}


def logprobs_json(result: GenerateResult, texts: Sequence[tuple[str, bytes]], start: int = 0) -> Json | None:
    """OpenAI's log-probs of the output from token `start` on, each with its token's id.

    `texts`: of each of these tokens its text and its bytes.
    """
    if result.output_logprobs is None:
        return None
    entries = zip(result.output_ids[start:], result.output_logprobs[start:], texts, strict=True)
    return {
        "content": [
            {"token": text, "token_id": token, "logprob": logprob, "bytes": list(raw), "top_logprobs": []}
            for token, logprob, (text, raw) in entries
        ]
    }


def choice_json(
    request: ChatRequest, prompt_ids: list[int], index: int, result: GenerateResult, *, spoken: Spoken,
    logprobs: Json | None,
) -> Json:  # fmt: skip
    """One entry of `choices`."""
    message: Json = {"role": "assistant", "content": spoken.content}
    if spoken.tool_calls:
        message["tool_calls"] = spoken.tool_calls
    choice: Json = {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        **spoken.end(result),
        "input_token_ids": prompt_ids,
    }
    if request.return_prompt_token_ids or request.return_token_ids:
        choice["prompt_token_ids"] = prompt_ids
    if request.return_token_ids:
        choice["response_token_ids"] = result.output_ids
    if request.return_meta_info:
        choice["meta_info"] = result.to_json()["meta_info"]
    return choice


def completion_json(
    request: ChatRequest, rid: str, created: int, choices: list[Json], results: Sequence[GenerateResult]
) -> Json:
    """The object `chat.completion`."""
    body: Json = {
        "id": rid,
        "object": "chat.completion",
        "created": created,
        "model": request.model,
        "choices": choices,
        "usage": usage_json(results),
        "metadata": {"weight_version": results[0].weight_version},
    }
    experts = results[0].routed_experts
    if experts is not None and not request.return_meta_info:
        body["sglext"] = {"routed_experts": experts}
    return body


def usage_json(results: Sequence[GenerateResult]) -> Json:
    """Token counts: the prompt once, the outputs of all choices."""
    prompt, output = results[0].prompt_tokens, sum(len(result.output_ids) for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": results[0].cached_tokens},
    }


def chunk_json(request: ChatRequest, rid: str, created: int, choices: list[Json], usage: Json | None = None) -> Json:
    """The object `chat.completion.chunk`."""
    chunk: Json = {
        "id": rid,
        "object": "chat.completion.chunk",
        "created": created,
        "model": request.model,
        "choices": choices,
    }
    if request.include_usage:
        chunk["usage"] = usage
    return chunk
