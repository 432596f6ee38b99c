"""Importance weights and rejection where the engine's probabilities differ from the trainer's.

Engine and trainer compute the log-prob of the same token with different kernels and dtypes, and asynchronous runs with
different weights. With d_t = log pi_train - log pi_engine of a sampled token, and sums over trained tokens alone, a
ratio is taken at one of three levels:

    token        r_t = exp(d_t)               Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL
                                              Training", 2025
    sequence     r   = exp(sum of d_t)        the whole response's ratio: Liu et al., "When Speed Kills Stability", 2025
    geometric    r   = exp(mean of d_t)       its geometric mean per token, as GSPO uses it (arXiv:2507.18071)

The weight of the loss is that ratio, bounded in one of three ways:

    truncate     min(r, upper)                truncated importance sampling: Ionides, J. Comput. Graph. Stat. 17, 2008
    clip         max(lower, min(r, upper))
    mask         r if lower <= r <= upper, else 0      IcePop: Zhao et al., "Small Leak Can Sink a Great Ship", 2025

Rejection (use_rs) takes tokens, or whole responses at the other two levels, out of the loss and out of its
denominators where the ratio leaves its own bounds. The veto rejects a whole response for a single token whose ratio is
below a threshold (Liu et al.): such a token is all but impossible under the trainer's policy.

    --use-tis --custom-config-path examples/train_infer_mismatch_helper/mis.yaml
    --custom-tis-function-path examples/train_infer_mismatch_helper/mis.py:compute_mis_weights_with_cp

The settings are in mis.yaml. Without --use-tis (with --get-mismatch-metrics) no weight is applied; without use_rs
nothing is rejected. Where context parallelism has cut the responses, the log-probs of all parts are gathered, and each
rank weighs its own tokens.
"""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from miles.backends.training_utils.cp_utils import all_gather_with_cp, slice_log_prob_with_cp
from miles.backends.training_utils.parallel import ParallelState

LEVELS = ("token", "sequence", "geometric")
MODES = ("truncate", "clip", "mask")

# Log-ratios are cut here before exp: e^20 is far beyond every useful bound and far from overflow, also when squared.
LOG_LIMIT = 20.0


