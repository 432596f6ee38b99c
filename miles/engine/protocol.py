"""SGLang's HTTP API as types: what a generate request may say, what comes back, and which user errors are answered.

The embedded engine, the clients and the router speak in these types; real SGLang servers speak the same JSON. This file
knows nothing about models, tokenizers or sockets, and imports nothing heavy.

    payload (JSON) --GenerateRequest.from_payload--> GenerateRequest(s) --engine--> GenerateResult --to_json--> JSON

Later users: asynchronous training reads `meta_info.weight_versions` (one span per stretch of output tokens that one
version generated); routing replay asks with `return_routed_experts` and reads `GenerateResult.routed_experts`; sessions
and the router find a request again by `rid`, which is unique among the requests that an engine holds.
"""

from __future__ import annotations

import math
import reprlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from miles.errors import EngineError

Json = dict[str, Any]
"""One decoded JSON object."""

GREEDY_BELOW = 1e-6
"""Temperatures under this are greedy, as in SGLang."""

DEFAULT_MAX_NEW_TOKENS = 128
"""What SGLang generates when `max_new_tokens` is not given."""


MAX_REQUESTS = 65536
"""Requests that one body may ask for: its prompts times their `n`."""

MAX_STOPS = 1024
"""Stop strings of one request; each is looked for after every token."""


