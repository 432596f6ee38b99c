"""`miles serve` as a child of a run: weights by descriptor, an end together with its parent, flags that are wrong."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file

from miles.engine.client import HttpEngineClient
from miles.engine.embedded.command import main, shared_weights
from miles.errors import EngineError, FlagError
from miles.weights.shared_memory import anonymous_file, layout_from_json, layout_of, layout_to_json, views

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

# Starts a server as its child, says where it is, and ends as soon as it is told to.
PARENT = """
import os, subprocess, sys
command = [sys.executable, "-m", "miles", "serve", "--port", "0", "--parent-pid", str(os.getpid()), *sys.argv[1:]]
child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, close_fds=False)
print(child.pid, child.stdout.readline().split("http")[1].split()[0], flush=True)
sys.stdin.readline()
os._exit(0)
"""


def test_a_server_with_inherited_weights_ends_with_its_parent(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    stored = load_file(str(checkpoints["qwen3"] / "model.safetensors"))
    layout, size = layout_of({name: (tuple(t.shape), t.dtype) for name, t in stored.items()})
    descriptor = anonymous_file()
    os.ftruncate(descriptor, size)
    memory = views(descriptor, layout, size)
    for name, tensor in stored.items():
        memory[name].copy_(tensor)
    layout_file = tmp_path / "layout.json"
    layout_file.write_text(json.dumps(layout_to_json(layout, size)))
    flags = ["--model", str(checkpoints["qwen3"]), "--weights-fd", str(descriptor)]
    flags += ["--weights-layout", str(layout_file), "--weight-version", "4", "--context-length", "64"]
    os.set_inheritable(descriptor, True)
    command = [sys.executable, "-c", PARENT, *flags]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, pass_fds=(descriptor,), env=ENVIRONMENT, **pipes) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        pid, rest = parent.stdout.readline().split()
        url = f"http{rest}"
        asyncio.run(use(url, memory))
        gone = os.pidfd_open(int(pid))
        parent.stdin.write("\n")
        parent.stdin.flush()
        assert parent.wait(20) == 0
        asyncio.run(ended(gone))
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
    os.close(descriptor)


async def use(url: str, memory: dict) -> None:
    client = HttpEngineClient(url)
    info = await client.server_info()
    assert (info["weight_version"], info["context_length"]) == ("4", 64)
    body = {"input_ids": [5, 6], "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}}
    before = await client.generate(body)
    await client.pause("in_place")
    for tensor in memory.values():
        tensor.neg_()
    await client.update_weights_from_shared_memory("5")
    await client.resume()
    after = await client.generate(body)
    assert after["meta_info"]["weight_version"] == "5" and after["output_ids"] != before["output_ids"]


async def ended(descriptor: int) -> None:
    """Returns when the process of this descriptor is gone."""
    gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(descriptor, gone.set)
    async with asyncio.timeout(20):
        await gone.wait()
    asyncio.get_running_loop().remove_reader(descriptor)
    os.close(descriptor)


WRONG_FLAGS = {
    "a limit of 0": (["--max-queued-requests", "0"], "--max-queued-requests: expected a number >= 1, got 0"),
    "one of two": (["--weights-fd", "3"], "--weights-fd: expected a file descriptor together with --weights-layout"),
    "exact": (["--exact", "--dtype", "bfloat16"], "--exact: expected --dtype float32, got 'bfloat16'"),
    "no layout": (
        ["--weights-fd", "0", "--weights-layout", "/nowhere.json"],
        "--weights-layout: expected a layout in JSON",
    ),
}


@pytest.mark.parametrize("case", WRONG_FLAGS)
def test_wrong_flags_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    flags, message = WRONG_FLAGS[case]
    assert main(["--model", str(tmp_path), "--port", "0", *flags]) == 2
    assert message in capsys.readouterr().err


WRONG_LAYOUTS = [
    ([], "expected an object with 'size'"),
    ({"size": 8, "tensors": {"a": 1}}, "a: expected an object with 'offset'"),
    ({"size": 8, "tensors": {"a": {"offset": -1, "dtype": "float32", "shape": [1]}}}, "in whole numbers >= 0"),
    ({"size": 8, "tensors": {"a": {"offset": 0, "dtype": "float33", "shape": [1]}}}, "'float33' is no dtype"),
    ({"size": 8, "tensors": {"a": {"offset": 2, "dtype": "float32", "shape": [1]}}}, "offset 2 is no multiple of 4"),
    ({"size": 8, "tensors": {"a": {"offset": 0, "dtype": "float32", "shape": [3]}}}, "ends at byte 12 of a memory"),
]


@pytest.mark.parametrize(("body", "message"), WRONG_LAYOUTS)
def test_layouts_that_cannot_be_read(body: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout_from_json(body)


def test_memory_that_is_too_small_is_refused(tmp_path: Path) -> None:
    descriptor = anonymous_file()
    os.ftruncate(descriptor, 64)
    (tmp_path / "layout.json").write_text('{"size": 128, "tensors": {}}')
    with pytest.raises(FlagError, match="--weights-fd: expected memory of 128 bytes, and not of 64"):
        shared_weights(descriptor, str(tmp_path / "layout.json"), "cpu")
    os.close(descriptor)


def test_a_deadline_says_who_waited_and_what_the_engine_said_last() -> None:
    async def scenario() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            if b"server_info" in head:
                body = b'{"last_error": "the disk is full"}'
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
                await writer.drain()
            await reader.read()
            writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        client = HttpEngineClient(url, who="the driver", control_timeout_s=0.1)
        said = rf"the driver waited 0\.1 s for {url}/pause_generation: .*the disk is full"
        with pytest.raises(EngineError, match=said):
            await client.pause()
        server.close()

    asyncio.run(scenario())
