"""Trials of the plug points that see tensors: the loss, importance sampling, the reducer, the data between them.

There is no model here. Logits (or log-probs) are drawn at random with a fixed seed, such that the current policy is
close to the one that sampled; everything else is that of the samples: tokens, masks, log-probs, rewards. Three things
are then true or not, whatever the loss means:

    finite   no NaN or infinity in value and gradient
    mask     no gradient at response tokens whose loss mask is 0, and none outside of responses
    scale    the whole is the sum of its samples: the convention that makes micro-batches add up
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.batch import PackedBatch, TrainBatch, default_rewards, pack, to_train_batch
from miles.hooks.values import BadReturn, scalar_problem
from miles.loss import (
    LossInputs,
    LossPlugins,
    LossSettings,
    ParallelState,
    SumOfSampleMean,
    TokenLogProbs,
    compute_policy_loss,
    custom_loss,
    loss_batch,
)
from miles.loss.importance import correct
from miles.trial.material import SEED, vocabulary_size
from miles.trial.outcome import Failed, Outcome, Trial, TrialFunction, counted, failing, number_text, range_text
from miles.trial.reward import number_of
from miles.trial.watch import same
from miles.types import Sample

# How many samples are laid out, and what their logits may hold (64 MiB in float32): seconds even on a small machine.
MAX_SAMPLES, MAX_SAMPLES_THOROUGH, MAX_LOGITS = 8, 64, 1 << 24
MIN_TOKENS = 16
# Standard deviations of the log-ratios between the current policy, the trainer's old one, and the engine's.
CURRENT_NOISE, OLD_NOISE, REFERENCE_NOISE = 0.05, 0.02, 0.1
# Two gradients are the same up to float32 sums in another order.
SAME = 1e-3


@dataclass(frozen=True)
class Drawn:
    """The batch of a trial: columns as the trainer fills them, and what the random model says, per row."""

    batch: TrainBatch
    current: Tensor  # float32 [R], log-probs of the current policy
    logits: list[Tensor]  # per row float32 [tokens, V], which give exactly these log-probs


@dataclass(frozen=True)
class Probe:
    """One evaluation: the value, its gradient at each response token, and how much of it lies elsewhere."""

    value: float
    gradient: Tensor  # float32 [R] or [R, V]
    outside: float
    mask: Tensor  # int32 [R]


Evaluate = Callable[[TrainBatch, list[int]], Probe]


# ---- the batch -----------------------------------------------------------------------------------------------------


def drawn(trial: Trial, *, with_logits: bool) -> Drawn:
    vocabulary = vocabulary_size(trial.args.hf_checkpoint)
    most = MAX_SAMPLES_THOROUGH if trial.thorough else MAX_SAMPLES
    samples = _shortened(trial.material.flat(), most, MAX_LOGITS // vocabulary if with_logits else MAX_LOGITS)
    raw, rewards = _rewards(trial, samples)
    batch = to_train_batch(samples, raw, rewards)
    generator = torch.Generator().manual_seed(SEED)
    sampled = _sampled(batch, generator)

    def near(spread: float) -> Tensor:
        noise = torch.randn(sampled.shape, generator=generator)
        return (sampled + spread * noise).clamp(min=-20.0, max=-1e-3)

    current = near(CURRENT_NOISE)
    settings = trial.args
    if settings.compute_advantages_and_returns:
        spread = torch.repeat_interleave(torch.from_numpy(rewards), torch.from_numpy(batch.response_lengths))
        batch.response_columns |= {"log_probs": near(OLD_NOISE), "advantages": spread, "returns": spread.clone()}
        if settings.use_kl_loss or settings.kl_coef:
            batch.response_columns["ref_log_probs"] = near(REFERENCE_NOISE)
    size = max(vocabulary, int(batch.tokens.max(initial=0)) + 1)
    temperature = float(settings.rollout_temperature) or 1.0
    rows = [_logits(batch, i, current, size, generator) * temperature for i in range(len(batch))] if with_logits else []
    return Drawn(batch, current, rows)


def _shortened(samples: list[Sample], most: int, num_tokens: int) -> list[Sample]:
    """The first samples with a response, at most `most`, and so short that they have about `num_tokens` tokens."""
    answered = [s for s in samples if s.response_length > 0]
    if not answered:
        raise Failed(BadReturn("none", "no sample of the material has a response token: nothing to compute a loss of"))
    count = min(len(answered), most)
    while count > 2 and num_tokens // count < MIN_TOKENS:
        count -= 1
    for sample in answered[:count]:
        _cut(sample, max(MIN_TOKENS, num_tokens // count))
    return answered[:count]


def _cut(sample: Sample, room: int) -> None:
    """The end of the prompt and the beginning of the response, `room` tokens together."""
    prompt, response = len(sample.tokens) - sample.response_length, sample.response_length
    if prompt + response > room:
        kept = min(response, max(1, room // 2))
        before = min(prompt, room - kept)
        for name, value in vars(sample).items():
            if isinstance(value, list) and len(value) == response and name != "tokens":
                setattr(sample, name, value[:kept])
        sample.tokens = sample.tokens[prompt - before : prompt + kept]
        sample.response_length = kept
        sample.rollout_routed_experts = None
    sample.multimodal_inputs = sample.multimodal_train_inputs = None


def _rewards(trial: Trial, samples: list[Sample]) -> tuple[list[Any], np.ndarray[Any, np.dtype[np.float32]]]:
    """Normalised in their groups; 1 and -1 in turn where that leaves nothing to learn from."""
    turns = np.array([1.0 - 2.0 * (i % 2) for i in range(len(samples))], dtype=np.float32)
    numbers = [number_of(s.reward, trial.args) for s in samples]
    if any(n is None for n in numbers):
        return list(turns), turns
    for sample, number in zip(samples, numbers, strict=True):
        sample.reward = number
    raw, rewards = default_rewards(
        samples, reward_key=None, estimator="grpo", normalization=True, std_normalization=True, n_samples_per_prompt=2
    )
    return raw, rewards if rewards.any() else turns


def _sampled(batch: TrainBatch, generator: torch.Generator) -> Tensor:
    """The log-probs that the engine sampled under; drawn where the record has none."""
    if batch.rollout_log_probs is not None:
        return torch.from_numpy(batch.rollout_log_probs).clone()
    return -torch.rand(len(batch.loss_masks), generator=generator) - 0.05


def _logits(batch: TrainBatch, row: int, current: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """[tokens, V] for one row: normal, but for the targets, whose logits give them their log-probs.

    With L = logsumexp of the others and p = exp(log_prob): z = L + log(p / (1 - p)).
    """
    micro = pack(batch, [row])
    logits = torch.randn(len(micro.tokens), size, generator=generator)
    log_probs = micro.column(current)
    others = logits[micro.predicting].scatter(1, micro.targets[:, None], -torch.inf)
    odds = log_probs - torch.log1p(-log_probs.exp())
    logits[micro.predicting, micro.targets] = torch.logsumexp(others, dim=1) + odds
    return logits


def _with_gaps(batch: TrainBatch) -> TrainBatch:
    """The same batch with every third response token masked, as tool output would be; as it is where some are."""
    whole = batch.select(list(range(len(batch))))
    if whole.loss_masks.all():
        whole.loss_masks = np.where(np.arange(len(whole.loss_masks)) % 3 == 1, 0, 1).astype(np.int32)
    return whole


# ---- judging -------------------------------------------------------------------------------------------------------


def judge(trial: Trial, batch: TrainBatch, evaluate: Evaluate) -> tuple[float, str, list[str]]:
    """Value, sentence and warnings. Raises Failed for what is not finite."""
    rows = list(range(len(batch)))
    whole = evaluate(batch, rows)
    if not np.isfinite(whole.value) or not torch.isfinite(whole.gradient).all():
        what = f"the value {whole.value}" if not np.isfinite(whole.value) else "a gradient with NaN or infinities"
        raise Failed(BadReturn("nan", f"gave {what}", "look for a log or a division of 0, or a large exp"))
    said, warnings = ["gradient finite"], []
    if not whole.gradient.any():
        warnings.append("its gradient is 0 everywhere: nothing is learned")
    leaks = _leaks(evaluate(_with_gaps(batch), rows))
    warnings += leaks
    said.append("ignores the mask" if leaks else "respects the mask")
    scale, complaint = _scale(whole, [evaluate(batch, [row]) for row in rows])
    said.append(scale)
    return whole.value, ", ".join(said), [*warnings, *complaint]


def _leaks(probe: Probe) -> list[str]:
    masked = probe.gradient[probe.mask == 0]
    leaking = int((masked.flatten(1) if masked.dim() > 1 else masked[:, None]).any(1).sum())
    warnings = []
    if leaking:
        warnings.append(
            f"it gives a gradient to {leaking} of {len(masked)} response tokens whose loss mask is 0 (tool output): "
            "multiply by loss_masks, or reduce with the reducer that is passed in"
        )
    if probe.outside > 0:
        warnings.append("it gives a gradient to positions outside of responses")
    return warnings


def _scale(whole: Probe, parts: list[Probe]) -> tuple[str, list[str]]:
    """How the gradient of the whole follows from those of its samples alone."""
    each = torch.cat([p.gradient for p in parts])
    counts = [int(p.mask.sum()) for p in parts]
    by_tokens = torch.cat([p.gradient * n for p, n in zip(parts, counts, strict=True)])
    if _alike(whole.gradient, each):
        return "a sum over samples", []
    remedy = "a run divides by the global batch size itself"
    if _alike(whole.gradient * len(parts), each):
        return "a mean over samples", [f"it is a mean over the samples of a micro-batch, expected a sum: {remedy}"]
    if _alike(whole.gradient * sum(counts), by_tokens):
        text = f"it is a mean over the tokens of a micro-batch, expected a sum over samples: {remedy}"
        return "a mean over tokens", [text]
    return "no sum over samples", [
        "the gradient of several samples is not the sum of theirs: the result depends on how micro-batches are cut"
    ]


def _alike(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= SAME * max(a.norm(), b.norm()))


def _gradient(value: Tensor, of: Tensor, what: str) -> Tensor:
    (gradient,) = torch.autograd.grad(value, of, allow_unused=True)
    if gradient is None:
        raise Failed(BadReturn("type", f"returned a value that does not depend on {what}", f"compute it from {what}"))
    return gradient


# ---- the plug points -----------------------------------------------------------------------------------------------


def try_loss(trial: Trial) -> Outcome:
    data = drawn(trial, with_logits=True)
    per_token = bool(trial.args.calculate_per_token_loss)
    metrics: dict[str, Tensor] = {}
    changed: set[str] = set()

    def evaluate(batch: TrainBatch, rows: list[int]) -> Probe:
        micro = pack(batch, rows)
        logits = torch.cat([data.logits[i] for i in rows])[None].clone().requires_grad_()
        given = loss_batch(micro, {name: micro.column(flat) for name, flat in batch.flat_columns().items()})
        before = _copies(given)
        with failing(trial):
            result = trial.call(
                custom_loss, trial.hook.raw, trial.args, ParallelState.single_process(), micro, given, logits,
                per_token=per_token, scale=1.0,
            )  # fmt: skip
        changed.update(name for name, value in before.items() if not same(value, given.get(name)))
        metrics.update({} if metrics else result.metrics)  # those of the first call, on everything
        gradient = _gradient(result.loss, logits, "`logits`")[0]
        inside = gradient[micro.predicting]
        outside = gradient.clone()
        outside[micro.predicting] = 0
        return Probe(float(result.loss.detach()), inside, float(outside.abs().sum()), micro.loss_mask)

    value, said, warnings = judge(trial, data.batch, evaluate)
    warnings += _changed(changed)
    details = [f"metric {name}: {number_text(float(v))}" for name, v in metrics.items()]
    return Outcome(f"loss {number_text(value)}, {said}", warnings, [_laid_out(data), *details])


def _copies(given: dict[str, Any]) -> dict[str, Any]:
    return {name: copy.deepcopy(value) for name, value in given.items()}


def _changed(names: set[str]) -> list[str]:
    return [f"it changes batch[{name!r}] in place, which later micro-batches see" for name in sorted(names)]


def _laid_out(data: Drawn) -> str:
    masked = int((data.batch.loss_masks == 0).sum())
    return (
        f"{counted(len(data.batch), 'sample')}, {len(data.batch.tokens)} tokens, "
        f"{len(data.batch.loss_masks)} of them in responses, {masked} of these masked"
    )


def _inputs(data: Drawn, batch: TrainBatch, rows: list[int]) -> tuple[PackedBatch, LossInputs]:
    micro = pack(batch, rows)
    columns = {name: micro.column(flat) for name, flat in batch.flat_columns().items()}
    columns.setdefault("log_probs", micro.column(data.current))
    columns.setdefault("advantages", torch.ones(len(micro.loss_mask)))
    current = micro.column(data.current).clone().requires_grad_()
    return micro, LossInputs.of(micro, TokenLogProbs(current, None), columns)


def _token_loss(inputs: LossInputs, settings: LossSettings) -> Tensor:
    """The clipped policy loss of each token [R], which importance sampling and the reducer receive."""
    old, advantages = inputs.require("old_log_probs"), inputs.require("advantages")
    pg_loss, _ = compute_policy_loss(
        old - inputs.log_probs, advantages, settings.eps_clip, settings.clip_high, settings.eps_clip_c
    )
    return pg_loss


def try_importance(trial: Trial) -> Outcome:
    data, settings = drawn(trial, with_logits=False), LossSettings.of(trial.args)
    plugins = LossPlugins(tis=trial.hook.raw, args=trial.args)
    seen: dict[str, Any] = {}

    def evaluate(batch: TrainBatch, rows: list[int]) -> Probe:
        _, inputs = _inputs(data, batch, rows)
        pg_loss = _token_loss(inputs, settings)
        with failing(trial):
            corrected, masks, metrics = trial.call(correct, inputs, settings, plugins, pg_loss)
        mask = torch.cat(masks)
        reduce = SumOfSampleMean(
            mask, inputs.sample_ids, inputs.num_samples, per_token=settings.calculate_per_token_loss
        )
        if len(rows) == len(batch) and "mask" not in seen:
            trained = (inputs.loss_mask != 0) & (pg_loss != 0)
            seen.update(mask=mask, before=inputs.loss_mask, metrics=metrics)
            seen["weights"] = (corrected / pg_loss).detach()[trained].tolist()
        seen["freed"] = seen.get("freed", 0) + int(((mask != 0) & (inputs.loss_mask == 0)).sum())
        value = reduce(corrected)
        gradient = _gradient(value, inputs.log_probs, "`pg_loss`")
        return Probe(float(value.detach()), gradient, 0.0, inputs.loss_mask)

    value, said, warnings = judge(trial, data.batch, evaluate)
    left_out = int(((seen["mask"] == 0) & (seen["before"] != 0)).sum())
    if seen["freed"]:
        warnings.append("it returns masks that are not 0 where the loss mask is: masked tokens would be trained")
    if settings.get_mismatch_metrics and not settings.use_tis and (left_out or any(w != 1 for w in seen["weights"])):
        warnings.append(
            "it changes the loss although --use-tis is not given: with --get-mismatch-metrics alone only its metrics "
            "count, and the pg_loss and loss_masks that it returns are not used"
        )
    weights = range_text(seen["weights"]) if seen["weights"] else "none"
    details = [f"metric {name}: mean {number_text(float(v.float().mean()))}" for name, v in seen["metrics"].items()]
    returned = f"weights {weights}, masks {left_out} of {len(seen['mask'])} tokens, loss {number_text(value)}"
    return Outcome(f"{returned}, {said}", warnings, [_laid_out(data), *details])


def try_reducer(trial: Trial) -> Outcome:
    data, settings = drawn(trial, with_logits=False), LossSettings.of(trial.args)
    per_token = settings.calculate_per_token_loss
    default: list[float] = []

    def evaluate(batch: TrainBatch, rows: list[int]) -> Probe:
        _, inputs = _inputs(data, batch, rows)
        pg_loss = _token_loss(inputs, settings)
        reducer = trial.raw(inputs.total_lengths, inputs.response_lengths, inputs.loss_masks, per_token)
        with failing(trial):
            value = trial.call(reducer, pg_loss)
        bad = scalar_problem(value)
        if bad is not None:
            raise Failed(bad)
        default.append(float(inputs.reducer(per_token=per_token)(pg_loss).detach()))
        if not value.requires_grad:
            raise Failed(BadReturn("type", "made a value without gradient", "compute it from the tensor passed in"))
        gradient = _gradient(value, inputs.log_probs, "what it reduces")
        return Probe(float(value.detach()), gradient, 0.0, inputs.loss_mask)

    value, said, warnings = judge(trial, data.batch, evaluate)
    returned = f"{number_text(value)} where the default gives {number_text(default[0])}, {said}"
    return Outcome(returned, warnings, [_laid_out(data)])


def try_postprocess(trial: Trial) -> Outcome:
    """The columns before and after."""
    data = drawn(trial, with_logits=False)
    batch = data.batch
    before = dict(batch.select(list(range(len(batch)))).as_dict(tensors=True))
    view = batch.as_dict(tensors=True)
    value = trial.raw(trial.args, trial.material.rollout_id, view)
    with failing(trial):
        view.write_back()
    after = dict(batch.as_dict(tensors=True))
    changed = [name for name in after if name in before and not same(before[name], after[name])]
    added, removed = [n for n in after if n not in before], [n for n in before if n not in after]
    for name, column in batch.response_columns.items():
        if not torch.isfinite(column).all():
            raise Failed(BadReturn("nan", f"left NaN or infinities in the column {name!r}"))
    parts = [("changed", changed), ("added", added), ("removed", removed)]
    said = "; ".join(f"{what} {', '.join(names)}" for what, names in parts if names) or "changed nothing"
    masked = int((batch.loss_masks == 0).sum())
    warnings = [] if value is None else [f"its {type(value).__name__} is ignored; change rollout_data in place"]
    if batch.loss_masks.size and masked == batch.loss_masks.size:
        warnings.append("it masks every token: nothing is left to train")
    return Outcome(said, warnings, [_laid_out(data), f"columns {', '.join(after)}"])


TRIALS: dict[str, TrialFunction] = {
    "custom_loss_function": try_loss,
    "custom_tis_function": try_importance,
    "custom_pg_loss_reducer_function": try_reducer,
    "rollout_data_postprocess": try_postprocess,
}
