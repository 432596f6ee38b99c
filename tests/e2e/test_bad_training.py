"""Batches that cannot be trained on: a sentence that names the sample and the flag. And odd ones, which can.

What fails inside a plug-in's own call is in test_bad_plug_ins.py; here rollout functions return, and what they return
is wrong. No engine takes part.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_runs import BASE, QUICKSTART, metrics, miles, same, saving, train, weights
from safetensors.torch import load_file

BATCHES = Path(__file__).with_name("bad_batches.py")
SMALL = ("--debug-train-only", "--rollout-batch-size", 2, "--num-rollout", 1, "--num-steps-per-rollout", 1)
RAISED, REFUSED = 1, 2


def of(name: str) -> tuple[object, ...]:
    return "--rollout-function-path", f"{BATCHES}:{name}", *SMALL


CARDS = {
    "reward_nan": ((), "The reward of sample 5 is float nan. Expected a finite number."),
    "reward_text": ((), "The reward of sample 2 is str 'good'. Expected a finite number."),
    "one_without_log_probs": ((), "sample 6 has no rollout_log_probs, while sample 0 has. Expected all samples of a"),
    "short_log_probs": ((), "rollout_log_probs length of sample 1 is 3, its response_length is 4. Expected one entry"),
    "long_mask": ((), "loss_mask length of sample 3 is 7, its response_length is 6. Expected one entry per response"),
    "mask_of_halves": ((), "loss_mask: row 4 must be a list of whole numbers, got list [0.5, 0.5,"),
    "response_of_everything": ((), "response_length of sample 7 is 12, but it has 12 tokens. Expected at least one"),
    "good": (
        ("--global-batch-size", 16, "--rollout-batch-size", 4, "--num-steps-per-rollout", 1),
        "The rollout gave 8 samples, fewer than one optimizer step of 16 (--global-batch-size).",
    ),
}


@pytest.mark.parametrize("name", CARDS)
def test_the_rollout_function_gets_the_card(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more, says = CARDS[name]
    train(tmp_path / "r", *of(name), *more, status=RAISED)
    card = capsys.readouterr().err
    assert f"miles: --rollout-function-path {BATCHES}:{name} failed" in card and says in card
    assert "Traceback" not in card and "bad_batches.py" in card


SENTENCES = {
    "log-probs for --use-tis": ("no_log_probs", ("--use-tis",), "--use-tis, --get-mismatch-metrics and --use-rollout"),
    "log-probs to start from": (
        "no_log_probs",
        ("--use-rollout-logprobs",),
        "sample.rollout_log_probs, one float per response token, on every sample.",
    ),
    "a long sample": (
        "good",
        ("--max-tokens-per-gpu", 11),
        "sample 7 has 12 tokens, more than one micro batch may hold: --max-tokens-per-gpu is 11. Raise it, or keep "
        "samples shorter: lower --rollout-max-response-len, or cut the conversations.",
    ),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_a_setting_is_named(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, more, says = SENTENCES[case]
    train(tmp_path / "r", *of(name), *more, status=REFUSED)
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said


@pytest.mark.parametrize("flag", [(), ("--disable-rollout-trim-samples",)], ids=["trimmed", "left"])
def test_what_fills_no_whole_step_is_told(
    flag: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(tmp_path / "r", *of("good"), "--n-samples-per-prompt", 3, *flag)  # a step of 6
    assert len(metrics(run, "train/loss")) == 1
    said = "rollout 0: 2 of 8 samples fill no whole optimizer step of 6 (--global-batch-size) and are not trained on"
    assert said in caplog.text


def test_an_empty_response_takes_part_and_changes_nothing(tmp_path: Path) -> None:
    run = train(tmp_path / "r", *of("one_empty"))
    assert metrics(run, "train/exactly_zero_samples") == {0: 1}
    assert metrics(run, "train/grad_norm")[0] > 0


@pytest.mark.parametrize("name", ["all_empty", "all_removed"])
def test_nothing_to_train_is_a_step_without_gradient(name: str, tmp_path: Path) -> None:
    run = train(tmp_path / "r", *of(name), "--weight-decay", 0, *saving(tmp_path / "r"))
    assert metrics(run, "train/exactly_zero_samples") == {0: 8} and metrics(run, "train/grad_norm") == {0: 0.0}
    assert metrics(run, "train/loss") == {0: 0.0}
    before = load_file(BASE / "model.safetensors")
    after = weights(run)
    assert same({name: t.float() for name, t in before.items()}, after)


# ---- supervised fine-tuning ----------------------------------------------------------------------------------------

HELD_OUT = {
    "nothing learned": (
        [{"role": "user", "content": "1+1=?"}],
        (),
        "evaluation set 'held': no token of its 1 conversations is learned, so that they have no loss.",
    ),
    "too long": (
        [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2" * 20}],
        ("--max-tokens-per-gpu", 16),
        "evaluation set 'held': sample 0 has 26 tokens, more than one micro batch may hold: --max-tokens-per-gpu is 16",
    ),
    "temperature": ([], ("--rollout-temperature", 0), "--rollout-temperature: expected a value > 0 for training"),
    "no messages": ([], (), "--input-key messages: expected a string or a list of messages"),
}


@pytest.mark.parametrize("case", HELD_OUT)
def test_held_out_conversations_that_have_no_loss(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], write: Callable[..., Path]
) -> None:
    messages, more, says = HELD_OUT[case]
    good = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"}]
    held, data = (
        write(json.dumps({"messages": m}) + "\n", name) for m, name in ((messages, "held.jsonl"), (good, "train.jsonl"))
    )
    argv = [
        *("train", "--config", QUICKSTART / "sft.yaml", "--run-dir", tmp_path / "r", "--hf-checkpoint", BASE),
        *("--prompt-data", data, "--rollout-batch-size", 1, "--global-batch-size", 1, "--num-rollout", 1),
        *("--eval-prompt-data", "held", held, "--eval-interval", 1, *more),
    ]
    assert miles(*argv) == REFUSED
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said
