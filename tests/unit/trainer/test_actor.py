"""The core truth: what the actor and the fsdp backend do to a model is what a plain Hugging Face loop does to it.

The reference is written here from the formulas alone: one forward pass per sample, no packing, no sharing of prompts,
nothing left out, `torch.optim.AdamW`.
"""

from __future__ import annotations

import math
import shlex
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from miles.batch import TrainBatch, from_published_dict
from miles.config import parse
from miles.errors import CheckpointError, UsageError
from miles.hooks import bind
from miles.observe.tracking import Tracker
from miles.trainer.actor import Restoring, TrainActor
from miles.trainer.fsdp.backend import FsdpBackend
from miles.trainer.schedule import schedule_of

STEPS, SAMPLES_PER_STEP, GROUP = 3, 8, 4
SAMPLES = STEPS * SAMPLES_PER_STEP
VOCABULARY = 41


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen3 with tied embeddings."""
    path = tmp_path_factory.mktemp("actor") / "model"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=48, max_position_embeddings=128, tie_word_embeddings=True, eos_token_id=1,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


# ---- one rollout ---------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """Samples with everything a loss reads; `advantages` are one number per sample."""

    prompts: list[list[int]]
    responses: list[list[int]]
    masks: list[list[int]]
    rewards: list[float]
    rollout_log_probs: list[list[float]]

    def batch(self) -> TrainBatch:
        n = len(self.prompts)
        return from_published_dict(
            {
                "tokens": [p + r for p, r in zip(self.prompts, self.responses)],
                "response_lengths": [len(r) for r in self.responses],
                "rewards": self.rewards,
                "raw_reward": self.rewards,
                "truncated": [0] * n,
                "sample_indices": [*range(n)],
                "loss_masks": self.masks,
                "rollout_log_probs": self.rollout_log_probs,
            }
        )


def make_rollout(*, same_prompts: bool = True) -> Rollout:
    """Groups of four; one group without any advantage, one removed sample, one with masked tokens in the middle."""
    rng = torch.Generator().manual_seed(7)

    def ids(count: int) -> list[int]:
        return torch.randint(2, VOCABULARY, (count,), generator=rng).tolist()

    prompts = [p for _ in range(SAMPLES // GROUP) for p in [ids(6)] * GROUP]
    if not same_prompts:
        prompts = [ids(4 + i % 5) for i in range(SAMPLES)]
    responses = [ids(3 + (5 * i) % 17) for i in range(SAMPLES)]
    rewards = torch.randn(SAMPLES, generator=rng)
    rewards[4:8] = 0.0
    masks = [[1] * len(r) for r in responses]
    masks[9] = [0] * len(masks[9])
    masks[10][1:3] = [0, 0]
    # An engine that is a little off, for --use-tis.
    noise = [(-3.7 + 0.3 * torch.randn(len(r), generator=rng)).tolist() for r in responses]
    return Rollout(prompts, responses, masks, rewards.tolist(), noise)


# ---- the reference -------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """The flags of one case, as the reference understands them."""

    temperature: float = 1.0
    entropy_coef: float = 0.0
    per_token: bool = False
    tis: bool = False
    sft: bool = False
    weight_decay: float = 0.0
    clip_grad: float = 0.5
    lr: float = 5e-3
    # Far above the rounding of float32, which AdamW would otherwise blow up where a gradient is almost zero.
    adam_eps: float = 1e-4
    eps: tuple[float, float] = (0.1, 0.15)


@dataclass
class Trace:
    """What happened to a model: per optimizer step loss and gradient norm, at the end the weights."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def reference(folder: Path, rollout: Rollout, s: Settings) -> Trace:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=s.lr, betas=(0.9, 0.95), eps=s.adam_eps, weight_decay=s.weight_decay
    )

    def log_probs(i: int) -> tuple[Tensor, Tensor]:
        """Of the response tokens of sample i, and the entropy where each was drawn."""
        prompt, response = rollout.prompts[i], rollout.responses[i]
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / s.temperature
        log_p = logits.log_softmax(-1)
        return log_p.gather(-1, torch.tensor(response)[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    with torch.no_grad():
        old = [log_probs(i)[0] for i in range(SAMPLES)]
    trace = Trace()
    for step in range(STEPS):
        rows = range(step * SAMPLES_PER_STEP, (step + 1) * SAMPLES_PER_STEP)
        total = torch.zeros(())
        for i in rows:
            now, entropy = log_probs(i)
            mask = torch.tensor(rollout.masks[i], dtype=torch.float32)
            value = -now if s.sft else clipped(now, old[i], rollout.rewards[i], s)
            if s.tis:
                value = value * torch.exp(old[i] - torch.tensor(rollout.rollout_log_probs[i])).clamp(0.0, 2.0)
            value = (value - s.entropy_coef * entropy) * mask
            total = total + (value.sum() if s.per_token else value.sum() / mask.sum().clamp(min=1))
        count = sum(sum(rollout.masks[i]) for i in rows) if s.per_token else SAMPLES_PER_STEP
        optimizer.zero_grad()
        (total / count).backward()
        trace.losses.append((total / count).item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip_grad if s.clip_grad > 0 else math.inf)
        trace.norms.append(float(norm))
        optimizer.step()
    trace.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return trace


def clipped(now: Tensor, old: Tensor, advantage: float, s: Settings) -> Tensor:
    ratio = torch.exp(now - old)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - s.eps[0], 1 + s.eps[1]) * advantage)


