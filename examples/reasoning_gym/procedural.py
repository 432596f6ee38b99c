"""reasoning-gym's data sets as a data source, and their own scorers as the reward.

    ReasoningGymSource   entry i of data set d ──► one group: the prompt, the answer as label, (d, i) as metadata
    reward               response ──► final answer ──► the data set's score_answer (scorer.py), in a process of its own
                         that is ended after a time limit: a scorer may loop for ever on some answers

Entries are made from a seed and a number, never stored: a checkpoint holds how many were drawn, and the scorer makes
the entry again. With several data sets, each draw chooses one by weight, always the same for a seed and a position.

    --data-source-path examples/reasoning_gym/procedural.py:ReasoningGymSource
    --custom-rm-path examples/reasoning_gym/procedural.py:reward
    --custom-config-path examples/reasoning_gym/gym.yaml          the data sets: see there

With --apply-chat-template prompts are conversations under reasoning-gym's system prompt, which asks for <answer> tags.
"""

from __future__ import annotations

import copy
import random
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import reasoning_gym
    from reasoning_gym.utils import SYSTEM_PROMPTS, extract_answer
except ImportError as error:
    raise ImportError(
        "examples/reasoning_gym needs the library reasoning-gym: pip install reasoning-gym==0.1.25"
    ) from error

from miles.rollout import data_state
from miles.rollout.data_source import DataSource
from miles.rollout.rm_hub.pool import grade
from miles.utils.types import Sample

# Entries of a data set before it starts again, where its `config` gives no `size`.
DEFAULT_SIZE = 100_000

SCORER = f"{Path(__file__).resolve().with_name('scorer.py')}:score"

Group = list[Sample]


@dataclass(frozen=True)
class GymDataset:
    """One entry of the list `reasoning_gym` in --custom-config-path.

    Example: `GymDataset("chain_sum", config={"min_terms": 2, "max_terms": 2}, prompt="{expression}=?", remove=" ")`
    """

    dataset: str
    weight: float = 1.0
    config: dict[str, Any] = field(default_factory=dict)
    prompt: str = "{question}"  # of `question` and everything in the entry's metadata
    remove: str = ""  # characters that the prompt shall not have

    def text(self, entry: dict[str, Any]) -> str:
        known = {**entry["metadata"], "question": entry["question"]}
        try:
            text = self.prompt.format_map(known)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"reasoning_gym, {self.dataset}: the prompt {self.prompt!r} cannot be filled in ({error!r}). Expected "
                f"only names in braces of these: {', '.join(known)}."
            ) from error
        return text.translate({ord(c): None for c in self.remove})

    @property
    def full_config(self) -> dict[str, Any]:
        return {"size": DEFAULT_SIZE, **self.config}


def datasets_of(args: Namespace) -> list[GymDataset]:
    """The list `reasoning_gym` that --custom-config-path has set on `args`, checked."""
    given = vars(args).get("reasoning_gym")
    if not isinstance(given, list) or not given or not all(isinstance(item, dict) for item in given):
        raise ValueError(
            "reasoning_gym: expected a list of data sets in --custom-config-path, each with at least `dataset: NAME`, "
            f"got {given!r}."
        )
    datasets = []
    for item in given:
        try:
            datasets.append(GymDataset(**item))
        except TypeError as error:
            keys = ", ".join(GymDataset.__dataclass_fields__)
            raise ValueError(f"reasoning_gym: {item!r} has other keys than {keys}, or lacks `dataset`.") from error
        if datasets[-1].dataset not in reasoning_gym.factory.DATASETS:
            raise ValueError(f"reasoning_gym: the library has no data set {datasets[-1].dataset!r}.")
        if not datasets[-1].weight > 0:
            raise ValueError(f"reasoning_gym, {item['dataset']}: expected a weight > 0, got {datasets[-1].weight!r}.")
    return datasets


class ReasoningGymSource(DataSource):
    """Groups of `n_samples_per_prompt` samples, without end; groups that came back are given out first."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.datasets = datasets_of(args)
        self.made = [
            reasoning_gym.create_dataset(d.dataset, seed=args.rollout_seed, **d.full_config) for d in self.datasets
        ]
        self.position = 0  # entries drawn so far
        self.buffer: list[Group] = []
        self._group(0)  # a prompt or a config that does not fit is said at the start

    def get_samples(self, num_samples: int) -> list[Group]:
        groups, self.buffer = self.buffer[:num_samples], self.buffer[num_samples:]
        while len(groups) < num_samples:
            groups.append(self._group(self.position))
            self.position += 1
        return groups

    def _group(self, position: int) -> Group:
        seed, n = self.args.rollout_seed, self.args.n_samples_per_prompt
        chooser = random.Random(f"{seed}/{position}")
        which = chooser.choices(range(len(self.datasets)), [d.weight for d in self.datasets])[0]
        chosen, dataset = self.datasets[which], self.made[which]
        index = position % len(dataset)
        entry = dataset[index]
        prompt: Any = chosen.text(entry)
        if self.args.apply_chat_template:
            system = {"role": "system", "content": SYSTEM_PROMPTS["DeepSeekZero"]}
            prompt = [system, {"role": "user", "content": prompt}]
        origin = {"dataset": chosen.dataset, "config": chosen.full_config, "seed": seed, "index": index}
        return [
            Sample(
                group_index=position,
                index=position * n + i,
                prompt=copy.deepcopy(prompt),
                label=entry["answer"],
                metadata={"reasoning_gym": dict(origin)},
            )
            for i in range(n)
        ]

    def add_samples(self, samples: list[Group]) -> None:
        self.buffer += samples

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save(self, rollout_id: int) -> None:
        state = {"position": self.position, "buffer": [data_state.encode_group(group) for group in self.buffer]}
        data_state.write(self._path(self.args.save, rollout_id), state)

    def load(self, rollout_id: int | None = None) -> None:
        import torch

        if self.args.load is None or not (path := self._path(self.args.load, rollout_id)).is_file():
            return
        state = torch.load(path, weights_only=True)
        self.position = state["position"]
        self.buffer = [data_state.decode_group(group) for group in state["buffer"]]

    @staticmethod
    def _path(folder: str, rollout_id: int | None) -> Path:
        return Path(folder) / "rollout" / f"reasoning_gym_{rollout_id}.pt"


# ---- the reward ----------------------------------------------------------------------------------------------------


async def reward(args: Namespace, sample: Sample, **kwargs: Any) -> float:
    """The data set's own score of the final answer, from 0 to 1. GraderError where it gives none in time."""
    origin = sample.metadata.get("reasoning_gym")
    if origin is None:
        raise ValueError("the sample is of no reasoning-gym data set: give ReasoningGymSource as --data-source-path.")
    answer = answer_of(sample.response)
    return await grade(SCORER, origin["dataset"], origin["config"], origin["seed"], origin["index"], answer)


def answer_of(response: str) -> str | None:
    """What stands in the last <answer> tags, else what follows the only </think>; None where there is neither."""
    tagged = extract_answer(response)
    if tagged is not None:
        return tagged
    _, *after = response.split("</think>")
    return after[0].removesuffix("<eos>").strip() if len(after) == 1 else None
