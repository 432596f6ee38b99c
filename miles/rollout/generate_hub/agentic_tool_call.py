"""An agent of yours talks to the model as to an OpenAI server; what was said becomes the sample.

    sample.prompt ──► --custom-agent-function-path ──chat completions──► session of MilesRouter ──► engine
                                                                             │ recorded, token by token
    sample  ◄── merge_samples ◄── one sample per answer ◄────────────────────┘

Named by `--custom-generate-function-path miles.rollout.generate_hub.agentic_tool_call.generate`, with
`--use-miles-router`; `add_arguments` adds `--generate-multi-samples`. The conversation is one sample: the model's own
tokens carry loss, what stands between them does not. `--generate-multi-samples` makes a sample of each answer instead,
which is what an agent needs that does not say one conversation from its beginning to its end.

Every attempt of the agent has a session of its own. A router that dies takes its sessions with it; their agents then
begin anew, at the router that has taken its place. When the rollout is aborted, the agent is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from argparse import ArgumentParser
from itertools import pairwise
from typing import Any

from miles.errors import EngineError, FlagError, HookError, UsageError
from miles.hooks import Hook
from miles.hooks.values import BadReturn
from miles.rollout.generate_utils.openai_endpoint_utils import (
    OpenAIEndpointTracer,
    compute_samples_from_openai_records,
)
from miles.rollout.generate_utils.sample_utils import merge_samples
from miles.router.session.session_types import SessionRecord
from miles.types import GenerateFnInput, GenerateFnOutput, Sample

logger = logging.getLogger(__name__)

MAX_LOST_SESSIONS = 3
"""How often an agent begins anew because the router has lost its session."""

ABORT_POLL_S = 0.1
"""How often a waiting agent looks whether the rollout has been aborted."""

# Name among the sampling parameters -> name in the chat API.
_RENAMED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}

# What SGLang's ChatCompletionRequest knows of a request, `model` and `messages` aside.
_CHAT_FIELDS = frozenset("""
    chat_template_kwargs continue_final_message custom_logit_processor custom_params ebnf frequency_penalty ignore_eos
    logit_bias logprob_start_len logprobs lora_path max_completion_tokens max_tokens min_p min_tokens n no_stop_trim
    presence_penalty regex repetition_penalty response_format return_hidden_states return_meta_info
    return_routed_experts seed separate_reasoning session_params skip_special_tokens stop stop_regex stop_token_ids
    stream stream_options temperature tool_choice tools top_k top_logprobs top_p user
""".split())  # fmt: skip  # noqa: SIM905


async def generate(input: GenerateFnInput) -> GenerateFnOutput:
    """Let the agent work on `input.sample.prompt`, and make samples of what the model answered.

    The sample ends as its last answer did: COMPLETED, or TRUNCATED where the answer reached its limit or the context
    was full; ABORTED where the rollout was aborted. The metadata of the one sample of a conversation count the answers
    as `round_number`.
    """
    hook = _agent_of(input)
    begin = time.perf_counter()
    said = await _Agent(input, hook).work()
    if said is None:
        input.sample.status = Sample.Status.ABORTED
        return GenerateFnOutput(samples=input.sample)
    records, context_full = said
    if not records:
        _no_record(hook, input.sample, context_full)
    samples = _samples_of(input, records)
    if context_full:
        samples[-1].status = Sample.Status.TRUNCATED
    if input.args.generate_multi_samples:
        return GenerateFnOutput(samples=samples)
    sample = _merged(hook, samples, input)
    engine_s = sum(_engine_seconds(record) for record in records)
    sample.non_generation_time += max(0.0, time.perf_counter() - begin - engine_s)
    sample.metadata = {**(sample.metadata or {}), "round_number": len(records)}
    return GenerateFnOutput(samples=sample)


def _add_arguments(parser: ArgumentParser) -> None:
    """The published flag; that of the agent is a plug point and always there."""
    parser.add_argument("--generate-multi-samples", action="store_true", help="One sample per answer.")


generate.add_arguments = _add_arguments  # type: ignore[attr-defined]


def build_chat_request_kwargs(sampling_params: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters as fields of a chat completion, with log-probs; what the chat API lacks is left out.

    Example: `build_chat_request_kwargs({"max_new_tokens": 8, "stop": None, "spaces_between_special_tokens": False})`
    is `{"max_tokens": 8, "logprobs": True, "logprob_start_len": 0}`.
    """
    renamed = {_RENAMED.get(name, name): value for name, value in sampling_params.items()}
    kwargs = renamed | {"logprobs": True, "logprob_start_len": 0}
    return {name: value for name, value in kwargs.items() if name in _CHAT_FIELDS and value is not None}


def _agent_of(input: GenerateFnInput) -> Hook:
    """The agent; FlagError where a setting makes its work impossible."""
    state: Any = input.state
    args = input.args
    if args.partial_rollout:
        raise FlagError(
            "--partial-rollout", given="Partial rollout is not supported by agentic_tool_call: an agent that was cut "
            "short cannot be continued.",
            remedy="Leave it out, or generate with single_turn.",
        )  # fmt: skip
    if not args.use_miles_router:
        raise FlagError(
            "--use-miles-router", given=False,
            expected="to be given: agentic_tool_call records conversations with its session routes",
        )  # fmt: skip
    hook: Hook | None = state.context.hook("custom_agent_function", args)
    if hook is None:
        raise FlagError("--custom-agent-function-path", given=None, expected="the agent that agentic_tool_call needs")
    return hook