# ---- ours ----------------------------------------------------------------------------------------------------------

FLAGS = shlex.split("""
    --prompt-data none --num-rollout 1 --rollout-batch-size 6 --n-samples-per-prompt 4 --num-steps-per-rollout 3
    --train-backend fsdp --lr 5e-3 --adam-beta2 0.95 --adam-eps 1e-4 --weight-decay 0 --clip-grad 0.5
    --eps-clip 0.1 --eps-clip-high 0.15
""")


class Lines:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.steps: list[Mapping[str, Any]] = []

    def log(self, metrics: Mapping[str, Any], step_key: str | None) -> None:
        if step_key == "train/step":
            self.steps.append(metrics)

    def close(self) -> None: ...


def make_actor(folder: Path, *flags: str) -> tuple[TrainActor, Lines]:
    config, args = parse([*FLAGS, "--hf-checkpoint", str(folder), *flags])
    backend = FsdpBackend(str(folder), config.train, config.optimizer)
    backend.use_schedule(schedule_of(config.optimizer, STEPS))
    lines = Lines()
    tracker = Tracker(sinks=[lines])
    return TrainActor(backend, config, args, bind(args), tracker, transport=None, on_step=lambda: None), lines


def ours(folder: Path, rollout: Rollout, *flags: str) -> tuple[Trace, Lines]:
    actor, lines = make_actor(folder, *flags)
    report = actor.train(0, rollout.batch(), SAMPLES_PER_STEP)
    assert report.steps == STEPS and actor.steps_done == STEPS
    names = dict(actor.backend.model.named_parameters())
    trace = Trace(
        [line["train/loss"] for line in lines.steps],
        [line["train/grad_norm"] for line in lines.steps],
        {name: p.detach() for name, p in names.items()},
    )
    return trace, lines


