"""Weights over HTTP: every transport arrives whole or not at all, and what fails leaves the old weights in use."""

from __future__ import annotations

import asyncio
import base64
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from engine_tiny import make_checkpoint, request
from safetensors.torch import load_file, save, save_file

from miles.engine.client import HttpEngineClient
from miles.engine.embedded import EmbeddedEngine
from miles.engine.embedded.http import Limits
from miles.engine.embedded.server import create_app, serve_in_loop
from miles.errors import EngineError
from miles.weights.shared_memory import anonymous_file, layout_of, views

Tensors = dict[str, torch.Tensor]
HERE = Path(__file__).resolve().parent
GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights of the engine's architecture."""
    return make_checkpoint(tmp_path_factory.mktemp("other") / "model", "qwen3", seed=5)


@pytest.fixture(scope="module")
def new(other: Path) -> Tensors:
    return load_file(str(other / "model.safetensors"))


def run(
    engine: EmbeddedEngine,
    scenario: Callable[[HttpEngineClient], Coroutine[Any, Any, None]],
    **options: Any,
) -> None:
    """`scenario` with a client of the engine behind a real port."""

    async def go() -> None:
        async with served(engine, **options) as client:
            await scenario(client)

    asyncio.run(asyncio.wait_for(go(), 60))


@asynccontextmanager
async def served(engine: EmbeddedEngine, **options: Any) -> AsyncIterator[HttpEngineClient]:
    async with serve_in_loop(create_app(engine, **options), "127.0.0.1", 0) as url:
        yield HttpEngineClient(url)


def in_use(engine: EmbeddedEngine, tensors: Tensors) -> bool:
    """Whether the engine computes with exactly these."""
    assert set(engine.model.named) == set(tensors)
    return all(torch.equal(engine.model.named[name], tensor) for name, tensor in tensors.items())


async def post(client: HttpEngineClient, path: str, **options: Any) -> httpx.Response:
    async with httpx.AsyncClient() as http:
        return await http.post(f"{client.base_url}{path}", **options)


@contextmanager
def unchanged(engine: EmbeddedEngine) -> Iterator[None]:
    """The weights and their version are the same before and after."""
    before = {name: tensor.clone() for name, tensor in engine.model.named.items()}
    version = engine.weight_version
    yield
    assert engine.weight_version == version and in_use(engine, before)


# ---- in one call -----------------------------------------------------------------------------------------------------


def test_safetensors_as_the_body_and_in_base64(engine: EmbeddedEngine, new: Tensors) -> None:
    async def scenario(client: HttpEngineClient) -> None:
        await client.update_weights_from_safetensors(save(new), "7/a b")
        assert await client.weight_version() == "7/a b" and in_use(engine, new)
        doubled = {name: tensor * 2 for name, tensor in new.items()}
        body = {
            "serialized_named_tensors": [base64.b64encode(save(doubled)).decode()],
            "load_format": "safetensors",
            "weight_version": "8",
            "flush_cache": True,
        }
        answer = await post(client, "/update_weights_from_tensor", json=body)
        assert answer.json()["success"] is True and answer.status_code == 200
        assert engine.weight_version == "8" and in_use(engine, doubled)
        answered = await client.generate({"input_ids": [5, 6], "sampling_params": GREEDY})
        assert answered["meta_info"]["weight_version"] == "8"

    run(engine, scenario)


def test_tensors_are_taken_in_the_engine_s_dtype(engine: EmbeddedEngine, new: Tensors) -> None:
    async def scenario(client: HttpEngineClient) -> None:
        await client.update_weights_from_safetensors(save({n: t.to(torch.bfloat16) for n, t in new.items()}), "2")

    run(engine, scenario)
    assert in_use(engine, {n: t.to(torch.bfloat16).float() for n, t in new.items()})


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


