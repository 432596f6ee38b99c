"""Routed experts through engine, router and session into the sample of several turns: the real parts, a tiny model."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from examples.tiny_tools import make_tokenizer
from miles.engine.embedded import EmbeddedEngine
from miles.engine.embedded.server import create_app, serve_in_loop
from miles.rollout.generate_utils.openai_endpoint_utils import (
    OpenAIEndpointTracer,
    compute_samples_from_openai_records,
)
from miles.rollout.generate_utils.sample_utils import merge_samples
from miles.router.router import MilesRouter
from miles.types import Sample

LAYERS, TOP_K = 2, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Qwen3-MoE with the tokenizer and the chat template of the tiny tool model."""
    path: Path = tmp_path_factory.mktemp("moe") / "base"
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(make_tokenizer.VOCAB), hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=48, moe_intermediate_size=24, num_experts=8,
        num_experts_per_tok=TOP_K, max_position_embeddings=256, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    make_tokenizer.save(path)
    return str(path)


def test_the_experts_of_the_last_turn_cover_the_conversation(folder: str) -> None:
    tokenizer = make_tokenizer.tokenizer()

    async def go() -> tuple[list[Any], Any]:
        engine = EmbeddedEngine.from_folder(folder, seed=1)
        router = MilesRouter(Namespace(hf_checkpoint=folder))
        try:
            async with (
                serve_in_loop(create_app(engine), "127.0.0.1", 0) as worker,
                serve_in_loop(router.app, "127.0.0.1", 0) as url,
                httpx.AsyncClient(base_url=url, timeout=60) as client,
            ):
                await client.post("/add_worker", params={"url": worker})
                port = int(url.rpartition(":")[2])
                tracer = await OpenAIEndpointTracer.create(
                    Namespace(sglang_router_ip="127.0.0.1", sglang_router_port=port)
                )
                messages: list[Any] = [{"role": "user", "content": "a"}]
                for _ in range(3):
                    body = {"messages": messages, "max_tokens": 6, "temperature": 0, "return_routed_experts": True}
                    answer = await client.post(f"{tracer.base_url}/v1/chat/completions", json=body)
                    messages += [answer.json()["choices"][0]["message"], {"role": "user", "content": "b"}]
                records = await tracer.collect_records()
                scored = await client.post(
                    "/generate",
                    json={
                        "input_ids": records[-1].request["input_ids"],
                        "sampling_params": {"max_new_tokens": 6, "temperature": 0},
                        "return_routed_experts": True,
                    },
                )
            await router.stop()
        finally:
            engine.close()
        return records, scored.json()

    records, direct = asyncio.run(go())
    args = Namespace(num_layers=LAYERS, moe_router_topk=TOP_K)
    turns = compute_samples_from_openai_records(Sample(prompt="a"), records, tokenizer, args)
    for turn in turns:
        assert turn.rollout_routed_experts.shape == (len(turn.tokens) - 1, LAYERS, TOP_K)
        turn.status = Sample.Status.COMPLETED
    sample = merge_samples(turns, tokenizer)
    sample.validate()
    assert (sample.rollout_routed_experts == turns[-1].rollout_routed_experts).all()
    # The same tokens in one request: the experts are those of the whole conversation.
    assert sample.tokens[-len(direct["output_ids"]) :] == direct["output_ids"]
    assert records[-1].response["choices"][0]["meta_info"]["routed_experts"] == direct["meta_info"]["routed_experts"]
