"""Decode speed of the embedded engine against a bare loop over a static cache, side by side in one process.

    OMP_NUM_THREADS=2 python benchmarks/engine_decode.py [--concurrency 32 128] [--threads 2] [--json]

Both run the same 1M-parameter Llama (hidden 128, 4 layers, vocabulary 2048, 256 positions, fp32) on prompts of 16
tokens up to position 256. The bare loop knows one batch of equal lengths, picks the most likely token and returns
nothing but tokens; the engine samples at temperature 1 with log-probs, through `await generate`, batching continuously.
Tokens per second count generated tokens over the time from the first request to the last result, prefill included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from miles.engine.embedded import EmbeddedEngine
from miles.engine.protocol import GenerateRequest, SamplingParams

HIDDEN, LAYERS, HEADS, POSITIONS, PROMPT = 128, 4, 4, 256, 16
HEAD_DIM = HIDDEN // HEADS


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=3 * HIDDEN,
        vocab_size=2048,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


class BareLoop:
    """Decoding with nothing around it: a cache of fixed size, one position for the whole batch, greedy."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        tensors = {name: p.detach() for name, p in model.named_parameters()}
        self.embed, self.norm = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
        self.layers = [
            {
                name.removeprefix(f"model.layers.{i}.").removesuffix(".weight").split(".")[-1]: tensor
                for name, tensor in tensors.items()
                if name.startswith(f"model.layers.{i}.")
            }
            for i in range(LAYERS)
        ]
        inverse = 1.0 / (10000.0 ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM))
        angles = torch.outer(torch.arange(POSITIONS).float(), inverse)
        self.cos, self.sin = torch.cat((angles, angles), -1).cos(), torch.cat((-angles, angles), -1).sin()
        self.causal = torch.full((POSITIONS, POSITIONS), float("-inf")).triu(1)

    @torch.inference_mode()
    def run(self, prompts: Tensor) -> Tensor:
        """int64 [B, prompt] -> int64 [B, POSITIONS] with the continuation."""
        batch = prompts.shape[0]
        self.keys = torch.zeros(LAYERS, batch, HEADS, POSITIONS, HEAD_DIM)
        self.values = torch.zeros_like(self.keys)
        out = torch.zeros(batch, POSITIONS, dtype=torch.int64)
        out[:, :PROMPT] = prompts
        step = slice(0, PROMPT)
        for position in range(PROMPT, POSITIONS):
            hidden = self.forward(out[:, step], step)
            out[:, position] = F.linear(hidden[:, -1], self.embed).argmax(-1)
            step = slice(position, position + 1)
        return out

    def forward(self, tokens: Tensor, span: slice) -> Tensor:
        batch, length = tokens.shape
        x = F.embedding(tokens, self.embed)
        cos, sin, mask = self.cos[span], self.sin[span], self.causal[span]
        for i, layer in enumerate(self.layers):
            y = F.rms_norm(x, (HIDDEN,), layer["input_layernorm"], 1e-6)
            q, k, v = (
                F.linear(y, layer[n]).view(batch, length, HEADS, HEAD_DIM) for n in ("q_proj", "k_proj", "v_proj")
            )
            q, k = (rotated(t.transpose(1, 2), cos, sin) for t in (q, k))
            self.keys[i, :, :, span] = k
            self.values[i, :, :, span] = v.transpose(1, 2)
            attended = F.scaled_dot_product_attention(q, self.keys[i], self.values[i], attn_mask=mask)
            x = x + F.linear(attended.transpose(1, 2).flatten(2), layer["o_proj"])
            y = F.rms_norm(x, (HIDDEN,), layer["post_attention_layernorm"], 1e-6)
            x = x + F.linear(
                F.silu(F.linear(y, layer["gate_proj"])) * F.linear(y, layer["up_proj"]), layer["down_proj"]
            )
        return F.rms_norm(x, (HIDDEN,), self.norm, 1e-6)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.roll(x, HEAD_DIM // 2, -1) * sin


def time_bare(loop: BareLoop, prompts: list[list[int]]) -> float:
    begin = time.perf_counter()
    loop.run(torch.tensor(prompts))
    return time.perf_counter() - begin


def time_engine(engine: EmbeddedEngine, prompts: list[list[int]]) -> float:
    params = SamplingParams(max_new_tokens=POSITIONS - PROMPT, ignore_eos=True)

    async def run() -> float:
        requests = [GenerateRequest(input_ids=p, sampling_params=params, return_logprob=True) for p in prompts]
        begin = time.perf_counter()
        results = await asyncio.gather(*(engine.generate(r) for r in requests))
        assert all(len(r.output_ids) == POSITIONS - PROMPT for r in results)
        return time.perf_counter() - begin

    return asyncio.run(run())


def measure(concurrency: int, rounds: int) -> dict[str, float]:
    """Medians over rounds that alternate between the two."""
    model = make_model()
    loop = BareLoop(model)
    engine = EmbeddedEngine(
        model.config, dict(model.named_parameters()), None, max_running_requests=concurrency, eos_token_ids=frozenset()
    )
    rng = random.Random(0)
    times: dict[str, list[float]] = {"bare": [], "engine": []}
    for i in range(rounds + 1):
        prompts = [[rng.randrange(2048) for _ in range(PROMPT)] for _ in range(concurrency)]
        bare, ours = time_bare(loop, prompts), time_engine(engine, prompts)
        if i:  # the first round warms up
            times["bare"].append(bare)
            times["engine"].append(ours)
    engine.close()
    tokens = concurrency * (POSITIONS - PROMPT)
    speed = {name: tokens / statistics.median(seconds) for name, seconds in times.items()}
    return {
        "concurrency": concurrency,
        "bare_tokens_per_s": round(speed["bare"]),
        "engine_tokens_per_s": round(speed["engine"]),
        "ratio": round(speed["engine"] / speed["bare"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for concurrency in options.concurrency:
        row = measure(concurrency, options.rounds)
        if options.json:
            print(json.dumps({"benchmark": "engine_decode", "threads": options.threads, **row}), flush=True)
        else:
            print(
                f"concurrency {concurrency:4d}: bare loop {row['bare_tokens_per_s']:7.0f} tokens/s, embedded engine "
                f"{row['engine_tokens_per_s']:7.0f} tokens/s, ratio {row['ratio']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
