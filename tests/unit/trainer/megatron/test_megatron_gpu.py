"""The megatron backend on a GPU: equal to Hugging Face and AdamW there, too. Skipped where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[4]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]

# Of the loss and, relatively, of the gradient norm; float32 sums on a GPU have other orders than a CPU's.
BOUNDS = {"float32": (2e-5, 2e-4), "bfloat16": (5e-2, 1e-1)}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("model", ["llama", "qwen2", "qwen3", "qwen3 tied", "moe and dense"])
def test_three_steps_equal_hugging_face_and_adamw(model: str, dtype: str, tmp_path: Path) -> None:
    program = Path(__file__).with_name("gpu_steps.py")
    text = subprocess.run(
        [sys.executable, str(program), model, dtype, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert text.returncode == 0, text.stderr[-4000:]
    steps = json.loads(text.stdout.splitlines()[-1])
    assert len(steps) == 3
    of_loss, of_norm = BOUNDS[dtype]
    for step in steps:
        assert step["loss"] == pytest.approx(step["expected loss"], abs=of_loss)
        assert step["norm"] == pytest.approx(step["expected norm"], rel=of_norm)


def test_the_same_command_trains_and_resumes_on_a_gpu(tmp_path: Path) -> None:
    flags = ["--train-backend", "megatron", "--skip-eval-before-train", "--eval-interval", "100", "--quiet"]
    config = ["--config", "examples/quickstart/carry.yaml", *flags, "--save", str(tmp_path / "ck")]
    for number, more in (("2", []), ("3", ["--load", str(tmp_path / "ck")])):
        command = [sys.executable, "-m", "miles", "train", *config, "--num-rollout", number, *more]
        run_dir = ["--run-dir", str(tmp_path / number)]
        result = subprocess.run([*command, *run_dir], capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, result.stderr[-4000:]
        lines = [json.loads(line) for line in (tmp_path / number / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "train/step" in line]
        assert steps and all(line["train/grad_norm"] > 0 for line in steps)
        # The trainer computes in bfloat16 and hands its weights over in it; the engine sums in another order.
        assert all(line["train/train_rollout_logprob_abs_diff"] < 0.1 for line in steps)
