"""--custom-generate-function-path: once per unfinished sample, in every form; what it fills is what is trained."""

from __future__ import annotations

import asyncio
import copy
import threading
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hooks_helpers import answered, bound, sample
from hooks_stage import SAMPLES, Stage

from miles.errors import HookError
from miles.rollout.loop_thread import get_async_loop
from miles.rollout.sample import generate_and_rm
from miles.rollout.state import GenerateState
from miles.types import Failure, GenerateFnInput, GenerateFnOutput, Sample

MakeStage = Callable[..., Stage]
ARGS = Namespace(word="said")


def fill(sample: Sample, **fields: Any) -> Sample:
    kept = {name: vars(sample)[name] for name in ("prompt", "label", "metadata")}
    vars(sample).update(vars(answered(sample.index or 0)) | kept)
    vars(sample).update(fields)
    return sample


# ---- what it is called with -----------------------------------------------------------------------------------------


def test_the_published_call(stage: MakeStage) -> None:
    seen: list[tuple[Any, ...]] = []
    threads: list[threading.Thread] = []

    async def generate(*given: Any) -> Sample:
        seen.append(given)
        threads.append(threading.current_thread())
        return fill(given[1])

    s = stage("--hook-form", "custom-generate-function=args-sample-params", custom_generate_function=generate)
    batch = s.rollout().shards[0]
    assert len(seen) == SAMPLES and {len(given) for given in seen} == {3}
    for args, given, params in seen:
        assert args is s.args and isinstance(given, Sample)
        assert set(params) == {
            "temperature", "top_p", "top_k", "max_new_tokens", "stop", "stop_token_ids", "skip_special_tokens",
            "no_stop_trim", "spaces_between_special_tokens", "sampling_seed",
        }  # fmt: skip
    assert [given.index for _, given, _ in seen] == [0, 1, 2, 3]
    assert set(threads) == {get_async_loop().thread} and s.engine.requests == []
    assert batch.tokens.tolist() == [6, 7, 8, 9] * SAMPLES and batch.response_lengths.tolist() == [2] * SAMPLES