def assert_equal(got: Trace, want: Trace) -> None:
    assert got.losses == pytest.approx(want.losses, abs=1e-6)
    assert got.norms == pytest.approx(want.norms, abs=1e-5)
    assert got.weights.keys() == want.weights.keys()
    for name, tensor in want.weights.items():
        torch.testing.assert_close(got.weights[name], tensor, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


# ---- plug-ins that see everything, so that nothing is left out or shared ---------------------------------------------


def from_logits(args: Namespace, parallel_state: Any, batch: dict[str, Any], logits: Tensor, reduce: Any) -> Any:
    """The policy loss as a custom loss."""
    end, values = 0, []
    for i, (tokens, total, length) in enumerate(
        zip(batch["unconcat_tokens"], batch["total_lengths"], batch["response_lengths"])
    ):
        end += total
        log_p = (logits[0, end - length - 1 : end - 1] / args.rollout_temperature).log_softmax(-1)
        now = log_p.gather(-1, tokens[-length:, None])[:, 0]
        ratio = torch.exp(now - batch["log_probs"][i])
        bounded = ratio.clamp(1 - args.eps_clip, 1 + args.eps_clip_high)
        values.append(-torch.minimum(ratio * batch["advantages"][i], bounded * batch["advantages"][i]))
    loss = reduce(torch.cat(values))
    return loss, {"loss": loss.detach()}


def sum_of_means(total_lengths: Any, response_lengths: list[int], masks: list[Tensor], per_token: bool) -> Any:
    """The default reducer: with it, rows of zero gradient run like all others."""

    def reduce(values: Tensor) -> Tensor:
        parts = torch.split(values, response_lengths)
        return torch.stack([(v * m).sum() / m.sum().clamp(min=1) for v, m in zip(parts, masks)]).sum()

    return reduce


def own(name: str) -> str:
    return f"{__file__}:{name}"


# ---- the truth -----------------------------------------------------------------------------------------------------

SPLITS = {
    "one by one": ["--micro-batch-size", "1"],
    "three": ["--micro-batch-size", "3"],
    "all at once": ["--micro-batch-size", "64"],
    "few tokens": ["--use-dynamic-batch-size", "--max-tokens-per-gpu", "40"],
    "many tokens": ["--use-dynamic-batch-size", "--max-tokens-per-gpu", "10000"],
}

CASES: dict[str, tuple[list[str], Settings]] = {
    "policy loss": ([], Settings()),
    "nothing left out": (["--custom-pg-loss-reducer-function-path", own("sum_of_means")], Settings()),
    "custom loss": (["--loss-type", "custom_loss", "--custom-loss-function-path", own("from_logits")], Settings()),
    "entropy bonus": (["--entropy-coef", "0.01"], Settings(entropy_coef=0.01)),
    "temperature": (["--rollout-temperature", "0.7"], Settings(temperature=0.7)),
    "per token": (["--calculate-per-token-loss"], Settings(per_token=True)),
    "importance": (["--use-tis"], Settings(tis=True)),
    "weight decay": (["--weight-decay", "0.1"], Settings(weight_decay=0.1)),
    "no clipping": (["--clip-grad", "0"], Settings(clip_grad=0.0)),
    "sft": (["--loss-type", "sft_loss", "--disable-compute-advantages-and-returns"], Settings(sft=True)),
    "recomputed": (["--gradient-checkpointing", "--recompute-loss-function"], Settings()),
    "chunked log-probs": (["--log-probs-chunk-size", "5"], Settings()),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("same_prompts", [True, False], ids=["shared prompts", "own prompts"])
def test_any_split_equals_the_plain_loop(split: str, same_prompts: bool, folder: Path) -> None:
    rollout = make_rollout(same_prompts=same_prompts)
    got, _ = ours(folder, rollout, *SPLITS[split])
    assert_equal(got, reference(folder, rollout, Settings()))


@pytest.mark.parametrize("case", CASES)
def test_any_loss_equals_the_plain_loop(case: str, folder: Path) -> None:
    flags, settings = CASES[case]
    rollout = make_rollout()
    got, lines = ours(folder, rollout, *SPLITS["few tokens"], *flags)
    assert_equal(got, reference(folder, rollout, settings))
    assert all(not line["train/skipped_step"] for line in lines.steps)


def test_clipping_takes_part(folder: Path) -> None:
    """The cases above show little where the ratio stays inside the clip range."""
    _, lines = ours(folder, make_rollout(), *SPLITS["three"])
    assert lines.steps[0]["train/pg_clipfrac"] == 0 < lines.steps[2]["train/pg_clipfrac"]
    assert lines.steps[0]["train/ppo_kl"] == pytest.approx(0.0, abs=1e-7) != lines.steps[2]["train/ppo_kl"]
    assert all(line["train/grad_norm"] > 0.5 for line in lines.steps), "the norm is clipped in every step"


def test_rows_of_zero_gradient_are_counted_and_not_run(folder: Path) -> None:
    _, lines = ours(folder, make_rollout(), *SPLITS["three"])
    assert [line["train/exactly_zero_samples"] for line in lines.steps] == [4, 1, 0]
    _, lines = ours(folder, make_rollout(), "--custom-pg-loss-reducer-function-path", own("sum_of_means"))
    assert [line["train/exactly_zero_samples"] for line in lines.steps] == [0, 0, 0]


def test_metrics_do_not_depend_on_what_ran(folder: Path) -> None:
    """Means over the samples that ran, or zero anyway: leaving rows out changes no metric by more than that."""
    rollout = make_rollout()
    rollout.rewards[4:8] = [0.5, -0.5, 1.0, -1.0]
    rollout.masks[9] = [1] * len(rollout.masks[9])
    _, some = ours(folder, rollout, *SPLITS["three"])
    _, everything = ours(
        folder, rollout, *SPLITS["three"], "--custom-pg-loss-reducer-function-path", own("sum_of_means")
    )
    for ran, all_ran in zip(some.steps, everything.steps, strict=True):
        assert ran.keys() == all_ran.keys()
        assert dict(ran) == pytest.approx(dict(all_ran), abs=1e-5)


# ---- edges ---------------------------------------------------------------------------------------------------------


def test_a_step_without_any_gradient_is_a_step(folder: Path) -> None:
    """Moments decay and the schedule goes on, as in the plain loop, whose gradient is then exactly zero."""
    rollout = make_rollout()
    rollout.rewards[SAMPLES_PER_STEP : 2 * SAMPLES_PER_STEP] = [0.0] * SAMPLES_PER_STEP
    actor, lines = make_actor(folder, *SPLITS["three"])
    actor.train(0, rollout.batch(), SAMPLES_PER_STEP)
    want = reference(folder, rollout, Settings())
    assert lines.steps[1]["train/grad_norm"] == want.norms[1] == 0.0
    for name, p in actor.backend.model.named_parameters():
        torch.testing.assert_close(p.detach(), want.weights[name], atol=1e-6, rtol=0)


def test_a_gradient_that_is_not_finite_changes_nothing(folder: Path) -> None:
    rollout = make_rollout()
    rollout.rewards[0] = math.inf
    actor, lines = make_actor(folder, *SPLITS["three"])
    before = {name: p.detach().clone() for name, p in actor.backend.model.named_parameters()}
    actor.train(0, rollout.batch().select(range(SAMPLES_PER_STEP)), SAMPLES_PER_STEP)
    assert lines.steps[0]["train/skipped_step"] == 1.0
    for name, p in actor.backend.model.named_parameters():
        assert torch.equal(p.detach(), before[name]), name


def test_too_few_samples_for_a_step(folder: Path) -> None:
    actor, _ = make_actor(folder)
    with pytest.raises(UsageError, match="5 samples fill no optimizer step of 8"):
        actor.train(0, make_rollout().batch().select(range(5)), SAMPLES_PER_STEP)


def test_rewards_that_are_no_numbers(folder: Path) -> None:
    actor, _ = make_actor(folder)
    batch = make_rollout().batch()
    batch.rewards = [{"score": 1.0}] * SAMPLES
    with pytest.raises(UsageError, match="--advantage-estimator grpo: expected one number per sample"):
        actor.train(0, batch, SAMPLES_PER_STEP)


def test_save_and_load_continue_bitwise(folder: Path, tmp_path: Path) -> None:
    rollout = make_rollout()
    straight, _ = make_actor(folder)
    straight.train(0, rollout.batch(), SAMPLES_PER_STEP)
    tmp_path.joinpath("ck").mkdir()
    straight.backend.save(tmp_path / "ck", with_optimizer=True)
    straight.train(1, rollout.batch(), SAMPLES_PER_STEP)

    resumed, _ = make_actor(folder)
    resumed.restore(tmp_path / "ck", Restoring(weight_version=5, steps_done=STEPS))
    assert (resumed.weight_version, resumed.steps_done, resumed.backend.scheduler.num_steps) == (5, STEPS, STEPS)
    resumed.train(1, rollout.batch(), SAMPLES_PER_STEP)
    for a, b in zip(straight.backend.params, resumed.backend.params):
        assert torch.equal(a, b)


def test_a_model_folder_that_is_none(folder: Path, tmp_path: Path) -> None:
    config, _ = parse([*FLAGS, "--hf-checkpoint", str(folder)])
    with pytest.raises(CheckpointError, match=r"expected a Hugging Face model folder with a config\.json"):
        FsdpBackend(str(tmp_path), config.train, config.optimizer)
