"""Filters and processors of groups, log functions, conversions."""

from __future__ import annotations

from typing import List  # noqa: UP035

from miles.types import DynamicFilterOutput, Sample

SEEN: list[object] = []


def keep_output(args, samples, **kwargs):
    return DynamicFilterOutput(keep=len(samples) > 1, reason="small")


def keep_bool(args, group):
    return len(group) > 1


def keep_nothing(args, group):
    SEEN.append(len(group))


async def async_filter(args, group):
    return True


def filter_fails(args, group):
    raise ZeroDivisionError("std of one")


def pop_two(args, rollout_id, buffer, num_samples):
    assert rollout_id is None
    taken = buffer[: min(2, num_samples)]
    del buffer[: len(taken)]
    return taken


def even_groups(samples):
    return [g for g in samples if g[0].index % 2 == 0]


def takes_too_many(args, rollout_id, buffer, num_samples):
    return list(buffer)


def anything(*args):
    return args[0]


def mark_groups(args, samples: list[list[Sample]]) -> None:
    for group in samples:
        group[0].remove_sample = True


def mark_unannotated(args, samples):
    for group in samples:
        group[0].remove_sample = True


def mark_flat(args, samples: list[Sample]) -> None:
    for sample in samples:
        sample.remove_sample = sample.index > 0


def mark_flat_old_style(args, samples: List[Sample]) -> None:  # noqa: UP006
    mark_flat(args, samples)


def process_three(args, all_groups, get_samples):
    SEEN.append((len(all_groups), get_samples(2)))


def process_two(args, samples: list[list[Sample]]) -> None:
    SEEN.append(len(samples))


def process_fails(args, groups):
    raise OSError("disk full")


def post_process(args, samples):
    raw = [s.reward for s in samples]
    return raw, [r - 1 for r in raw]


def post_process_short(args, samples):
    return [1.0], [1.0]


def post_process_nan(args, samples):
    return [0.0] * len(samples), [float("nan")] * len(samples)


def post_process_single(args, samples):
    return [s.reward for s in samples]


def convert(args, samples):
    return {"tokens": [s.tokens for s in samples]}


def convert_nothing(args, samples):
    samples.clear()


def convert_wrong(args, samples):
    return {"input_ids": []}


def log_rollout(rollout_id, args, samples, extra, seconds):
    SEEN.append((rollout_id, len(samples), extra, seconds))
    return 1


def log_returns_none(rollout_id, args, samples, extra, seconds):
    pass


def log_eval(rollout_id, args, data, extra_metrics):
    return "yes"


def log_fails(rollout_id, args, data, extra_metrics):
    raise ValueError("no such metric")


class Source:
    def __init__(self, args):
        self.args = args

    def get_samples(self, num_samples):
        return []

    def add_samples(self, samples):
        pass

    def save(self, rollout_id):
        pass

    def load(self, rollout_id=None):
        pass


def make_source(args):
    return Source(args)


def make_nothing(args):
    return object()


class SourceWithoutSave:
    def __init__(self, args):
        pass

    def get_samples(self, num_samples):
        return []

    def add_samples(self, samples):
        pass


class SourceWithoutArgs(Source):
    def __init__(self):
        pass
