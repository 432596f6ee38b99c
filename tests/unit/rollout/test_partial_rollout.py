"""--partial-rollout: what an abort cut short comes back, is continued, and its columns agree."""

from __future__ import annotations

import asyncio
import copy
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import pytest
from rollout_chat import state_of

from miles.errors import HookError
from miles.rollout import context, loop
from miles.rollout.sample import generate_and_rm, generate_and_rm_group
from miles.rollout.state import GenerateState
from miles.types import GenerateFnInput, Sample, is_failed

HERE = "tests/unit/rollout/test_partial_rollout.py"
LIMIT = 6


class SlowWriter:
    """Generates token after token until told to stop: `patience` tokens for the group of a prompt."""

    base_url = "slow"

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.patience: dict[int, int] = {}
        self.stopped = False
        self.running = self.most_running = 0

    async def generate(self, payload: dict[str, Any]) -> dict[str, Any]:
        self.requests.append(payload)
        prompt, version = payload["input_ids"][0], str(len(self.requests))
        wanted = min(payload["sampling_params"]["max_new_tokens"], LIMIT)
        ids: list[int] = []
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        while len(ids) < wanted and not self.stopped:
            ids.append(100 + len(payload["input_ids"]) + len(ids))
            # A group in a hurry is done at once; any other goes on from token to token until the abort.
            await asyncio.sleep(0 if prompt not in self.patience or len(ids) < self.patience[prompt] else 0.01)
        self.running -= 1
        finish = "abort" if len(ids) < wanted else "length" if wanted < LIMIT else "stop"
        meta = {
            "finish_reason": {"type": finish}, "weight_version": version,
            "output_token_logprobs": [[-token / 1000, token, None] for token in ids],
        }  # fmt: skip
        return {"text": "x" * len(ids), "meta_info": meta}

    async def abort_all(self) -> None:
        self.stopped = True


class Source:
    """Groups whose prompt is their number; what comes back is taken first."""

    def __init__(self, size: int = 2) -> None:
        self.size, self.next, self.back = size, 0, []

    def get_samples(self, n: int) -> list[Any]:
        taken, self.back = self.back[:n], self.back[n:]
        while len(taken) < n:
            taken.append(
                [
                    Sample(group_index=self.next, index=self.next * self.size + i, prompt="p", tokens=[self.next])
                    for i in range(self.size)
                ]
            )
            self.next += 1
        return taken


async def one(args: Namespace, sample: Sample) -> float:
    return 1.0


async def fails_for_group_3(args: Namespace, sample: Sample) -> float:
    return 1 / (sample.group_index - 3 if sample.index % 2 else 1)


