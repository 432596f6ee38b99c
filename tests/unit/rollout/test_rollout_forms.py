"""Every form of a rollout function and of a generate function, through a run: rollout, training and evaluation."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from miles.__main__ import main
from miles.errors import UsageError
from miles.observe.record import read_metrics, read_rollouts
from miles.rollout import sleep_rollout
from miles.rollout.generate_hub import benchmarkers
from miles.rollout.generate_utils.tool_call_parsers import FORMATS
from miles.types import Sample

ROOT = Path(__file__).resolve().parents[3]
PLUG_INS = ROOT / "tests" / "unit" / "rollout" / "form_plug_ins.py"
TINY = (
    "train", "--config", "tests/e2e/tiny.yaml", "--num-rollout", "1", "--rollout-batch-size", "2",
    "--n-samples-per-prompt", "2", "--num-steps-per-rollout", "1", "--eval-interval", "1",
    "--skip-eval-before-train", "--eval-prompt-data", "heldout", "examples/quickstart/data/heldout.jsonl@[0:2]",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)


def train(run_dir: Path, *flags: str, status: int = 0) -> tuple[list[str], dict[str, Any]]:
    """One run; what its plug-ins noted, and its metrics."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.chdir(ROOT):
            module = importlib.import_module("form_plug_ins")
            module.seen.clear()
            assert main([*TINY, "--run-dir", str(run_dir), *flags]) == status
            return list(module.seen), {k: v for line in read_metrics(run_dir) for k, v in line.items()}
    finally:
        torch.set_num_threads(threads)


def path(name: str) -> str:
    return f"{PLUG_INS}:{name}"


@pytest.mark.parametrize("name", ["sync", "with_source", "guide", "AsyncClass", "SyncClass"])
def test_rollout_functions(name: str, tmp_path: Path) -> None:
    seen, metrics = train(tmp_path / "r", "--rollout-function-path", path(name))
    assert seen == [f"{name} train", f"{name} eval"]
    assert metrics["train/step"] == 0 and "train/loss" in metrics
    assert "eval/heldout" in metrics
    if name == "AsyncClass":
        assert metrics["rollout/of_my_own"] == 7
    if name == "SyncClass":
        assert (metrics["agent/made_up"], metrics["eval/heldout"], metrics["rollout/raw_reward"]) == (2, 0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("three", ["three"] * 6),
        ("four", ["four train"] * 4 + ["four eval"] * 2),
        ("one_input", ["one_input train"] * 4 + ["one_input eval"] * 2),
        ("OneInput", ["OneInput train"] * 4 + ["OneInput eval"] * 2),
        ("threaded", ["threaded"] * 6),
    ],
)
def test_generate_functions(name: str, calls: list[str], tmp_path: Path) -> None:
    seen, metrics = train(tmp_path / "r", "--custom-generate-function-path", path(name))
    assert seen == calls
    assert "train/loss" in metrics and "eval/heldout" in metrics


def test_several_samples_go_through_reward_filters_conversion_and_evaluation(tmp_path: Path) -> None:
    check = "miles.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
    seen, metrics = train(
        tmp_path / "r", "--custom-generate-function-path", path("several"),
        "--custom-rm-path", path("batch_or_single"), "--dynamic-sampling-filter-path", check,
        "--log-passrate",
    )  # fmt: skip
    assert seen.count("several") == 6 and seen.count("scored 1") == 6
    assert metrics["rollout/raw_reward"] == 0.5 and metrics["eval/heldout"] == 0.5
    assert metrics["train/step"] == 1, "eight samples are two steps of four"
    assert (metrics["eval/heldout-pass@1"], metrics["eval/heldout-pass@2"]) == (0.25, 0.5)
    assert metrics["passrate/pass@1"] == 0.25


# ---- conversations with tools --------------------------------------------------------------------------------------


def every_answer_calls(text: str) -> Iterator[tuple[int, int, Any]]:
    """A format in which everything that the model says is a tool call: the tiny model cannot write any."""
    yield 0, len(text), {"name": "check", "arguments": {"said": text[:1]}}


