"""The losses written again from their papers: double precision, Python loops over samples and tokens, no tensors.

Slow, and independent of `miles.loss`: nothing is imported from it. Gradients come from central differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Row:
    """One sample: a value per response token in every list."""

    current: list[float]
    mask: list[int]
    old: list[float] = field(default_factory=list)
    rollout: list[float] = field(default_factory=list)
    ref: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    advantage: list[float] = field(default_factory=list)
    value: list[float] = field(default_factory=list)  # a critic's, now
    old_value: list[float] = field(default_factory=list)  # and before the first step
    target: list[float] = field(default_factory=list)


def sum_of_means(rows: list[Row], values: list[list[float]], per_token: bool = False) -> float:
    total = 0.0
    for row, xs in zip(rows, values):
        inner = sum(x for x, m in zip(xs, row.mask) if m)
        total += inner if per_token else inner / max(sum(row.mask), 1)
    return total


def kl(kind: str, d: float, ratio: float = 1.0) -> float:
    if kind == "k1":
        return ratio * d
    if kind == "k2":
        return ratio * d * d / 2
    value = ratio * (math.exp(-d) - 1 + d)
    return min(max(value, -10.0), 10.0) if kind == "low_var_kl" else value


def token_loss(ppo_kl: float, a: float, low: float, high: float, c: float | None) -> tuple[float, float]:
    ratio = math.exp(-ppo_kl)
    bounded = min(max(ratio, 1 - low), 1 + high)
    plain, clipped = -ratio * a, -bounded * a
    loss = max(plain, clipped)
    if c is not None and a < 0:
        loss = min(loss, -c * a)
    return loss, float(clipped > plain)


def cispo_loss(ppo_kl: float, a: float, log_prob: float, low: float, high: float) -> tuple[float, float]:
    """The value: its gradient treats the bounded ratio as a constant, see `policy`."""
    ratio = math.exp(-ppo_kl)
    bounded = min(max(ratio, 1 - low), 1 + high)
    return -bounded * a * log_prob, float(bounded != ratio)


def value(rows: list[Row], s: Any) -> dict[str, float]:
    """All metrics of the value loss."""
    losses, outside = [], []
    for row in rows:
        row_losses, row_outside = [], []
        for v, old, target in zip(row.value, row.old_value, row.target):
            near = min(max(v, old - s.value_clip), old + s.value_clip)
            row_losses.append(max((v - target) ** 2, (near - target) ** 2))
            row_outside.append(float(abs(v - old) > s.value_clip))
        losses.append(row_losses)
        outside.append(row_outside)
    per_token = s.calculate_per_token_loss
    return {
        "value_loss": sum_of_means(rows, losses, per_token),
        "value_clipfrac": sum_of_means(rows, outside, per_token),
    }


def policy(rows: list[Row], s: Any) -> dict[str, float]:
    """All metrics of the policy loss; `s` holds the flags."""
    high = s.eps_clip if s.eps_clip_high is None else s.eps_clip_high
    per_token = s.calculate_per_token_loss
    losses, clips, log_ratios, diffs, kls, ois, tis, tis_clip, tis_abs = ([] for _ in range(9))
    opsm = 0.0
    for row in rows:
        old = row.rollout if s.use_rollout_logprobs else row.old
        count = max(sum(row.mask), 1)
        drift = sum(o - c for o, c, m in zip(old, row.current, row.mask) if m) / count
        out: list[tuple[float, ...]] = []
        dropped = 0
        for t, (c, o, a) in enumerate(zip(row.current, old, row.advantage)):
            log_ratio = drift if s.advantage_estimator == "gspo" else o - c
            if s.advantage_estimator == "cispo":
                loss, clip = cispo_loss(log_ratio, a, c, s.eps_clip, high)
            else:
                loss, clip = token_loss(log_ratio, a, s.eps_clip, high, s.eps_clip_c)
            if s.use_opsm and drift > s.opsm_delta and a < 0:
                loss, dropped = 0.0, dropped + 1
            ratio = math.exp(row.old[t] - row.rollout[t]) if row.rollout and row.old else 1.0
            weight = min(max(ratio, s.tis_clip_low), s.tis_clip)
            if s.use_tis:
                loss *= weight
            k = 0.0
            if s.use_kl_loss:
                k = kl(s.kl_loss_type, c - row.ref[t], math.exp(c - o) if s.use_unbiased_kl else 1.0)
            trainer_side = row.old[t] if row.old else o
            diff = abs(trainer_side - row.rollout[t]) if row.rollout else 0.0
            out.append(
                (loss, clip, log_ratio, diff, k, math.exp(-log_ratio), ratio, float(weight != ratio), abs(ratio - 1))
            )
        opsm += dropped / count
        for column, target in enumerate((losses, clips, log_ratios, diffs, kls, ois, tis, tis_clip, tis_abs)):
            target.append([entry[column] for entry in out])

    def reduce(values: list[list[float]]) -> float:
        return sum_of_means(rows, values, per_token)

    pg_loss = reduce(losses)
    if s.advantage_estimator == "dr_grpo":
        pg_loss = sum_of_means(rows, losses, True) / s.rollout_max_response_len
    result = {"pg_loss": pg_loss, "pg_clipfrac": reduce(clips), "ppo_kl": reduce(log_ratios)}
    result["loss"] = result["pg_loss"]
    if all(row.entropy or not row.mask for row in rows):
        result["entropy_loss"] = reduce([row.entropy for row in rows])
        result["loss"] -= s.entropy_coef * result["entropy_loss"]
    if s.use_kl_loss:
        result["kl_loss"] = reduce(kls)
        result["loss"] += s.kl_loss_coef * result["kl_loss"]
    result["train_rollout_logprob_abs_diff"] = reduce(diffs)
    if s.use_opsm:
        result["opsm_clipfrac"] = opsm
    if s.use_tis or s.get_mismatch_metrics:
        result |= {"ois": reduce(ois), "tis": reduce(tis), "tis_clipfrac": reduce(tis_clip), "tis_abs": reduce(tis_abs)}
    return result


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    powers = [math.exp(z - top) for z in logits]
    return [p / sum(powers) for p in powers]


def log_prob_and_entropy(
    hidden: list[float], weight: list[list[float]], target: int, temperature: float
) -> tuple[float, float]:
    p = softmax([sum(h * w for h, w in zip(hidden, row)) / temperature for row in weight])
    return math.log(p[target]), -sum(q * math.log(q) for q in p if q > 0)


def slope(f: Callable[[float], float], x: float, step: float = 1e-5) -> float:
    return (f(x + step) - f(x - step)) / (2 * step)
