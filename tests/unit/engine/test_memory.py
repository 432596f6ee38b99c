"""Memory given back and taken again; what a request hears meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from engine_tiny import make_checkpoint, request, run_all

from miles.engine.embedded import EmbeddedEngine
from miles.engine.embedded.model import load_tensors
from miles.engine.protocol import BadRequestError
from miles.errors import EngineError

GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}


def answer(engine: EmbeddedEngine) -> list[int]:
    return run_all(engine, [request([5, 6, 7], **GREEDY)])[0].output_ids


@pytest.mark.parametrize("tags", [["kv_cache"], ["weights"], None])
def test_released_memory_is_free_and_comes_back(engine: EmbeddedEngine, tags: list[str] | None) -> None:
    before = answer(engine)
    engine.release_memory(tags)
    cache_is_gone, weights_are_gone = engine._scheduler.cache.kv.numel() == 0, not engine.model.named
    assert cache_is_gone == (tags != ["weights"]) and weights_are_gone == (tags != ["kv_cache"])
    assert engine.model.layers == [] or not weights_are_gone
    with pytest.raises(EngineError, match=r"memory is released \(.*Call /resume_memory_occupation first") as caught:
        answer(engine)
    assert caught.value.status == 503
    engine.resume_memory(tags)
    assert answer(engine) == before and engine.weight_version == "default"


def test_the_published_order_of_a_colocated_run(engine: EmbeddedEngine, tmp_path: Path) -> None:
    """Released as a whole; weights back, updated; then the cache."""
    new = load_tensors(make_checkpoint(tmp_path / "new", "qwen3", seed=5), dtype=None, device="cpu")
    engine.release_memory()
    with pytest.raises(EngineError, match=r"weights are released: call /resume_memory_occupation with tags"):
        engine.update_some_weights(new, "2")
    engine.resume_memory(["weights"])
    engine.update_some_weights(new, "2")
    with pytest.raises(EngineError, match=r"released \(cuda_graph, kv_cache\)"):
        answer(engine)
    engine.resume_memory(["kv_cache", "cuda_graph"])
    assert engine.weight_version == "2" and len(answer(engine)) == 6


def test_weights_that_came_over_the_network_are_missing_until_the_next_update(
    engine: EmbeddedEngine, tmp_path: Path
) -> None:
    new = load_tensors(make_checkpoint(tmp_path / "new", "qwen3", seed=5), dtype=None, device="cpu")
    engine.update_some_weights(new, "2")
    expected = answer(engine)
    engine.release_memory()
    engine.resume_memory()
    assert engine.weights_missing
    with pytest.raises(EngineError, match="has no weights since /release_memory_occupation") as caught:
        answer(engine)
    assert caught.value.status == 503
    with pytest.raises(BadRequestError, match="weights are released"):
        engine.checker.snapshot()
    engine.update_some_weights(new, "3")
    assert answer(engine) == expected


def test_memory_stays_while_requests_run(engine: EmbeddedEngine) -> None:
    async def scenario() -> None:
        running = asyncio.create_task(engine.generate(request([5, 6], max_new_tokens=100, ignore_eos=True)))
        while not engine.num_running:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(engine.pause, "in_place")
        with pytest.raises(BadRequestError, match="1 requests are running"):
            await asyncio.to_thread(engine.release_memory)
        await asyncio.to_thread(engine.pause, "retract")
        await asyncio.to_thread(engine.release_memory)
        await asyncio.to_thread(engine.resume)
        await asyncio.sleep(0)
        assert not running.done(), "it waits for the memory"
        await asyncio.to_thread(engine.resume_memory)
        assert len((await running).output_ids) == 100

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_unknown_tags_are_named(engine: EmbeddedEngine) -> None:
    with pytest.raises(BadRequestError, match=r"tags must be among kv_cache, weights, cuda_graph, got \['gpu'\]"):
        engine.release_memory(["gpu"])
