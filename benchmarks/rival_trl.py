"""TRL's GRPOTrainer on the quickstart's model, data and settings: the other half of `benchmarks/quickstart.py`.

Runs in an environment of its own (`pip install torch==2.13.0 trl==1.16.0 datasets`) and prints one JSON line.
`first_step_s` counts from process start, so the imports are part of it, as they are for miles.
"""

from __future__ import annotations

import time

START = time.time()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import tempfile  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

PROMPTS, GROUP, STEPS = 16, 8, 2


def reward(completions, label, **_):
    """1 for a completion with exactly one `</think>` and exactly the label after it."""
    parts = [completion.split("</think>") for completion in completions]
    return [float(len(p) == 2 and p[1] == answer) for p, answer in zip(parts, label)]


class Timed(GRPOTrainer):
    """Counts the seconds of generation."""

    generation_s = 0.0

    def _generate_single_turn(self, *args, **kwargs):
        begin = time.time()
        try:
            return super()._generate_single_turn(*args, **kwargs)
        finally:
            Timed.generation_s += time.time() - begin


class Watch(TrainerCallback):
    """Notes the end of the first optimizer step and the mean reward of each rollout."""

    first_step_s: float | None = None
    rewards: tuple[float, ...] = ()

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 1:
            Watch.first_step_s = time.time() - START

    def on_log(self, args, state, control, logs=None, **_):
        if "reward" in (logs or {}):
            Watch.rewards += (logs["reward"],)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rollouts", type=int, default=40)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with open(given.data) as lines:
        rows = [json.loads(line) for line in lines][: given.rollouts * PROMPTS]
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        seed=given.seed,
        shuffle_dataset=False,
        per_device_train_batch_size=PROMPTS * GROUP // STEPS,
        steps_per_generation=STEPS,
        num_generations=GROUP,
        max_completion_length=36,
        max_steps=given.rollouts * STEPS,
        learning_rate=given.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10 * STEPS,
        adam_beta2=0.99,
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        temperature=1.0,
        logging_steps=STEPS,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(given.model),
        train_dataset=Dataset.from_list(rows),
        reward_funcs=reward,
        callbacks=[Watch()],
        args=config,
    )
    begin = time.time()
    trainer.train()
    wall_s = time.time() - begin
    result = {
        "wall_s_per_rollout": wall_s / given.rollouts,
        "generation_s_per_rollout": Timed.generation_s / given.rollouts,
        "first_step_s": Watch.first_step_s,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "rewards": Watch.rewards,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
