"""What a loss reads and what it gives back.

A loss is a function of flat tensors over response tokens: it sees no model, no logits and no processes. Custom losses
get the published arguments instead (`published`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from miles.errors import FlagError, UsageError
from miles.loss.parallel_state import ParallelState
from miles.loss.reduce import Reducer, SumOfSampleMean

if TYPE_CHECKING:
    from miles.batch.pack import PackedBatch
    from miles.loss.logprobs import TokenLogProbs


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The flags that losses obey, under their own names.

    Example: `LossSettings(eps_clip=0.2, eps_clip_high=0.28)`, or `LossSettings.of(config.algorithm)`.
    """

    loss_type: Literal["policy_loss", "value_loss", "sft_loss", "custom_loss"] = "policy_loss"
    advantage_estimator: str = "grpo"
    calculate_per_token_loss: bool = False
    eps_clip: float = 0.2
    eps_clip_high: float | None = None  # None: as eps_clip
    eps_clip_c: float | None = None  # None: no dual clip
    entropy_coef: float = 0.0
    use_kl_loss: bool = False
    kl_loss_coef: float = 0.0
    kl_loss_type: str = "k1"
    use_unbiased_kl: bool = False
    use_tis: bool = False
    get_mismatch_metrics: bool = False
    tis_clip: float = 2.0
    tis_clip_low: float = 0.0
    use_rollout_logprobs: bool = False
    use_opsm: bool = False
    opsm_delta: float = 1e-4
    value_clip: float = 0.2
    gamma: float = 1.0
    lambd: float = 1.0
    kl_coef: float = 0.0
    normalize_advantages: bool = False
    rollout_max_response_len: int | None = None  # what dr_grpo divides by

    def __post_init__(self) -> None:
        if self.eps_clip_c is not None and self.eps_clip_c <= 1:
            raise FlagError("--eps-clip-c", given=self.eps_clip_c, expected="a number > 1 (the dual clip's bound)")
        if self.use_tis and self.use_rollout_logprobs:
            raise FlagError(
                "--use-tis",
                given="cannot be combined with --use-rollout-logprobs: with the engine's log-probs as the old policy",
                remedy="there is no mismatch left to correct.",
            )

        if self.advantage_estimator == "dr_grpo" and self.rollout_max_response_len is None:
            raise FlagError("--advantage-estimator dr_grpo", given="needs --rollout-max-response-len.")
        if self.advantage_estimator == "dr_grpo" and self.calculate_per_token_loss:
            raise FlagError(
                "--advantage-estimator dr_grpo",
                given="excludes --calculate-per-token-loss: it divides by a constant, not by the number of tokens.",
            )

    @staticmethod
    def of(*sources: object) -> LossSettings:
        """From anything that carries these flags as attributes, each taken from the first that has it: config
        sections, or a plug-in's `args`."""

        def value(name: str) -> Any:
            holder = next((source for source in sources if hasattr(source, name)), sources[0])
            return getattr(holder, name)

        return LossSettings(**{f.name: value(f.name) for f in fields(LossSettings)})

    @property
    def clip_high(self) -> float:
        return self.eps_clip if self.eps_clip_high is None else self.eps_clip_high

    @property
    def corrects_importance(self) -> bool:
        """Whether an importance function runs: to correct the loss, or only to measure."""
        return self.use_tis or self.get_mismatch_metrics


Column = Literal[
    "old_log_probs", "rollout_log_probs", "ref_log_probs", "advantages", "values", "old_values", "returns"
]
"""What a loss may ask `LossInputs.require` for."""

TisFunction = Callable[..., tuple[Tensor, list[Tensor], dict[str, Tensor]]]
"""`--custom-tis-function-path`, called by keyword; see `importance`."""

PgReducerFactory = Callable[[list[int], list[int], list[Tensor], bool], Reducer]
"""`--custom-pg-loss-reducer-function-path`: (total_lengths, response_lengths, masks, calculate_per_token_loss)."""


@dataclass(frozen=True)
class LossPlugins:
    """The user's functions inside the policy loss, and the `args` and `parallel_state` that they are called with."""

    tis: TisFunction | None = None
    pg_reducer: PgReducerFactory | None = None
    args: Any = None
    parallel_state: ParallelState = field(default_factory=ParallelState.single_process)