def test_sampling_params_belong_to_one_call(stage: MakeStage, tmp_path: Path) -> None:
    """In training and in evaluation; a function that changes them changes nobody else's."""
    seen: list[Any] = []

    async def generate(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
        seen.append(sampling_params.get("temperature"))
        sampling_params["temperature"] = -1.0
        return fill(sample)

    s = stage(*Stage.evaluating(tmp_path), "--rollout-temperature", 0.7, custom_generate_function=generate)
    s.rollout()
    assert seen == [0.7] * SAMPLES
    s.evaluate()
    assert seen[SAMPLES:] == [0.7] * 3


def test_evaluation_is_passed_to_those_who_name_it(stage: MakeStage, tmp_path: Path) -> None:
    seen: list[Any] = []

    async def names_it(args: Namespace, sample: Sample, sampling_params: Any, evaluation: bool = False) -> Sample:
        seen.append(evaluation)
        return fill(sample)

    async def takes_anything(args: Namespace, sample: Sample, sampling_params: Any, **kwargs: Any) -> Sample:
        seen.append(kwargs)
        return fill(sample)

    s = stage(*Stage.evaluating(tmp_path, 1), custom_generate_function=names_it)
    s.rollout()
    s.evaluate()
    assert seen == [False] * SAMPLES + [True]
    seen.clear()
    stage(custom_generate_function=takes_anything).rollout()
    assert seen == [{}] * SAMPLES


def test_the_one_input_form(stage: MakeStage) -> None:
    seen: list[GenerateFnInput] = []

    async def generate(input: GenerateFnInput) -> GenerateFnOutput:
        seen.append(input)
        assert input.state.tokenizer.encode("1+1=?", add_special_tokens=False)
        return GenerateFnOutput(samples=fill(input.sample))

    s = stage(custom_generate_function=generate)
    s.rollout()
    assert s.hooks.custom_generate_function.form == "input" and len(seen) == SAMPLES
    assert all(i.args is s.args and isinstance(i.state, GenerateState) and i.evaluation is False for i in seen)
    assert len({id(i.sampling_params) for i in seen}) == SAMPLES


def test_a_class_is_made_once(stage: MakeStage) -> None:
    made: list[Any] = []

    class Generate:
        def __init__(self) -> None:
            self.calls = 0
            made.append(self)

        async def __call__(self, args: Namespace, sample: Sample, sampling_params: Any) -> Sample:
            self.calls += 1
            return fill(sample)

    s = stage(custom_generate_function=Generate)
    s.rollout(0)
    s.rollout(1)
    assert [g.calls for g in made] == [2 * SAMPLES] and s.hooks.custom_generate_function.form == "args-sample-params"


def test_a_synchronous_function_runs_in_a_thread(stage: MakeStage) -> None:
    threads: list[threading.Thread] = []

    def generate(args: Namespace, sample: Sample, sampling_params: Any) -> Sample:
        threads.append(threading.current_thread())
        return fill(sample)

    s = stage(custom_generate_function=generate)
    assert s.rollout().samples == SAMPLES and s.hooks.custom_generate_function.in_thread
    assert get_async_loop().thread not in threads and len(threads) == SAMPLES


def test_a_slot_is_held_while_it_runs_and_not_during_the_reward(stage: MakeStage) -> None:
    """With one slot, a reward that waits for the next generation to begin still ends."""
    running: list[int] = []
    begun = [asyncio.Event() for _ in range(SAMPLES + 1)]
    begun[SAMPLES].set()

    async def generate(input: GenerateFnInput) -> GenerateFnOutput:
        begun[len(running)].set()
        running.append(sum(running) + 1)
        await asyncio.sleep(0)
        assert running[-1] == 1, "nobody else came in"
        running[-1] = 0
        return GenerateFnOutput(samples=fill(input.sample))

    async def reward(args: Namespace, sample: Sample) -> float:
        await asyncio.wait_for(begun[(sample.index or 0) + 1].wait(), 5)
        return 1.0

    s = stage("--sglang-server-concurrency", 1, custom_generate_function=generate, custom_rm=reward)
    assert s.rollout().samples == SAMPLES and running == [0] * SAMPLES


@pytest.mark.parametrize(
    ("name", "form", "response"),
    [
        ("three", "args-sample-params", "said 0.5"),
        ("with_evaluation", "args-sample-params", "evaluation=True"),
        ("with_kwargs", "args-sample-params", "kwargs=[]"),
        ("one_input", "input", "input said"),
        ("OneInput", "input", "object"),
        ("ThreeArguments", "args-sample-params", "object of three"),
        ("synchronous", "args-sample-params", "thread"),
        ("raw_from_input", "input", "4"),
    ],
)
def test_forms(name: str, form: str, response: str) -> None:
    hook = bound("custom_generate_function", f"generates:{name}")
    output = asyncio.run(hook.call_async(given(evaluation=True)))
    assert hook.form == form and isinstance(output, GenerateFnOutput)
    made = output.samples if isinstance(output.samples, Sample) else output.samples[0]
    assert made.response == response


def given(evaluation: bool = False, **fields: Any) -> GenerateFnInput:
    return GenerateFnInput(Namespace(args=ARGS), sample(**fields), {"temperature": 0.5}, evaluation)


# ---- what becomes of its samples ------------------------------------------------------------------------------------


def scored(seen: list[Any]) -> Callable[..., Any]:
    async def reward(args: Namespace, sample: Any) -> Any:
        seen.append([s.index for s in sample] if isinstance(sample, list) else sample.index)
        return [1.0] * len(sample) if isinstance(sample, list) else 1.0

    return reward


def one(s: Stage, sample: Sample) -> Any:
    """`generate_and_rm` for one sample, on the stage's own plug-ins."""
    return asyncio.run(generate_and_rm(GenerateState(s.args), sample, {}))


@pytest.mark.parametrize(
    ("fields", "scores", "status"),
    [
        ({"status": Sample.Status.COMPLETED}, [7], Sample.Status.COMPLETED),
        ({"status": Sample.Status.TRUNCATED}, [7], Sample.Status.TRUNCATED),
        ({"status": Sample.Status.FAILED}, [7], Sample.Status.FAILED),
        ({"status": Sample.Status.PENDING}, [7], Sample.Status.PENDING),
        ({"status": "completed"}, [7], "completed"),
        ({"status": Sample.Status.ABORTED}, [], Sample.Status.ABORTED),
        ({"status": Sample.Status.COMPLETED, "reward": 0.0}, [], Sample.Status.COMPLETED),
    ],
    ids=str,
)
def test_what_it_leaves_decides_about_the_reward(fields: Any, scores: Any, status: Any, stage: MakeStage) -> None:
    seen: list[Any] = []

    async def generate(args: Namespace, sample: Sample, sampling_params: Any) -> Sample:
        return fill(sample, **fields)

    s = stage(custom_generate_function=generate, custom_rm=scored(seen))
    done = one(s, sample(7, tokens=[]))
    assert seen == scores and done.status == status
    assert done.reward == fields.get("reward", 1.0 if scores else None)


@pytest.mark.parametrize("status", [Sample.Status.COMPLETED, Sample.Status.TRUNCATED, "completed"])
def test_it_is_not_called_for_a_finished_sample(status: Any, stage: MakeStage) -> None:
    async def never(args: Namespace, sample: Sample, sampling_params: Any) -> Sample:
        raise AssertionError("called")

    finished = answered(3, status=status, reward=1.0)
    assert one(stage(custom_generate_function=never), finished) is finished


def test_it_is_not_called_once_the_rollout_is_aborted(stage: MakeStage) -> None:
    async def never(args: Namespace, sample: Sample, sampling_params: Any) -> Sample:
        raise AssertionError("called")

    s = stage(custom_generate_function=never)
    state = GenerateState(s.args)
    state.aborted = True
    untouched = sample(1, tokens=[])
    done = asyncio.run(generate_and_rm(state, untouched, {}))
    assert done is untouched and done.status == Sample.Status.ABORTED and done.reward is None


def test_several_samples_from_one_prompt(stage: MakeStage) -> None:
    """They are scored in one call, those without a reward; all of them are trained."""
    seen: list[Any] = []

    async def generate(args: Namespace, sample: Sample, sampling_params: Any) -> list[Sample]:
        fill(sample)
        second, third = copy.deepcopy(sample), copy.deepcopy(sample)
        second.reward, third.index = 0.0, 10 + (sample.index or 0)
        return [sample, second, third]

    s = stage(custom_generate_function=generate, custom_rm=scored(seen))
    report = s.rollout()
    assert sorted(seen) == [[i, 10 + i] for i in range(SAMPLES)]
    assert report.samples == 3 * SAMPLES and report.shards[0].raw_reward == [1.0, 0.0, 1.0] * SAMPLES


def test_a_list_with_an_aborted_entry_is_not_scored(stage: MakeStage) -> None:
    seen: list[Any] = []

    async def generate(args: Namespace, sample: Sample, sampling_params: Any) -> list[Sample]:
        return [fill(sample), fill(copy.deepcopy(sample), status=Sample.Status.ABORTED)]

    first, second = one(stage(custom_generate_function=generate, custom_rm=scored(seen)), sample(0, tokens=[]))
    assert seen == [] and first.reward is None and second.reward is None


def test_masks_logprobs_and_train_metadata_reach_the_batch(stage: MakeStage) -> None:
    async def generate(args: Namespace, sample: Sample, sampling_params: Any) -> Sample:
        fill(sample, loss_mask=[1, 0], rollout_log_probs=[-0.25, 0.0], train_metadata={"turn": sample.index})
        sample.tool_call_count = 2  # type: ignore[attr-defined]
        return sample

    s = stage(custom_generate_function=generate)
    batch = s.rollout().shards[0]
    assert batch.loss_masks.tolist() == [1, 0] * SAMPLES and batch.metadata == [{"turn": i} for i in range(SAMPLES)]
    assert batch.rollout_log_probs is not None
    np.testing.assert_array_equal(batch.rollout_log_probs, np.tile(np.float32([-0.25, 0.0]), SAMPLES))


def test_a_retry_starts_from_the_sample_as_it_was(no_delay: None) -> None:
    hook = bound("custom_generate_function", "generates:half_done", policies={"custom-generate-function": "retry:2"})
    attempts = hook.target.__globals__["ATTEMPTS"]
    attempts.clear()
    output = asyncio.run(hook.call_async(given(response="")))
    assert attempts == [("", 3)] * 3
    assert output.samples.response == "partial" and output.samples.tokens == [1, 2, 3, 9]


def test_a_dropped_sample_is_as_it_was_and_leaves_training(stage: MakeStage) -> None:
    hook = bound("custom_generate_function", "generates:half_done", policies={"custom-generate-function": "drop"})
    hook.target.__globals__["ATTEMPTS"].clear()
    call = given(response="")
    before = sample(response="")
    assert isinstance(asyncio.run(hook.call_async(call)), Failure)
    assert call.sample == before


@pytest.mark.parametrize(
    ("returned", "kind", "says"),
    [
        (None, "none", "returned None, expected the Sample"),
        ("text", "type", "returned str 'text', expected a Sample"),
        ([], "length", "returned no samples"),
        (GenerateFnOutput(samples=None), "none", "returned None"),
        ([1], "type", "returned list [1], expected a Sample"),
    ],
    ids=str,
)
def test_what_is_no_sample(returned: Any, kind: str, says: str, stage: MakeStage) -> None:
    async def generate(args: Namespace, sample: Sample, sampling_params: Any) -> Any:
        return returned

    with pytest.raises(HookError, match=says.replace("[", r"\[")) as caught:
        stage(custom_generate_function=generate).rollout()
    assert caught.value.failure.kind == kind


def test_one_object_twice_is_refused(stage: MakeStage) -> None:
    async def generate(args: Namespace, sample: Sample, sampling_params: Any) -> Any:
        return [sample, sample]

    with pytest.raises(HookError, match=r"one Sample object several times(.|\n)*copy.deepcopy"):
        stage(custom_generate_function=generate).rollout()
