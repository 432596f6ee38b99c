"""Built-in rewards by `--rm-type`, and the published dispatchers `async_rm` and `batched_async_rm`.

    metadata["rm_type"], else --rm-type ──► boxed_? the response becomes its last \\boxed{} ──► REWARDS[name]
                                                                  text comparison: here; sympy and the like: `pool`

`built_in_rm` is what scores a sample when `--custom-rm-path` is not set: it takes the reward plug-in's place, so that
time limits, failure policies and error cards are the same for both. Names and their checks before the start are left to
`miles.config.rewards`, each grader to the file of its name.
"""

from __future__ import annotations

import copy
import hashlib
import random
from argparse import Namespace
from collections.abc import Awaitable, Callable
from typing import Any

from miles.config.rewards import BOXED, ifbench_module, known_names
from miles.errors import FlagError, HookError
from miles.rollout import context
from miles.rollout.rm_hub import deepscaler, math_utils, pool
from miles.rollout.rm_hub.deepscaler import get_deepscaler_rule_based_reward
from miles.rollout.rm_hub.f1 import f1_score
from miles.rollout.rm_hub.gpqa import compute_gpqa_reward
from miles.rollout.rm_hub.math_dapo_utils import DapoScore
from miles.rollout.rm_hub.math_dapo_utils import compute_score as compute_score_dapo
from miles.rollout.rm_hub.math_utils import extract_answer as extract_boxed_answer
from miles.rollout.rm_hub.math_utils import grade_answer_verl
from miles.rollout.rm_hub.remote import remote_rm
from miles.types import Failure, Sample

__all__ = [
    "async_rm",
    "batched_async_rm",
    "built_in_rm",
    "compute_gpqa_reward",
    "compute_score_dapo",
    "extract_boxed_answer",
    "f1_score",
    "get_deepscaler_rule_based_reward",
    "grade_answer_verl",
    "remote_rm",
]


class NoSuchReward(FlagError, NotImplementedError):
    """`--rm-type` or a row's `rm_type` names no built-in reward, or nothing names one."""


# ---- the rewards ---------------------------------------------------------------------------------------------------


async def _under_sympy(verdict: bool | list[tuple[str, str]]) -> int:
    """1 or 0: the verdict, or what a worker process says about the expressions that are left to compare."""
    return int(verdict if isinstance(verdict, bool) else await pool.grade("sympy", verdict))


async def _math(args: Namespace, sample: Sample) -> int:
    return await _under_sympy(math_utils.undecided_verl(sample.response, sample.label))


async def _deepscaler(args: Namespace, sample: Sample) -> int:
    return await _under_sympy(deepscaler.undecided(sample.response, sample.label))


async def _math_verify(args: Namespace, sample: Sample) -> int:
    label = None if sample.label is None else str(sample.label)
    return int(await pool.grade("math_verify", sample.response, label))


async def _dapo(args: Namespace, sample: Sample) -> DapoScore:
    return compute_score_dapo(sample.response, sample.label)


async def _f1(args: Namespace, sample: Sample) -> float:
    label: object = sample.label
    if not (label is None or isinstance(label, (str, int, float))):
        raise TypeError(f"--rm-type f1 needs a text as label, got {label!r}")
    return f1_score(sample.response, None if label is None else str(label))[0]


async def _gpqa(args: Namespace, sample: Sample) -> float:
    return compute_gpqa_reward(sample.response, sample.label, _metadata(sample))


async def _ifbench(args: Namespace, sample: Sample) -> float:
    ifbench_module()  # where it is missing, every row says the same: what to install
    known = _metadata(sample)
    used = {key: known[key] for key in ("instruction_id_list", "kwargs", "prompt_text", "record_id") if key in known}
    return float(await pool.grade("ifbench", sample.response, None, used))


async def _random(args: Namespace, sample: Sample) -> int:
    return random.randint(0, 1)


async def _deterministic_random(args: Namespace, sample: Sample) -> int:
    """One bit of a hash of the run's seed, the sample's number and its response: equal runs have equal rewards."""
    seed = vars(args).get("rollout_seed")
    digest = hashlib.blake2b(f"{seed}\0{sample.index}\0{sample.response}".encode("utf-8", "surrogatepass"))
    return digest.digest()[0] & 1


def _metadata(sample: Sample) -> dict[str, Any]:
    return sample.metadata if isinstance(sample.metadata, dict) else {}


REWARDS: dict[str, Callable[[Namespace, Sample], Awaitable[Any]]] = {
    "math": _math,
    "math_verify": _math_verify,
    "deepscaler": _deepscaler,
    "dapo": _dapo,
    "f1": _f1,
    "gpqa": _gpqa,
    "ifbench": _ifbench,
    "remote_rm": remote_rm,
    "random": _random,
    "deterministic_random": _deterministic_random,
}


# ---- dispatch ------------------------------------------------------------------------------------------------------


async def built_in_rm(args: Namespace, sample: Sample) -> Any:
    """The reward that `metadata["rm_type"]` or `--rm-type` names. Raises NoSuchReward (a NotImplementedError)."""
    name = str(_metadata(sample).get("rm_type") or args.rm_type or "").strip()
    if not name:
        raise NoSuchReward(
            "--rm-type",
            given="the type of the reward is not specified.",
            remedy=f"Give --custom-rm-path your/file.py:function, or --rm-type. {known_names()}",
        )
    plain = name.removeprefix(BOXED)
    reward = REWARDS.get(plain)
    if reward is None:
        raise NoSuchReward(f"--rm-type {name}", given="this reward is not implemented.", remedy=known_names(name))
    if plain != name and reward is not remote_rm:
        sample = copy.copy(sample)
        sample.response = extract_boxed_answer(sample.response) or ""
    return await reward(args, sample)


async def async_rm(args: Namespace, sample: Sample, **kwargs: Any) -> Any:
    """Score one sample: `--custom-rm-path`, else the built-in reward. Plug-ins call this from their own code."""
    value = await context.current(args).reward(args).call_async(args, sample)
    return _or_raise(value)


async def batched_async_rm(
    args: Namespace, samples: list[Sample], inplace_set_reward_field: bool = False, **kwargs: Any
) -> list[Any] | None:
    """Score several samples at once; `inplace_set_reward_field` writes `sample.reward` and returns None."""
    if inplace_set_reward_field:
        for sample in samples:
            assert sample.reward is None, f"Overriding the reward {sample.reward!r} of sample {sample.index}"
    values = [_or_raise(v) for v in await context.current(args).reward(args).call_batch_async(args, samples)]
    if not inplace_set_reward_field:
        return values
    for sample, value in zip(samples, values, strict=True):
        sample.reward = value
    return None


def _or_raise(value: Any) -> Any:
    """A plug-in that scores for itself must not see a failure as a value."""
    if isinstance(value, Failure):
        raise HookError(value, f"{value.flag} {value.path} failed at {value.location}: {value.message}")
    return value
