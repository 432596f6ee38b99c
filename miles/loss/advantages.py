"""Rewards, values or a teacher's log-probs to per-token advantages: one function per estimator, in a table.

An estimator reads `AdvantageInputs` and returns flat advantages and returns over the response tokens of a whole shard.
Rewards come with their baseline already taken off (`miles.batch.rewards`). Whitening over ranks comes after it
(`miles.loss.whiten`), and is the trainer's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from miles.errors import UsageError
from miles.loss.kl import compute_approx_kl
from miles.loss.reduce import ids_of
from miles.loss.scan import discounted_sums, following
from miles.loss.types import LossSettings


@dataclass(frozen=True)
class AdvantageInputs:
    """n samples with R response tokens. What an estimator does not read may be None.

    Example: `AdvantageInputs(rewards=[0.7, -0.7], response_lengths=[3, 2])` is
    `[0.7, 0.7, 0.7, -0.7, -0.7]` under GRPO.
    """

    rewards: Tensor | None  # float32 [n], after post-processing
    response_lengths: Sequence[int]
    loss_mask: Tensor | None = None  # int32 [R]; None: every token is trained
    settings: LossSettings = field(default_factory=LossSettings)  # gamma, lambd, kl_coef, kl_loss_type
    old_log_probs: Tensor | None = None  # float32 [R], of the policy that is trained, before the rollout's first step
    ref_log_probs: Tensor | None = None  # float32 [R], of the reference model
    values: Tensor | None = None  # float32 [R], the critic's before the rollout's first step
    teacher_log_probs: Tensor | None = None  # float32 [R]

    def ids(self, device: torch.device) -> Tensor:
        """int64 [R]: the sample of each response token."""
        return ids_of(self.response_lengths, device)

    def numbers(self) -> Tensor:
        """The rewards; estimators of rewards have them."""
        assert self.rewards is not None and self.rewards.shape == (len(self.response_lengths),)
        return self.rewards

    def kl_penalty(self) -> Tensor:
        """float64 [R]: kl_coef times the estimate of KL(pi_old || pi_ref) at each token. A masked token (what a tool
        said, say) was not the policy's choice and pays nothing. 0 without `--kl-coef`, and where the old policy was not
        evaluated, as in rollouts that train the critic alone."""
        wanted = self.settings.kl_coef != 0 and self.old_log_probs is not None and self.ref_log_probs is not None
        if not wanted:
            count = sum(self.response_lengths)
            return torch.zeros(count, dtype=torch.float64, device=self.numbers().device)
        assert self.old_log_probs is not None and self.ref_log_probs is not None
        old, ref = self.old_log_probs.double(), self.ref_log_probs.double()
        if self.loss_mask is not None:
            old, ref = (x.masked_fill(self.loss_mask == 0, 0.0) for x in (old, ref))
        return self.settings.kl_coef * compute_approx_kl(old, ref, self.settings.kl_loss_type)


@dataclass(frozen=True)
class Advantages:
    """`advantages` weigh the policy gradient, `returns` are what a critic would learn. float32 [R] each."""

    advantages: Tensor
    returns: Tensor


Estimator = Callable[[AdvantageInputs], Advantages]


def reward_of_the_sample(inputs: AdvantageInputs) -> Advantages:
    """Every token of a response gets its reward, whose baseline is already taken off: GRPO (arXiv:2402.03300), GSPO
    (arXiv:2507.18071), RLOO (arXiv:2402.14740), Dr.GRPO (arXiv:2503.20783), CISPO (arXiv:2506.13585)."""
    rewards = inputs.numbers()
    spread = rewards.float()[inputs.ids(rewards.device)]
    return Advantages(advantages=spread, returns=spread)


def generalized_advantages(inputs: AdvantageInputs) -> Advantages:
    """PPO: generalized advantage estimation (arXiv:1506.02438, eq. 16) with the reward at the last token and
    -kl_coef KL at every token. delta_t = r_t + gamma V_{t+1} - V_t with V = 0 after the end,
    A_t = delta_t + gamma lambda A_{t+1}, returns A + V. The mask plays no part: time passes at every token."""
    assert inputs.values is not None
    gamma, lengths = inputs.settings.gamma, inputs.response_lengths
    values = inputs.values.double()
    rewards = with_outcome(-inputs.kl_penalty(), inputs.numbers(), last_places(inputs, trained=False))
    deltas = rewards + gamma * following(values, lengths) - values
    advantages = discounted_sums(deltas, lengths, gamma * inputs.settings.lambd)
    return Advantages(advantages.float(), (advantages + values).float())


def discounted_returns(inputs: AdvantageInputs) -> Advantages:
    """REINFORCE++ (arXiv:2501.03262): r_t = -kl_coef KL_t, plus the reward at the last trained token; the advantage is
    the discounted return, sum over s >= t of gamma^(s-t) r_s. A sample without a trained token has only zeros."""
    rewards = with_outcome(-inputs.kl_penalty(), inputs.numbers(), last_places(inputs, trained=True))
    returns = discounted_sums(rewards, inputs.response_lengths, inputs.settings.gamma).float()
    return Advantages(returns, returns)


def reward_less_kl(inputs: AdvantageInputs) -> Advantages:
    """REINFORCE++ with a baseline (arXiv:2501.03262): the reward less its group's mean, less kl_coef KL_t."""
    rewards = inputs.numbers().double()
    advantages = (rewards[inputs.ids(rewards.device)] - inputs.kl_penalty()).float()
    return Advantages(advantages, advantages)


