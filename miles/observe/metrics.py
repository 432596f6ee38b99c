"""What a rollout, an evaluation and the timers say in numbers, under their published names.

Pure functions without numpy or torch. Samples whose score failed (`miles.types.is_failed`) leave every statistic of
rewards and are counted in `failed_scores`; rewards that are no single number leave those statistics, too. Leaves the
training metrics to the trainer and the writing to `miles.observe.tracking`.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from math import comb
from typing import Any, Literal

from miles.errors import FlagError
from miles.observe.jsonable import as_number
from miles.types import Sample, is_failed

# A response counts as repetitive when it is longer than this many characters and its last so many ...
REPETITION_WINDOW = 10_000
# ... compress by more than this factor.
REPETITION_RATIO = 10

_COMPRESSORS: dict[str, Callable[[bytes, int], bytes]] = {
    "zlib": zlib.compress,
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "lzma": lambda data, level: lzma.compress(data, preset=level),
}


# ---- helpers that plug-ins import ------------------------------------------------------------------------------


def dict_add_prefix(d: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """`{"mean": 2.0}` with prefix `"len/"` -> `{"len/mean": 2.0}`."""
    return {f"{prefix}{key}": value for key, value in d.items()}


def compute_statistics(values: Sequence[float]) -> dict[str, float]:
    """Mean, median, max and min; nothing for no values.

    Example: `[1, 2, 6]` -> `{"mean": 3.0, "median": 2.0, "max": 6, "min": 1}`
    """
    if not values:
        return {}
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return {"mean": mean(ordered), "median": float(median), "max": ordered[-1], "min": ordered[0]}


def compression_ratio(
    data: str | bytes,
    *,
    encoding: str = "utf-8",
    algorithm: Literal["zlib", "gzip", "bz2", "lzma"] = "zlib",
    level: int = 9,
) -> tuple[float, float]:
    """(size / compressed size, percent saved); (1.0, 0.0) for nothing. Raises ValueError for an unknown algorithm."""
    if algorithm not in _COMPRESSORS:
        raise ValueError(f"algorithm: expected one of {', '.join(_COMPRESSORS)}, got {algorithm!r}")
    raw = data.encode(encoding, "replace") if isinstance(data, str) else data
    if not raw:
        return 1.0, 0.0
    size = len(_COMPRESSORS[algorithm](raw, level))
    return len(raw) / size, 100.0 * (1.0 - size / len(raw))


def has_repetition(text: str) -> bool:
    """Whether the end of a long response repeats itself (`REPETITION_WINDOW`, `REPETITION_RATIO`)."""
    return len(text) > REPETITION_WINDOW and compression_ratio(text[-REPETITION_WINDOW:])[0] > REPETITION_RATIO


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate that at least one of k samples is correct: 1 - C(n - c, k) / C(n, k), for k <= n.

    Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.
    """
    if not 0 < k <= num_samples:
        raise ValueError(f"k must be in 1..{num_samples}, got {k}")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def compute_pass_rate(flat_rewards: Sequence[Any], group_size: int, num_groups: int | None = None) -> dict[str, float]:
    """`{"pass@1": ..., "pass@2": ..., "pass@4": ...}` up to the group size; correct means reward == 1.

    `flat_rewards` holds `num_groups` groups of `group_size`, one after the other (asserted). A reward that is no number
    (a failed score is None) leaves its group; a group smaller than k leaves pass@k.
    """
    assert group_size >= 1, f"group_size must be >= 1, got {group_size}"
    if num_groups is None:
        num_groups = len(flat_rewards) // group_size
    assert len(flat_rewards) == num_groups * group_size, (
        f"{len(flat_rewards)} rewards are not {num_groups} groups of {group_size}"
    )
    return pass_rates([flat_rewards[start : start + group_size] for start in range(0, len(flat_rewards), group_size)])


def pass_rates(groups: Iterable[Sequence[Any]]) -> dict[str, float]:
    """`compute_pass_rate` for groups of any sizes, up to the largest.

    Example: `[[1, 0], [0]]` -> `{"pass@1": 0.25, "pass@2": 1.0}`
    """
    counts = []  # per group: valid samples, correct ones
    for group in groups:
        numbers = [as_number(reward) for reward in group]
        counts.append((sum(number is not None for number in numbers), numbers.count(1)))
    rates = {}
    k = 1
    while any(n >= k for n, _ in counts):
        rates[f"pass@{k}"] = mean([pass_at_k(n, c, k) for n, c in counts if n >= k])
        k *= 2
    return rates


