"""What is optimized: advantages, loss, corrections. What a flag needs beside it is in `miles.config.resolve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from miles.config.flags import Check, Section, at_least, between, flag, no_meaning_here


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig(Section):
    """Advantages and the loss.

    Example: `AlgorithmConfig(advantage_estimator="grpo", eps_clip=0.2, eps_clip_high=0.28)`
    """

    # The last three are not among the published ones.
    advantage_estimator: Literal[
        "grpo",
        "gspo",
        "reinforce_plus_plus",
        "reinforce_plus_plus_baseline",
        "ppo",
        "on_policy_distillation",
        "rloo",
        "cispo",
        "dr_grpo",
    ] = flag("grpo", "How rewards become advantages.", common=True)
    loss_type: Literal["policy_loss", "sft_loss", "custom_loss"] = flag("policy_loss", "Which loss.", common=True)
    calculate_per_token_loss: bool = flag(
        False, "Average over all tokens of a step, not first over each sample.", common=True
    )
    rewards_normalization: bool = flag(
        True, "Train on the rewards as they are, not relative to their group.", option="--disable-rewards-normalization"
    )
    grpo_std_normalization: bool = flag(
        True,
        "Do not divide by the standard deviation of the group.",
        option="--disable-grpo-std-normalization",
        common=True,
    )
    compute_advantages_and_returns: bool = flag(
        True,
        "Skip old log-probs and advantages, which an SFT loss does not need.",
        option="--disable-compute-advantages-and-returns",
    )
    normalize_advantages: bool = flag(False, "Whiten the advantages over all samples.")
    gamma: float = flag(1.0, "Discount of later rewards.", check=between(0, 1))
    lambd: float = flag(1.0, "Lambda of generalized advantage estimation.", check=between(0, 1))
    eps_clip: float = flag(0.2, "Clip range of the policy ratio below 1.", check=at_least(0), common=True)
    eps_clip_high: float | None = flag(
        None, "Clip range above 1; as --eps-clip when unset.", check=at_least(0), common=True
    )
    eps_clip_c: float | None = flag(
        None,
        "Dual clip: bound of the loss where the advantage is negative.",
        check=Check("a value > 1", lambda v: v > 1),
    )
    entropy_coef: float = flag(0.0, "Weight of the entropy bonus.")
    use_rollout_entropy: bool = flag(
        False,
        "Compute the entropy in passes without gradients, too.",
        status=no_meaning_here("it is always reported."),
    )
    reset_optimizer_states: bool = flag(False, "Forget the optimizer's moments before each rollout's training.")

    use_rollout_logprobs: bool = flag(False, "Take the engine's log-probs for those of the old policy.")
    use_tis: bool = flag(False, "Weight the loss by the truncated ratio of trainer to engine probabilities.")
    tis_clip: float = flag(2.0, "Upper bound of that ratio.", check=at_least(0))
    tis_clip_low: float = flag(0, "Lower bound of that ratio.", check=at_least(0))
    get_mismatch_metrics: bool = flag(
        False, "Measure how trainer and engine differ, through --custom-tis-function-path, without correcting it."
    )

    kl_coef: float = flag(0.0, "Weight of the KL penalty in the advantages.", check=at_least(0))
    use_kl_loss: bool = flag(False, "Add the KL to the reference model to the loss.")
    kl_loss_coef: float = flag(0.0, "Weight of that term.", check=at_least(0))
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = flag("k1", "Estimator of the KL.")
    use_unbiased_kl: bool = flag(False, "Weight the estimate by the policy ratio.")
    ref_update_interval: int | None = flag(
        None, "Rollouts after which the reference becomes the actor.", check=at_least(1)
    )

    value_clip: float = flag(0.2, "Clip range of the value loss.", check=at_least(0))
    num_critic_only_steps: int = flag(0, "First rollouts, which train the critic alone.", check=at_least(0))
    use_routing_replay: bool = flag(False, "Route tokens to the same experts in training as in the log-prob pass.")
    use_rollout_routing_replay: bool = flag(False, "Route tokens to the experts that the engine has used.")
    use_opsm: bool = flag(False, "Drop bad samples that are far off-policy.")
    opsm_delta: float = flag(1e-4, "Distance from which on they are dropped.")

    @property
    def use_critic(self) -> bool:
        """Only PPO has a critic."""
        return self.advantage_estimator == "ppo"

    @property
    def use_reference(self) -> bool:
        """Whether anything reads the reference model's log-probs."""
        return self.use_kl_loss or self.kl_coef != 0
