"""The model that a run exports, used without miles: plain `transformers` gives the same answers and accuracy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from e2e_runs import BASE, HELDOUT, START_TIMEOUT_S, exported, miles, saving, summary, train, weights
from safetensors.torch import load_file

from miles.observe.record import read_metrics, read_rollouts

PROBLEMS = 96

# Run by an interpreter of its own: nothing of miles is imported there.
SCORE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, heldout, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
rows = [json.loads(line) for line in open(heldout)][:count]
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
given = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
given.pop("token_type_ids", None)
with torch.no_grad():
    out = model.generate(**given, do_sample=False, max_new_tokens=36)
texts = tokenizer.batch_decode(out[:, given["input_ids"].shape[1]:], skip_special_tokens=True)
rewards = [float(text.split("</think>")[1:] == [row["label"]]) for text, row in zip(texts, rows)]
assert not any(name.split(".")[0] == "miles" for name in sys.modules)
print(json.dumps({"texts": texts, "rewards": rewards}))
"""


def score_with_transformers(folder: Path) -> dict[str, list]:
    done = subprocess.run(
        [sys.executable, "-c", SCORE, str(folder), str(HELDOUT), str(PROBLEMS)],
        capture_output=True, text=True, timeout=START_TIMEOUT_S, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def eval_config(folder: Path) -> Path:
    dataset = {"name": "greedy", "path": f"{HELDOUT}@[0:{PROBLEMS}]", "temperature": 0.0}
    path = folder / "eval.yaml"
    path.write_text(yaml.safe_dump({"datasets": [dataset]}))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers some problems: eight rollouts at a high rate."""
    run = tmp_path_factory.mktemp("export") / "run"
    return train(
        run, *saving(run, every=8), "--num-rollout", 8, "--rollout-batch-size", 16, "--n-samples-per-prompt", 8,
        "--max-tokens-per-gpu", 4096, "--lr", 2e-4, "--lr-warmup-iters", 4,
    )  # fmt: skip


def evaluated(run: Path, model: Path) -> dict[str, float]:
    """Evaluation alone: `--num-rollout 0`."""
    status = miles(
        "train", "--hf-checkpoint", model, "--run-dir", run, "--prompt-data", HELDOUT, "--label-key", "label",
        "--input-key", "prompt", "--custom-rm-path", "examples/quickstart/carry.py:reward", "--num-rollout", 0,
        "--rollout-batch-size", 4, "--n-samples-per-prompt", 4, "--num-steps-per-rollout", 1,
        "--eval-interval", 1, "--eval-config", eval_config(run.parent), "--eval-max-response-len", 36,
    )  # fmt: skip
    assert status == 0
    return summary(run)["eval_before"]


def test_export_scores_the_same_without_miles(trained: Path, tmp_path: Path) -> None:
    ours = evaluated(tmp_path / "run", trained / "model")
    theirs = score_with_transformers(trained / "model")
    samples = read_rollouts(tmp_path / "run", 0, evaluation="greedy")
    assert [s.response.removesuffix("<eos>") for s in samples] == theirs["texts"]
    assert [s.reward for s in samples] == theirs["rewards"]
    assert ours["greedy"] == pytest.approx(sum(theirs["rewards"]) / PROBLEMS)
    assert 0 < ours["greedy"] < 1, "a model that is always right or wrong shows little"


def test_export_has_the_form_of_the_base(trained: Path) -> None:
    base, mine = load_file(BASE / "model.safetensors"), exported(trained)
    assert {n: (t.dtype, t.shape) for n, t in base.items()} == {n: (t.dtype, t.shape) for n, t in mine.items()}
    assert json.loads((BASE / "config.json").read_text()) == json.loads((trained / "model" / "config.json").read_text())
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in weights(trained).items()}
    assert all(torch.equal(mine[name], rounded[name]) for name in mine)
    assert any(not torch.equal(mine[name], base[name]) for name in mine)


def test_no_rollouts_is_evaluation_only(tmp_path: Path) -> None:
    """J.2: with `--num-rollout 0` the model is evaluated once, as step 0, and nothing is trained or exported."""
    accuracy = evaluated(tmp_path / "run", BASE)
    assert accuracy == {"greedy": 0.0}
    lines = read_metrics(tmp_path / "run")
    assert (
        len(lines) == 1
        and lines[0]["_rollout_id"] == -1
        and lines[0]["eval/greedy"] == 0.0
        and lines[0]["eval/step"] == 0
    )
    assert not (tmp_path / "run" / "model").exists()
    numbers = summary(tmp_path / "run")
    assert (numbers["rollouts"], numbers["eval_after"], numbers["wall_s_per_rollout"]) == (0, None, None)


def test_save_hf(tmp_path: Path) -> None:
    """`--save-hf` exports with every checkpoint, each under its rollout."""
    run = tmp_path / "run"
    train(run, *saving(run), "--num-rollout", 2, "--save-hf", "{run_dir}/hf/{rollout_id}")
    folders = sorted(path.name for path in (run / "hf").iterdir())
    assert folders == ["0", "1"]
    last = load_file(run / "hf" / "1" / "model.safetensors")
    assert all(torch.equal(last[name], tensor) for name, tensor in exported(run).items())
