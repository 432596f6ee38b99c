"""The real TensorBoard and W&B: a run logs to both, and what they have written is read back."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from miles.__main__ import main
from miles.observe.record import read_metrics
from miles.observe.tracking import in_one_line

ROOT = Path(__file__).resolve().parents[3]

# The published names that every run of this kind logs, by step axis.
PUBLISHED = {
    "rollout/step": [
        *(f"rollout/response_len/{s}" for s in ("mean", "median", "max", "min")),
        "rollout/repetition_frac", "rollout/truncated_ratio", "rollout/response_lengths", "rollout/total_lengths",
        "rollout/rewards", "rollout/raw_reward", "rollout/truncated", "rollout/log_probs",
        "rollout/rollout_log_probs", "rollout/advantages", "rollout/returns",
        "perf/rollout_time", "perf/tokens_per_gpu_per_sec", "perf/longest_sample_tokens_per_sec",
        "perf/effective_tokens_per_gpu_per_sec", "perf/longest_effective_sample_tokens_per_sec",
        "perf/train_time", "perf/train_wait_time", "perf/actor_train_time", "perf/log_probs_time",
        "perf/data_preprocess_time", "perf/update_weights_time", "perf/step_time", "perf/wait_time_ratio",
        "passrate/pass@1", "passrate/pass@2",
        *(f"multi_turn/raw_response_length/response_length_{s}" for s in ("mean", "max", "min", "clip_ratio")),
        *(f"multi_turn/wo_obs_response_length/response_length_{s}" for s in ("mean", "max", "min")),
    ],
    "train/step": [
        "train/loss", "train/pg_loss", "train/entropy_loss", "train/pg_clipfrac", "train/ppo_kl", "train/grad_norm",
        "train/lr-pg_0", "train/train_rollout_logprob_abs_diff",
    ],
    "eval/step": [
        f"eval/{name}{key}" for name in ("greedy", "several")
        for key in ("", "-truncated_ratio", "-pass@1", "/response_len/mean", "/truncated_ratio", "/repetition_frac")
    ] + ["eval/several-pass@2"],
}  # fmt: skip


class Listener:
    """A proxy that serves nobody and counts who comes."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.visitors = 0
        self.came = threading.Event()
        threading.Thread(target=self._count, daemon=True).start()

    def _count(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                visitor, _ = self.socket.accept()
                self.visitors += 1
                self.came.set()
                visitor.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Listener]]:
    """One run with both trackers, and a proxy that would see whatever leaves this machine."""
    folder, listener = tmp_path_factory.mktemp("tracked"), Listener()
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(ROOT):
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"):
            patch.setenv(name, listener.url)
        for name in ("WANDB_MODE", "WANDB_ERROR_REPORTING"):
            patch.setenv(name, "")
            patch.delenv(name)
        patch.delenv("NO_PROXY", raising=False)
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("TENSORBOARD_DIR", str(folder / "tb"))
        patch.setattr(logging, "raiseExceptions", False)
        torch.set_num_threads(1)
        sets = folder / "sets.yaml"
        heldout = "examples/quickstart/data/heldout.jsonl"
        sets.write_text(
            "defaults: {max_response_len: 36}\n"
            "datasets:\n"
            f"  - {{name: greedy, path: '{heldout}@[0:2]', temperature: 0.0}}\n"
            f"  - {{name: several, path: '{heldout}@[2:4]', n_samples_per_eval_prompt: 2}}\n"
        )
        status = main(
            [
                "train", "--config", "tests/e2e/tiny.yaml", "--num-rollout", "2", "--run-dir", str(folder / "r"),
                "--eval-config", str(sets), "--eval-interval", "1", "--log-passrate", "--log-multi-turn",
                "--entropy-coef", "0.01", "--use-tensorboard",
                "--use-wandb", "--wandb-mode", "offline", "--wandb-dir", str(folder / "wb"),
                "--wandb-project", "p", "--wandb-group", "g",
            ]
        )
        assert status == 0
        import wandb

        wandb.teardown()
    torch.set_num_threads(threads)
    yield folder, listener
    listener.socket.close()


def logged(folder: Path, step_key: str) -> dict[int, dict[str, Any]]:
    """Step -> everything that the record has at that step of this axis."""
    steps: dict[int, dict[str, Any]] = {}
    for line in read_metrics(folder / "r"):
        if step_key in line:
            steps.setdefault(line[step_key], {}).update(line)
    return steps


@pytest.mark.parametrize("step_key", PUBLISHED)
def test_published_names_are_logged(step_key: str, run: tuple[Path, Listener]) -> None:
    steps = logged(run[0], step_key)
    assert steps
    for metrics in steps.values():
        assert [name for name in PUBLISHED[step_key] if name not in metrics] == []


def test_tensorboard_has_every_number_at_its_step(run: tuple[Path, Listener]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run[0] / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    for step_key, names in PUBLISHED.items():
        steps = logged(run[0], step_key)
        for name in names:
            written = {event.step: event.value for event in events.Scalars(name)}
            assert written.keys() == steps.keys(), name
            for step, value in written.items():
                assert value == pytest.approx(steps[step][name], rel=1e-6, abs=1e-9), name


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    """The history of an offline run: LevelDB's log format (blocks of 32 KiB), one protobuf record each."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, part, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, part = wandb_internal_pb2.Record.FromString(part), b""
            if record.WhichOneof("record_type") == "history":
                rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    return rows


def test_wandb_has_every_metric(run: tuple[Path, Listener]) -> None:
    rows = wandb_history(run[0] / "wb")
    for step_key, names in PUBLISHED.items():
        for step, metrics in logged(run[0], step_key).items():
            merged = {k: v for row in rows if row.get(step_key) == step for k, v in row.items()}
            for name in names:
                assert merged[name] == pytest.approx(metrics[name], rel=1e-6, abs=1e-9), name


def test_offline_wandb_calls_nobody(run: tuple[Path, Listener]) -> None:
    _, listener = run
    assert listener.visitors == 0
    socket.create_connection(listener.socket.getsockname()).close()
    assert listener.came.wait(5), "the listener counts"


def test_metrics_as_a_log_line() -> None:
    metrics = {"train/step": 3, "train/loss": 0.271828, "train/lr-pg_0": torch.tensor(2.0), "note": "text", "n": 5}
    assert in_one_line(metrics, "train/step") == "train/step 3: train/loss 0.2718, train/lr-pg_0 2, note text, n 5"
    assert in_one_line({"mine": 1}) == "mine 1"
