"""What the tests of the tool examples look at after a run: samples, which of their tokens carry loss, weights."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import load_file

from examples.tiny_tools.make_tokenizer import tokenizer
from miles.observe.record import read_rollouts, recorded_rollouts
from miles.types import Sample

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "examples" / "tiny_tools" / "base"
TOKENIZER = tokenizer()

SMALL = ("--num-rollout", 3, "--rollout-batch-size", 4, "--n-samples-per-prompt", 4)
NO_EVAL = ("--eval-interval", 100, "--skip-eval-before-train")


def trained(run: Path) -> list[Sample]:
    return [sample for i in recorded_rollouts(run) for sample in read_rollouts(run, i, kept_only=True)]


def by_loss(sample: Sample) -> list[tuple[bool, str]]:
    """The response in pieces: whether they carry loss, and their text.

    Example: `[(True, "<search>capital Peru</search>"), (False, "<information>…</information>"), (True, "<answer>…")]`
    """
    assert sample.loss_mask is not None
    ids = zip(sample.tokens[-sample.response_length :], sample.loss_mask, strict=True)
    return [(bool(mask), TOKENIZER.decode([i for i, _ in run])) for mask, run in groupby(ids, key=lambda pair: pair[1])]


def check_samples(samples: list[Sample]) -> None:
    """Lengths agree, the text is the tokens, and what carries no loss has log-prob 0, what does has none of it."""
    for sample in samples:
        sample.validate()
        assert sample.loss_mask is not None and sample.rollout_log_probs is not None
        assert "".join(text for _, text in by_loss(sample)) == sample.response
        for mask, log_prob in zip(sample.loss_mask, sample.rollout_log_probs, strict=True):
            assert log_prob <= 0 if mask else log_prob == 0


def rewards_vary(samples: list[Sample]) -> bool:
    """Whether some group holds different rewards: without that nothing is learned."""
    rewards: dict[object, set[object]] = {}
    for sample in samples:
        rewards.setdefault(sample.group_index, set()).add(sample.reward)
    return any(len(values) > 1 for values in rewards.values())


def weights_changed(run: Path) -> bool:
    before, after = (load_file(folder / "model.safetensors") for folder in (BASE, run / "model"))
    return any(not torch.equal(before[name], after[name]) for name in before)
