"""Two kinds of agents, one policy: solvers answer side by side, a selector chooses among their answers.

                     ┌─► solver 0 ──► 14 ─┐
    prompt "7+8=?" ──┤                    ├──► selector "7+8=? A 14 B 15" ──► B ──► 15 is the answer
                     └─► solver 1 ──► 15 ─┘

    miles train --config examples/multi_agent/multi_agent.yaml

Every agent's turn is a sample of its own, so one prompt makes a list of them. A solver is rewarded for its own answer,
a selector for what it has chosen; `normalise_by_role` compares solvers with solvers and selectors with selectors.

    --custom-generate-function-path      generate_with_multi_agents      one prompt, all agents
    --rollout-function-path              generate_rollout                the same inside a rollout of one's own, which
                                                                         also reports how the agents do
    --custom-reward-post-process-path    normalise_by_role
"""

from __future__ import annotations

import asyncio
import copy
import re
import statistics
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain
from typing import Any

from miles.errors import FlagError
from miles.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput
from miles.rollout.sglang_rollout import eval_rollout, generate, generate_rollout_async
from miles.types import Sample

ANSWER = re.compile(r"<answer>([^<]*)</answer>")
LETTERS = "ABCDEFGH"
SOLVER, SELECTOR = "solver", "selector"
HERE = "examples.multi_agent.rollout_with_multi_agents"


async def generate_with_multi_agents(
    args: Namespace, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False
) -> list[Sample]:
    """The samples of the solvers, then the selector's. In evaluation the selector's alone: it is what the team says."""
    if args.partial_rollout:
        raise FlagError("--partial-rollout", given="a conversation between agents cannot be continued.")
    problem = sample.prompt[-1]["content"] if isinstance(sample.prompt, list) else sample.prompt
    team = [agent(sample, SOLVER, problem) for _ in range(args.multi_agent_solvers)]
    await asyncio.gather(*(speak(args, member, sampling_params, i) for i, member in enumerate(team)))
    proposals = [answer(member) or "?" for member in team]

    selector = agent(sample, SELECTOR, selection_prompt(problem, proposals))
    if all(member.status != Sample.Status.ABORTED for member in team):
        await speak(args, selector, sampling_params, len(team))
    else:
        selector.status = Sample.Status.ABORTED
    chosen = dict(zip(LETTERS, proposals, strict=False)).get(answer(selector) or "")
    for member, said in zip([*team, selector], [*proposals, chosen], strict=True):
        member.reward = float(said == str(sample.label))
    return [selector] if evaluation else [*team, selector]


def agent(sample: Sample, role: str, text: str) -> Sample:
    """A sample of the same group whose prompt is `text`. Its metadata belong to it alone."""
    own = copy.deepcopy(sample)
    own.prompt = [{"role": "user", "content": text}]
    own.metadata["role"] = role
    return own


async def speak(args: Namespace, sample: Sample, sampling_params: dict[str, Any], place: int) -> None:
    """One request of the built-in generation. With seeds, agents with equal prompts would say the same: they differ."""
    params = dict(sampling_params)
    if "sampling_seed" in params:
        params["sampling_seed"] = (params["sampling_seed"] + place) % 2**31
    await generate(args, sample, params)


def selection_prompt(problem: str, proposals: Iterable[str]) -> str:
    """Example: `selection_prompt("7+8=?", ["14", "15"])` is `"7+8=? A 14 B 15"`."""
    return " ".join([problem, *(f"{letter} {text}" for letter, text in zip(LETTERS, proposals, strict=False))])


def answer(sample: Sample) -> str | None:
    """What stands in the one `<answer>`."""
    found = ANSWER.findall(sample.response)
    return found[0].strip() if len(found) == 1 else None


# ---- a rollout of one's own ----------------------------------------------------------------------------------------


async def generate_rollout(
    args: Namespace, rollout_id: int, data_source: Any, *, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """The default rollout with these agents, and how often each role was right as metrics."""
    args = copy.copy(args)
    args.custom_generate_function_path = f"{HERE}.generate_with_multi_agents"
    if evaluation:
        return (await eval_rollout(args, rollout_id))[0]
    output, aborted = await generate_rollout_async(args, rollout_id, data_source.get_samples)
    data_source.add_samples(aborted)
    samples = list(chain.from_iterable(chain.from_iterable(output.samples)))
    return RolloutFnTrainOutput(output.samples, {**(output.metrics or {}), **agent_metrics(samples)})


def agent_metrics(samples: list[Sample]) -> dict[str, float]:
    """Example: `{"agent/solver_right": 0.61, "agent/selector_right": 0.66}`."""
    rewards: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        rewards[sample.metadata["role"]].append(sample.reward)
    return {f"agent/{role}_right": statistics.fmean(values) for role, values in rewards.items()}


def normalise_by_role(args: Namespace, samples: list[Sample]) -> tuple[list[float], list[float]]:
    """GRPO's normalisation inside the samples of one prompt that have the same role."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        groups[sample.group_index, sample.metadata.get("role")].append(i)
    raw = [sample.get_reward_value(args) for sample in samples]
    rewards = [0.0] * len(samples)
    for members in groups.values():
        values = [raw[i] for i in members]
        mean, deviation = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        for i in members:
            rewards[i] = (raw[i] - mean) / (deviation + 1e-6)
    return raw, rewards


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--multi-agent-solvers", type=int, choices=range(1, len(LETTERS) + 1), default=2)


generate_with_multi_agents.add_arguments = add_arguments  # type: ignore[attr-defined]
generate_rollout.add_arguments = add_arguments  # type: ignore[attr-defined]
