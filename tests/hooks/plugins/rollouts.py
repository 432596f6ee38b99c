"""Rollout functions in every form."""

from __future__ import annotations

import asyncio
import threading

from miles.types import RolloutFnConstructorInput, RolloutFnEvalOutput, RolloutFnTrainOutput, Sample

GROUPS = [[Sample(index=0), Sample(index=1)]]


def raw(args, rollout_id, data_buffer, evaluation=False):
    return {"set": {"rewards": [float(rollout_id)]}} if evaluation else data_buffer.get_samples(rollout_id)


def no_source(args, rollout_id, *, evaluation=False):
    return RolloutFnEvalOutput(data={}) if evaluation else RolloutFnTrainOutput(samples=GROUPS, metrics={"a": 1})


async def guide(args, rollout_id, *, evaluation=False):
    await asyncio.sleep(0)
    return RolloutFnEvalOutput(data={}) if evaluation else RolloutFnTrainOutput(samples=GROUPS)


async def async_with_source(args, rollout_id, data_source, evaluation=False):
    return data_source.get_samples(1)


def any_arguments(*args, **kwargs):
    return args[2].get_samples(1)


class Rollout:
    def __init__(self, input: RolloutFnConstructorInput) -> None:
        self.args, self.data_source = input.args, input.data_source
        self.seen = 0

    def __call__(self, input):
        self.seen += 1
        return RolloutFnEvalOutput(data={}) if input.evaluation else RolloutFnTrainOutput(samples=GROUPS)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class AsyncRollout(Rollout):
    async def __call__(self, input):
        return RolloutFnTrainOutput(samples=GROUPS)


THREADS: list[str] = []


def notes_thread(args, rollout_id, data_source, evaluation=False):
    THREADS.append(threading.current_thread().name)
    return GROUPS


def returns_none(args, rollout_id, data_source, evaluation=False):
    return None


def wrong_kind(args, rollout_id, data_source, evaluation=False):
    return RolloutFnEvalOutput(data={})


def no_rewards(args, rollout_id, data_source, evaluation=False):
    return {"set": {"samples": []}}


def no_evaluation(args, rollout_id, data_source):
    return GROUPS


class NoCall:
    def __init__(self, input):
        pass


class CallWithoutInput:
    def __init__(self, input):
        pass

    def __call__(self):
        return GROUPS