def test_conversations_with_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "hermes", every_answer_calls)
    conversation = (
        "--custom-generate-function-path", "miles.rollout.generate_hub.multi_turn.generate",
        "--generate-tool-call-parser", "hermes", "--generate-max-turns", "2",
        "--generate-tool-specs-path", path("SPECS"), "--generate-execute-tool-function-path", path("check"),
    )  # fmt: skip
    seen, metrics = train(
        tmp_path / "r", *conversation, "--rollout-sample-filter-path", path("masks_of_tools"), "--log-multi-turn",
        "--rollout-max-response-len", "60",
    )  # fmt: skip
    assert len([text for text in seen if text.startswith("checked")]) == 12, "two answers of each of six samples"
    # Two answers of the tool, nine characters each; the template ends nothing and begins nothing.
    assert [text for text in seen if text.startswith("turns")] == ["turns 3 masked 18"] * 4
    assert metrics["rollout/round_number"] == metrics["multi_turn/multi_turn_metric/round_number_mean"] == 2
    lengths = [metrics[f"multi_turn/{part}_response_length/response_length_mean"] for part in ("raw", "wo_obs")]
    assert lengths[0] - lengths[1] == 18
    assert "train/loss" in metrics and "eval/heldout" in metrics

    several = ("--generate-multi-samples", "--custom-rm-path", path("batch_or_single"))
    seen, metrics = train(tmp_path / "s", *conversation, *several)
    assert seen.count("scored 2") == 6, "the two turns of each of six samples"
    assert metrics["train/step"] == 1, "eight turns are two steps of four"


# ---- prompt files --------------------------------------------------------------------------------------------------


def test_prompts_from_parquet_as_messages(tmp_path: Path) -> None:
    """A slice of a Parquet file, prompts as message lists that the template renders, a limit on their length."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"messages": [{"role": "user", "content": "1" * (i + 1) + "+1=?"}], "answer": str(i), "more": {"row": i}}
        for i in range(8)
    ]
    file = tmp_path / "prompts.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    _, metrics = train(
        tmp_path / "r", "--prompt-data", f"{file}@[2:]", "--input-key", "messages", "--label-key", "answer",
        "--metadata-key", "more", "--rollout-max-prompt-len", "10", "--rollout-batch-size", "4",
        "--eval-prompt-data", "own", f"{file}@[:2]",
    )  # fmt: skip
    samples = read_rollouts(tmp_path / "r", 0)
    assert [(s.prompt[0]["content"], s.label, s.metadata) for s in samples[::2]] == [
        (rows[i]["messages"][0]["content"], str(i), {"row": i}) for i in (2, 3, 4, 5)
    ]
    assert [len(s.tokens) - s.response_length for s in samples[::2]] == [7, 8, 9, 10]
    assert "eval/own" in metrics


def test_sleep_leaves_the_engines_to_whoever_asks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`sleep_rollout` never returns; here its nap posts to the engine and then interrupts the run."""
    from urllib.request import Request, urlopen

    answers = []

    def nap(seconds: float) -> None:
        body = json.dumps({"text": "1+1=?", "sampling_params": {"max_new_tokens": 3}}).encode()
        address = json.loads((tmp_path / "address").read_text())
        with urlopen(Request(f"{address}/generate", body, {"Content-Type": "application/json"})) as response:
            answers.append(json.load(response)["meta_info"]["completion_tokens"])
        raise UsageError("slept")

    def told(message: str, rollout_id: int, address: str) -> None:
        (tmp_path / "address").write_text(json.dumps(address))

    monkeypatch.setattr(sleep_rollout.time, "sleep", nap)
    monkeypatch.setattr(sleep_rollout.logger, "info", told)
    train(tmp_path / "r", "--rollout-function-path", "miles.rollout.sleep_rollout.sleep", status=2)
    assert answers == [3]


def test_random_lengths_of_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No end-of-sequence token stops a response; here its length is what the tiny context takes."""
    monkeypatch.setattr(benchmarkers, "MIN_TOKENS", 5)
    monkeypatch.setattr(benchmarkers, "MAX_TOKENS", 9)
    benchmark = "miles.rollout.generate_hub.benchmarkers.generate_with_random_osl"
    train(tmp_path / "r", "--custom-generate-function-path", benchmark)
    samples = read_rollouts(tmp_path / "r", 0)
    assert {s.status for s in samples} == {Sample.Status.TRUNCATED}
    assert all(5 <= s.response_length < 9 for s in samples)


def test_the_zero_spread_filter_keeps_groups_of_one(tmp_path: Path) -> None:
    """A group of one has no spread: dropping it for that would go on for ever."""
    check = "miles.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
    _, metrics = train(tmp_path / "r", "--n-samples-per-prompt", "1", "--dynamic-sampling-filter-path", check)
    assert metrics["train/step"] == 0 and not [key for key in metrics if "dynamic_filter" in key]


def test_a_run_that_lost_its_data_position_is_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, save = tmp_path / "r", str(tmp_path / "ck")
    train(run_dir, "--save", save)
    position = tmp_path / "ck" / "rollout" / "global_dataset_state_dict_0.pt"
    position.unlink()
    again = ("--num-rollout", "2", "--save", save, "--load", save)
    train(run_dir, *again, status=2)
    assert f"{position}, the position in the data" in capsys.readouterr().err
    train(run_dir, *again, "--start-rollout-id", "0")