class _Agent:
    """One sample's agent while it works. `tracer` is the session of the latest attempt."""

    def __init__(self, input: GenerateFnInput, hook: Hook) -> None:
        state: Any = input.state
        self.args, self.sample, self.state, self.hook = input.args, input.sample, state, hook
        self.request_kwargs = build_chat_request_kwargs(input.sampling_params)
        if input.args.use_rollout_routing_replay:
            self.request_kwargs["return_routed_experts"] = True
        self.tracer: OpenAIEndpointTracer | None = None

    async def open_session(self) -> str:
        """The address for one attempt. What an attempt before it has said is forgotten."""
        if self.tracer is not None:
            await self.tracer.delete()
        self.tracer = await OpenAIEndpointTracer.create(self.args)
        return self.tracer.base_url

    async def work(self) -> tuple[list[SessionRecord], bool] | None:
        """What was said, once the agent is done, and whether the context was full; None where the rollout was aborted.

        Raises HookError where the agent fails.
        """
        for attempt in range(MAX_LOST_SESSIONS + 1):
            try:
                return await self._attempt()
            except _SessionIsLost as lost:
                if attempt == MAX_LOST_SESSIONS:
                    raise lost.error from None
                logger.warning(
                    "the router lost the session of sample %s; its agent begins anew: %s",
                    self.sample.index,
                    lost.error,
                )
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self) -> tuple[list[SessionRecord], bool] | None:
        """`work`, once. Raises _SessionIsLost where the reason for a failure is the router's."""
        call = self.hook.call_async(
            base_url=self.open_session,
            prompt=self.sample.prompt,
            request_kwargs=self.request_kwargs,
            metadata=self.sample.metadata,
        )
        working = asyncio.create_task(call, name=f"agent of sample {self.sample.index}")
        try:
            while not (await asyncio.wait([working], timeout=ABORT_POLL_S))[0]:
                if self.state.aborted:
                    return None
            working.result()
            return await self._collect()
        except HookError as error:
            if self.tracer is not None and await self.tracer.is_lost():
                self.tracer = None
                raise _SessionIsLost(error) from None
            raise
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            if self.tracer is not None:
                await self.tracer.delete()
                self.tracer = None

    async def _collect(self) -> tuple[list[SessionRecord], bool]:
        """What the latest session has recorded; it ends."""
        tracer, self.tracer = self.tracer, None
        if tracer is None:  # an agent that never asked for its address
            return [], False
        try:
            return await tracer.collect_records(), tracer.context_full
        except EngineError as error:
            if error.status in (None, 404):
                raise _SessionIsLost(error) from None
            raise


class _SessionIsLost(Exception):
    """A router has died with a session. `error` is what came of it."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _no_record(hook: Hook, sample: Sample, context_full: bool) -> None:
    """Raises: without an answer there is nothing to train on."""
    if context_full:
        raise UsageError(
            f"sample {sample.index} (group {sample.group_index}): its prompt leaves no room for a response in the "
            f"context of the model. It begins {str(sample.prompt)[:60]!r}. Leave such prompts out with "
            "--rollout-max-prompt-len, or shorten it."
        )
    hook.reject(
        BadReturn(
            "none",
            "made no chat completion that was answered",
            "send requests to base_url + '/v1/chat/completions'; nothing else is recorded",
        ),
        sample=sample,
    )


def _samples_of(input: GenerateFnInput, records: list[SessionRecord]) -> list[Sample]:
    state: Any = input.state
    replay = input.args if input.args.use_rollout_routing_replay else None
    return compute_samples_from_openai_records(input.sample, records, state.tokenizer, replay)


def _merged(hook: Hook, samples: list[Sample], input: GenerateFnInput) -> Sample:
    """The one sample of the conversation; the agent's card where its requests are not one conversation."""
    state: Any = input.state
    for turn, (a, b) in enumerate(pairwise(samples), start=2):
        if b.tokens[: len(a.tokens)] != a.tokens or len(b.tokens) - b.response_length <= len(a.tokens):
            hook.reject(
                BadReturn(
                    "type",
                    f"asked for answer {turn} of {len(samples)} with messages that do not continue those of answer "
                    f"{turn - 1}",
                    "append the answer's message and what follows it to the same list, with the same tools; or make "
                    "a sample of each answer: --generate-multi-samples",
                ),
                sample=input.sample,
            )
        a.status = Sample.Status.COMPLETED  # it may have been cut off; the agent went on, and b begins with its tokens
    return merge_samples(samples, state.tokenizer)


def _engine_seconds(record: SessionRecord) -> float:
    """What the engine took for an answer, where it says so."""
    meta = record.response["choices"][0].get("meta_info") or {}
    return float(meta.get("e2e_latency") or 0.0)
