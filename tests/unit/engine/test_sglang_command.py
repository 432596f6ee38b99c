"""Command lines of SGLang servers, and the Python that runs them; no SGLang is needed for that."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from miles.config import resolve as rules
from miles.config.parse import parse
from miles.config.run_config import RunConfig
from miles.engine.sglang import SglangCommand, find_python, server_command
from miles.errors import FlagError

REQUIRED = [
    *("--hf-checkpoint", "models/base", "--prompt-data", "train.jsonl", "--num-rollout", "3"),
    *("--rollout-batch-size", "16", "--n-samples-per-prompt", "8", "--global-batch-size", "64"),
    *("--rollout-engine", "sglang", "--seed", "40"),
]


def config_of(monkeypatch: pytest.MonkeyPatch, gpus: int, *flags: str) -> RunConfig:
    monkeypatch.setattr(rules, "local_gpus", lambda: gpus)
    return parse([*REQUIRED, *flags])[0]


def command(config: RunConfig, gpus: int, rank: int = 0) -> SglangCommand:
    return server_command(config, python="/env/bin/python", rank=rank, host="127.0.0.1", port=3000, gpus=gpus)


def value(made: SglangCommand, option: str) -> str:
    assert made.argv.count(option) == 1
    return made.argv[made.argv.index(option) + 1]


def test_what_miles_sets_for_each_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--rollout-num-gpus", "4", "--rollout-num-gpus-per-engine", "2", "--actor-num-gpus-per-node", "2")
    config = config_of(monkeypatch, 8, *flags)
    made = command(config, 8, rank=1)
    assert made.argv[:3] == ["/env/bin/python", "-m", "sglang.launch_server"]
    assert (value(made, "--model-path"), value(made, "--host"), value(made, "--port")) == (
        "models/base",
        "127.0.0.1",
        "3000",
    )
    assert (value(made, "--tp-size"), value(made, "--random-seed")) == ("2", "41")
    assert value(made, "--base-gpu-id") == "4"  # after the trainer's two and the first engine's two
    assert {"--trust-remote-code", "--skip-server-warmup"} <= set(made.argv)
    assert not {"--device", "--enable-memory-saver", "--enable-return-routed-experts"} & set(made.argv)
    assert "SGLANG_USE_CPU_ENGINE" not in made.env


def test_shared_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    made = command(config_of(monkeypatch, 2, "--colocate", "--actor-num-gpus-per-node", "2"), 2, rank=1)
    assert value(made, "--base-gpu-id") == "1" and "--enable-memory-saver" in made.argv


def test_flags_of_the_user_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--sglang-context-length", "512", "--sglang-cuda-graph-max-bs", "8", "--sglang-page-size", "16")
    flags += ("--sglang-enable-deterministic-inference", "--sglang-server-concurrency", "7")
    made = command(config_of(monkeypatch, 2, *flags), 2)
    assert (value(made, "--context-length"), value(made, "--cuda-graph-max-bs-decode")) == ("512", "8")
    assert value(made, "--page-size") == "16" and "--enable-deterministic-inference" in made.argv
    assert not {"--server-concurrency", "--python", "--mem-fraction-static"} & set(made.argv)


def test_without_a_gpu_the_server_is_told_so_unless_flags_say_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    made = command(config_of(monkeypatch, 0, "--sglang-max-running-requests", "9", "--sglang-device", "cpu"), 0)
    assert (value(made, "--device"), value(made, "--attention-backend")) == ("cpu", "torch_native")
    assert value(made, "--max-running-requests") == "9" and "--base-gpu-id" not in made.argv
    assert (made.env["SGLANG_USE_CPU_ENGINE"], made.env["OMP_NUM_THREADS"]) == ("1", "1")


def test_the_python_must_have_sglang(tmp_path: Path) -> None:
    for python in (None, sys.executable):
        with pytest.raises(FlagError, match="--sglang-python sglang-env/bin/python"):
            find_python(python)
    with pytest.raises(FlagError, match="a Python that can be executed, got"):
        find_python(str(tmp_path / "none"))
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\nexit 7\n")
    other.chmod(0o755)
    with pytest.raises(FlagError, match="this one ended with an error at once"):
        find_python(str(other))
    other.write_text("#!/bin/sh\nexit 0\n")
    assert find_python(str(other)) == str(other)
