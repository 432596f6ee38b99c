"""A plain Hugging Face training loop with every algorithm, written from the formulas: one forward pass per sample,
loops over tokens for advantages, `torch.optim.AdamW`. Nothing of `miles` is used.

What a `Rollout` is and how it is trained by miles is in `test_actor`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

EPS_LOW, EPS_HIGH, LR, CRITIC_LR, CLIP_GRAD = 0.1, 0.15, 5e-3, 2e-3, 0.5


@dataclass
class Algorithm:
    """The flags of one case, as the loop understands them."""

    estimator: str = "grpo"
    kl_coef: float = 0.0
    kl_loss_coef: float = 0.0
    kl: str = "k1"
    unbiased: bool = False
    opsm_delta: float | None = None
    whiten: bool = False
    gamma: float = 1.0
    lambd: float = 1.0
    dual_clip: float | None = None
    length: float = 1.0  # of dr_grpo
    value_clip: float = 0.2
    critic_only: bool = False


@dataclass
class Outcome:
    losses: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    values: list[list[float]] = field(default_factory=list)
    critic_losses: list[float] = field(default_factory=list)
    critic: dict[str, Tensor] = field(default_factory=dict)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").train()


def adamw(params: Any, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.0)


def states(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """The last hidden states that predict the response tokens."""
    hidden = model.base_model(torch.tensor([prompt + response])).last_hidden_state[0]
    return hidden[len(prompt) - 1 : -1]


def log_probs(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    logits = states(model, prompt, response) @ model.get_output_embeddings().weight.T
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


def kl_of(kind: str, d: Tensor, ratio: Tensor | float = 1.0) -> Tensor:
    values = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d, "low_var_kl": torch.exp(-d) - 1 + d}[kind] * ratio
    return values.clamp(-10, 10) if kind == "low_var_kl" else values


def advantages_of(rollout: Any, a: Algorithm, old: list[Tensor], ref: list[Tensor], values: list[list[float]]) -> Any:
    """Per sample the advantages and returns of its tokens."""
    advantages: list[list[float]] = []
    returns: list[list[float]] = []
    for i, reward in enumerate(rollout.rewards):
        mask, n = rollout.masks[i], len(rollout.masks[i])
        kl = [0.0] * n
        if a.kl_coef:
            kl = [a.kl_coef * float(k) * m for k, m in zip(kl_of(a.kl, old[i] - ref[i]), mask)]
        if a.estimator == "ppo":
            own, value = [0.0] * n, values[i]
            ahead = 0.0
            for t in reversed(range(n)):
                r = -kl[t] + (reward if t == n - 1 else 0.0)
                delta = r + a.gamma * (value[t + 1] if t < n - 1 else 0.0) - value[t]
                own[t] = ahead = delta + a.gamma * a.lambd * ahead
            advantages.append(own)
            returns.append([x + v for x, v in zip(own, value)])
            continue
        if a.estimator == "reinforce_plus_plus":
            last = max((t for t in range(n) if mask[t]), default=-1)
            own, ahead = [0.0] * n, 0.0
            for t in reversed(range(n)):
                own[t] = ahead = -kl[t] + (reward if t == last else 0.0) + a.gamma * ahead
        elif a.estimator == "reinforce_plus_plus_baseline":
            own = [reward - k for k in kl]
        else:
            own = [reward] * n
        advantages.append(own)
        returns.append(own)
    if a.whiten:
        trained = [x for row, mask in zip(advantages, rollout.masks) for x, m in zip(row, mask) if m]
        mean = sum(trained) / len(trained)
        variance = sum((x - mean) ** 2 for x in trained) / (len(trained) - 1)
        advantages = [[(x - mean) / math.sqrt(variance + 1e-8) for x in row] for row in advantages]
    return advantages, returns


def policy_terms(now: Tensor, old: Tensor, ref: Tensor, adv: Tensor, mask: Tensor, a: Algorithm) -> Tensor:
    """The loss of one sample."""
    count = mask.sum().clamp(min=1)
    difference = old - now
    drift = (difference * mask).sum() / count
    ppo_kl = drift.expand_as(now) if a.estimator == "gspo" else difference
    ratio = torch.exp(-ppo_kl)
    bounded = ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH)
    if a.estimator == "cispo":
        values = -bounded.detach() * adv * now
    else:
        values = -torch.minimum(ratio * adv, bounded * adv)
        if a.dual_clip is not None:
            values = torch.where(adv < 0, torch.minimum(values, -a.dual_clip * adv), values)
    if a.opsm_delta is not None and float(drift.detach()) > a.opsm_delta:
        values = torch.where(adv < 0, 0.0, values)
    total = (values * mask).sum() / (a.length if a.estimator == "dr_grpo" else count)
    if a.kl_loss_coef:
        kl = kl_of(a.kl, now - ref, torch.exp(now - old) if a.unbiased else 1.0)
        total = total + a.kl_loss_coef * (kl * mask).sum() / count
    return total


def train(folder: Path, ref_folder: Path, rollout: Any, a: Algorithm, *, per_step: int, head: Tensor) -> Outcome:
    """Optimizer steps of `per_step` samples each; `head` [1, D] is the critic's projection before training."""
    model, out, n = load(folder), Outcome(), len(rollout.rewards)
    optimizer = adamw(model.parameters(), LR)
    rows = [(rollout.prompts[i], rollout.responses[i]) for i in range(n)]
    masks = [torch.tensor(mask, dtype=torch.float32) for mask in rollout.masks]
    reference = load(ref_folder)
    with torch.no_grad():
        old = [log_probs(model, *row) for row in rows]
        ref = [log_probs(reference, *row) for row in rows]
    if a.critic_only:
        ref = old
    returns: Any = None
    if a.estimator == "ppo":
        critic, projection = load(folder), torch.nn.Linear(head.shape[1], 1)
        projection.weight.data, projection.bias.data = head.clone(), torch.zeros(1)
        with torch.no_grad():
            out.values = [projection(states(critic, *row))[:, 0].tolist() for row in rows]
    advantages, returns = advantages_of(rollout, a, old, ref, out.values)
    if a.estimator == "ppo":
        learn_values(critic, projection, rows, masks, out, returns, a, per_step)
    for start in [] if a.critic_only else range(0, n, per_step):
        total = torch.zeros(())
        for i in range(start, start + per_step):
            now = log_probs(model, *rows[i])
            total = total + policy_terms(now, old[i], ref[i], torch.tensor(advantages[i]), masks[i], a)
        step(total / per_step, model.parameters(), optimizer)
        out.losses.append(float(total.detach()) / per_step)
    out.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return out


