"""What HTTP costs the embedded engine: decode speed of `miles serve` beside a bare loop, and weights by shared memory.

    OMP_NUM_THREADS=2 python benchmarks/engine_http.py [--concurrency 32 128] [--threads 2] [--json]

The model and the bare loop are those of engine_decode.py. The server is a process of its own; the clients are
connections of this process that send one request after the other, without a library around them, so that what they cost
is small. Requests ask for 240 tokens with log-probs. Tokens per second count generated tokens over the time from the
first request to the last answer.

The weights (500 MB in float32) are written into memory that the server has mapped, and the server is told; beside it, a
plain copy of the same tensors.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import torch
from engine_decode import POSITIONS, PROMPT, BareLoop, make_model, time_bare
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from miles.weights.shared_memory import anonymous_file, layout_of, layout_to_json, views

NEW_TOKENS = POSITIONS - PROMPT
ROUNDS_PER_CLIENT = 2
GOAL_DECODE, GOAL_MEMORY = 0.5, 2.0


@contextlib.contextmanager
def server(folder: Path, threads: int, *flags: str, fds: tuple[int, ...] = ()) -> Iterator[tuple[str, int]]:
    """`miles serve` as a child; yields host and port."""
    command = [sys.executable, "-m", "miles", "serve", "--model", str(folder), "--port", "0", *flags]
    command += ["--threads", str(threads), "--parent-pid", str(os.getpid())]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=fds, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            address = urlsplit(next(word for word in line.split() if word.startswith("http")))
            assert address.hostname is not None and address.port is not None
            yield address.hostname, address.port
        finally:
            process.terminate()


class Connection:
    """HTTP/1.1 with what this benchmark needs of it."""

    async def open(self, host: str, port: int) -> Connection:
        self._reader, self._writer = await asyncio.open_connection(host, port, limit=1 << 22)
        return self

    async def post(self, path: str, body: bytes) -> bytes:
        lines = (f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(body)}")
        self._writer.write("\r\n".join((*lines, "", "")).encode() + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        size = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        content = await self._reader.readexactly(size)
        assert answer.startswith(b"HTTP/1.1 200"), content[:500]
        return content

    def close(self) -> None:
        self._writer.close()


async def time_served(address: tuple[str, int], prompts: list[list[int]]) -> float:
    """Seconds for ROUNDS_PER_CLIENT requests of each client; a client per prompt."""
    parameters = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    clients = [await Connection().open(*address) for _ in prompts]

    async def ask(client: Connection, prompt: list[int]) -> None:
        body = json.dumps({"input_ids": prompt, "return_logprob": True, "sampling_params": parameters}).encode()
        for _ in range(ROUNDS_PER_CLIENT):
            answer = json.loads(await client.post("/generate", body))
            assert len(answer["meta_info"]["output_token_logprobs"]) == NEW_TOKENS

    begin = time.perf_counter()
    await asyncio.gather(*map(ask, clients, prompts))
    seconds = time.perf_counter() - begin
    for client in clients:
        client.close()
    return seconds


def measure_decode(address: tuple[str, int], loop: BareLoop, concurrency: int, rounds: int) -> dict[str, float]:
    """Medians over rounds that alternate between the two."""
    rng = random.Random(0)
    speed: dict[str, list[float]] = {"bare": [], "served": []}
    for i in range(rounds + 1):
        prompts = [[rng.randrange(2048) for _ in range(PROMPT)] for _ in range(concurrency)]
        bare = concurrency * NEW_TOKENS / time_bare(loop, prompts)
        served = ROUNDS_PER_CLIENT * concurrency * NEW_TOKENS / asyncio.run(time_served(address, prompts))
        if i:  # the first round warms up
            speed["bare"].append(bare)
            speed["served"].append(served)
    ratios = [s / b for s, b in zip(speed["served"], speed["bare"])]
    return {
        "concurrency": concurrency,
        "bare_tokens_per_s": round(statistics.median(speed["bare"])),
        "served_tokens_per_s": round(statistics.median(speed["served"])),
        "ratio": round(statistics.median(ratios), 2),
    }


def large_model() -> LlamaConfig:
    """500 MB in float32."""
    return LlamaConfig(
        hidden_size=1024,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        intermediate_size=3072,
        vocab_size=24000,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )


def measure_memory(threads: int, rounds: int) -> dict[str, float]:
    config = large_model()
    with torch.device("meta"):
        shapes = {n: (tuple(p.shape), p.dtype) for n, p in LlamaForCausalLM(config).named_parameters()}
    source = {name: torch.randn(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    target = {name: torch.zeros_like(tensor) for name, tensor in source.items()}
    layout, size = layout_of(shapes)
    descriptor = anonymous_file()
    os.ftruncate(descriptor, size)
    memory = views(descriptor, layout, size)
    times: dict[str, list[float]] = {"copy": [], "write": [], "update": []}
    with tempfile.TemporaryDirectory() as folder:
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        layout_file = Path(folder) / "layout.json"
        layout_file.write_text(json.dumps(layout_to_json(layout, size)))
        copy(source, memory)
        flags = ("--weights-fd", str(descriptor), "--weights-layout", str(layout_file))
        with server(Path(folder), threads, *flags, fds=(descriptor,)) as address:
            for i in range(rounds + 1):
                begin = time.perf_counter()
                copy(source, target)
                copied = time.perf_counter()
                copy(source, memory)
                written = time.perf_counter()
                asyncio.run(tell(address, i))
                done = time.perf_counter()
                if i:
                    for name, seconds in zip(times, (copied - begin, written - copied, done - written)):
                        times[name].append(seconds)
    ratios = [(w + u) / c for c, w, u in zip(times["copy"], times["write"], times["update"])]
    medians = {f"{name}_ms": round(1000 * statistics.median(each), 1) for name, each in times.items()}
    return {"bytes": size, **medians, "ratio": round(statistics.median(ratios), 2)}


def copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)


async def tell(address: tuple[str, int], version: int) -> None:
    connection = await Connection().open(*address)
    await connection.post("/update_weights_from_shared_memory", b'{"weight_version": "%d"}' % version)
    connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = make_model()
    loop = BareLoop(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        most = str(max(options.concurrency))
        with server(Path(folder), options.threads, "--max-running-requests", most) as address:
            for concurrency in options.concurrency:
                row = measure_decode(address, loop, concurrency, options.rounds)
                if options.json:
                    print(json.dumps({"benchmark": "engine_http", "threads": options.threads, **row}), flush=True)
                else:
                    print(
                        f"concurrency {concurrency:4d}: bare loop {row['bare_tokens_per_s']:7.0f} tokens/s, served "
                        f"engine {row['served_tokens_per_s']:7.0f} tokens/s, ratio {row['ratio']:.2f} "
                        f"(goal {GOAL_DECODE})",
                        flush=True,
                    )
    row = measure_memory(options.threads, options.rounds)
    if options.json:
        print(json.dumps({"benchmark": "shared_memory", "threads": options.threads, **row}), flush=True)
    else:
        print(
            f"{row['bytes'] / 1e6:.0f} MB of weights: written in {row['write_ms']:.0f} ms, in use after "
            f"{row['update_ms']:.0f} ms more; plain copy {row['copy_ms']:.0f} ms, ratio {row['ratio']:.2f} "
            f"(goal {GOAL_MEMORY:g})",
            flush=True,
        )


if __name__ == "__main__":
    main()
