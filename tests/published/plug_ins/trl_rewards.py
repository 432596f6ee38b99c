"""Rewards as they are written for TRL's GRPOTrainer: whole batches, data set columns by name."""

import re

CALLS = []


def accuracy_reward(completions: list[list[dict[str, str]]], solution: list[str], **kwargs):
    """Conversational: a completion is a list of messages; the answers are a column of the data set."""
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if sol in content else 0.0 for content, sol in zip(contents, solution)]


def format_reward(completions, **kwargs):
    """Plain text completions; everything else is ignored."""
    CALLS.append(sorted(kwargs))
    return [len(re.findall(r"\d", completion)) / max(len(completion), 1) for completion in completions]


def length_reward(prompts, completions, completion_ids, trainer_state=None, log_metric=None, **kwargs):
    assert trainer_state is None and log_metric is None
    assert len(prompts) == len(completions) == len(completion_ids)
    return [-float(len(ids)) for ids in completion_ids]


async def column_reward(prompts, completions, difficulty, **kwargs):
    """Asynchronous, with a column that comes from the data set's metadata and one through **kwargs."""
    return [float(level) + float(answer) for level, answer in zip(difficulty, kwargs["solution"])]
