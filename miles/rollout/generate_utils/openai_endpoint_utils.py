"""From a recorded session to samples: the rollout side of the router's session routes.

    OpenAIEndpointTracer.create(args)        a session, and the address that an agent talks to
    tracer.collect_records()                 what was said there; the session is deleted
    compute_samples_from_openai_records      one sample per answer, with the very tokens that the engine read and wrote

The names and signatures are published.
"""

from __future__ import annotations

import base64
import copy
import logging
from argparse import Namespace
from typing import Any

from miles.engine.calls import request_json
from miles.errors import EngineError
from miles.router.session.session_types import GetSessionResponse, SessionRecord
from miles.types import STATUS_OF_FINISH_REASON, Sample

logger = logging.getLogger(__name__)

ROUTER_RETRIES = 60
"""Seconds within which a router that died has been replaced: one more attempt is made in each."""

_STATUS = {**STATUS_OF_FINISH_REASON, "tool_calls": Sample.Status.COMPLETED}


class OpenAIEndpointTracer:
    """One session of the router.

    Example::

        tracer = await OpenAIEndpointTracer.create(args)
        await agent(base_url=tracer.base_url)          # http://127.0.0.1:30000/sessions/1f0c...
        records = await tracer.collect_records()
    """

    def __init__(self, router_url: str, session_id: str) -> None:
        self.router_url, self.session_id = router_url.rstrip("/"), session_id
        self.base_url = f"{self.router_url}/sessions/{session_id}"
        self.context_full = False  # after `collect_records`: a request found no room for an answer

    @staticmethod
    async def create(args: Namespace) -> OpenAIEndpointTracer:
        """Open a session at `args.sglang_router_ip:sglang_router_port`. Raises EngineError."""
        router_url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}"
        answer = await request_json("post", f"{router_url}/sessions", {}, retries=ROUTER_RETRIES)
        if not isinstance(answer, dict) or "session_id" not in answer:
            raise EngineError(f"{router_url}/sessions: expected a session_id, got {str(answer)[:200]}")
        return OpenAIEndpointTracer(router_url, answer["session_id"])

    async def collect_records(self) -> list[SessionRecord]:
        """What the session has recorded, in order; the session ends. Raises EngineError."""
        try:
            answer = await request_json("get", self.base_url)
        finally:
            await self.delete()
        session = GetSessionResponse.model_validate(answer)
        self.context_full = session.context_full
        return session.records

    async def is_lost(self) -> bool:
        """Whether the router, once it answers, does not know the session: another one has taken its place."""
        try:
            await request_json("get", self.base_url, retries=ROUTER_RETRIES)
        except EngineError as error:
            return error.status == 404
        return False

    async def delete(self) -> None:
        """End the session; a failure is logged, for the router forgets idle sessions by itself."""
        try:
            await request_json("delete", self.base_url)
        except EngineError as error:
            logger.warning("the session %s was not deleted: %s", self.session_id, error)


def compute_samples_from_openai_records(
    input_sample: Sample, records: list[SessionRecord], tokenizer: Any, args: Namespace | None = None
) -> list[Sample]:
    """One sample per record, each a copy of `input_sample` with the tokens of that turn.

    `args` gives the shape of routed experts (`num_layers`, `moe_router_topk`); None leaves them out. Raises ValueError
    where the engine has read other tokens than the ones that it was sent.
    """
    return [_sample(input_sample, record, tokenizer, args) for record in records]


def _sample(given: Sample, record: SessionRecord, tokenizer: Any, args: Namespace | None) -> Sample:
    choice = record.response["choices"][0]
    prompt_ids = list(choice["input_token_ids"])
    sent = record.request.get("input_ids")
    if sent is not None and list(sent) != prompt_ids:
        raise ValueError(
            f"the engine has read {len(prompt_ids)} tokens that are not the {len(sent)} which it was sent as input_ids."
        )
    content = choice["logprobs"]["content"]
    output_ids = [entry["token_id"] for entry in content]
    sample = copy.deepcopy(given)
    sample.tokens = prompt_ids + output_ids
    sample.response = tokenizer.decode(output_ids)
    sample.response_length = len(output_ids)
    sample.loss_mask = [1] * len(output_ids)
    sample.rollout_log_probs = [entry["logprob"] for entry in content]
    sample.status = _STATUS.get(choice.get("finish_reason"), sample.status)
    meta = choice.get("meta_info") or {}
    if "weight_version" in meta:
        sample.weight_versions.append(meta["weight_version"])
    sample.prefix_cache_info.add(meta)
    sample.spec_info.add(meta)
    sample.rollout_routed_experts = _routed_experts(meta.get("routed_experts"), sample, args)
    return sample


def _routed_experts(encoded_experts: str | None, sample: Sample, args: Namespace | None) -> Any:
    """int32 [len(tokens) - 1, num_layers, moe_router_topk]; the engine says them for the whole prefix."""
    if encoded_experts is None or args is None:
        return None
    import numpy as np

    flat = np.frombuffer(base64.b64decode(encoded_experts), dtype=np.int32)
    return flat.reshape(len(sample.tokens) - 1, args.num_layers, args.moe_router_topk)