def log_ratio_to_the_teacher(inputs: AdvantageInputs) -> Advantages:
    """log pi_teacher - log pi of each sampled token: the policy gradient of the reverse KL to the teacher, with a
    discount of 0 (Agarwal et al., "On-Policy Distillation of Language Models", arXiv:2306.13649; Lu et al., "On-Policy
    Distillation", Thinking Machines Lab, 2025). Rewards are not read."""
    assert inputs.teacher_log_probs is not None and inputs.old_log_probs is not None
    ratio = inputs.teacher_log_probs - inputs.old_log_probs
    return Advantages(advantages=ratio, returns=ratio)


def last_places(inputs: AdvantageInputs, *, trained: bool) -> Tensor:
    """int64 [n]: the place in [R] of each sample's last token, or last trained one; -1 where it has none."""
    device = inputs.numbers().device
    ids = inputs.ids(device)
    places = torch.arange(len(ids), device=device)
    if trained and inputs.loss_mask is not None:
        counts = inputs.loss_mask != 0
        ids, places = ids[counts], places[counts]
    none = torch.full((len(inputs.response_lengths),), -1, dtype=torch.int64, device=device)
    return none.scatter_reduce(0, ids, places, "amax")


def with_outcome(token_rewards: Tensor, rewards: Tensor, places: Tensor) -> Tensor:
    """`token_rewards` [R] plus each sample's reward [n] at its place; nothing where that is -1."""
    has = places >= 0
    return token_rewards.index_add(0, places[has], rewards[has].to(token_rewards.dtype))


ESTIMATORS: dict[str, Estimator] = {
    "grpo": reward_of_the_sample,
    "gspo": reward_of_the_sample,
    "rloo": reward_of_the_sample,
    "dr_grpo": reward_of_the_sample,
    "cispo": reward_of_the_sample,
    "ppo": generalized_advantages,
    "reinforce_plus_plus": discounted_returns,
    "reinforce_plus_plus_baseline": reward_less_kl,
    "on_policy_distillation": log_ratio_to_the_teacher,
}

FROM_A_TEACHER = frozenset({"on_policy_distillation"})
"""Estimators that read `old_log_probs` and `teacher_log_probs`, and no rewards."""

PENALIZED = frozenset({"ppo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"})
"""Estimators that read `old_log_probs` and `ref_log_probs` where `--kl-coef` is not 0."""


def compute_advantages(estimator: str, inputs: AdvantageInputs) -> Advantages:
    """The advantages of `--advantage-estimator`."""
    if estimator not in ESTIMATORS:
        raise UsageError(f"--advantage-estimator: expected one of {', '.join(ESTIMATORS)}, got {estimator!r}.")
    return ESTIMATORS[estimator](inputs)
