"""Sampling statistics: the distribution that comes out is the one that was asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from miles.engine.embedded.sampler import BatchSampler, uniform
from miles.engine.protocol import SamplingParams

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
ROWS = 40_000

SETTINGS = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 2.0},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "all together": {"temperature": 1.5, "top_k": 4, "top_p": 0.9, "min_p": 0.05},
}


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits, -1)


def expected_probs(temperature: float = 1.0, top_k: int = 6, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """Written out plainly: cut the sorted distribution, then renormalise."""
    probs = torch.softmax(LOGITS.double() / temperature, -1).numpy()
    kept, mass = np.zeros_like(probs), 0.0
    for rank, token in enumerate(np.argsort(-probs)):
        if rank < top_k and mass <= top_p and probs[token] >= min_p * probs.max():
            kept[token] = probs[token]
        mass += probs[token]
    return kept / kept.sum()


def sample(params: SamplingParams, rows: int, seeds: list[int] | None = None, position: int = 7):
    seeds = list(range(rows)) if seeds is None else seeds
    sampler = BatchSampler([params] * rows, seeds, [position] * rows, torch.device("cpu"), log_softmax)
    return sampler.sample(LOGITS.repeat(rows, 1))


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_pass_a_chi_square_test(name: str) -> None:
    tokens, _ = sample(SamplingParams(**SETTINGS[name]), ROWS)
    counts, probs = np.bincount(tokens.numpy(), minlength=6), expected_probs(**SETTINGS[name])
    assert counts[probs == 0].sum() == 0
    kept = probs > 0
    chi_square = (((counts - ROWS * probs)[kept]) ** 2 / (ROWS * probs[kept])).sum()
    # Mean + 5 standard deviations of a chi-square variable; the seeds are fixed, so this either holds or does not.
    freedom = kept.sum() - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_consecutive_positions_of_one_seed_are_as_good_as_seeds() -> None:
    noise = uniform(np.full(ROWS, 5, dtype=np.uint64), np.arange(ROWS, dtype=np.uint64))
    counts, _ = np.histogram(noise, bins=20, range=(0, 1))
    assert ((counts - ROWS / 20) ** 2 / (ROWS / 20)).sum() < 19 + 5 * math.sqrt(38)
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.02
    assert noise.min() >= 0 and noise.max() < 1


@pytest.mark.parametrize("name", SETTINGS)
def test_log_probs_are_those_before_cutting(name: str) -> None:
    tokens, logprobs = sample(SamplingParams(**SETTINGS[name]), 50)
    scores = torch.log_softmax(LOGITS / SETTINGS[name].get("temperature", 1.0), -1)
    torch.testing.assert_close(logprobs, scores[tokens])


def test_greedy_reports_unscaled_log_probs() -> None:
    tokens, logprobs = sample(SamplingParams(temperature=0.0, top_p=0.5), 4)
    assert tokens.tolist() == [0] * 4
    torch.testing.assert_close(logprobs, torch.log_softmax(LOGITS, -1)[:1].repeat(4))


def test_rows_with_different_parameters_do_not_touch_each_other() -> None:
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(top_k=2),
        SamplingParams(temperature=0.3),
    ]
    seeds = [11, 12, 13, 14]
    sampler = BatchSampler(params, seeds, [3] * 4, torch.device("cpu"), log_softmax)
    tokens, logprobs = sampler.sample(LOGITS.repeat(4, 1))
    for i, one in enumerate(params):
        alone_tokens, alone_logprobs = sample(one, 1, [seeds[i]], position=3)
        assert tokens[i] == alone_tokens[0]
        torch.testing.assert_close(logprobs[i], alone_logprobs[0])


def test_a_forbidden_token_is_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, -math.inf]]).repeat(2000, 1)
    sampler = BatchSampler([SamplingParams()] * 2000, list(range(2000)), [0] * 2000, torch.device("cpu"), log_softmax)
    tokens, logprobs = sampler.sample(logits)
    assert set(tokens.tolist()) == {1}
    assert logprobs.abs().max() == 0