def learn_values(
    critic: Any, projection: Any, rows: Any, masks: Any, out: Outcome, returns: Any, a: Algorithm, per_step: int
) -> None:
    params = [*critic.base_model.parameters(), *projection.parameters()]
    optimizer = adamw(params, CRITIC_LR)
    for start in range(0, len(rows), per_step):
        total = torch.zeros(())
        for i in range(start, start + per_step):
            value, old, target = (
                projection(states(critic, *rows[i]))[:, 0], torch.tensor(out.values[i]), torch.tensor(returns[i])
            )  # fmt: skip
            near = torch.minimum(torch.maximum(value, old - a.value_clip), old + a.value_clip)
            worst = torch.maximum((value - target) ** 2, (near - target) ** 2)
            total = total + (worst * masks[i]).sum() / masks[i].sum().clamp(min=1)
        step(total / per_step, params, optimizer)
        out.critic_losses.append(float(total.detach()) / per_step)
    out.critic = {f"model.{name}": p.detach() for name, p in critic.base_model.named_parameters()}
    out.critic |= {"lm_head.weight": projection.weight.detach(), "lm_head.bias": projection.bias.detach()}


def step(loss: Tensor, params: Any, optimizer: torch.optim.AdamW) -> None:
    params = list(params)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params, CLIP_GRAD)
    optimizer.step()
