"""A conversation with tools: the model answers, its tool calls are made, it answers again.

    prompt ──► engine ──► tool calls in the answer? ──no──► done
                 ▲               │ yes
                 └── answers ◄───┘ --generate-execute-tool-function-path, one call after the other

Named by `--custom-generate-function-path miles.rollout.generate_hub.multi_turn.generate`; `add_arguments` adds its
flags. The whole conversation is one sample, in which the model's own tokens carry loss and those of the tools do not;
`--generate-multi-samples` makes a sample of each turn instead.

`max_new_tokens` limits each turn, --rollout-max-context-len the whole conversation.
"""

from __future__ import annotations

import copy
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from typing import Any

from miles.errors import FlagError
from miles.hooks import Hook
from miles.hooks.values import BadReturn
from miles.rollout.generate_utils.generate_endpoint_utils import (
    compute_prompt_ids_from_sample,
    compute_request_payload,
    update_sample_from_response,
)
from miles.rollout.generate_utils.tool_call_parsers import FLAG as PARSER_FLAG
from miles.rollout.generate_utils.tool_call_parsers import FORMATS, Parser, create_tool_call_parser, known_parser
from miles.rollout.generate_utils.tool_call_utils import execute_tool_calls, update_sample_with_tool_responses
from miles.types import GenerateFnInput, GenerateFnOutput, Sample

DEFAULT_MAX_TURNS = 16


async def generate(input: GenerateFnInput) -> GenerateFnOutput:
    """Up to `generate_max_turns` answers and the tool calls between them.

    The sample ends TRUNCATED where the context is full or an answer reached its limit, ABORTED where the rollout was
    aborted, COMPLETED otherwise. Tool calls in the last answer that is allowed are made, too. The metadata of the one
    sample of a conversation count the answers as `round_number`.
    """
    _refuse_settings(input.args)
    conversation = _Conversation(input)
    for _ in range(input.args.generate_max_turns):
        if not await conversation.answer():
            break
        if not await conversation.use_tools():
            break
    return GenerateFnOutput(samples=conversation.result())


def _add_arguments(parser: ArgumentParser) -> None:
    """The published flags."""
    add = parser.add_argument
    add("--generate-max-turns", type=_turns, default=DEFAULT_MAX_TURNS, help="Most answers of one conversation.")
    add("--generate-tool-specs-path", type=str, help="Plug-in: list of OpenAI tool specifications.")
    add("--generate-tool-call-parser", type=_parser_name, help=f"Format of tool calls: {', '.join(FORMATS)}.")
    add("--generate-execute-tool-function-path", type=str, help="Plug-in: executes one tool call.")
    add("--generate-multi-samples", action="store_true", help="One sample per turn.")


generate.add_arguments = _add_arguments  # type: ignore[attr-defined]


def _turns(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a whole number >= 1, got {text}")
    return int(text)


def _parser_name(text: str) -> str:
    try:
        return known_parser(text)
    except FlagError as error:
        raise ArgumentTypeError(str(error).removeprefix(f"{PARSER_FLAG}: ").rstrip(".")) from error


def _refuse_settings(args: Namespace) -> None:
    if args.partial_rollout:
        raise FlagError(
            "--partial-rollout", given="Partial rollout is not supported by multi_turn: a conversation that was cut "
            "short cannot be continued.",
            remedy="Leave it out, or generate with single_turn.",
        )  # fmt: skip


class _Conversation:
    """One sample while it grows; with `--generate-multi-samples` the samples of the turns so far."""

    def __init__(self, input: GenerateFnInput) -> None:
        state: Any = input.state
        self.args, self.state, self.params = input.args, state, input.sampling_params
        self.specs = _tool_specs(state, input.args, input.sample)
        self.parser: Parser = create_tool_call_parser(self.specs, input.args.generate_tool_call_parser)
        self.execute = _required_hook(state, input.args, "generate_execute_tool_function")
        self.given = copy.deepcopy(input.sample)
        self.sample = copy.deepcopy(input.sample)
        self.sample.tokens = compute_prompt_ids_from_sample(state, self.sample, tools=self.specs)
        self.given.multimodal_train_inputs = self.sample.multimodal_train_inputs
        self.turns: list[Sample] = []
        self.rounds = 0

    async def answer(self) -> bool:
        """One engine call. False where there was none, or where nothing may follow its answer."""
        sample, args = self.sample, self.args
        if self.state.aborted:
            self._ends(Sample.Status.ABORTED)
            return False
        payload, halt = compute_request_payload(args, sample.tokens, self.params, sample.multimodal_inputs)
        if payload is None:
            assert halt is not None
            self._ends(halt)
            return False
        output = await self.state.context.client.generate(payload)
        await update_sample_from_response(args, sample, payload, output, update_loss_mask=True)
        if args.generate_multi_samples:
            turn = copy.deepcopy(self.given)
            await update_sample_from_response(args, turn, payload, output, update_loss_mask=True)
            self.turns.append(turn)
        self.text = output["text"]
        self.rounds += 1
        return sample.status not in (Sample.Status.ABORTED, Sample.Status.TRUNCATED)

    def _ends(self, status: Sample.Status) -> None:
        """The conversation cannot go on; the last turn that exists says so."""
        self.sample.status = status
        if self.turns:
            self.turns[-1].status = status

    async def use_tools(self) -> bool:
        """Make the calls of the last answer and append what they return. False where it has none."""
        _, calls = self.parser.parse_non_stream(self.text)
        if not calls:
            return False
        begin = time.perf_counter()
        messages = await execute_tool_calls(calls, self.execute.call_async)
        self.sample.non_generation_time += time.perf_counter() - begin
        update_sample_with_tool_responses(self.sample, messages, self.state.tokenizer)
        return True

    def result(self) -> Sample | list[Sample]:
        if self.sample.loss_mask is None:  # the prompt alone fills the context
            self.sample.loss_mask, self.sample.rollout_log_probs = [], []
        if not self.args.generate_multi_samples:
            self.sample.metadata = {**(self.sample.metadata or {}), "round_number": self.rounds}
            return self.sample
        return self.turns or [self.sample]


def _required_hook(state: Any, args: Namespace, name: str) -> Hook:
    hook: Hook | None = state.context.hook(name, args)
    if hook is None:
        flag = f"--{name.replace('_', '-')}-path"
        raise FlagError(flag, given=None, expected="the plug-in that multi_turn needs")
    return hook


def _tool_specs(state: Any, args: Namespace, sample: Sample) -> list[dict[str, Any]]:
    """Those of --generate-tool-specs-path, else the tools of the sample's own row (`--tool-key`)."""
    hook: Hook | None = state.context.hook("generate_tool_specs", args)
    if hook is None:
        tools = sample.metadata.get("tools") if isinstance(sample.metadata, dict) else None
        if tools and all(_is_spec(tool) for tool in tools):
            return list(tools)
        raise FlagError(
            "--generate-tool-specs-path", given=None,
            expected="a list of OpenAI tool specifications, or prompt data with a column of them (--tool-key)",
        )  # fmt: skip
    specs: list[dict[str, Any]] = hook()
    bad = next((spec for spec in specs if not _is_spec(spec)), None)
    if bad is not None:
        hook.reject(
            BadReturn(
                "type",
                f"holds {bad!r}, which is no OpenAI tool specification",
                'expected {"type": "function", "function": {"name": "...", "parameters": {...}}}',
            )
        )
    return specs


def _is_spec(spec: Any) -> bool:
    function = spec.get("function") if isinstance(spec, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)
