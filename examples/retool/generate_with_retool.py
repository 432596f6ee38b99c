"""Code execution during generation, as in ReTool (https://arxiv.org/abs/2504.11536): the model writes a program, the
sandbox runs it, the model reads what it printed and goes on.

    <|system|>python(code)<|end|><|user|>37*48=?<|end|>
    <|assistant|><tool_call>{"name": "python", "arguments": {"code": "print(37*48)"}}</tool_call><|end|>     learned
    <|tool|>1776<|end|><|assistant|>                                                                         not learned
    <answer>1776</answer><|end|>                                                                             learned

    miles train --config examples/retool/retool.yaml

A loop of one's own, where multi_turn.yaml uses the built-in one: it counts calls, refuses a call beyond the budget in
words that the model reads, and its reward knows whether a program has run.
"""

from __future__ import annotations

import re
import time
from argparse import ArgumentParser, Namespace
from typing import Any

from examples.retool import tool
from miles.errors import FlagError
from miles.rollout.generate_utils.generate_endpoint_utils import (
    compute_prompt_ids_from_sample,
    compute_request_payload,
    update_sample_from_response,
)
from miles.rollout.generate_utils.tool_call_utils import (
    create_tool_call_parser,
    execute_tool_calls,
    update_sample_with_tool_responses,
)
from miles.rollout.sglang_rollout import GenerateState
from miles.types import Sample
from miles.utils.http_utils import post

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


async def generate(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """Turns until the model answers without a tool call; `metadata["tool_calls"]` counts the programs that ran.

    `metadata["round_number"]` counts the turns, as that of multi_turn does.
    """
    if args.partial_rollout:
        raise FlagError("--partial-rollout", given="a conversation that was cut short cannot be continued.")
    state = GenerateState(args)
    parser = create_tool_call_parser(tool.SPECS, "hermes")
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    sample.tokens = compute_prompt_ids_from_sample(state, sample, tools=tool.SPECS)
    sample.loss_mask, sample.rollout_log_probs = [], []
    num_calls = num_turns = 0

    async def execute(name: str, params: dict[str, Any]) -> str:
        nonlocal num_calls
        if num_calls >= args.retool_max_tool_calls:
            return "error: no more calls, answer now"
        num_calls += 1
        return await tool.execute(name, params)

    # Every turn makes a call or is the last one; one more turn than calls, so that the last result can be read.
    for _ in range(args.retool_max_tool_calls + 1):
        payload, halt = compute_request_payload(args, sample.tokens, sampling_params)
        if payload is None or state.aborted:
            sample.status = Sample.Status.ABORTED if state.aborted else halt
            break
        output = await post(url, payload)
        await update_sample_from_response(args, sample, payload, output, update_loss_mask=True)
        num_turns += 1
        if sample.status != Sample.Status.COMPLETED:
            break
        _, calls = parser.parse_non_stream(output["text"])
        if not calls:
            break
        begin = time.perf_counter()
        messages = await execute_tool_calls(calls, execute)
        sample.non_generation_time += time.perf_counter() - begin
        update_sample_with_tool_responses(sample, messages, state.tokenizer)
    sample.metadata = {**sample.metadata, "tool_calls": num_calls, "round_number": num_turns}
    return sample


async def reward_func(args: Namespace, sample: Sample, **kwargs: Any) -> float:
    """1.0 for the right answer; `--retool-call-score` for a wrong one after a program has run; else 0.0."""
    if final_answer(sample.response) == str(sample.label).strip():
        return 1.0
    return args.retool_call_score if sample.metadata.get("round_number", 1) > 1 else 0.0


def final_answer(response: str) -> str | None:
    """The text of the one `<answer>` in the last turn.

    Example: `final_answer("<tool_call>…</tool_call><|end|><|tool|>8<|end|><|assistant|><answer>8</answer><|end|>")` is
    `"8"`.
    """
    answers = ANSWER.findall(response.rpartition("<|assistant|>")[2])
    return answers[0].strip() if len(answers) == 1 else None


def _generate_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--retool-max-tool-calls", type=int, default=2, help="Programs per conversation.")


def _reward_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--retool-call-score", type=float, default=0.1, help="Reward of a wrong answer with a program.")


generate.add_arguments = _generate_arguments  # type: ignore[attr-defined]
reward_func.add_arguments = _reward_arguments  # type: ignore[attr-defined]
