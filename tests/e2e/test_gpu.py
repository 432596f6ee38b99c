"""The quickstart's command on a GPU. Where there is none these are skipped: everything else proves itself on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from miles.__main__ import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


def test_the_same_command_trains_on_a_gpu(tmp_path: Path) -> None:
    flags = ["--num-rollout", "2", "--skip-eval-before-train", "--eval-interval", "100", "--quiet"]
    status = main(["train", "--config", "examples/quickstart/carry.yaml", "--run-dir", str(tmp_path / "run"), *flags])
    assert status == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/step" in line]
    assert len(steps) == 4
    # The engine computes on the trainer's own tensors: what differs is the order of sums.
    assert all(line["train/train_rollout_logprob_abs_diff"] < 1e-3 for line in steps)
    assert all(line["train/grad_norm"] > 0 for line in steps)
