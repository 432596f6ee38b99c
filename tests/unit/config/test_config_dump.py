"""The record of the settings: complete as JSON, and sufficient as YAML."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from config_helpers import REQUIRED, write

from miles.config import parse
from miles.config.dump import HIDDEN, as_yaml, resolved
from miles.config.flags import flags_of
from miles.config.sections import SECTIONS

COMMANDS = [
    [],
    ["--lr", "1.5e-4", "--eps-clip-high", "0.28", "--disable-grpo-std-normalization", "--rollout-stop", "\n", "END"],
    ["--apply-chat-template-kwargs", '{"enable_thinking": false}', "--hook-policy", "custom-rm=retry:2"],
    ["--eval-interval", "5", "--eval-prompt-data", "carry", "eval.jsonl", "--eval-temperature", "0"],
    ["--eval-prompt-data", "single.jsonl"],
    ["--debug-rollout-only", "--colocate"],
    ["--load-debug-rollout-data", "d/{rollout_id}.pt", "--dump-details", "d"],
    ["--n-samples-per-prompt", "1", "--global-batch-size", "16", "--no-offload-train"],
    ["--use-dynamic-batch-size", "--max-tokens-per-gpu", "2048", "--deterministic", "--wandb-group", "007"],
    ["--sglang-page-size", "16", "--router-policy", "random", "--custom-rm-path", "my/reward.py:grade"],
    ["--num-rollout", "3", "--rollout-max-context-len", "64", "--save", "ckpt", "--save-interval", "1"],
]


@pytest.mark.parametrize("flags", COMMANDS, ids=lambda flags: " ".join(flags)[:50] or "plain")
def test_yaml_reads_back_to_the_same_run(flags: list[str], tmp_path: Path) -> None:
    config, args = parse([*REQUIRED, *flags])
    again, args_again = parse(["--config", write(tmp_path, as_yaml(config))])
    assert again == config
    assert vars(args_again) == {**vars(args), "config": args_again.config}
    assert as_yaml(again) == as_yaml(config)


def test_yaml_of_a_batch_size_that_follows_from_the_steps(tmp_path: Path) -> None:
    at = REQUIRED.index("--global-batch-size")
    config, _ = parse([*REQUIRED[:at], "--num-steps-per-rollout", "4"])
    assert config.data.global_batch_size == 32
    assert parse(["--config", write(tmp_path, as_yaml(config))])[0] == config


def test_yaml_of_files(tmp_path: Path) -> None:
    """Files that settings come from are named, not copied."""
    evaluation = write(tmp_path, "datasets: {a: {path: a.jsonl, temperature: 0.5}}", "eval.yaml")
    custom = write(tmp_path, "max_turns: 3\nlr: 0.5\n", "custom.yaml")
    config, args = parse([*REQUIRED, "--eval-config", evaluation, "--custom-config-path", custom])
    again, args_again = parse(["--config", write(tmp_path, as_yaml(config))])
    assert again == config and args_again.max_turns == args.max_turns == 3


def test_yaml_leaves_out_what_follows_and_what_is_secret() -> None:
    config, args = parse([*REQUIRED, "--wandb-key", "s3cret"])
    text = as_yaml(config)
    assert "s3cret" not in text and "over-sampling-batch-size" not in text and "train-backend: fsdp" in text
    assert set(yaml.safe_load(text)) <= {*SECTIONS, "extras"}
    record = json.dumps(resolved(config, args))
    assert "s3cret" not in record and HIDDEN in record
    assert args.wandb_key == "s3cret" == config.tracking.wandb_key


def test_record_holds_every_flag_with_its_origin(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 7\n")
    config, args = parse([*REQUIRED, "--config", path, "--eval-prompt-data", "a", "b", "--sglang-page-size", "16"])
    args.anything = object()
    record = json.loads(json.dumps(resolved(config, args)))
    for name, section in SECTIONS.items():
        assert set(record["flags"][name]) == {flag.name for flag in flags_of(section)}
    assert record["flags"]["run"]["seed"] == {"value": 7, "from": "file"}
    assert record["flags"]["optimizer"]["lr"] == {"value": 1e-6, "from": "default"}
    assert record["flags"]["data"]["rollout_batch_size"] == {"value": 16, "from": "command line"}
    assert record["flags"]["train"]["train_backend"] == {"value": "fsdp", "from": "substituted"}
    assert record["flags"]["algorithm"]["eps_clip_high"] == {"value": 0.2, "from": "derived"}
    assert record["eval_datasets"][0]["name"] == "a"
    assert record["extras"] == {"sglang_page_size": {"value": 16, "from": "command line"}}
    assert record["args"]["use_critic"] is False and record["args"]["anything"].startswith("<object")
    assert record["notices"] == config.notices
