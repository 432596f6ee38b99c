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
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(run_dir / "model", out)
    make_tokenizer.save(out)
    for file in out.iterdir():
        file.chmod(0o644)  # weights are written for their owner alone


def write_random_model(folder: Path, seed: int) -> None:
    """A Qwen3 of 822,656 parameters in bfloat16, with its tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(make_tokenizer.VOCAB),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=make_tokenizer.MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=make_tokenizer.VOCAB.index("<|end|>"),
        pad_token_id=make_tokenizer.VOCAB.index("<|pad|>"),
    )
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer.save(folder)


if __name__ == "__main__":
    make_base(HERE / "base", Path("runs/tiny_tools_base"))
