"""Between a sample and the engine's /generate: prompt ids, the request payload, and what the response changes.

Built-in generate functions and plug-ins share these three functions; the names and signatures are published.
"""

from __future__ import annotations

import base64
from argparse import Namespace
from functools import lru_cache
from typing import Any

from miles.rollout import limits
from miles.rollout.tokenizer import encode_image_for_rollout_engine
from miles.types import Sample

PROMPTS_KEPT = 256


def compute_prompt_ids_from_sample(state: Any, sample: Sample, tools: list[dict[str, Any]] | None = None) -> list[int]:
    """Token ids of the prompt; a message list is rendered with the chat template.

    With raw media on the sample the processor makes the ids, and what it returns beside them is kept on the sample as
    `multimodal_train_inputs`.
    """
    prompt = sample.prompt
    if not isinstance(prompt, str):
        prompt = state.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, tools=tools)
    if sample.multimodal_inputs and state.processor is not None:
        encoded = dict(state.processor(text=prompt, **sample.multimodal_inputs))
        ids = encoded.pop("input_ids")[0]
        encoded.pop("attention_mask", None)
        sample.multimodal_train_inputs = encoded or None
        return list(ids)
    return list(_encoded(state.tokenizer, prompt))


@lru_cache(maxsize=PROMPTS_KEPT)
def _encoded(tokenizer: Any, prompt: str) -> tuple[int, ...]:
    """The samples of a group ask for the same prompt one after the other."""
    return tuple(tokenizer.encode(prompt, add_special_tokens=False))


def compute_request_payload(
    args: Namespace,
    input_ids: list[int],
    sampling_params: dict[str, Any],
    multimodal_inputs: dict[str, Any] | None = None,
) -> tuple[dict[str, Any] | None, Sample.Status | None]:
    """The JSON body of /generate, or (None, TRUNCATED) where the context has no room for another token."""
    params = dict(sampling_params)
    limit = params.pop("max_new_tokens", None) or args.rollout_max_response_len
    if args.rollout_max_context_len is not None:
        room = args.rollout_max_context_len - len(input_ids)
        limit = room if limit is None else min(limit, room)
    most = limits.context_length(args)
    if most is not None and limit is not None and limit > most - len(input_ids):
        if len(input_ids) < most:
            limits.tell_cut(args, len(input_ids), limit, most)
        limit = most - len(input_ids)
    if limit is not None and limit <= 0:
        return None, Sample.Status.TRUNCATED
    payload: dict[str, Any] = {
        "input_ids": input_ids,
        "sampling_params": {**params, "max_new_tokens": limit},
        "return_logprob": True,
        "return_routed_experts": args.use_rollout_routing_replay,
    }
    images = (multimodal_inputs or {}).get("images")
    if images:
        payload["image_data"] = [encode_image_for_rollout_engine(image) for image in images]
    return payload, None


async def update_sample_from_response(
    args: Namespace, sample: Sample, payload: dict[str, Any], output: dict[str, Any], update_loss_mask: bool = False
) -> None:
    """Append what the engine generated to `sample`: tokens, text, log-probs, experts, status, weight version."""
    meta = output["meta_info"]
    generated = meta.get("output_token_logprobs") or []
    new_tokens = [item[1] for item in generated]
    if not sample.tokens:
        sample.tokens = list(payload["input_ids"])
    sample.tokens = sample.tokens + new_tokens
    sample.response += output["text"]
    sample.response_length += len(new_tokens)
    sample.rollout_log_probs = (sample.rollout_log_probs or []) + [item[0] for item in generated]
    if update_loss_mask:
        sample.loss_mask = (sample.loss_mask or []) + [1] * len(new_tokens)
    elif sample.loss_mask is not None:
        # A resumed sample whose earlier tokens were masked: the new ones are on-policy.
        sample.loss_mask = sample.loss_mask + [1] * (sample.response_length - len(sample.loss_mask))
    sample.rollout_routed_experts = routed_experts_of(args, sample, meta)
    sample.update_from_meta_info(args, meta)


def routed_experts_of(args: Namespace, sample: Sample, meta: dict[str, Any]) -> Any:
    """int32 [len(tokens) - 1, num_layers, moe_router_topk], of the latest request, which covers the whole prefix."""
    encoded = meta.get("routed_experts")
    if encoded is None:
        return None
    import numpy as np

    flat = np.frombuffer(base64.b64decode(encoded), dtype=np.int32)
    return flat.reshape(len(sample.tokens) - 1, args.num_layers, args.moe_router_topk)
