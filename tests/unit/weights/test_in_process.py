"""Trainer and engine on the same tensors: nothing is copied, and nothing old is served."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from miles.config import parse
from miles.engine.embedded.engine import EmbeddedEngine
from miles.engine.embedded.model import load_config
from miles.engine.protocol import GenerateRequest, GenerateResult, SamplingParams
from miles.errors import CheckpointError
from miles.rollout.tokenizer import load_tokenizer
from miles.trainer.fsdp.backend import FsdpBackend
from miles.weights.in_process import InProcess

BASE = Path(__file__).resolve().parents[3] / "examples" / "quickstart" / "base"
FLAGS = shlex.split("""
    --prompt-data none --num-rollout 1 --rollout-batch-size 1 --n-samples-per-prompt 1 --num-steps-per-rollout 1
    --train-backend fsdp
""")


@pytest.fixture
def backend() -> FsdpBackend:
    config, _ = parse([*FLAGS, "--hf-checkpoint", str(BASE)])
    return FsdpBackend(str(BASE), config.train, config.optimizer)


@pytest.fixture
def engine(backend: FsdpBackend) -> Iterator[EmbeddedEngine]:
    engine = fresh(backend)
    yield engine
    engine.close()


def fresh(backend: FsdpBackend) -> EmbeddedEngine:
    return EmbeddedEngine(load_config(BASE), backend.weights(), load_tokenizer(str(BASE), trust_remote_code=True))


def generate(engine: EmbeddedEngine) -> GenerateResult:
    """The same prompt every time, so that a prefix kept from former weights would be found."""
    greedy = SamplingParams(temperature=0.0, max_new_tokens=40)
    request = GenerateRequest(text="859+467=?", sampling_params=greedy, return_logprob=True)
    return asyncio.run(engine.generate(request))


def change(backend: FsdpBackend) -> None:
    with torch.no_grad():
        for p in backend.params:
            p.mul_(1.05)


def test_engine_serves_the_new_weights_under_the_new_version(backend: FsdpBackend, engine: EmbeddedEngine) -> None:
    transport = InProcess(engine)
    transport.update(backend.weights(), 1)
    before = generate(engine)
    change(backend)
    transport.update(backend.weights(), 2)
    after = generate(engine)
    assert (before.weight_version, after.weight_version) == ("1", "2")
    other = fresh(backend)
    try:
        want = generate(other)
    finally:
        other.close()
    assert after.output_ids == want.output_ids
    assert log_probs(after) == pytest.approx(log_probs(want), abs=1e-5) != log_probs(before)


def log_probs(result: GenerateResult) -> list[float]:
    return [entry[0] for entry in result.to_json()["meta_info"]["output_token_logprobs"]]


def test_the_trainer_s_tensors_are_handed_over_themselves(backend: FsdpBackend) -> None:
    given = backend.weights()
    assert {t.data_ptr() for t in given.values()} == {p.data_ptr() for p in backend.params}


def test_a_model_of_another_shape_is_refused_and_the_old_one_stays(
    backend: FsdpBackend, engine: EmbeddedEngine
) -> None:
    transport = InProcess(engine)
    transport.update(backend.weights(), 1)
    before = generate(engine)
    cut = {name: tensor[:4] for name, tensor in backend.weights().items()}
    with pytest.raises(CheckpointError):
        transport.update(cut, 2)
    after = generate(engine)
    assert after.output_ids == before.output_ids and engine.weight_version == "1"