def compute_rollout_step(args: Namespace, rollout_id: int) -> int:
    """The step axis of a rollout: its id, or the optimizer steps done before it with --wandb-always-use-train-step."""
    if not args.wandb_always_use_train_step:
        return rollout_id
    return int(rollout_id * args.rollout_batch_size * args.n_samples_per_prompt // args.global_batch_size)


# ---- rewards ---------------------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values))


def reward_value(sample: Sample, reward_key: str | None = None) -> float | int | None:
    """The reward as one number; None where the score failed, is absent, or is no single number."""
    if is_failed(sample):
        return None
    reward = sample.reward
    if reward_key:
        reward = reward.get(reward_key) if isinstance(reward, Mapping) else None
    return as_number(reward)


def mean_reward(samples: Iterable[Sample], reward_key: str | None = None) -> float | None:
    """Mean over the samples whose reward is one number; None when there are none."""
    values = [value for sample in samples if (value := reward_value(sample, reward_key)) is not None]
    return mean(values) if values else None


def zero_std_metrics(samples: Iterable[Sample], reward_key: str | None = None) -> dict[str, int]:
    """Groups whose rewards are all equal, counted by that reward: `{"zero_std/count_1.0": 3, "zero_std/count_0.0": 5}`.

    Samples without a group index belong to no group. A group that failed scores left with one sample is not counted.
    """
    groups: dict[Hashable, list[Sample]] = {}
    for sample in samples:
        if sample.group_index is not None:
            groups.setdefault(sample.group_index, []).append(sample)
    counts: Counter[str] = Counter()
    for group in groups.values():
        scored = [sample for sample in group if not is_failed(sample)]
        values = [reward_value(sample, reward_key) for sample in scored]
        first = values[0] if values else None
        shrunk_to_one = len(scored) == 1 < len(group)
        if first is not None and not shrunk_to_one and all(value == first for value in values):
            counts[f"zero_std/count_{round(first, 1)}"] += 1
    return dict(counts)


def category_metrics(samples: Sequence[Sample], category_key: str) -> dict[str, float]:
    """Share of each value of `reward[category_key]` among the scored samples: `{"error_cat/timeout": 0.25}`."""
    categories = [
        sample.reward.get(category_key)
        for sample in samples
        if isinstance(sample.reward, Mapping) and not is_failed(sample)
    ]
    return {
        f"error_cat/{category}": count / len(categories) for category, count in Counter(map(str, categories)).items()
    }


def group_pass_rates(samples: Iterable[Sample], reward_key: str | None = None) -> dict[str, float]:
    """pass@k of training groups. Samples without a group index belong to no group."""
    groups: dict[Hashable, list[Any]] = {}
    for sample in samples:
        if sample.group_index is not None:
            groups.setdefault(sample.group_index, []).append(reward_value(sample, reward_key))
    return pass_rates(groups.values())


# ---- a rollout -------------------------------------------------------------------------------------------------


def _is_truncated(sample: Sample) -> bool:
    return sample.status in (Sample.Status.TRUNCATED, Sample.Status.TRUNCATED.value)


def sample_metrics(
    samples: Sequence[Sample],
    *,
    reward_key: str | None = None,
    category_key: str | None = None,
    with_zero_std: bool = True,
) -> dict[str, float]:
    """What rollouts and evaluations have in common, without prefix; empty for no samples.

    Keys: `response_len/{mean,median,max,min}` (tokens that are trained on), `zero_std/count_<reward>`,
    `error_cat/<value>`, `repetition_frac`, `truncated_ratio`, `failed_scores`.
    """
    if not samples:
        return {}
    metrics: dict[str, float] = dict_add_prefix(
        compute_statistics([sample.effective_response_length for sample in samples]), "response_len/"
    )
    if with_zero_std:
        metrics |= zero_std_metrics(samples, reward_key)
    if category_key:
        metrics |= category_metrics(samples, category_key)
    metrics["repetition_frac"] = mean([has_repetition(sample.response) for sample in samples])
    metrics["truncated_ratio"] = mean([_is_truncated(sample) for sample in samples])
    metrics["failed_scores"] = sum(is_failed(sample) for sample in samples)
    return metrics


def rollout_metrics(
    samples: Sequence[Sample],
    *,
    reward_key: str | None = None,
    category_key: str | None = None,
    with_zero_std: bool = True,
    with_pass_rate: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`rollout/...` of the flat samples of one rollout; `extra` (the rollout function's metrics) goes in verbatim.

    `with_zero_std` is false for PPO, which has no groups; `category_key` is --log-reward-category. `with_pass_rate`
    (--log-passrate) adds `passrate/pass@<k>`.

    Example::

        {"rollout/response_len/mean": 31.5, ..., "rollout/zero_std/count_0.0": 2, "rollout/repetition_frac": 0.0,
         "rollout/truncated_ratio": 0.0, "rollout/failed_scores": 0}
    """
    metrics = sample_metrics(samples, reward_key=reward_key, category_key=category_key, with_zero_std=with_zero_std)
    rates = dict_add_prefix(group_pass_rates(samples, reward_key), "passrate/") if with_pass_rate else {}
    return {**dict_add_prefix(metrics, "rollout/"), **rates, **(extra or {})}


def multi_turn_metrics(samples: Sequence[Sample], max_response_len: int | None) -> dict[str, float]:
    """`multi_turn/...` (--log-multi-turn): responses with and without what tools said, and their numbers of turns.

    `response_length_clip_ratio` is the share of responses of at least `max_response_len` tokens. `round_number` is
    taken from the metadata of samples that have it there.
    """
    parts = {
        "raw_response_length/response_length": [s.response_length for s in samples],
        "wo_obs_response_length/response_length": [s.effective_response_length for s in samples],
        "multi_turn_metric/round_number": [
            number for s in samples if s.metadata and (number := as_number(s.metadata.get("round_number"))) is not None
        ],
    }
    metrics = {
        f"multi_turn/{name}_{statistic}": value
        for name, values in parts.items()
        for statistic, value in compute_statistics(values).items()
        if statistic != "median"
    }
    if samples and max_response_len is not None:
        clipped = mean([s.response_length >= max_response_len for s in samples])
        metrics["multi_turn/raw_response_length/response_length_clip_ratio"] = clipped
    return metrics


def _token_speed(
    lengths: Sequence[int], outside_s: Sequence[float], seconds: float, num_gpus: int, key: str
) -> dict[str, float]:
    """Tokens per second over all samples and of the longest one; `outside_s` was spent in tools and environments."""
    longest = max(lengths)
    metrics = {
        f"{key}tokens_per_gpu_per_sec": sum(lengths) / seconds / num_gpus,
        f"longest_{key}sample_tokens_per_sec": longest / seconds,
    }
    if any(outside_s):
        longest_outside_s = mean([s for s, length in zip(outside_s, lengths) if length == longest])
        metrics[f"longest_{key}sample_non_generation_time"] = longest_outside_s
        if longest_outside_s < seconds:
            metrics[f"longest_{key}sample_tokens_per_sec_without_non_generation"] = longest / (
                seconds - longest_outside_s
            )
    return metrics


def perf_metrics(samples: Sequence[Sample], seconds: float, num_gpus: int = 1) -> dict[str, float]:
    """`perf/...` of one rollout that took `seconds`. `num_gpus` is --rollout-num-gpus, at least 1.

    Keys: `rollout_time`, `[effective_]tokens_per_gpu_per_sec`, `longest_[effective_]sample_tokens_per_sec` (effective:
    tokens that are trained on); where time was spent outside the engine also `non_generation_time/<statistic>`,
    `longest_[effective_]sample_non_generation_time` and `..._tokens_per_sec_without_non_generation`.
    """
    metrics: dict[str, float] = {"rollout_time": seconds}
    if samples and seconds > 0:
        outside_s = [sample.non_generation_time for sample in samples]
        if any(outside_s):
            metrics |= dict_add_prefix(compute_statistics(outside_s), "non_generation_time/")
        lengths = [sample.response_length for sample in samples]
        effective = [sample.effective_response_length for sample in samples]
        metrics |= _token_speed(lengths, outside_s, seconds, num_gpus, "")
        metrics |= _token_speed(effective, outside_s, seconds, num_gpus, "effective_")
    return dict_add_prefix(metrics, "perf/")


def timer_metrics(seconds: Mapping[str, float]) -> dict[str, float]:
    """`perf/<timer>_time` for each timer, and where the trainer's own are among them `perf/step_time` (waiting plus
    training) and `perf/wait_time_ratio`.

    Example: `{"train": 3.0, "train_wait": 1.0}` -> `{"perf/train_time": 3.0, "perf/train_wait_time": 1.0,
    "perf/step_time": 4.0, "perf/wait_time_ratio": 0.25}`
    """
    metrics = {f"perf/{name}_time": value for name, value in seconds.items()}
    if "train" in seconds and "train_wait" in seconds:
        step_s = seconds["train_wait"] + seconds["train"]
        metrics["perf/step_time"] = step_s
        metrics["perf/wait_time_ratio"] = seconds["train_wait"] / step_s if step_s > 0 else 0.0
    return metrics


# ---- an evaluation ---------------------------------------------------------------------------------------------


def eval_metrics(
    data: Mapping[str, Mapping[str, Any]],
    *,
    group_size: int | Mapping[str, int] = 1,
    with_pass_rate: bool = False,
    reward_key: str | None = None,
    category_key: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`eval/...` of the data sets of one evaluation, in the form of `RolloutFnEvalOutput.data`.

    Keys per data set: `eval/<ds>` (mean reward, absent when every score failed), `eval/<ds>/<key of sample_metrics>`,
    `eval/<ds>-truncated_ratio`, and `with_pass_rate` (--log-passrate) `eval/<ds>-pass@<k>`. `group_size` is the number
    of samples per problem, for all data sets or by name (1 for a name that is not there); a data set with
    `prompt_indices` (one number per reward) says itself which rewards belong together. `extra` goes in verbatim.
    Raises FlagError where rewards are to be grouped and are no whole groups.

    Example: `{"carry": {"rewards": [1, 0], "truncated": [False, False]}}` ->
    `{"eval/carry": 0.5, "eval/carry-truncated_ratio": 0.0}`
    """
    metrics: dict[str, Any] = {}
    for name, entry in data.items():
        samples: Sequence[Sample] = entry.get("samples") or ()
        rewards: list[Any] = list(entry["rewards"])
        if len(samples) == len(rewards):
            rewards = [None if is_failed(sample) else reward for sample, reward in zip(samples, rewards)]
        numbers = [number for reward in rewards if (number := as_number(reward)) is not None]
        if numbers:
            metrics[f"eval/{name}"] = mean(numbers)
        per_sample = sample_metrics(samples, reward_key=reward_key, category_key=category_key)
        metrics |= dict_add_prefix(per_sample, f"eval/{name}/")
        truncated = entry.get("truncated")
        if truncated:
            metrics[f"eval/{name}-truncated_ratio"] = mean([bool(flag) for flag in truncated])
        if with_pass_rate:
            size = group_size if isinstance(group_size, int) else group_size.get(name, 1)
            groups = _eval_groups(name, rewards, entry.get("prompt_indices"), size)
            metrics |= dict_add_prefix(pass_rates(groups), f"eval/{name}-")
    return {**metrics, **(extra or {})}


def _eval_groups(name: str, rewards: list[Any], prompt_indices: Sequence[int] | None, size: int) -> list[list[Any]]:
    """The rewards of each problem."""
    if prompt_indices is not None and len(prompt_indices) == len(rewards):
        groups: dict[int, list[Any]] = {}
        for index, reward in zip(prompt_indices, rewards):
            groups.setdefault(index, []).append(reward)
        return list(groups.values())
    if len(rewards) % size:
        raise FlagError(
            "--log-passrate", given=f"{len(rewards)} rewards of evaluation set {name!r} are not groups of {size}.",
            remedy="Set its n_samples_per_eval_prompt to the samples per problem, or return `prompt_indices` beside "
            "`rewards`: for each reward the number of its problem.",
        )  # fmt: skip
    return [rewards[start : start + size] for start in range(0, len(rewards), size)]
