"""Plug-ins of the end-to-end tests."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles.types import (
    GenerateFnInput,
    GenerateFnOutput,
    RolloutFnConstructorInput,
    RolloutFnInput,
    RolloutFnOutput,
    RolloutFnTrainOutput,
    Sample,
)

# Tells a test that the program runs and the plug-ins are being loaded, which is before anything heavy is imported.
if marker := os.environ.get("MILES_TEST_MARKER"):
    Path(marker).touch()


# ---- rewards -------------------------------------------------------------------------------------------------------


async def digits(args: Namespace, sample: Sample) -> float:
    """A reward with many values, so that hardly any group is exactly zero: the share of digits of the label found."""
    answer = sample.response.split("</think>")[-1]
    return sum(a == b for a, b in zip(reversed(answer.removesuffix("<eos>")), reversed(sample.label))) / 4


def sleeps(args: Namespace, sample: Sample) -> float:
    """A synchronous reward, in a thread of its own, that does not come back."""
    (Path(args.run_dir) / "is_sleeping").touch()
    time.sleep(600)
    return 0.0


async def bonus(args: Namespace, sample: Sample) -> float:
    """Whatever the attribute says that --custom-config-path brought."""
    return args.my_bonus


class Curriculum:
    """A reward that changes with the number of samples scored so far: state that a checkpoint must hold."""

    def __init__(self) -> None:
        self.scored = 0

    async def __call__(self, args: Namespace, sample: Sample) -> float:
        self.scored += 1
        return await digits(args, sample) + len(sample.response) * 0.001 * (self.scored // 16)

    def state_dict(self) -> dict[str, Any]:
        return {"scored": self.scored}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scored = state["scored"]


# ---- whole rollouts ------------------------------------------------------------------------------------------------


class RolloutClass:
    """The class form: hands over to the shipped class and counts."""

    built = 0

    def __init__(self, input: RolloutFnConstructorInput) -> None:
        from miles.rollout.inference_rollout.inference_rollout_common import InferenceRolloutFn

        RolloutClass.built += 1
        self.inner = InferenceRolloutFn(input)

    async def __call__(self, input: RolloutFnInput) -> RolloutFnOutput:
        output = await self.inner(input)
        output.metrics = {**(output.metrics or {}), "mine/rollout_id": input.rollout_id}
        return output


async def rollout_async(
    args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False
) -> RolloutFnTrainOutput:
    """The function form as a coroutine, around the published coroutine of the function tree."""
    from miles.rollout.sglang_rollout import generate_rollout_async

    assert not evaluation
    output, aborted = await generate_rollout_async(args, rollout_id, data_source.get_samples)
    data_source.add_samples(aborted)
    return output


def rollout_of_13(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> list[list[Sample]]:
    """A rollout whose last group has lost three of its four samples, as a filter of the user's own may do."""
    from miles.rollout.sglang_rollout import generate_rollout

    groups = generate_rollout(args, rollout_id, data_source).samples
    return [*groups[:-1], groups[-1][:1]]


# ---- one sample ----------------------------------------------------------------------------------------------------


def _payload(input: GenerateFnInput, ids: list[int]) -> dict[str, Any]:
    return {"input_ids": ids, "sampling_params": input.sampling_params, "return_logprob": True}


def _fill(sample: Sample, ids: list[int], answer: dict[str, Any]) -> Sample:
    scored = answer["meta_info"]["output_token_logprobs"]
    sample.tokens = ids + [token for _, token, *_ in scored]
    sample.response, sample.response_length = answer["text"], len(scored)
    sample.rollout_log_probs = [log_prob for log_prob, *_ in scored]
    stopped = answer["meta_info"]["finish_reason"]["type"] == "stop"
    sample.status = Sample.Status.COMPLETED if stopped else Sample.Status.TRUNCATED
    return sample


def _url(args: Namespace) -> str:
    return f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"


async def generate_by_post(input: GenerateFnInput) -> GenerateFnOutput:
    """Posts to the run's own address with the published helper."""
    from miles.utils.http_utils import post

    ids = input.state.tokenizer(input.sample.prompt)["input_ids"]
    return GenerateFnOutput(_fill(input.sample, ids, await post(_url(input.args), _payload(input, ids))))


async def generate_by_httpx(input: GenerateFnInput) -> GenerateFnOutput:
    """Posts with a plain, blocking client from another thread."""
    import httpx

    ids = input.state.tokenizer(input.sample.prompt)["input_ids"]

    def ask() -> dict[str, Any]:
        assert threading.current_thread() is not threading.main_thread()
        return httpx.post(_url(input.args), json=_payload(input, ids), timeout=60).raise_for_status().json()

    return GenerateFnOutput(_fill(input.sample, ids, await asyncio.to_thread(ask)))


# ---- losses --------------------------------------------------------------------------------------------------------


def policy_loss(
    args: Namespace,
    parallel_state: Any,
    batch: dict[str, Any],
    logits: Tensor,
    sum_of_sample_mean: Callable[[Tensor], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate from logits alone, written without the package's loss functions."""
    log_probs, end = [], 0
    for tokens, total, response in zip(batch["unconcat_tokens"], batch["total_lengths"], batch["response_lengths"]):
        end += total
        rows = logits[0, end - response - 1 : end - 1] / args.rollout_temperature
        log_probs.append(rows.log_softmax(-1).gather(-1, tokens[-response:, None])[:, 0])
    now, old = torch.cat(log_probs), torch.cat(batch["log_probs"])
    advantages = torch.cat(batch["advantages"])
    ratio = torch.exp(now - old)
    clipped = ratio.clamp(1 - args.eps_clip, 1 + args.eps_clip_high)
    loss = sum_of_sample_mean(torch.maximum(-ratio * advantages, -clipped * advantages))
    return loss, {"loss": loss.detach(), "mine": sum_of_sample_mean(ratio.detach())}


def pg_reducer(
    total_lengths: list[int], response_lengths: list[int], masks: list[Tensor], calculate_per_token_loss: bool
) -> Callable[[Tensor], Tensor]:
    """The published default, written as a user would."""

    def reduce(values: Tensor) -> Tensor:
        parts = torch.split(values, response_lengths)
        return torch.stack([(x * m).sum() / m.sum().clamp(min=1) for x, m in zip(parts, masks)]).sum()

    return reduce


def half_pg_reducer(*given: Any) -> Callable[[Tensor], Tensor]:
    """Half of it: shows that the reducer is really used."""
    whole = pg_reducer(*given)
    return lambda values: whole(values) / 2


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def note_saved(args: Namespace, rollout_id: int, checkpoint_dir: str, hf_checkpoint_dir: str | None) -> None:
    """One line of `<run>/saved_<rank>.txt`: what a post-save hook was told, and what was in force then."""
    folder = Path(checkpoint_dir)
    in_force = (folder.parent / "latest_checkpointed_iteration.txt").read_text().strip()
    has_model = hf_checkpoint_dir is not None and (Path(hf_checkpoint_dir) / "model.safetensors").is_file()
    whole = (folder / "meta.json").is_file()
    with open(Path(args.run_dir) / f"saved_{getattr(args, 'rank', 0)}.txt", "a") as file:
        file.write(f"{rollout_id} {folder.name} {in_force} {whole} {hf_checkpoint_dir} {has_model}\n")


def fails_after_a_save(args: Namespace, rollout_id: int, checkpoint_dir: str, hf_checkpoint_dir: str | None) -> None:
    raise OSError(f"nobody takes {Path(checkpoint_dir).name}")