@dataclass(frozen=True)
class MisSettings:
    """The keys of mis.yaml under their own names, checked. `None` bounds: see `tis_bounds` and `rs_bounds`.

    Example: `MisSettings(tis_level="sequence", tis_mode="mask", tis_upper_bound=5.0).tis_bounds` is `(0.2, 5.0)`.
    """

    use_tis: bool = True
    tis_level: str = "token"
    tis_mode: str = "truncate"
    tis_lower_bound: float | None = None
    tis_upper_bound: float = 2.0
    tis_batch_normalize: bool = False
    use_rs: bool = False
    rs_level: str = "token"
    rs_lower_bound: float | None = None
    rs_upper_bound: float | None = None
    rs_veto_threshold: float | None = None

    def __post_init__(self) -> None:
        for name, known in (("tis_level", LEVELS), ("tis_mode", MODES), ("rs_level", LEVELS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}.")
        for name in ("use_tis", "use_rs", "tis_batch_normalize"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected true or false, got {getattr(self, name)!r}.")
        for name in ("tis_lower_bound", "tis_upper_bound", "rs_lower_bound", "rs_upper_bound", "rs_veto_threshold"):
            value = getattr(self, name)
            optional = name != "tis_upper_bound"
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not (number and value >= 0) and not (optional and value is None):
                raise ValueError(f"{name}: expected a number >= 0, got {value!r}.")
        for prefix, (lower, upper) in (("tis", self.tis_bounds), ("rs", self.rs_bounds)):
            if not lower <= upper:
                raise ValueError(f"{prefix}_lower_bound {lower}: expected at most {prefix}_upper_bound, {upper}.")

    @staticmethod
    def of(args: Namespace) -> MisSettings:
        """From the attributes that --custom-config-path has set on `args`; what is missing keeps its default."""
        given = vars(args)
        return MisSettings(**{f.name: given[f.name] for f in fields(MisSettings) if f.name in given})

    @property
    def tis_bounds(self) -> tuple[float, float]:
        """Lower bound: 1 / upper where unset."""
        return _bounds(self.tis_lower_bound, self.tis_upper_bound)

    @property
    def rs_bounds(self) -> tuple[float, float]:
        """Those of the weights where no upper bound is set; lower: 1 / upper where only that is set."""
        if self.rs_upper_bound is not None:
            return _bounds(self.rs_lower_bound, self.rs_upper_bound)
        lower, upper = self.tis_bounds
        return (lower if self.rs_lower_bound is None else self.rs_lower_bound), upper


def _bounds(lower: float | None, upper: float) -> tuple[float, float]:
    if lower is None:
        lower = 1.0 / upper if upper > 0 else 0.0
    return float(lower), float(upper)


def compute_mis_weights_with_cp(
    *,
    args: Namespace,
    pg_loss: Tensor,
    train_log_probs: list[Tensor],
    rollout_log_probs: list[Tensor],
    loss_masks: list[Tensor],
    total_lengths: list[int],
    response_lengths: list[int],
    parallel_state: ParallelState | None = None,
    **kwargs: Any,
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """The loss [R] times its weights, the masks that are left after rejection, and metrics [R] per token.

    `pg_loss` is flat over the response tokens of all samples; lists have one tensor per sample. Metrics are averaged
    by the caller over the tokens that were trained before rejection. Under context parallelism `pg_loss`, log-probs and
    metrics are those of this rank's tokens; masks are whole.
    """
    if parallel_state is None:
        parallel_state = ParallelState.single_process()
    lengths = list(zip(total_lengths, response_lengths))

    def whole(parts: list[Tensor]) -> list[Tensor]:
        return [all_gather_with_cp(part.detach(), *both, parallel_state) for part, both in zip(parts, lengths)]

    def own(column: Tensor) -> Tensor:
        rows = zip(torch.split(column, response_lengths), lengths)
        parts = [slice_log_prob_with_cp(row, *both, parallel_state) for row, both in rows]
        return torch.cat(parts) if parts else column

    settings = MisSettings.of(args)
    result = mismatch_weights(settings, whole(train_log_probs), whole(rollout_log_probs), loss_masks)
    masks = list(loss_masks)
    if settings.use_rs:
        kept = torch.split(result.keep, response_lengths)
        masks = [mask * keep.to(mask.dtype) for mask, keep in zip(loss_masks, kept)]
    if settings.use_tis:
        pg_loss = pg_loss * own(result.weights).to(pg_loss.dtype)
    return pg_loss, masks, {name: own(values).to(pg_loss.dtype) for name, values in result.metrics.items()}


@dataclass(frozen=True)
class MismatchWeights:
    """`weights` float64 [R] of the loss (1 at untrained tokens), `keep` bool [R], `metrics` name -> float64 [R]."""

    weights: Tensor
    keep: Tensor
    metrics: dict[str, Tensor]


@torch.no_grad()
def mismatch_weights(
    settings: MisSettings, train_log_probs: list[Tensor], rollout_log_probs: list[Tensor], loss_masks: list[Tensor]
) -> MismatchWeights:
    """Weights and rejections of a micro batch, whether or not they will be applied. In float64, in logarithms."""
    if not loss_masks:
        empty = torch.empty(0, dtype=torch.float64)
        return MismatchWeights(empty, empty.bool(), dict.fromkeys(METRICS, empty))
    trained = torch.cat(loss_masks) != 0
    ids = torch.repeat_interleave(
        torch.arange(len(loss_masks), device=trained.device),
        torch.tensor([len(mask) for mask in loss_masks], device=trained.device),
    )
    difference = torch.cat(train_log_probs).double() - torch.cat(rollout_log_probs).double()
    # Infinities may not meet in a sum; what stands at untrained tokens may be anything.
    difference = difference.clamp(-1e6, 1e6).masked_fill(~trained, 0.0)

    def at_level(level: str) -> Tensor:
        """The log of the ratio that each token has at this level; 0 at untrained tokens."""
        if level == "token":
            return difference
        sums = difference.new_zeros(len(loss_masks)).index_add(0, ids, difference)
        if level == "geometric":
            counts = difference.new_zeros(len(loss_masks)).index_add(0, ids, trained.double())
            sums = sums / counts.clamp(min=1)
        return sums[ids].masked_fill(~trained, 0.0)

    log_ratio = at_level(settings.tis_level)
    weights, below, above = bounded(log_ratio, settings.tis_mode, settings.tis_bounds)
    rejected = outside(at_level(settings.rs_level), settings.rs_bounds)
    vetoed = torch.zeros_like(trained)
    if settings.rs_veto_threshold is not None:
        catastrophic = trained & (difference < log_of(settings.rs_veto_threshold))
        hit = difference.new_zeros(len(loss_masks)).index_add(0, ids, catastrophic.double())
        vetoed = hit[ids] > 0
    keep = ~(rejected | vetoed)
    if settings.tis_batch_normalize:
        weights = normalized(weights, trained & keep if settings.use_rs else trained)
    weights = torch.where(trained, weights, 1.0)
    measured = {
        "mis_ratio": ratio_of(difference),
        "mis_log_ratio_abs": difference.abs(),
        # The k3 estimate of KL(engine || trainer): exp(d) - 1 - d, never negative.
        "mis_kl": ratio_of(difference) - 1 - difference.clamp(-LOG_LIMIT, LOG_LIMIT),
        "mis_weight": weights,
        "mis_below": below.double(),
        "mis_above": above.double(),
        "mis_rejected": (~keep).double(),
        "mis_vetoed": vetoed.double(),
    }
    assert tuple(measured) == METRICS
    return MismatchWeights(weights, keep, measured)


METRICS = (
    "mis_ratio",
    "mis_log_ratio_abs",
    "mis_kl",
    "mis_weight",
    "mis_below",
    "mis_above",
    "mis_rejected",
    "mis_vetoed",
)
"""Of all micro batches alike: means of per-token values, those of yes-or-no values being shares of tokens."""


def bounded(log_ratio: Tensor, mode: str, bounds: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, below, above): the bounded ratios, and where the lower or upper bound was passed."""
    lower, upper = bounds
    below, above = log_ratio < log_of(lower), log_ratio > log_of(upper)
    ratio = ratio_of(log_ratio)
    if mode == "truncate":
        return ratio.clamp(max=upper), torch.zeros_like(below), above
    if mode == "clip":
        return ratio.clamp(lower, upper), below, above
    return ratio.masked_fill(below | above, 0.0), below, above


def outside(log_ratio: Tensor, bounds: tuple[float, float]) -> Tensor:
    lower, upper = bounds
    return (log_ratio < log_of(lower)) | (log_ratio > log_of(upper))


def normalized(weights: Tensor, counted: Tensor) -> Tensor:
    """Self-normalised importance sampling: weights whose mean over the counted tokens of the micro batch is 1."""
    mean = weights.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)
    return weights / torch.where(mean > 0, mean, 1.0)


def ratio_of(log_ratio: Tensor) -> Tensor:
    return torch.exp(log_ratio.clamp(-LOG_LIMIT, LOG_LIMIT))


def log_of(bound: float) -> float:
    return math.log(bound) if bound > 0 else -math.inf
