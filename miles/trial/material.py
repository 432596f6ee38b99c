"""The samples that trials call plug-ins with: made up as the default rollout would make them, or recorded.

Made-up samples answer the first prompts of the run's own data, in the tokens of its own tokenizer. Where the data are
not at hand (a data source of the user's own, a file that is not there) a small addition problem stands in.
"""

from __future__ import annotations

import copy
import json
import random
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from miles.config.model_folder import facts_of
from miles.errors import MilesError
from miles.hooks import CATALOG
from miles.rollout.dataset import read_rows
from miles.trial.recorded import choose_rollout, recorded_groups
from miles.types import Group, Sample

NUM_PROMPTS = 2
SEED = 0

# How a response may give the answer that a label holds. A reward usually knows one of them.
WAYS_TO_ANSWER = (
    "{}",
    "The answer is \\boxed{{{}}}.",
    "Answer: {}",
    "<answer>{}</answer>",
    "#### {}",
    "<think></think>{}",
    "<think></think>The answer is \\boxed{{{}}}.",
    "<think></think><answer>{}</answer>",
)
OTHER_RESPONSES = ("I do not know.", "Let me think about it, step by")

_MADE_UP_ROWS = [{"prompt": "859+467=?", "label": "1326"}, {"prompt": "196+117=?", "label": "313"}]
# Plug points that give samples more than the default rollout does.
_MAKERS = ("rollout_function", "custom_generate_function", "data_source")


@dataclass(frozen=True)
class Material:
    """Groups of samples, and what is known about them. Plug-ins get copies (`fresh`), never the groups themselves.

    `trusted` is false where the samples may lack what those of the run will have: a plug-in that misses a key there
    need not be wrong.

    Example: `Material(name="2 prompts of train.jsonl, 8 made-up responses each", groups=[[...], [...]], ...)`
    """

    name: str
    groups: list[Group]
    rollout_id: int = 0
    recorded: bool = False
    trusted: bool = True

    def fresh(self) -> list[Group]:
        return copy.deepcopy(self.groups)

    def flat(self) -> list[Sample]:
        """Copies of all samples."""
        return [sample for group in self.fresh() for sample in group]

    def with_rewards(self, rewards: Sequence[Any]) -> Material:
        """The same samples with these rewards, in the order of `flat`."""
        groups, values = self.fresh(), iter(rewards)
        for sample in (s for group in groups for s in group):
            sample.reward = copy.deepcopy(next(values))
        return replace(self, groups=groups)


def recorded(run_dir: str | Path, rollout_id: int | None) -> Material:
    """A rollout of a run directory, the newest by default. Raises RunDirError, UsageError."""
    number = choose_rollout(run_dir, rollout_id)
    groups = recorded_groups(run_dir, number)
    count = sum(map(len, groups))
    return Material(f"rollout {number} of {run_dir}, {count} samples in {len(groups)} groups", groups, number, True)


# ---- made up -------------------------------------------------------------------------------------------------------


def made_up(args: Namespace) -> Material:
    """Two groups of `--n-samples-per-prompt`: rewards differ in the first and are equal in the second."""
    rows, where = _rows(args)
    size = max(1, args.n_samples_per_prompt)
    writer = Writer(args)
    groups = []
    for number, row in enumerate(rows):
        texts = _responses(row["label"])
        members = [writer.sample(row, texts[i % len(texts)], number * size + i, number) for i in range(size)]
        for i, sample in enumerate(members):
            sample.reward = made_up_reward(args, float(number == 0 and i % 2 == 0))
        groups.append(members)
    scored = not vars(args).get("reward_key") or vars(args).get("custom_rm_path")  # else the dicts have other keys
    own = where is not None and scored and all(_is_default(args, name) for name in _MAKERS)
    what = f"{len(rows)} prompts of {where}" if where else f"{len(rows)} made-up prompts"
    name = f"{what}, {size} made-up response{'s' if size > 1 else ''} each"
    return Material(name, groups, trusted=bool(own))


def made_up_reward(args: Namespace, value: float) -> Any:
    key = vars(args).get("reward_key")
    return {key: value} if key else value


def _is_default(args: Namespace, name: str) -> bool:
    point = CATALOG[name]
    return vars(args).get(point.dest) in (None, point.default)


def _rows(args: Namespace) -> tuple[list[dict[str, Any]], str | None]:
    """Prompt, label and metadata of the first rows of `--prompt-data`, and its name; or made-up ones and None."""
    path = vars(args).get("prompt_data")
    if path is None:
        return [{"metadata": {}, **row} for row in _MADE_UP_ROWS], None
    try:
        rows = [_row(args, row) for _, row in islice(read_rows(path), NUM_PROMPTS)]
    except (MilesError, KeyError, TypeError, ValueError):  # whoever trains is told what is wrong with the data
        rows = []
    if not rows:
        return [{"metadata": {}, **row} for row in _MADE_UP_ROWS], None
    return rows, path


