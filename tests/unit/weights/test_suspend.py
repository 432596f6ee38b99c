"""Weights that change while requests run: no token is sampled between the first change and the update."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from miles.engine.embedded.engine import EmbeddedEngine
from miles.engine.embedded.model import load_config, load_tensors
from miles.engine.protocol import GenerateRequest, GenerateResult, SamplingParams
from miles.weights.in_process import InProcess

BASE = Path(__file__).resolve().parents[3] / "examples" / "quickstart" / "base"
TOKENS = 60


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return load_tensors(BASE, dtype=None, device="cpu")


@pytest.fixture
def engine(weights: dict[str, torch.Tensor]) -> Iterator[EmbeddedEngine]:
    engine = EmbeddedEngine(load_config(BASE), weights, None)
    yield engine
    engine.close()


def request() -> GenerateRequest:
    params = SamplingParams(temperature=0.0, max_new_tokens=TOKENS, ignore_eos=True)
    return GenerateRequest(input_ids=[13, 10, 14, 20], sampling_params=params)


async def steps_settle(engine: EmbeddedEngine) -> None:
    """Long enough for many steps, were there any."""
    await asyncio.sleep(0.3)


def test_a_request_that_comes_while_suspended_waits_for_the_new_weights(
    engine: EmbeddedEngine, weights: dict[str, torch.Tensor]
) -> None:
    transport = InProcess(engine)
    transport.update(weights, 1)

    async def scenario() -> GenerateResult:
        transport.suspend()
        assert engine.paused
        answer = asyncio.ensure_future(engine.generate(request()))
        await steps_settle(engine)
        assert not answer.done()
        await asyncio.to_thread(transport.update, weights, 2)
        assert not engine.paused
        return await asyncio.wait_for(answer, 30)

    result = asyncio.run(scenario())
    assert [(s.version, s.start, s.end) for s in result.weight_versions] == [("2", 0, TOKENS)]


def test_a_running_request_goes_on_under_the_new_weights(
    engine: EmbeddedEngine, weights: dict[str, torch.Tensor]
) -> None:
    """As a trainer does it: everything in the engine's thread, between two of its steps."""
    transport = InProcess(engine)
    transport.update(weights, 1)

    def train() -> None:
        transport.suspend()
        for tensor in weights.values():
            tensor.mul_(1.01)

    async def scenario() -> GenerateResult:
        answer = asyncio.ensure_future(engine.generate(request()))
        while engine.num_unfinished == 0:
            await asyncio.sleep(0.001)
        await asyncio.wrap_future(engine.submit(train))
        await steps_settle(engine)
        assert not answer.done()
        await asyncio.to_thread(transport.update, weights, 2)
        return await asyncio.wait_for(answer, 30)

    result = asyncio.run(scenario())
    spans = result.weight_versions
    assert spans[-1].version == "2" and spans[-1].end == TOKENS and len(result.output_ids) == TOKENS
    assert [s.start for s in spans[1:]] == [s.end for s in spans[:-1]], "no token is without a version"


def test_an_explicit_pause_outlasts_an_update(engine: EmbeddedEngine, weights: dict[str, torch.Tensor]) -> None:
    engine.pause("in_place")
    engine.suspend()
    engine.update_weights(weights, "7")
    assert engine.paused
    engine.resume()
    assert not engine.paused
