"""Reward functions in every form: those written for miles, and those written for TRL and verl.

Each becomes the canonical call, one sample at a time; forms that score several at once keep that as `batch`.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from miles.hooks.adapt import Callee
from miles.hooks.adapted import Adapted, AsyncFn, awaitable
from miles.hooks.point import Form
from miles.hooks.threads import Threads
from miles.hooks.values import reward_list
from miles.types import Sample


def reward(callee: Callee, form: Form, threads: Threads | None) -> Adapted:
    fn = awaitable(callee.obj, threads)
    if form.name == "sample":
        return Adapted(fn)
    if form.name == "sample-or-samples":

        async def group(args: Namespace, samples: list[Sample]) -> list[Any]:
            return reward_list(await fn(args, samples), len(samples))

        return Adapted(fn, group)
    if form.name == "verl":
        return Adapted(_verl(callee, fn))
    batch = _trl(callee, fn) if form.name == "trl" else fn

    async def several(args: Namespace, samples: list[Sample]) -> list[Any]:
        return reward_list(await batch(args, samples), len(samples))

    async def single(args: Namespace, sample: Sample) -> Any:
        return (await several(args, [sample]))[0]

    return Adapted(single, several)


# Data set columns that foreign rewards read the expected answer from; `label` fills those that metadata lacks.
_ANSWER_COLUMNS = ("answer", "answers", "ground_truth", "label", "labels", "reference", "solution", "target")


def _trl(callee: Callee, fn: AsyncFn) -> AsyncFn:
    """TRL's `reward_func(prompts=, completions=, **columns)`; columns are the keys of `metadata`, plus `label`.

    Where the data set's prompts are conversations, prompts and completions are message lists, as there.
    """

    async def call(args: Namespace, samples: list[Sample]) -> Any:
        prompts = [s.prompt if isinstance(s.prompt, list) else vars(s).get("prompt_messages") for s in samples]
        chat = None not in prompts
        columns: dict[str, list[Any]] = {
            key: [s.metadata.get(key) for s in samples] for key in dict.fromkeys(k for s in samples for k in s.metadata)
        }
        labels = [s.label for s in samples]
        columns.setdefault("label", labels)
        # Functions with **columns look for the answer under the data set's own name for it.
        if own_name := vars(args).get("label_key"):
            columns.setdefault(own_name, labels)
        for name in callee.names:
            if name in _ANSWER_COLUMNS:
                columns.setdefault(name, labels)
        columns["prompts"] = prompts if chat else [s.prompt for s in samples]
        columns["completions"] = [
            [{"role": "assistant", "content": s.response}] if chat else s.response for s in samples
        ]
        columns["completion_ids"] = [s.tokens[len(s.tokens) - s.response_length :] for s in samples]
        return await fn(**{k: v for k, v in columns.items() if callee.takes_any_keyword or k in callee.names})

    return call


def _verl(callee: Callee, fn: AsyncFn) -> AsyncFn:
    """verl's `compute_score`; a dict counts by its `score` where no --reward-key says otherwise."""

    async def call(args: Namespace, sample: Sample) -> Any:
        passed = {
            "data_source": sample.metadata.get("data_source", ""),
            "solution_str": sample.response,
            "ground_truth": sample.label,
            "extra_info": sample.metadata.get("extra_info", sample.metadata),
        }
        value = await fn(**{k: v for k, v in passed.items() if callee.takes_any_keyword or k in callee.names})
        if isinstance(value, dict) and "score" in value and not vars(args).get("reward_key"):
            return value["score"]
        return value

    return call