class BadRequestError(EngineError):
    """A request that the engine refuses, with a sentence for the person who sent it (HTTP 400)."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=400)


@dataclass(frozen=True)
class SamplingParams:
    """How one request samples. Names and defaults are SGLang's; `null` means the default.

    Log-probs are those of `softmax(logits / temperature)` before top-p, top-k and min-p cut the distribution; a greedy
    request (temperature 0) reports `softmax(logits)`.

    Example::

        SamplingParams(temperature=0.7, top_p=0.9, max_new_tokens=64, stop=("\\n",), sampling_seed=7)
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1  # -1: the whole vocabulary
    min_p: float = 0.0
    max_new_tokens: int | None = DEFAULT_MAX_NEW_TOKENS  # None: up to the context length
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    n: int = 1
    # True: max_new_tokens shrinks to what the context leaves (as where it is not given); False: that is an error.
    fit_context: bool = False
    # The same seed gives the same tokens whatever else is in the batch. None: the engine draws one.
    sampling_seed: int | None = None

    @classmethod
    def from_payload(cls, payload: object) -> SamplingParams:
        """Check and convert the JSON object `sampling_params`; BadRequestError names the parameter that is wrong."""
        if payload is None:
            return _DEFAULT_SAMPLING
        if not isinstance(payload, Mapping):
            raise BadRequestError(f"sampling_params: expected an object, got {_show(payload)}.")
        values: dict[str, Any] = {}
        for name, value in payload.items():
            convert = _CONVERTERS.get(name)
            if convert is not None:
                if value is not None or name == "max_new_tokens":
                    values[name] = convert(name, value)
            elif name not in _NEUTRAL_SAMPLING:
                raise BadRequestError(_unknown("sampling parameter", str(name), [*_CONVERTERS, *_NEUTRAL_SAMPLING]))
            elif value not in _NEUTRAL_SAMPLING[name]:
                raise BadRequestError(
                    f"sampling parameter {name!r} is not built into this engine (got {_show(value)}). Leave it out, or "
                    "use an SGLang engine."
                )
        params = cls(**values, fit_context="max_new_tokens" not in payload)
        params._check_ranges()
        return params

    def _check_ranges(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise BadRequestError(f"temperature must be a finite number >= 0, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise BadRequestError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.top_k < 1 and self.top_k != -1:
            raise BadRequestError(f"top_k must be -1 (all tokens) or >= 1, got {self.top_k}.")
        if not 0 <= self.min_p <= 1:
            raise BadRequestError(f"min_p must be in [0, 1], got {self.min_p}.")
        if self.max_new_tokens is not None and self.max_new_tokens < 0:
            raise BadRequestError(f"max_new_tokens must be >= 0, got {self.max_new_tokens}.")
        limit = math.inf if self.max_new_tokens is None else self.max_new_tokens
        if not 0 <= self.min_new_tokens <= limit:
            raise BadRequestError(
                f"min_new_tokens must be in [0, max_new_tokens ({self.max_new_tokens})], got {self.min_new_tokens}."
            )
        if self.n < 1:
            raise BadRequestError(f"n must be >= 1, got {_show(self.n)}.")
        if len(self.stop) > MAX_STOPS:
            raise BadRequestError(f"stop: at most {MAX_STOPS} strings, got {len(self.stop)}.")
        if self.sampling_seed is not None and not -(2**63) <= self.sampling_seed < 2**63:
            raise BadRequestError(f"sampling_seed must fit into 64 bits, got {self.sampling_seed}.")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def truncates(self) -> bool:
        """True where top-k, top-p or min-p cut tokens off."""
        return self.top_p < 1.0 or self.top_k != -1 or self.min_p > 0.0


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 60


def _show(value: object) -> str:
    """A value in a message: bounded, however large it is."""
    text = _REPR.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown(kind: str, name: str, known: Sequence[str]) -> str:
    name = name[:100]
    near = get_close_matches(name, known, n=1)
    return f"unknown {kind} {name!r}." + (f" Did you mean {near[0]!r}?" if near else "")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRequestError(f"{name}: expected a number, got {_show(value)}.")
    return float(value)


def _whole(name: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise BadRequestError(f"{name}: expected a whole number, got {_show(value)}.")


def _whole_or_none(name: str, value: object) -> int | None:
    return None if value is None else _whole(name, value)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise BadRequestError(f"{name}: expected true or false, got {_show(value)}.")
    return value


def _strings(name: str, value: object) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise BadRequestError(f"{name}: expected a string or a list of strings, got {_show(value)}.")
    return tuple(item for item in items if item)


def _token_set(name: str, value: object) -> frozenset[int]:
    items = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
    return frozenset(_whole(name, item) for item in items)


_CONVERTERS = {
    "temperature": _number,
    "top_p": _number,
    "top_k": _whole,
    "min_p": _number,
    "max_new_tokens": _whole_or_none,
    "min_new_tokens": _whole,
    "stop": _strings,
    "stop_token_ids": _token_set,
    "ignore_eos": _flag,
    "skip_special_tokens": _flag,
    "spaces_between_special_tokens": _flag,
    "no_stop_trim": _flag,
    "n": _whole,
    "sampling_seed": _whole,
}

# SGLang parameters that only a full engine has, each with the values that change nothing.
_NEUTRAL_SAMPLING: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "repetition_penalty": (1, None),
    "json_schema": (None, ""),
    "regex": (None, ""),
    "ebnf": (None, ""),
    "structural_tag": (None, ""),
    "stop_regex": (None, "", []),
    "logit_bias": (None, {}),
    "beam_width": (None, 1),
    "custom_params": (None, {}),
    "stream_interval": (None, 1),
}

_DEFAULT_SAMPLING = SamplingParams(fit_context=True)


@dataclass
class GenerateRequest:
    """One prompt for the engine. Exactly one of `input_ids` and `text` is given.

    `logprob_start_len` >= 0 with `return_logprob` also asks for the log-probs of the prompt's tokens from that position
    on; with `max_new_tokens=0` nothing else happens (scoring). -1 asks for output tokens only.

    Example::

        GenerateRequest(rid="a1", input_ids=[5, 9, 2], return_logprob=True,
                        sampling_params=SamplingParams(max_new_tokens=8))
    """

    input_ids: list[int] | None = None
    text: str | None = None
    sampling_params: SamplingParams = _DEFAULT_SAMPLING
    rid: str = field(default_factory=lambda: uuid.uuid4().hex)
    return_logprob: bool = False
    logprob_start_len: int = -1
    # Tokens as text, third entry of each log-prob triple.
    return_text_in_logprobs: bool = False
    # Routing replay: the experts of every position. Refused by engines without experts.
    return_routed_experts: bool = False

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> list[GenerateRequest]:
        """The requests of one `/generate` body: one, or several for a batch or `n` > 1 (see `is_batch`).

        A batch gives `text` or `input_ids` as a list of prompts; other fields are then lists of that length or one
        value for all. Request ids of `n` > 1 and of batches with one `rid` are `<rid>_<i>`.
        """
        for name, value in payload.items():
            if name in _REQUEST_FIELDS or name in _IGNORED_FIELDS or name == "stream":  # the server streams
                continue
            if name not in _NEUTRAL_FIELDS:
                raise BadRequestError(_unknown("field", str(name), [*_REQUEST_FIELDS, "stream", *_NEUTRAL_FIELDS]))
            if value:
                raise BadRequestError(f"{name!r} is not built into this engine (got {_show(value)}). Leave it out.")
        prompts = _prompts(payload)
        count = len(prompts)
        params = [SamplingParams.from_payload(p) for p in _per_prompt(payload, "sampling_params", count)]
        columns = {name: _per_prompt(payload, name, count) for name in _REQUEST_FIELDS if name in _COLUMN_CHECKS}
        if (total := sum(p.n for p in params)) > MAX_REQUESTS:
            raise BadRequestError(f"n: one body may ask for at most {MAX_REQUESTS} answers, got {total}.")
        _flag("stream", payload.get("stream") or False)
        rids = _request_ids(payload.get("rid"), [p.n for p in params], alone=not is_batch(payload))
        requests = []
        for i, prompt in enumerate(prompts):
            options: Json = {
                name: _COLUMN_CHECKS[name](name, values[i]) for name, values in columns.items() if values[i] is not None
            }
            for rid in rids[i]:
                requests.append(cls(**prompt, **options, sampling_params=params[i], rid=rid))
        return requests


# A request's JSON fields, beside the two that hold the prompt.
_COLUMN_CHECKS = {
    "return_logprob": _flag,
    "logprob_start_len": _whole,
    "return_text_in_logprobs": _flag,
    "return_routed_experts": _flag,
}
_REQUEST_FIELDS = [f.name for f in fields(GenerateRequest)]

# Fields of SGLang's body that only a full engine has; accepted where they ask for nothing.
_NEUTRAL_FIELDS = """
    image_data video_data audio_data input_embeds top_logprobs_num token_ids_logprob return_hidden_states
    session_params lora_path lora_id modalities custom_logit_processor priority extra_key routing_key background
    conversation_id bootstrap_host bootstrap_port bootstrap_room data_parallel_rank return_bytes return_entropy
""".split()  # noqa: SIM905

# What concerns whoever passes a request on, and how it is logged: routers of SGLang add these to every request.
_IGNORED_FIELDS = ("model", "log_metrics", "no_logs")


def is_batch(payload: Mapping[str, Any]) -> bool:
    """True where SGLang answers `/generate` with a list: several prompts, or `n` > 1."""
    text, input_ids, params = payload.get("text"), payload.get("input_ids"), payload.get("sampling_params")
    if isinstance(text, list) or (isinstance(input_ids, list) and bool(input_ids) and isinstance(input_ids[0], list)):
        return True
    return isinstance(params, Mapping) and params.get("n") not in (None, 1)


def _prompts(payload: Mapping[str, Any]) -> list[Json]:
    text, input_ids = payload.get("text"), payload.get("input_ids")
    if (text is None) == (input_ids is None):
        raise BadRequestError("expected exactly one of 'text' and 'input_ids'.")
    if text is not None:
        texts = text if isinstance(text, list) else [text]
        if not texts or not all(isinstance(item, str) for item in texts):
            raise BadRequestError(f"text: expected a string or a list of strings, got {_show(text)}.")
        return [{"text": item} for item in texts]
    if not isinstance(input_ids, list) or not input_ids:
        raise BadRequestError(f"input_ids: expected a list of token ids, at least one, got {_show(input_ids)}.")
    rows = input_ids if isinstance(input_ids[0], list) else [input_ids]
    for row in rows:
        if not isinstance(row, list) or not row or not all(type(token) is int for token in row):
            raise BadRequestError(f"input_ids: expected whole numbers, at least one per prompt, got {_show(row)}.")
    return [{"input_ids": row} for row in rows]


def _per_prompt(payload: Mapping[str, Any], name: str, count: int) -> list[Any]:
    value = payload.get(name)
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise BadRequestError(f"{name}: {len(value)} entries for {count} prompts.")
    return value


def _request_ids(rid: object, repeats: list[int], alone: bool) -> list[list[str]]:
    """Per prompt the ids of its `n` requests."""
    total = sum(repeats)
    if rid is None:
        flat = [uuid.uuid4().hex for _ in range(total)]
    elif isinstance(rid, list):
        if len(rid) != len(repeats) or not all(isinstance(item, str) for item in rid):
            raise BadRequestError(f"rid: expected {len(repeats)} strings, got {_show(rid)}.")
        return [[item] if n == 1 else [f"{item}_{i}" for i in range(n)] for item, n in zip(rid, repeats)]
    elif isinstance(rid, str):
        flat = [rid] if alone else [f"{rid}_{i}" for i in range(total)]
    else:
        raise BadRequestError(f"rid: expected a string, got {_show(rid)}.")
    ids = iter(flat)
    return [[next(ids) for _ in range(n)] for n in repeats]


@dataclass(frozen=True)
class FinishReason:
    """Why a request ended: `stop` (matched a token id or a string), `length`, or `abort` (with a message).

    Example: `FinishReason("stop", matched=2).to_json() == {"type": "stop", "matched": 2}`
    """

    type: str
    matched: int | str | None = None
    length: int | None = None
    message: str | None = None

    def to_json(self) -> Json:
        if self.type == "stop":
            return {"type": "stop", "matched": self.matched}
        if self.type == "length":
            return {"type": "length", "length": self.length}
        return {"type": "abort", "message": self.message}


@dataclass(frozen=True)
class WeightVersionSpan:
    """Output tokens `start` to `end` (exclusive) were sampled under weights `version`.

    Example: an update after the third of ten tokens gives `("4", 0, 3), ("5", 3, 10)`.
    """

    version: str
    start: int
    end: int


TokenLogprob = tuple[float | None, int, str | None]
"""log-prob, token id, token text where asked for. The first prompt token has no log-prob."""


@dataclass
class GenerateResult:
    """What the engine made of one request; `to_json` is SGLang's response object.

    Example::

        GenerateResult(rid="a1", text="1326", output_ids=[4, 6, 5, 9, 1], prompt_tokens=8, cached_tokens=7,
                       finish_reason=FinishReason("stop", matched=1), output_logprobs=[-0.1, -0.2, -0.1, -0.4, -0.0],
                       weight_versions=[WeightVersionSpan("4", 0, 5)], e2e_latency_s=0.07)
    """

    rid: str
    text: str
    output_ids: list[int]
    finish_reason: FinishReason | None  # None: one of a stream's partial results, more is to come
    prompt_tokens: int
    weight_versions: list[WeightVersionSpan]  # never empty; the last one is the current version
    cached_tokens: int = 0
    # One per output token; None where not asked for.
    output_logprobs: list[float] | None = None
    output_texts: list[str] | None = None
    input_logprobs: list[TokenLogprob] | None = None
    # base64 of little-endian int32 [prompt + output - 1, layers, top-k], row-major.
    routed_experts: str | None = None
    e2e_latency_s: float = 0.0

    @property
    def weight_version(self) -> str:
        """The version that sampled the last token."""
        return self.weight_versions[-1].version

    def to_json(self) -> Json:
        meta_info: Json = {
            "id": self.rid,
            "finish_reason": None if self.finish_reason is None else self.finish_reason.to_json(),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": len(self.output_ids),
            "cached_tokens": self.cached_tokens,
            "weight_version": self.weight_version,
            "weight_versions": [{"version": s.version, "start": s.start, "end": s.end} for s in self.weight_versions],
            "e2e_latency": self.e2e_latency_s,
        }
        if self.output_logprobs is not None:
            texts: Sequence[str | None] = self.output_texts or [None] * len(self.output_ids)
            triples = zip(self.output_logprobs, self.output_ids, texts)
            meta_info["output_token_logprobs"] = [list(triple) for triple in triples]
            meta_info["input_token_logprobs"] = [list(triple) for triple in self.input_logprobs or []]
        if self.routed_experts is not None:
            meta_info["routed_experts"] = self.routed_experts
        return {"text": self.text, "output_ids": self.output_ids, "meta_info": meta_info}


# ---- description -----------------------------------------------------------------------------------------------------

_SCHEMAS: dict[Any, Json] = {
    _number: {"type": "number"},
    _whole: {"type": "integer"},
    _whole_or_none: {"type": ["integer", "null"]},
    _flag: {"type": "boolean"},
    _strings: {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    _token_set: {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]},
}

_RANGES: dict[str, Json] = {
    "temperature": {"minimum": 0},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1},
    "min_p": {"minimum": 0, "maximum": 1},
    "max_new_tokens": {"minimum": 0},
    "min_new_tokens": {"minimum": 0},
    "n": {"minimum": 1, "maximum": MAX_REQUESTS},
    "sampling_seed": {"minimum": -(2**63), "maximum": 2**63 - 1},
}


def generate_schema() -> Json:
    """JSON schema of a `/generate` body, made from the tables that check one."""

    def one_or_per_prompt(schema: Json) -> Json:
        return {"anyOf": [schema, {"type": "array", "items": schema}]}

    def neutral(values: Sequence[object]) -> Json:
        return {"enum": list(values)}

    sampling: Json = {name: _SCHEMAS[check] | _RANGES.get(name, {}) for name, check in _CONVERTERS.items()}
    sampling |= {name: neutral(values) for name, values in _NEUTRAL_SAMPLING.items()}
    parameters: Json = {"type": "object", "properties": sampling, "additionalProperties": False}
    ids: Json = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
    properties: Json = {
        "text": one_or_per_prompt({"type": "string"}),
        "input_ids": {"anyOf": [ids, {"type": "array", "items": ids, "minItems": 1}]},
        "sampling_params": one_or_per_prompt(parameters),
        "rid": one_or_per_prompt({"type": "string"}),
        "stream": {"type": "boolean"},
    }
    properties |= {name: one_or_per_prompt(_SCHEMAS[check]) for name, check in _COLUMN_CHECKS.items()}
    properties |= {name: neutral([None, False, 0]) for name in _NEUTRAL_FIELDS}
    properties |= {name: {"description": "Ignored."} for name in _IGNORED_FIELDS}
    return {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "oneOf": [{"required": ["text"]}, {"required": ["input_ids"]}],
    }