def _row(args: Namespace, row: dict[str, Any]) -> dict[str, Any]:
    metadata = row.get(args.metadata_key) or {}
    metadata = json.loads(metadata) if isinstance(metadata, str) else dict(metadata)
    tools = row.get(args.tool_key) if args.tool_key else None
    if tools is not None:
        metadata["tools"] = json.loads(tools) if isinstance(tools, str) else tools
    label = row[args.label_key] if args.label_key else None
    return {"prompt": row[args.input_key], "label": label, "metadata": metadata}


def _responses(label: Any) -> list[str]:
    """What the members of a group say, over and over: the answer in two ways, and two that are none."""
    right = answers(label)[:2] or ["Yes.", "No."]
    return [right[0], OTHER_RESPONSES[0], right[1], OTHER_RESPONSES[1]]


def answers(label: Any) -> list[str]:
    """The label in every usual way; [] where there is none."""
    if label is None or label == "":
        return []
    text = label if isinstance(label, str) else json.dumps(label, ensure_ascii=False, default=str)
    return [way.format(text) for way in WAYS_TO_ANSWER]


class Writer:
    """Makes finished samples out of rows and texts, as the default rollout leaves them."""

    def __init__(self, args: Namespace) -> None:
        self._folder = Path(args.hf_checkpoint).expanduser() if vars(args).get("hf_checkpoint") else None
        self._renders = bool(vars(args).get("apply_chat_template"))
        self._settings = _json_file(self._folder, "tokenizer_config.json")
        self._encode = _encoder(self._folder)
        shows_end = not vars(args).get("rollout_skip_special_tokens")
        self._end = _token_text(self._settings.get("eos_token")) if shows_end else ""
        self._random = random.Random(SEED)

    def sample(self, row: dict[str, Any], text: str, index: int, group_index: int) -> Sample:
        """`text` as a response; one of OTHER_RESPONSES without a full stop was cut off at the length limit."""
        cut = text == OTHER_RESPONSES[1]
        prompt = self._prompt(row["prompt"])
        response = text if cut else text + self._end
        before = self._encode(self._text(prompt)) or [0]
        after = self._encode(response)
        return Sample(
            group_index=group_index,
            index=index,
            prompt=prompt,
            tokens=[*before, *after],
            response=response,
            response_length=len(after),
            label=copy.deepcopy(row["label"]),
            metadata=copy.deepcopy(row["metadata"]),
            rollout_log_probs=[-self._random.random() for _ in after],
            weight_versions=["1"],
            status=Sample.Status.TRUNCATED if cut else Sample.Status.COMPLETED,
        )

    def answer_to(self, sample: Sample, text: str) -> Sample:
        """Another response to the prompt of `sample`."""
        row = {"prompt": sample.prompt, "label": sample.label, "metadata": sample.metadata}
        renders, self._renders = self._renders, False
        made = self.sample(row, text, sample.index or 0, sample.group_index or 0)
        self._renders = renders
        return made

    def empty_answer_to(self, sample: Sample) -> Sample:
        """A response of no token at all."""
        made = self.answer_to(sample, OTHER_RESPONSES[1])
        made.tokens = made.tokens[: len(made.tokens) - made.response_length]
        made.response, made.response_length, made.rollout_log_probs = "", 0, []
        made.status = Sample.Status.COMPLETED
        return made

    def _prompt(self, prompt: Any) -> Any:
        """Under --apply-chat-template a rendered text: an approximation, as templates are programs."""
        if not self._renders:
            return prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return "\n".join(f"{m.get('role')}: {m.get('content')}" for m in messages) + "\nassistant: "

    def _text(self, prompt: Any) -> str:
        return prompt if isinstance(prompt, str) else "\n".join(str(m.get("content")) for m in prompt)


def _token_text(token: Any) -> str:
    """Tokenizer files spell a special token as a text or as an object with its `content`."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _json_file(folder: Path | None, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8")) if folder is not None else {}
    except (OSError, ValueError):
        content = {}
    return content if isinstance(content, dict) else {}


def _encoder(folder: Path | None) -> Any:
    """Text -> token ids with the model's own tokenizer.json; without one, its bytes, as far as the vocabulary goes."""
    file = folder / "tokenizer.json" if folder is not None else None
    if file is not None and file.is_file():
        try:
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(file))
            return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception:  # the library raises plain Exceptions for files that it cannot read
            return _encoder(None)
    size = vocabulary_size(folder)
    return lambda text: [byte % size for byte in text.encode("utf-8", "replace")]


def vocabulary_size(folder: Any) -> int:
    """That of the model in `folder`; that of bytes where there is none."""
    try:
        facts = facts_of(str(folder)) if folder is not None else None
    except MilesError:
        facts = None
    return facts.vocab_size if facts is not None and facts.vocab_size else 256


def groups_of(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    """`samples` in lists of `size`; the last one is filled up with copies of its own, as every group is full."""
    for start in range(0, len(samples), size):
        part = list(samples[start : start + size])
        yield part + [copy.deepcopy(part[i % len(part)]) for i in range(size - len(part))]
