"""Rewards to advantages written again from the papers: double precision, Python loops, no tensors.

Slow, and independent of `miles`: nothing is imported from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Response:
    """One sample: its reward after normalisation, and a value per response token in every list."""

    reward: float
    mask: list[int]
    old: list[float] = field(default_factory=list)
    ref: list[float] = field(default_factory=list)
    value: list[float] = field(default_factory=list)


def mean(xs: list[float]) -> float:
    return sum(xs) / len(xs)


# ---- rewards of a group --------------------------------------------------------------------------------------------


def group_relative(rewards: list[float | None], estimator: str, *, std: bool) -> list[float]:
    """The rewards of one group; None is a failed score. Groups with one score have nothing to compare with: 0."""
    known = [r for r in rewards if r is not None]
    result = []
    for i, reward in enumerate(rewards):
        if reward is None or len(known) == 1:
            result.append(0.0)
            continue
        if estimator == "rloo":
            result.append(reward - mean([r for j, r in enumerate(rewards) if r is not None and j != i]))
            continue
        centred = reward - mean(known)
        if std and estimator in ("grpo", "gspo", "cispo"):
            variance = sum((r - mean(known)) ** 2 for r in known) / (len(known) - 1)
            centred /= math.sqrt(variance) + 1e-6
        result.append(centred)
    return result


# ---- advantages ----------------------------------------------------------------------------------------------------


def penalty(row: Response, kind: str, coef: float) -> list[float]:
    """kl_coef times the estimate of the KL at each token; masked tokens pay nothing."""
    if coef == 0:
        return [0.0] * len(row.mask)
    result = []
    for o, r, m in zip(row.old, row.ref, row.mask):
        d = o - r
        kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}["k3" if kind == "low_var_kl" else kind]
        if kind == "low_var_kl":
            kl = min(max(kl, -10.0), 10.0)
        result.append(coef * kl if m else 0.0)
    return result


def outcome(row: Response) -> list[float]:
    return [row.reward] * len(row.mask)


def gae(row: Response, kl: list[float], gamma: float, lambd: float) -> tuple[list[float], list[float]]:
    """Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation", by its sum:
    A_t = sum over l of (gamma lambda)^l delta_{t+l}."""
    n = len(row.mask)
    rewards = [-k for k in kl]
    if n:
        rewards[-1] += row.reward
    deltas = [
        rewards[t] + (gamma * row.value[t + 1] if t + 1 < n else 0.0) - row.value[t] for t in range(n)
    ]
    advantages = [sum((gamma * lambd) ** (s - t) * deltas[s] for s in range(t, n)) for t in range(n)]
    return advantages, [a + v for a, v in zip(advantages, row.value)]


def discounted(row: Response, kl: list[float], gamma: float) -> list[float]:
    """REINFORCE++: the reward at the last trained token."""
    n = len(row.mask)
    rewards = [-k for k in kl]
    trained = [t for t in range(n) if row.mask[t]]
    if trained:
        rewards[trained[-1]] += row.reward
    return [sum(gamma ** (s - t) * rewards[s] for s in range(t, n)) for t in range(n)]


def advantages(
    estimator: str, rows: list[Response], *, gamma: float, lambd: float, kl_coef: float, kl_loss_type: str
) -> tuple[list[float], list[float]]:
    """Flat advantages and returns."""
    left: list[float] = []
    right: list[float] = []
    for row in rows:
        kl = penalty(row, kl_loss_type, kl_coef)
        if estimator == "ppo":
            a, r = gae(row, kl, gamma, lambd)
        elif estimator == "reinforce_plus_plus":
            a = r = discounted(row, kl, gamma)
        elif estimator == "reinforce_plus_plus_baseline":
            a = r = [row.reward - k for k in kl]
        else:
            a = r = outcome(row)
        left += a
        right += r
    return left, right


def whitened(values: list[float], mask: list[int]) -> list[float]:
    trained = [x for x, m in zip(values, mask) if m]
    center = mean(trained)
    variance = sum((x - center) ** 2 for x in trained) / (len(trained) - 1) if len(trained) > 1 else 0.0
    return [(x - center) / math.sqrt(variance + 1e-8) for x in values]
