"""Majority voting beside the mean: an evaluation with a second number per data set.

    miles train --config examples/quickstart/carry.yaml --n-samples-per-eval-prompt 5 \
        --eval-function-path examples/plug_ins/eval_function.py:evaluate

The built-in evaluation runs as always. Then the answers to each problem vote, and the reward of the most frequent
answer is logged as `eval/<name>_majority`.
"""

from __future__ import annotations

from argparse import Namespace
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from miles.rollout.sglang_rollout import eval_rollout
from miles.types import RolloutFnEvalOutput, RolloutFnTrainOutput, Sample

if TYPE_CHECKING:
    from miles.rollout.data_source import DataSource


async def evaluate(
    args: Namespace, rollout_id: int, data_source: DataSource, *, evaluation: bool = True
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    output, _ = await eval_rollout(args, rollout_id)
    votes = {f"{name}_majority": majority(entry) for name, entry in output.data.items()}
    return RolloutFnEvalOutput(data={**output.data, **votes})


def majority(entry: dict[str, Any]) -> dict[str, Any]:
    """One reward per problem, that of its most frequent answer.

    Example: rewards `[0.0, 1.0, 1.0]` with the answers 7, 8, 8 to one problem give `{"rewards": [1.0]}`.
    """
    ballots: defaultdict[int, list[tuple[str, float]]] = defaultdict(list)
    for problem, sample, reward in zip(entry["prompt_indices"], entry["samples"], entry["rewards"], strict=True):
        ballots[problem].append((answer_of(sample), reward))
    rewards = []
    for ballot in ballots.values():
        winner, _ = Counter(answer for answer, _ in ballot).most_common(1)[0]
        rewards.append(next(reward for answer, reward in ballot if answer == winner))
    return {"rewards": rewards}


def answer_of(sample: Sample) -> str:
    return sample.response.rpartition("</think>")[2]