NORM = {"model.norm.weight": torch.ones(32)}
REFUSED = {
    "a pickle": ({"serialized_named_tensors": [b64(pickle.dumps(NORM))]}, "is never read from the network"),
    "SGLang's bucket": (
        {"serialized_named_tensors": [b64(b"x")], "load_format": "flattened_bucket"},
        "load_format 'flattened_bucket': this engine takes 'safetensors' only",
    ),
    "no base64": ({"serialized_named_tensors": ["?"], "load_format": "safetensors"}, "not base64"),
    "no safetensors": (
        {"serialized_named_tensors": [b64(b"hello")], "load_format": "safetensors"},
        "these bytes are no safetensors file",
    ),
    "a part": (
        {"serialized_named_tensors": [b64(save(NORM))], "load_format": "safetensors"},
        "these are 1 of 24 weights ('model.embed_tokens.weight' is missing)",
    ),
    "another shape": (
        {
            "serialized_named_tensors": [b64(save({"model.norm.weight": torch.ones(5)}))],
            "load_format": "safetensors",
        },
        "model.norm.weight: expected shape [32], got [5]",
    ),
    "an unknown name": (
        {"serialized_named_tensors": [b64(save({"model.nom": torch.ones(5)}))], "load_format": "safetensors"},
        "'model.nom' is no weight of this model",
    ),
    "two ranks": (
        {"serialized_named_tensors": [b64(save(NORM))] * 2, "load_format": "safetensors"},
        "takes one entry, got 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_taken_is_refused_and_the_old_weights_stay(engine: EmbeddedEngine, case: str) -> None:
    body, message = REFUSED[case]

    async def scenario(client: HttpEngineClient) -> None:
        answer = await post(client, "/update_weights_from_tensor", json=body | {"weight_version": "9"})
        assert answer.status_code == 400 and answer.json()["success"] is False
        assert message in answer.json()["message"] and message in answer.json()["error"]["message"]
        assert message in (await client.server_info())["last_error"]

    with unchanged(engine):
        run(engine, scenario)


def test_a_folder_that_does_not_fit_leaves_the_old_weights(
    engine: EmbeddedEngine, checkpoints: dict[str, Path], new: Tensors, tmp_path: Path
) -> None:
    """Without the norms of heads, a Qwen3 is a model as well: another one."""
    save_file({name: t for name, t in new.items() if "k_norm" not in name}, tmp_path / "model.safetensors")

    async def scenario(client: HttpEngineClient) -> None:
        with pytest.raises(EngineError, match=r"q_proj.weight: expected shape \[64, 32\] from config.json, got"):
            await client.update_weights_from_disk(str(checkpoints["llama"]), "9")
        with pytest.raises(EngineError, match=r"have no tensor 'model.layers.0.self_attn.k_norm.weight'"):
            await client.update_weights_from_disk(str(tmp_path), "9")

    with unchanged(engine):
        run(engine, scenario)


def test_a_version_can_be_renamed(engine: EmbeddedEngine) -> None:
    async def scenario(client: HttpEngineClient) -> None:
        answer = await post(client, "/update_weight_version", json={"new_version": "12"})
        assert answer.json()["success"] is True and await client.weight_version() == "12"

    run(engine, scenario)


# ---- in parts --------------------------------------------------------------------------------------------------------


def halves(new: Tensors) -> list[Tensors]:
    names = sorted(new)
    return [{name: new[name] for name in names[start::2]} for start in (0, 1)]


def test_parts_are_used_together_at_the_end(engine: EmbeddedEngine, new: Tensors) -> None:
    first, second = halves(new)

    async def scenario(client: HttpEngineClient) -> None:
        old = {name: tensor.clone() for name, tensor in engine.model.named.items()}
        await client.begin_weight_update()
        with pytest.raises(EngineError, match="an update is under way"):
            await client.begin_weight_update()
        for part in (first, second):
            await client.update_weights_from_safetensors(save(part), "2")
            assert in_use(engine, old), "no token ever comes from a mixture"
            answer = await client.generate({"input_ids": [5, 6], "sampling_params": GREEDY})
            assert answer["meta_info"]["weight_version"] == "default"
        await client.end_weight_update()
        assert engine.weight_version == "2" and in_use(engine, new)
        with pytest.raises(EngineError, match="no update is under way"):
            await client.end_weight_update()

    run(engine, scenario)


def test_an_update_of_some_weights_keeps_the_others(engine: EmbeddedEngine, new: Tensors) -> None:
    first, _ = halves(new)
    expected = dict(engine.model.named) | first

    async def scenario(client: HttpEngineClient) -> None:
        await client.begin_weight_update()
        await client.update_weights_from_safetensors(save(first))
        await client.end_weight_update()

    run(engine, scenario)
    assert in_use(engine, expected) and engine.weight_version == "default"


def test_a_bad_part_does_not_end_the_update(engine: EmbeddedEngine, new: Tensors) -> None:
    async def scenario(client: HttpEngineClient) -> None:
        await client.begin_weight_update()
        with pytest.raises(EngineError, match=r"expected shape \[32\], got \[5\]"):
            await client.update_weights_from_safetensors(save({"model.norm.weight": torch.ones(5)}), "2")
        await client.update_weights_from_safetensors(save(new), "3")
        await client.end_weight_update()

    run(engine, scenario)
    assert in_use(engine, new) and engine.weight_version == "3"


def test_an_update_that_nobody_goes_on_with_is_given_up(engine: EmbeddedEngine, new: Tensors) -> None:
    async def scenario(client: HttpEngineClient) -> None:
        await client.begin_weight_update()
        await client.update_weights_from_safetensors(save(new), "2")
        while engine.last_error is None:
            await asyncio.sleep(0.01)
        assert "a weight update was given up: nothing came for 0.3 s after 24 tensors" in engine.last_error
        with pytest.raises(EngineError, match="no update is under way"):
            await client.end_weight_update()

    with unchanged(engine):
        run(engine, scenario, limits=Limits(weights_timeout_s=0.3))


def test_stacked_experts_of_a_trainer(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    engine = EmbeddedEngine.from_folder(checkpoints["qwen3-moe"])
    new = load_file(str(make_checkpoint(tmp_path / "moe", "qwen3-moe", seed=5) / "model.safetensors"))
    sent = {name: tensor for name, tensor in new.items() if ".experts." not in name}
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        each = {part: [new[f"{stem}.{e}.{part}_proj.weight"] for e in range(8)] for part in ("gate", "up", "down")}
        sent[f"{stem}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(each["gate"], each["up"])])
        sent[f"{stem}.down_proj"] = torch.stack(each["down"])

    async def scenario(client: HttpEngineClient) -> None:
        await client.update_weights_from_safetensors(save(sent), "2")

    run(engine, scenario)
    assert in_use(engine, new)
    engine.close()


# ---- shared memory ---------------------------------------------------------------------------------------------------


def test_shared_memory_is_read_in_place(engine: EmbeddedEngine, checkpoints: dict[str, Path], new: Tensors) -> None:
    layout, size = layout_of({name: (tuple(t.shape), t.dtype) for name, t in new.items()})
    descriptor = anonymous_file()
    os.ftruncate(descriptor, size)
    memory = views(descriptor, layout, size)
    old = load_file(str(checkpoints["qwen3"] / "model.safetensors"))
    for name, tensor in old.items():
        memory[name].copy_(tensor)
    sharing = EmbeddedEngine.from_folder(checkpoints["qwen3"], read=lambda: memory)

    async def scenario(client: HttpEngineClient) -> None:
        running = asyncio.create_task(
            sharing.generate(request([5, 6], max_new_tokens=100, ignore_eos=True, sampling_seed=1))
        )
        while sharing.num_unfinished == 0:
            await asyncio.sleep(0.001)
        await client.pause("in_place")
        for name, tensor in new.items():
            memory[name].copy_(tensor)
        await client.update_weights_from_shared_memory("7")
        assert in_use(sharing, new)
        await client.resume()
        assert (await running).weight_version == "7"
        # Released, rewritten, taken again: as between two rollouts of a colocated run.
        await client.pause()
        await client.release_memory()
        for name, tensor in old.items():
            memory[name].copy_(tensor)
        await client.resume_memory(["weights"])
        await client.update_weights_from_shared_memory("8")
        await client.resume_memory()
        await client.resume()
        assert in_use(sharing, old) and await client.weight_version() == "8"

    run(sharing, scenario, shared=lambda: memory)
    assert sharing.model.embed.data_ptr() == memory["model.embed_tokens.weight"].data_ptr()
    sharing.close()
    os.close(descriptor)


def test_shared_memory_changes_while_nothing_runs(engine: EmbeddedEngine, new: Tensors) -> None:
    async def scenario(client: HttpEngineClient) -> None:
        engine.suspend()  # what is inside stays inside
        asked = asyncio.create_task(engine.generate(request([5], max_new_tokens=100, ignore_eos=True)))
        while engine.num_unfinished == 0:
            await asyncio.sleep(0.001)
        engine._suspended = False
        with pytest.raises(EngineError, match="1 requests are being generated while the memory changes"):
            await client.update_weights_from_shared_memory("7")
        await client.abort_all()
        await asked

    with unchanged(engine):
        run(engine, scenario, shared=lambda: new)


def test_a_server_without_shared_memory_says_so(engine: EmbeddedEngine) -> None:
    async def scenario(client: HttpEngineClient) -> None:
        with pytest.raises(EngineError, match="started without --weights-fd"):
            await client.update_weights_from_shared_memory("7")

    run(engine, scenario)


# ---- process groups --------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@contextmanager
def sender(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(HERE / "weight_sender.py"), *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("form", ["plain", "flattened"])
def test_a_broadcast_of_rank_0(engine: EmbeddedEngine, new: Tensors, tmp_path: Path, form: str) -> None:
    save_file(new, tmp_path / "new.safetensors")
    names, group, port = sorted(new), f"test-{form}", free_port()
    body = {
        "names": names,
        "dtypes": ["float32", *["torch.float32"] * (len(names) - 1)],
        "shapes": [list(new[name].shape) for name in names],
        "group_name": group,
        "weight_version": "7",
    } | ({"load_format": "flattened_bucket"} if form == "flattened" else {})

    async def scenario(client: HttpEngineClient) -> None:
        await client.init_weights_update_group(
            master_address="127.0.0.1", master_port=port, rank_offset=1, world_size=2, group_name=group, backend="gloo"
        )
        answer = await post(client, "/update_weights_from_distributed", json=body, timeout=30)
        assert answer.json()["success"] is True, answer.text
        assert engine.weight_version == "7" and in_use(engine, new)
        await client.destroy_weights_update_group(group)
        with pytest.raises(EngineError, match=f"in no group '{group}'"):
            await client.update_weights_from_distributed(names, body["dtypes"], body["shapes"], group_name=group)

    with sender(str(port), group, str(tmp_path / "new.safetensors"), form):
        run(engine, scenario, limits=Limits(weights_timeout_s=60))


def test_members_who_do_not_come_are_waited_for_until_the_deadline(engine: EmbeddedEngine) -> None:
    async def scenario(client: HttpEngineClient) -> None:
        with pytest.raises(EngineError, match=r"waited 0.5 s at most for the 2 members of group 'nobody' at 127.0.0.1"):
            await client.init_weights_update_group(
                master_address="127.0.0.1",
                master_port=free_port(),
                rank_offset=1,
                world_size=2,
                group_name="nobody",
                backend="gloo",
            )

    run(engine, scenario, limits=Limits(weights_timeout_s=0.5))


def test_a_sender_who_dies_before_the_broadcast(engine: EmbeddedEngine, new: Tensors, tmp_path: Path) -> None:
    save_file({}, tmp_path / "nothing.safetensors")
    port = free_port()

    async def scenario(client: HttpEngineClient, process: subprocess.Popen[str]) -> None:
        await client.init_weights_update_group(
            master_address="127.0.0.1", master_port=port, rank_offset=1, world_size=2, group_name="dies", backend="gloo"
        )
        assert process.stdout is not None
        await asyncio.to_thread(process.stdout.readline)
        process.kill()
        shapes = [list(new[name].shape) for name in sorted(new)]
        with pytest.raises(EngineError, match=r"from rank 0 of group 'dies'.*The group is gone"):
            await client.update_weights_from_distributed(
                sorted(new), ["float32"] * len(new), shapes, group_name="dies", version="9"
            )

    with unchanged(engine), sender(str(port), "dies", str(tmp_path / "nothing.safetensors")) as process:
        run(engine, lambda client: scenario(client, process), limits=Limits(weights_timeout_s=20))


WRONG_GROUPS = [
    ({"backend": "nccl"}, "nccl needs a GPU"),
    ({"backend": "pigeon"}, "has no backend 'pigeon'"),
    ({"rank_offset": 2}, "rank_offset 2 is outside world_size 2"),
    ({"master_port": 70000}, "master_port: expected less than or equal to 65535"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_GROUPS)
def test_groups_that_cannot_be(engine: EmbeddedEngine, change: dict[str, Any], message: str) -> None:
    right = {"master_address": "127.0.0.1", "master_port": 9, "rank_offset": 1, "world_size": 2, "backend": "gloo"}

    async def scenario(client: HttpEngineClient) -> None:
        answer = await post(client, "/init_weights_update_group", json=right | change)
        assert answer.status_code == 400 and message in answer.json()["error"]["message"]

    run(engine, scenario)


# ---- looking at weights ----------------------------------------------------------------------------------------------


def test_the_checker_finds_what_an_update_missed(engine: EmbeddedEngine) -> None:
    old = {name: tensor.clone() for name, tensor in engine.model.named.items()}

    async def scenario(client: HttpEngineClient) -> None:
        with pytest.raises(EngineError, match="Send action 'snapshot' first"):
            await client.weights_checker("compare")
        await client.weights_checker("snapshot")
        before = (await client.weights_checker("checksum"))["per_engine_checksum"]
        await client.weights_checker("reset_tensors", skip_tensor_list=["norm"])
        assert torch.equal(engine.model.named["model.norm.weight"], old["model.norm.weight"])
        with pytest.raises(EngineError, match=r"\d+ parameters differ .*model.embed_tokens.weight \(\d+ of \d+ elem"):
            await client.weights_checker("compare")
        almost = old | {"model.norm.weight": old["model.norm.weight"].clone()}
        almost["model.norm.weight"][3] += 0.5
        await client.update_weights_from_safetensors(save(almost), "2")
        one = r"1 parameters differ from the snapshot: model.norm.weight \(1 of 32 elements, largest difference 0.5\)"
        with pytest.raises(EngineError, match=one):
            await client.weights_checker("compare")
        await client.update_weights_from_safetensors(save(old), "3")
        assert (await client.weights_checker("checksum"))["per_engine_checksum"] == before
        assert (await client.weights_checker("compare"))["success"] is True
        values = await client.get_weights_by_name("model.norm.weight", 3)
        assert values == old["model.norm.weight"][:3].tolist()
        with pytest.raises(EngineError, match=r"'model.nom' is no weight"):
            await client.get_weights_by_name("model.nom")

    run(engine, scenario)


def test_resetting_does_not_touch_a_trainer_s_tensors(checkpoints: dict[str, Path], new: Tensors) -> None:
    mine = {name: tensor.clone() for name, tensor in new.items()}
    engine = EmbeddedEngine.from_folder(checkpoints["qwen3"], read=lambda: mine)
    engine.checker.reset()
    assert all(torch.equal(mine[name], new[name]) for name in new) and not in_use(engine, mine)
