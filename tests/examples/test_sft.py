"""examples/sft: the conversations, their masks, and a run whose held-out loss falls without an engine."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tool_runs import BASE, TOKENIZER
from transformers import AutoModelForCausalLM

from examples.sft import conversations
from miles.rollout.loss_mask import MultiTurnLossMaskGenerator

CONFIG = "examples/sft/sft.yaml"
HELDOUT = Path(conversations.__file__).parent / "data" / "heldout.jsonl"
FEW = 16  # of the held-out conversations
ON_FEW = ("--eval-prompt-data", "heldout", f"{HELDOUT}@[:{FEW}]")
Train = Callable[..., Path]
Metrics = Callable[[Path, str], list[float]]
MASKS = MultiTurnLossMaskGenerator(TOKENIZER, "template")


def held_out() -> list[tuple[list[int], list[int]]]:
    rows = [json.loads(line) for line in HELDOUT.read_text().splitlines()[:FEW]]
    return [MASKS.get_loss_mask(row["messages"], row["tools"]) for row in rows]


@torch.no_grad()
def loss_of(folder: Path) -> float:
    """Mean negative log-likelihood per learned token, by transformers alone, one conversation at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    total, count = 0.0, 0
    for ids, mask in held_out():
        log_p = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        of_next = log_p.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        learned = torch.tensor(mask[1:], dtype=torch.bool)
        total, count = total - float(of_next[learned].sum()), count + int(learned.sum())
    return total / count


def test_the_files_beside_the_example_are_what_the_code_writes() -> None:
    for path, content in conversations.files().items():
        assert path.read_text(encoding="utf-8") == content, path


def test_guesses_of_the_pupil_are_seen_and_not_learned() -> None:
    guessed = [row for row in conversations.conversations() if row["messages"][1].get("step_loss_mask") == 0]
    assert len(guessed) > 50
    for row in guessed:
        ids, mask = MASKS.get_loss_mask(row["messages"], row["tools"])
        guess = row["messages"][1]["content"]
        assert guess in TOKENIZER.decode(ids)
        learned = MASKS.get_text_from_loss_mask(ids, mask)
        assert len(learned) == 4 and guess not in learned[0], "two calls and two answers"


def test_the_held_out_loss_falls_and_is_the_loss(train: Train, metrics: Metrics, capsys: pytest.CaptureFixture) -> None:
    run = train(CONFIG, *ON_FEW, "--num-rollout", 6, "--eval-interval", 3)
    losses = metrics(run, "eval/heldout-loss")
    assert len(losses) == 3 and losses[0] > 1.2 and losses[2] < 0.6 * losses[0] and losses[2] < losses[1]
    assert losses[0] == pytest.approx(loss_of(BASE), abs=1e-4)
    perplexities = metrics(run, "eval/heldout-perplexity")
    assert perplexities == pytest.approx([math.exp(loss) for loss in losses])
    assert metrics(run, "train/loss")[0] == pytest.approx(losses[0], rel=0.2), "both are means over learned tokens"
    shown = capsys.readouterr().out
    assert f"evaluation before training: heldout-loss {losses[0]:.4g}" in shown
    summary = json.loads((run / "summary.json").read_text())
    assert summary["eval_before"] == {"heldout-loss": losses[0]}
    assert summary["eval_after"] == {"heldout-loss": losses[2]}
    assert not (run / "reward.png").exists(), "there are no rewards"


def test_a_model_is_judged_without_training(train: Train, metrics: Metrics) -> None:
    run = train(CONFIG, *ON_FEW, "--num-rollout", 0)
    assert len(metrics(run, "eval/heldout-loss")) == 1 and not metrics(run, "train/loss")


def test_how_it_is_cut_into_micro_batches_does_not_matter(train: Train, metrics: Metrics) -> None:
    found = [
        metrics(train(CONFIG, *ON_FEW, "--num-rollout", 0, "--max-tokens-per-gpu", tokens), "eval/heldout-loss")[0]
        for tokens in (400, 100_000)
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-6)
