"""Runs that train a mixture of experts: without replay, with the log-prob pass's experts, with the engine's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from e2e_runs import distance, exported, metrics, saving, train
from moe_model import NUM_LAYERS, TOP_K, make_moe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from miles.engine.embedded import EmbeddedEngine
from miles.observe.record import read_rollouts

REWARD = f"{Path(__file__).with_name('moe_model.py')}:digits"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe(tmp_path_factory.mktemp("moe") / "model")


def run(folder: Path, model: Path, *more: object) -> Path:
    return train(folder, "--hf-checkpoint", model, "--custom-rm-path", REWARD, *saving(folder), *more)


def test_a_mixture_of_experts_trains_and_is_exported(tmp_path: Path, model: Path) -> None:
    done = run(tmp_path / "run", model)
    assert all(norm > 0.01 for norm in metrics(done, "train/grad_norm").values())
    assert max(metrics(done, "train/train_rollout_logprob_abs_diff").values()) < 2e-6
    before, after = load_file(model / "model.safetensors"), exported(done)
    assert before.keys() == after.keys() and "model.layers.0.mlp.experts.7.gate_proj.weight" in after
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == before.keys() and distance(before, after) < 0.1
    loaded = AutoModelForCausalLM.from_pretrained(done / "model")
    third = after["model.layers.2.mlp.experts.3.down_proj.weight"]
    assert torch.equal(loaded.model.layers[2].mlp.experts.down_proj[3], third)
    EmbeddedEngine.from_folder(done / "model").close()


@pytest.mark.parametrize("flag", ["--use-routing-replay", "--use-rollout-routing-replay"])
def test_replay_changes_nothing_where_all_agree_and_survives_recomputation(
    tmp_path: Path, model: Path, flag: str
) -> None:
    """Engine and trainer have the same float32 weights: the experts are the same but for ties, and so is the run."""
    free, replayed = run(tmp_path / "free", model), run(tmp_path / "replayed", model, flag)
    recomputed = run(tmp_path / "recomputed", model, flag, "--gradient-checkpointing", "--max-tokens-per-gpu", 150)
    for name in ("train/loss", "train/grad_norm", "train/entropy_loss"):
        values = [metrics(one, name) for one in (free, replayed, recomputed)]
        assert values[1][0] == pytest.approx(values[0][0], rel=1e-4, abs=1e-6)
        for step in range(2):  # later rollouts are other ones: AdamW enlarges rounding
            assert values[2][step] == pytest.approx(values[1][step], rel=1e-3, abs=1e-5)
    assert max(metrics(replayed, "train/train_rollout_logprob_abs_diff").values()) < 2e-6


def test_the_engines_experts_reach_the_trainer(tmp_path: Path, model: Path) -> None:
    done = run(tmp_path / "run", model, "--use-rollout-routing-replay", "--num-rollout", 1)
    for sample in read_rollouts(done, 0):
        experts = sample.rollout_routed_experts
        assert experts.shape == (len(sample.tokens) - 1, NUM_LAYERS, TOP_K) and experts.dtype == np.int32
        assert not experts[:, 1].any() and len(np.unique(experts[:, [0, 2]])) == 8
        assert (experts[:, 0, 0] != experts[:, 0, 1]).all()


def test_replay_without_experts_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", "--use-rollout-routing-replay", status=2)
    told = " ".join(capsys.readouterr().err.split())
    assert "--use-rollout-routing-replay: the model in" in told and "has no experts to route to" in told
    assert "Traceback" not in told
