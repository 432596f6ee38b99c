"""The rollout loop against an engine that answers from a table: what is kept, dropped, aborted, and in which order."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import pytest

from miles.config import parse
from miles.errors import HookError, UsageError
from miles.hooks import bind
from miles.rollout import context, loop, sample
from miles.rollout.state import GenerateState
from miles.types import DynamicFilterOutput, Failure, GenerateFnInput, Sample, is_failed

FLAGS = [
    "--hf-checkpoint",
    "m",
    "--prompt-data",
    "p",
    "--num-rollout",
    "1",
    "--rollout-batch-size",
    "2",
    "--n-samples-per-prompt",
    "2",
]


class TableEngine:
    """Generates one token per request; `delay` seconds by group, cut short by `abort_all`."""

    base_url = "table"

    def __init__(self) -> None:
        self.delay: dict[int, float] = {}
        self.requests: list[dict[str, Any]] = []
        self.stop = asyncio.Event()

    async def generate(self, payload: dict[str, Any]) -> dict[str, Any]:
        self.requests.append(payload)
        group = payload["input_ids"][0]
        finish: dict[str, Any] = {"type": "stop"}
        try:
            await asyncio.wait_for(self.stop.wait(), self.delay.get(group, 0.0) or 1e-4)
            finish = {"type": "abort"}
        except TimeoutError:
            pass
        meta = {"finish_reason": finish, "weight_version": "1", "output_token_logprobs": [[-0.5, 7, None]]}
        return {"text": "x", "meta_info": meta}

    async def abort_all(self) -> None:
        self.stop.set()


class CountingSource:
    """Groups whose prompt ids are their number."""

    def __init__(self, size: int) -> None:
        self.size, self.next, self.asked = size, 0, []

    def get_samples(self, n: int) -> list[list[Sample]]:
        self.asked.append(n)
        groups = []
        for _ in range(n):
            g, self.next = self.next, self.next + 1
            groups.append(
                [Sample(group_index=g, index=g * self.size + i, tokens=[g], label=g) for i in range(self.size)]
            )
        return groups


async def reward_label(args: Namespace, sample: Sample) -> float:
    return float(sample.label)


async def reward_index(args: Namespace, sample: Sample) -> float:
    return float(sample.index or 0)


async def reward_fails_on_odd(args: Namespace, sample: Sample) -> float:
    assert sample.index is not None
    return 1 / ((sample.index + 1) % 2)


async def reward_fails_in_group_0(args: Namespace, sample: Sample) -> float:
    return 1 / int(bool(sample.label))


def drop_group_1(args: Namespace, samples: list[Sample], **kwargs: Any) -> DynamicFilterOutput:
    return DynamicFilterOutput(keep=samples[0].label != 1, reason="one")


seen: dict[str, Any] = {}


def remember_kept(args: Namespace, groups: list[list[Sample]]) -> None:
    seen["kept"] = [[s.index for s in g] for g in groups]


def remember_all(args: Namespace, groups: list[list[Sample]], get_samples: Any) -> None:
    seen["all"] = [g[0].label for g in groups]
    seen["source"] = get_samples.__self__


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    seen.clear()
    yield
    context.install(None)


def rollout(
    *flags: str, delay: dict[int, float] | None = None, policies: dict[str, str] | None = None
) -> tuple[Any, list[list[Sample]], CountingSource, TableEngine]:
    """One rollout under `flags`: output, aborted groups, source, engine."""
    _, args = parse([*FLAGS, "--num-steps-per-rollout", "1", *flags])

    async def go() -> tuple[Any, list[list[Sample]], CountingSource, TableEngine]:
        engine, source = TableEngine(), CountingSource(args.n_samples_per_prompt)
        engine.delay = delay or {}
        context.install(context.RunContext(bind(args, policies=policies, error_budget=1.0), engine))  # type: ignore[arg-type]
        state = GenerateState(args)
        output, aborted = await loop.generate_rollout(state, 5, source.get_samples)
        assert not state.aborted
        return output, aborted, source, engine

    return asyncio.run(go())


HERE = "tests/unit/rollout/test_rollout_loop.py"


def rm(name: str) -> tuple[str, str]:
    return ("--custom-rm-path", f"{HERE}:{name}")


def labels(output: Any) -> list[Any]:
    return [g[0].label for g in output.samples]


def test_keeps_as_many_groups_as_asked_for_sorted_by_index() -> None:
    output, aborted, source, _ = rollout(*rm("reward_label"), delay={0: 0.03})
    assert labels(output) == [0, 1]
    assert source.asked == [2]
    assert aborted == []
    first = output.samples[1][0]
    assert (first.tokens, first.response, first.response_length, first.rollout_log_probs) == ([1, 7], "x", 1, [-0.5])
    assert (first.status, first.reward, first.weight_versions) == (Sample.Status.COMPLETED, 1.0, ["1"])


def test_a_dropped_group_is_replaced_and_counted() -> None:
    output, _, source, _ = rollout(
        *rm("reward_label"),
        "--dynamic-sampling-filter-path", f"{HERE}:drop_group_1",
        "--rollout-all-samples-process-path", f"{HERE}:remember_all",
        "--rollout-sample-filter-path", f"{HERE}:remember_kept",
    )  # fmt: skip
    assert labels(output) == [0, 2]
    assert output.metrics == {"rollout/dynamic_filter/drop_one": 1}
    assert seen["kept"] == [[0, 1], [4, 5]]
    assert seen["all"] == [0, 1, 2, 3] or seen["all"] == [0, 1, 2]
    assert seen["source"] is source


async def answer_in_another_object(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    fields = {"index": sample.index, "group_index": sample.group_index, "label": sample.label}
    return Sample(**fields, tokens=[*sample.tokens, 7], response_length=1, status=Sample.Status.COMPLETED)


def keep_from_group_50(args: Namespace, samples: list[Sample], **kwargs: Any) -> DynamicFilterOutput:
    return DynamicFilterOutput(keep=samples[0].label >= 50, reason="small")


def test_samples_that_a_generate_function_replaces_are_not_taken_for_repeated_ones() -> None:
    """Python gives the address of an object that is gone to the next one."""
    output, _, _, _ = rollout(
        *rm("reward_label"),
        "--custom-generate-function-path", f"{HERE}:answer_in_another_object",
        "--dynamic-sampling-filter-path", f"{HERE}:keep_from_group_50",
    )  # fmt: skip
    assert labels(output) == [50, 51]


def test_over_sampling_aborts_the_slowest_and_throws_them_away() -> None:
    output, aborted, source, engine = rollout(
        *rm("reward_label"), "--over-sampling-batch-size", "4", delay={0: 30.0, 2: 30.0}
    )
    assert labels(output) == [1, 3]
    assert source.asked == [4]
    assert engine.stop.is_set()
    assert aborted == []


def test_partial_rollout_returns_what_was_cut_short() -> None:
    output, aborted, _, _ = rollout(
        *rm("reward_label"), "--over-sampling-batch-size", "4", "--partial-rollout", delay={0: 30.0, 2: 30.0}
    )
    assert labels(output) == [1, 3]
    assert sorted(g[0].label for g in aborted) == [0, 2]
    cut = aborted[0][0]
    assert (cut.status, cut.metadata["start_rollout_id"], cut.reward) == (Sample.Status.ABORTED, 5, None)


def test_a_source_that_runs_dry_is_an_error_not_a_hang() -> None:
    _, args = parse([*FLAGS, "--num-steps-per-rollout", "1", *rm("reward_label")])

    async def go() -> None:
        context.install(context.RunContext(bind(args), TableEngine()))  # type: ignore[arg-type]
        await loop.generate_rollout(GenerateState(args), 0, lambda n: [])

    with pytest.raises(UsageError, match=r"--data-source-path: get_samples\(2\) returned no groups while rollout 0"):
        asyncio.run(go())


def test_a_reward_that_raises_ends_the_rollout_with_its_line() -> None:
    with pytest.raises(HookError, match=r"test_rollout_loop\.py:\d+") as caught:
        rollout(*rm("reward_fails_on_odd"))
    assert caught.value.failure.kind == "exception"


@pytest.mark.parametrize("policy", ["drop", "mask"])
def test_a_group_with_one_score_left_is_dropped(policy: str) -> None:
    """Groups of two in which the odd one fails: one valid sample is no group. Everything would be dropped for ever."""
    with pytest.raises(HookError):
        rollout(*rm("reward_fails_in_group_0"))
    output, _, _, _ = rollout(*rm("reward_fails_in_group_0"), policies={"custom-rm": policy})
    assert labels(output) == [1, 2]
    assert output.metrics == {"rollout/dynamic_filter/drop_failed_scores": 1}


def test_failed_samples_are_shown_to_no_plug_in_and_have_no_reward() -> None:
    output, _, _, _ = rollout(
        *rm("reward_fails_on_odd"),
        "--n-samples-per-prompt", "4",
        "--rollout-sample-filter-path", f"{HERE}:remember_kept",
        policies={"custom-rm": "mask"},
    )  # fmt: skip
    assert seen["kept"] == [[0, 2], [4, 6]]
    failed = [s for g in output.samples for s in g if is_failed(s)]
    assert [s.index for s in failed] == [1, 3, 5, 7]
    for s in failed:
        assert (s.reward, s.status, s.remove_sample) == (None, Sample.Status.FAILED, True)
        assert isinstance(s.failure, Failure)  # type: ignore[attr-defined]


def test_each_sample_gets_its_own_params_and_the_published_seed_where_asked() -> None:
    _, _, _, engine = rollout(*rm("reward_label"), "--sglang-enable-deterministic-inference")
    seeds = [r["sampling_params"]["sampling_seed"] for r in engine.requests]
    assert seeds == [42, 43, 42, 43]
    assert len({id(r["sampling_params"]) for r in engine.requests}) == 4


async def forward(input: GenerateFnInput) -> Any:
    raise AssertionError("a finished sample must not be generated again")


def test_finished_samples_are_left_alone() -> None:
    _, args = parse(
        [
            *FLAGS,
            "--num-steps-per-rollout",
            "1",
            *rm("reward_label"),
            "--custom-generate-function-path",
            f"{HERE}:forward",
        ]
    )

    async def go() -> Sample:
        context.install(context.RunContext(bind(args), TableEngine()))  # type: ignore[arg-type]
        done = Sample(index=1, tokens=[1, 2], response="y", response_length=1, reward=0.25)
        done.status = Sample.Status.COMPLETED
        return await sample.generate_and_rm(GenerateState(args), done, {})

    assert asyncio.run(go()).reward == 0.25
