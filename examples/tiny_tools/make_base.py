"""Make the tiny tool model with miles itself: a random Qwen3, fine-tuned on the lessons of lessons.py.

    python examples/tiny_tools/make_base.py        # writes base/ beside this file; five minutes on one core

One run of `miles train --config sft.yaml`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # run as a script, `examples` is not importable yet

from examples import base_models  # noqa: E402
from examples.tiny_tools import lessons, make_tokenizer  # noqa: E402
from miles.run.train import main as miles_train  # noqa: E402

BATCH = 64
NUM_STEPS = 800
LR = 3e-3
SEED = 0


def make_base(out: Path, work: Path, num_steps: int = NUM_STEPS, seed: int = SEED) -> None:
    """Write the model to `out`; `work` keeps the data, the random model and the run directory."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    data, random_model, run_dir = work / "sft.jsonl", work / "random", work / "run"
    data.write_text(lessons.jsonl(lessons.lessons(BATCH * num_steps)), encoding="utf-8")
    write_random_model(random_model, seed)
    status = miles_train(
        [
            *("--config", str(HERE / "sft.yaml")),
            *("--run-dir", str(run_dir)),
            *("--hf-checkpoint", str(random_model)),
            *("--prompt-data", str(data)),
            *("--num-rollout", str(num_steps)),
            *("--lr", str(LR)),
            *("--min-lr", "0"),
            *("--seed", str(seed)),
        ]
    )
    if status != 0:
        sys.exit(status)
    base_models.put_in_place(run_dir / "model", out)
    make_tokenizer.save(out)


def write_random_model(folder: Path, seed: int) -> None:
    """822,656 parameters, with their tokenizer."""
    base_models.write_random_model(
        folder,
        vocab=make_tokenizer.VOCAB,
        eos="<|end|>",
        pad="<|pad|>",
        num_layers=4,
        max_length=make_tokenizer.MAX_LENGTH,
        seed=seed,
    )
    make_tokenizer.save(folder)


if __name__ == "__main__":
    make_base(HERE / "base", Path("runs/tiny_tools_base"))