@dataclass(frozen=True)
class LossInputs:
    """One micro batch of n samples with R response tokens, flat: sample after sample.

    `log_probs` and `entropy` belong to the current policy and carry gradients. `old_log_probs` are the trainer's before
    the first step of this rollout, `rollout_log_probs` the engine's, `ref_log_probs` the reference model's.

    Example, two samples with two and one response tokens::

        LossInputs(log_probs=[-0.1, -0.7, -0.2], loss_mask=[1, 1, 1], sample_ids=[0, 0, 1], response_lengths=[2, 1],
                   total_lengths=[5, 4], old_log_probs=[-0.1, -0.7, -0.2], advantages=[0.7, 0.7, -0.7])
    """

    log_probs: Tensor  # float32 [R]
    loss_mask: Tensor  # int32 [R]
    sample_ids: Tensor  # int64 [R]
    response_lengths: list[int]
    total_lengths: list[int]
    entropy: Tensor | None = None  # float32 [R]
    old_log_probs: Tensor | None = None  # float32 [R]
    rollout_log_probs: Tensor | None = None  # float32 [R]
    ref_log_probs: Tensor | None = None  # float32 [R]
    advantages: Tensor | None = None  # float32 [R]
    values: Tensor | None = None  # float32 [R], the critic's, with gradient
    old_values: Tensor | None = None  # float32 [R], the critic's before the first step
    returns: Tensor | None = None  # float32 [R], what the critic learns

    @staticmethod
    def of(micro: PackedBatch, current: TokenLogProbs, columns: Mapping[str, Tensor]) -> LossInputs:
        """From a packed micro batch, the current policy's log-probs at its response tokens, and its flat columns [R]
        under their published names (the column `log_probs` holds the old policy's)."""
        return LossInputs(
            log_probs=current.log_probs,
            entropy=current.entropy,
            loss_mask=micro.loss_mask,
            sample_ids=micro.sample_ids,
            response_lengths=micro.response_lengths,
            total_lengths=micro.total_lengths,
            old_log_probs=columns.get("log_probs"),
            rollout_log_probs=columns.get("rollout_log_probs"),
            ref_log_probs=columns.get("ref_log_probs"),
            advantages=columns.get("advantages"),
        )

    @staticmethod
    def of_values(micro: PackedBatch, values: Tensor, columns: Mapping[str, Tensor]) -> LossInputs:
        """The same for a critic, from its values at the response tokens; the column `values` holds those before the
        first step. A critic has no distribution: its log-probs are 0."""
        return LossInputs(
            log_probs=torch.zeros_like(values),
            loss_mask=micro.loss_mask,
            sample_ids=micro.sample_ids,
            response_lengths=micro.response_lengths,
            total_lengths=micro.total_lengths,
            values=values,
            old_values=columns.get("values"),
            returns=columns.get("returns"),
        )

    @property
    def num_samples(self) -> int:
        return len(self.response_lengths)

    def trained(self, values: Tensor) -> Tensor:
        """`values` [R] with 0 at masked tokens, so that what stands there reaches neither loss nor gradient."""
        return values.masked_fill(self.loss_mask == 0, 0.0)

    @cached_property
    def loss_masks(self) -> list[Tensor]:
        """One mask per sample, as plug-ins receive them."""
        return self.per_sample(self.loss_mask)

    def per_sample(self, flat: Tensor) -> list[Tensor]:
        """[R] -> one tensor per sample (views)."""
        return list(torch.split(flat, self.response_lengths))

    def reducer(self, *, per_token: bool) -> SumOfSampleMean:
        return SumOfSampleMean(self.loss_mask, self.sample_ids, self.num_samples, per_token=per_token)

    def require(self, name: Column) -> Tensor:
        """The column, or a UsageError that says which flag or plug-in should have provided it."""
        column: Tensor | None = getattr(self, name)
        if column is None:
            raise UsageError(f"The loss needs {name}, and this batch has none. {PROVIDED_BY[name]}")
        return column


PROVIDED_BY = {
    "old_log_probs": "They come from the log-prob pass before training, which "
    "--disable-compute-advantages-and-returns switches off.",
    "rollout_log_probs": "--use-tis, --get-mismatch-metrics and --use-rollout-logprobs need them from the rollout: let "
    "your generate function set sample.rollout_log_probs, one float per response token, on every sample.",
    "ref_log_probs": "--use-kl-loss and --kl-coef need a reference model: give --ref-load.",
    "advantages": "--disable-compute-advantages-and-returns leaves them out; use it with sft_loss or custom_loss only.",
    "values": "They are the critic's: give --advantage-estimator ppo.",
    "old_values": "They come from the critic's pass before training: give --advantage-estimator ppo.",
    "returns": "--disable-compute-advantages-and-returns leaves them out.",
}


@dataclass(frozen=True)
class LossOutput:
    """`loss` is a scalar with gradient, `metrics` detached scalars; both are sums over the micro batch's samples (over
    its tokens with `--calculate-per-token-loss`)."""

    loss: Tensor
    metrics: dict[str, Tensor]


def detached(metrics: dict[str, Any], like: Tensor) -> dict[str, Tensor]:
    """Metric values as detached scalars on one device; plug-ins return numbers as well as tensors."""
    return {name: torch.as_tensor(value, device=like.device).detach() for name, value in metrics.items()}


LossFunction = Callable[[LossInputs, LossSettings, LossPlugins], LossOutput]


def lengths_of(values: Sequence[Tensor]) -> list[int]:
    return [int(value.shape[0]) for value in values]
