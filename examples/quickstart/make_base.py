"""Make the quickstart's base model with miles itself: a random Qwen3, fine-tuned on a pupil who forgets to carry.

    python examples/quickstart/make_base.py        # writes base/ beside this file; two to three minutes on two cores

Two runs of `miles train --config sft.yaml`, the second from the model that the first exported. What comes out answers
in the right form, is always wrong when it answers greedily, and right about one time in four when it samples.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # run as a script, `examples` is not importable yet

from examples import base_models  # noqa: E402
from examples.quickstart import carry, make_tokenizer  # noqa: E402
from miles.run.train import main as miles_train  # noqa: E402

BATCH = 64
SEED = 0


@dataclass(frozen=True)
class Phase:
    """One run: linear decay from `lr` to `min_lr` over `steps` optimizer steps."""

    steps: int
    lr: float
    min_lr: float


PHASES = (Phase(240, 2e-3, 6e-4), Phase(180, 1.5e-3, 0.0))


def make_base(out: Path, work: Path, phases: tuple[Phase, ...] = PHASES, seed: int = SEED) -> None:
    """Write the base model to `out`; `work` keeps the data, the random model and the run directories."""
    shutil.rmtree(work, ignore_errors=True)
    data = work / "sft.jsonl"
    carry.write_sft_data(data, BATCH * sum(phase.steps for phase in phases))
    model, first = work / "random", 0
    write_random_model(model, seed)
    for i, phase in enumerate(phases):
        run_dir = work / f"phase{i}"
        last = first + BATCH * phase.steps
        status = miles_train(
            [
                *("--config", str(HERE / "sft.yaml")),
                *("--run-dir", str(run_dir)),
                *("--hf-checkpoint", str(model)),
                *("--prompt-data", f"{data}@[{first}:{last}]"),
                *("--num-rollout", str(phase.steps)),
                *("--lr", str(phase.lr)),
                *("--min-lr", str(phase.min_lr)),
                *("--seed", str(seed)),
            ]
        )
        if status != 0:
            sys.exit(status)
        model, first = run_dir / "model", last
    base_models.put_in_place(model, out)
    make_tokenizer.save(out)


def write_random_model(folder: Path, seed: int) -> None:
    """597,696 parameters, with their tokenizer."""
    base_models.write_random_model(
        folder,
        vocab=make_tokenizer.VOCAB,
        eos="<eos>",
        pad="<pad>",
        num_layers=3,
        max_length=make_tokenizer.MAX_LENGTH,
        seed=seed,
    )
    make_tokenizer.save(folder)


if __name__ == "__main__":
    make_base(HERE / "base", Path("runs/base"))
