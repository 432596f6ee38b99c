"""Tokens per second over HTTP: the embedded engine and SGLang, the same model, the same requests, on a machine without
a GPU.

    python benchmarks/served_engines.py --sglang-python .venv-sglang/bin/python

A random Qwen3 of 1 million parameters (hidden 128, 4 layers, vocabulary 2,048, float32). Each client sends its next
request when the last one is answered: 32 tokens in, 128 out, log-probs returned. Best of three rounds per concurrency;
the other server is not running meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import httpx
from tiny_model import VOCABULARY, write_tiny_model

from miles.config.parse import parse
from miles.engine.process import ServerProcess, child_environment, free_port, wait_until_it_answers
from miles.engine.sglang import find_python, server_command

PROMPT, ANSWER, ROUNDS, START_S = 32, 128, 3, 600.0
FILLING = ["--prompt-data", "none", "--num-rollout", "1", "--rollout-batch-size", "1", "--n-samples-per-prompt", "1"]
FILLING += ["--global-batch-size", "1", "--debug-rollout-only", "--rollout-engine", "sglang"]
FILLING += ["--sglang-dtype", "float32", "--sglang-context-length", "256"]


def write_model(folder: Path) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    write_tiny_model(folder, context=256, eos_token_id=1, bos_token_id=None)
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t1", pad_token="t0").save_pretrained(folder)
    return folder


async def tokens_per_second(url: str, concurrency: int, requests: int) -> float:
    rng = random.Random(concurrency)
    prompts = [[rng.randrange(2, VOCABULARY) for _ in range(PROMPT)] for _ in range(requests)]
    params = {"max_new_tokens": ANSWER, "ignore_eos": True, "temperature": 1.0}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # SGLang, when busy, closes idle ones
    async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=False) as client:

        async def one_client() -> None:
            while prompts:
                body = {"input_ids": prompts.pop(), "sampling_params": params, "return_logprob": True}
                answer = (await client.post(f"{url}/generate", json=body)).json()
                assert len(answer["output_ids"]) == ANSWER

        began = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(concurrency)))
        return requests * ANSWER / (time.perf_counter() - began)


def measure(server: ServerProcess, concurrencies: list[int]) -> dict[int, float]:
    wait_until_it_answers(server, START_S, pause_s=0.5)
    asyncio.run(tokens_per_second(server.url, 8, 16))  # warm-up
    return {n: max(asyncio.run(tokens_per_second(server.url, n, 2 * n)) for _ in range(ROUNDS)) for n in concurrencies}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sglang-python", required=True)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    python = find_python(options.sglang_python)
    with tempfile.TemporaryDirectory(prefix="miles-served-") as work:
        model, results = write_model(Path(work) / "model"), {}
        for name in ("embedded", "sglang"):
            port = free_port()
            if name == "embedded":
                argv = [sys.executable, "-P", "-m", "miles", "serve", "--model", str(model), "--port", str(port)]
                environment = child_environment(options.threads)
            else:
                config, _ = parse([*FILLING, "--hf-checkpoint", str(model)])
                made = server_command(
                    config, python=python, rank=0, host="127.0.0.1", port=port, gpus=0, threads=options.threads
                )
                argv, environment = made.argv, {**made.env, "HF_HUB_OFFLINE": "1"}
            server = ServerProcess(name, argv, f"http://127.0.0.1:{port}", Path(work) / f"{name}.log", environment)
            try:
                results[name] = measure(server, options.concurrency)
            except httpx.HTTPError as error:
                raise SystemExit(f"{name}: {error!r}; {server.last_words()}") from error
            finally:
                server.stop()
    for n in options.concurrency:
        ours, theirs = results["embedded"][n], results["sglang"][n]
        shown = {"concurrency": n, "embedded": round(ours), "sglang": round(theirs), "ratio": round(ours / theirs, 2)}
        print(json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