async def by_hand(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """Goes on by two tokens and knows nothing of masks."""
    sample.tokens = [*sample.tokens, 7, 8]
    sample.response += "yy"
    sample.response_length += 2
    sample.status = Sample.Status.COMPLETED
    return sample


async def anew(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """Forgets what there was."""
    sample.tokens, sample.response, sample.response_length = [9, 7, 8], "yy", 2
    sample.status = Sample.Status.COMPLETED
    return sample


async def own_mask(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    sample = await by_hand(args, sample, sampling_params)
    sample.loss_mask = [0, 0, 1]
    return sample


async def two(input: GenerateFnInput) -> list[Sample]:
    samples = [copy.deepcopy(input.sample), copy.deepcopy(input.sample)]
    return [await by_hand(input.args, s, {}) for s in samples]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    context.install(None)


FLAGS = ("--n-samples-per-prompt", "2", "--rollout-max-response-len", str(LIMIT), "--custom-rm-path", f"{HERE}:one")


async def two_rollouts(*flags: str, **options: Any) -> tuple[Any, list[Any], Any, SlowWriter, GenerateState]:
    """Groups 0 and 2 are slow; the second rollout begins with what the first gave back."""
    engine, source = SlowWriter(), Source()
    engine.patience = {0: 2, 2: 4}
    state = state_of(engine, *FLAGS, "--over-sampling-batch-size", "4", "--partial-rollout", *flags, **options)
    first, aborted = await loop.generate_rollout(state, 0, source.get_samples)
    loop.give_back(state, source.back.extend, aborted)
    kept = copy.deepcopy(aborted)
    engine.stopped, engine.patience = False, {}
    second, _ = await loop.generate_rollout(state, 1, source.get_samples)
    return first, kept, second, engine, state


@pytest.mark.parametrize("masks", [False, True])
def test_a_response_that_was_cut_short_is_continued(masks: bool) -> None:
    more = ["--mask-offpolicy-in-partial-rollout"] if masks else []
    first, aborted, second, engine, _ = asyncio.run(two_rollouts(*more))
    assert [g[0].group_index for g in first.samples] == [1, 3]
    assert [g[0].group_index for g in aborted] == [0, 2]
    for before, after in zip((s for g in aborted for s in g), (s for g in second.samples for s in g), strict=True):
        earlier = before.response_length
        assert before.index == after.index and before.status == Sample.Status.ABORTED and 0 < earlier < LIMIT
        assert before.metadata == after.metadata == {"start_rollout_id": 0}
        assert after.tokens == [before.tokens[0], *(100 + i for i in range(1, LIMIT + 1))]
        assert after.tokens[: 1 + earlier] == before.tokens
        assert after.rollout_log_probs == [-token / 1000 for token in after.tokens[1:]]
        assert (after.response, after.response_length) == ("x" * LIMIT, LIMIT)
        assert after.loss_mask == ([0] * earlier + [1] * (LIMIT - earlier) if masks else None)
        assert len(after.weight_versions) == 2 and after.reward == 1.0
        request = next(r for r in engine.requests[8:] if r["input_ids"] == before.tokens)
        assert request["sampling_params"]["max_new_tokens"] == LIMIT - earlier
        after.validate()


def test_finished_members_of_a_group_wait_for_the_others_and_are_masked() -> None:
    async def go() -> list[Sample]:
        state = state_of(SlowWriter(), *FLAGS, "--partial-rollout", "--mask-offpolicy-in-partial-rollout")
        done = Sample(index=0, tokens=[5, 101], response="x", response_length=1, reward=0.5, status="completed")
        new = Sample(index=1, tokens=[5])
        return await generate_and_rm_group(state, [done, new], {"max_new_tokens": LIMIT})

    done, new = asyncio.run(go())
    assert (done.loss_mask, done.reward) == ([0], 0.5)
    assert (new.loss_mask, new.reward) == (None, 1.0)


def test_a_member_whose_score_failed_stays_failed() -> None:
    """Generating it again would be refused: only samples that are pending or aborted can go on."""

    async def go() -> tuple[list[Any], Any]:
        engine, source = SlowWriter(), Source()
        engine.patience = {0: 3}
        reward = ("--custom-rm-path", f"{HERE}:fails_for_group_3")
        more = (*FLAGS, *reward, "--n-samples-per-prompt", "2", "--partial-rollout")
        state = state_of(engine, *more, policies={"custom-rm": "mask"})
        failed = (await generate_and_rm_group(state, source.get_samples(4)[3], {"max_new_tokens": LIMIT}))[1]
        assert is_failed(failed)
        return [failed], await generate_and_rm(state, failed, {})

    (before,), after = asyncio.run(go())
    assert after is before and after.status == Sample.Status.FAILED and after.reward is None


@pytest.mark.parametrize(
    ("name", "mask", "tokens"),
    [("by_hand", [0, 1, 1], [5, 6, 7, 8]), ("anew", None, [9, 7, 8]), ("own_mask", [0, 0, 1], [5, 6, 7, 8])],
)
def test_masks_of_generate_functions_that_know_of_none(name: str, mask: Any, tokens: list[int]) -> None:
    async def go() -> Sample:
        path = ("--custom-generate-function-path", f"{HERE}:{name}")
        state = state_of(SlowWriter(), *FLAGS, *path, "--partial-rollout", "--mask-offpolicy-in-partial-rollout")
        cut = Sample(index=0, tokens=[5, 6], response="x", response_length=1, status=Sample.Status.ABORTED)
        return await generate_and_rm(state, cut, {})

    sample = asyncio.run(go())
    assert (sample.loss_mask, sample.tokens) == (mask, tokens)
    sample.validate()


def test_several_samples_of_one_prompt_are_refused() -> None:
    async def go() -> None:
        state = state_of(
            SlowWriter(), *FLAGS, "--custom-generate-function-path", f"{HERE}:two", "--partial-rollout"
        )  # fmt: skip
        await generate_and_rm(state, Sample(index=0, tokens=[5]), {})

    with pytest.raises(HookError, match="returned a list of 2 samples under --partial-rollout") as caught:
        asyncio.run(go())
    assert caught.value.failure.flag == "--custom-generate-function-path"
    assert caught.value.failure.sample_index == 0


def test_the_concurrency_limit_holds_while_generating() -> None:
    async def go() -> int:
        engine = SlowWriter()
        state = state_of(engine, *FLAGS, "--sglang-server-concurrency", "3", "--rollout-batch-size", "8")
        await loop.generate_rollout(state, 0, Source().get_samples)
        return engine.most_running

    assert asyncio.run(go()) == 3


def test_with_group_rewards_a_returned_group_is_scored_when_all_are_done() -> None:
    async def go() -> list[Sample]:
        state = state_of(
            SlowWriter(), *FLAGS, "--group-rm", "--partial-rollout", "--custom-rm-path", f"{HERE}:by_position"
        )  # fmt: skip
        done = Sample(index=0, tokens=[5, 101], response="x", response_length=1, status=Sample.Status.COMPLETED)
        return await generate_and_rm_group(state, [done, Sample(index=1, tokens=[5])], {"max_new_tokens": LIMIT})

    assert [s.reward for s in asyncio.run(go())] == [0.0, 1.0]


async def by_position(args: Namespace, samples: list[Sample]) -> list[float]:
    return [float(i) for i, _ in enumerate(samples)]


def test_with_group_rewards_several_samples_of_one_prompt_are_scored_together() -> None:
    async def go() -> list[Any]:
        more = ("--custom-generate-function-path", f"{HERE}:two", "--custom-rm-path", f"{HERE}:by_position")
        state = state_of(SlowWriter(), *FLAGS, "--group-rm", *more)
        return await generate_and_rm_group(state, [Sample(index=i, tokens=[5]) for i in range(2)], {})

    assert [[s.reward for s in entry] for entry in asyncio.run(go())] == [[0.0, 1.0], [2.0, 3.0]]
