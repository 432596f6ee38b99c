"""Runs of a second with published plug-ins, inside this process: the quickstart's task, two rollouts of 4 x 4 samples.

Plug-ins are named as users name them whose folder is on PYTHONPATH: `search_generate.generate`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from miles.__main__ import main
from miles.observe.record import read_metrics

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

BASE = f"""
hf-checkpoint: {ROOT}/examples/quickstart/base
prompt-data: {ROOT}/examples/quickstart/data/train.jsonl
input-key: prompt
label-key: label
num-rollout: 2
rollout-batch-size: 4
n-samples-per-prompt: 4
num-steps-per-rollout: 1
rollout-max-response-len: 24
rollout-max-context-len: 256
advantage-estimator: grpo
train-backend: fsdp
use-dynamic-batch-size: true
max-tokens-per-gpu: 2048
lr: 2.0e-4
progress: plain
"""


def train(folder: Path, *flags: str, status: int = 0) -> Path:
    """`miles train` with these flags; the run directory."""
    (folder / "base.yaml").write_text(BASE)
    run = folder / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.chdir(ROOT):
            got = main(["train", "--config", str(folder / "base.yaml"), "--run-dir", str(run), *flags])
    finally:
        torch.set_num_threads(threads)
    assert got == status, f"exit status {got}, expected {status}"
    return run


def logged(run: Path, key: str) -> list[float]:
    """Every value of a metric, in order."""
    return [line[key] for line in read_metrics(run) if key in line]
