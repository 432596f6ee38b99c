"""Where groups of samples come from: the prompt file, epoch after epoch, and the buffer of groups that came back.

    get_samples(n)   buffer (through the buffer filter) first, then the data set; shuffled anew at every epoch
    add_samples      groups that a rollout cut short; they are taken again before new prompts
    save / load      position, counters, metadata and buffer, so that a resumed run continues exactly

Reading and checking the file is `dataset`; the form of the saved file is `data_state`.
"""

from __future__ import annotations

import abc
import copy
import json
import logging
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles.errors import CheckpointError, FlagError, RunDirError, UsageError
from miles.hooks import load_function
from miles.rollout import data_state, limits
from miles.rollout.dataset import Dataset
from miles.rollout.tokenizer import load_processor, load_tokenizer
from miles.types import Group, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

logger = logging.getLogger(__name__)

BufferFilter = Callable[[Namespace, int | None, list[Group], int], list[Group]]


class DataSource(abc.ABC):
    """What `--data-source-path` must offer; classes that merely have these methods will do.

    With `state_dict` and `load_state_dict` beside them a source decides itself what a resumed run needs.
    """

    @abc.abstractmethod
    def get_samples(self, num_samples: int) -> list[Group]:
        """`num_samples` groups of `n_samples_per_prompt` samples each."""

    @abc.abstractmethod
    def add_samples(self, samples: list[Group]) -> None:
        """Take back groups that a rollout did not finish. Called after every training rollout, often with `[]`."""

    @abc.abstractmethod
    def save(self, rollout_id: int) -> None:
        """Called with every checkpoint."""

    @abc.abstractmethod
    def load(self, rollout_id: int | None = None) -> None:
        """Called once at start, with the id of the last finished rollout."""


class RolloutDataSource(DataSource):
    """The prompts of `--prompt-data` in order. Takes nothing back.

    With `--disable-rollout-global-dataset` it yields empty samples and saves nothing.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.epoch_id = 0
        self.sample_group_index = 0
        self.sample_index = 0
        self.sample_offset = 0
        self.metadata: dict[str, Any] = {}
        self.dataset: Dataset | None = _load_dataset(args) if args.rollout_global_dataset else None
        self._shuffle()

    def _shuffle(self) -> None:
        if self.dataset is not None and self.args.rollout_shuffle:
            self.dataset.shuffle(self.epoch_id)

    def get_samples(self, num_samples: int) -> list[Group]:
        """The next `num_samples` prompts, each as a group; passes into as many new epochs as it takes."""
        return [self._group(self._next_prompt()) for _ in range(num_samples)]

    def _next_prompt(self) -> Sample:
        if self.dataset is None:
            return Sample()
        if self.sample_offset >= len(self.dataset):
            self.epoch_id += 1
            self.sample_offset = 0
            self._shuffle()
        self.sample_offset += 1
        return self.dataset[self.sample_offset - 1]

    def _group(self, prompt: Sample) -> Group:
        group = []
        for _ in range(self.args.n_samples_per_prompt):
            sample = copy_sample(prompt)
            sample.group_index = self.sample_group_index
            sample.index = self.sample_index
            self.sample_index += 1
            group.append(sample)
        self.sample_group_index += 1
        return group

    def add_samples(self, samples: list[Group]) -> None:
        if samples:
            raise RuntimeError(
                f"{type(self).__name__} takes no samples back. Use RolloutDataSourceWithBuffer, or leave out "
                "--partial-rollout."
            )

    def state_dict(self) -> dict[str, Any]:
        """Position, counters and metadata, in values that a `weights_only` file can hold."""
        return {
            "sample_offset": self.sample_offset,
            "epoch_id": self.epoch_id,
            "sample_group_index": self.sample_group_index,
            "sample_index": self.sample_index,
            "metadata": data_state.encode_metadata(self.metadata),
            "num_prompts": None if self.dataset is None else len(self.dataset),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.sample_offset = state["sample_offset"]
        self.epoch_id = state["epoch_id"]
        self.sample_group_index = state["sample_group_index"]
        self.sample_index = state["sample_index"]
        self.metadata = data_state.decode_metadata(state["metadata"])
        before = state.get("num_prompts")  # absent in files of other versions
        if self.dataset is not None and before not in (None, len(self.dataset)):
            logger.warning(
                "--prompt-data %s has %d prompts, %d when the checkpoint was written; the data order changes",
                self.args.prompt_data, len(self.dataset), before,
            )  # fmt: skip
        self._shuffle()

    def save(self, rollout_id: int) -> None:
        """Write the state below `--save`; nothing without a prompt file."""
        if self.args.rollout_global_dataset:
            data_state.write(state_path(self.args.save, rollout_id), self.state_dict())

    def load(self, rollout_id: int | None = None) -> None:
        """Read the state below `--load`; without it, or before the first rollout, start at the beginning.

        Raises CheckpointError for a damaged file, and for one that is missing beside the weights of that rollout.
        """
        if not self.args.rollout_global_dataset or self.args.load is None:
            return
        path = state_path(self.args.load, rollout_id)
        if not path.is_file():
            self._refuse_weights_alone(path, rollout_id)
            logger.info("no data position at %s: the data starts at the beginning", path)
            return
        self.load_state_dict(data_state.read(path))
        logger.info("data continues in epoch %d at prompt %d", self.epoch_id, self.sample_offset)


    def _refuse_weights_alone(self, path: Path, rollout_id: int | None) -> None:
        """A run that goes on from trained weights must not go through its data from the start without a word."""
        weights = None if rollout_id is None else _checkpoint_after(Path(self.args.load), rollout_id)
        if weights is not None:
            raise CheckpointError(
                f"--load {self.args.load}: {weights} has weights, but {path}, the position in the data that belongs to "
                "them, does not exist. Put the file back, resume from an earlier checkpoint, or begin the data and the "
                "count of rollouts anew with --start-rollout-id 0."
            )


class RolloutDataSourceWithBuffer(RolloutDataSource):
    """The default: prompts of the file, and before them the groups that came back.

    `buffer_filter(args, None, buffer, n)` takes at most n groups out of the live buffer; a run replaces the
    attribute by the plug-in that it has bound.
    """

    def __init__(self, args: Namespace) -> None:
        super().__init__(args)
        self.buffer: list[Group] = []
        self.buffer_filter: BufferFilter = (
            pop_first if args.buffer_filter_path is None else load_function(args.buffer_filter_path)
        )

    def get_samples(self, num_samples: int) -> list[Group]:
        taken = self._take_from_buffer(num_samples)
        return taken + super().get_samples(num_samples - len(taken))

    def _take_from_buffer(self, num_samples: int) -> list[Group]:
        if not self.buffer or num_samples == 0:
            return []
        taken = self.buffer_filter(self.args, None, self.buffer, num_samples)
        if len(taken) > num_samples:
            raise UsageError(
                f"--buffer-filter-path {self.args.buffer_filter_path}: returned {len(taken)} groups, "
                f"expected at most the {num_samples} that were asked for."
            )
        return taken

    def add_samples(self, samples: list[Group]) -> None:
        """Append groups to the buffer, in order. AssertionError where one has not `n_samples_per_prompt` members."""
        if not samples:
            return
        assert isinstance(samples, list), f"expected a list of groups, got {type(samples).__name__}"
        size = self.args.n_samples_per_prompt
        for group in samples:
            assert isinstance(group, list), f"expected a group (a list of samples), got {type(group).__name__}"
            assert len(group) == size, f"expected groups of {size} samples, got one of {len(group)}"
        self.buffer.extend(samples)

    def update_metadata(self, metadata: dict[str, Any]) -> None:
        self.metadata.update(metadata)

    def get_metadata(self) -> dict[str, Any]:
        return self.metadata

    def get_buffer_length(self) -> int:
        return len(self.buffer)

    def state_dict(self) -> dict[str, Any]:
        """As above, and `buffer`: the groups as `data_state.encode_group` writes them."""
        return {**super().state_dict(), "buffer": [data_state.encode_group(group) for group in self.buffer]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        # Files that other versions wrote hold no buffer.
        self.buffer = [data_state.decode_group(group) for group in state.get("buffer", [])]


def pop_first(args: Namespace, rollout_id: int | None, buffer: list[Group], num_samples: int) -> list[Group]:
    """The default buffer filter: the oldest groups, first in, first out."""
    count = min(len(buffer), num_samples)
    taken = buffer[:count]
    del buffer[:count]
    return taken


def _checkpoint_after(folder: Path, rollout_id: int) -> Path | None:
    """The checkpoint that a run saved after `rollout_id`, under the number that its backend gave it."""
    for number in (rollout_id, rollout_id + 1):
        meta = folder / f"iter_{number:07d}" / "meta.json"
        if meta.is_file() and json.loads(meta.read_text()).get("rollout_id") == rollout_id:
            return meta.parent
    return None


def state_path(folder: str, rollout_id: int | None) -> Path:
    """Example: `state_path("ckpt", 19)` is `ckpt/rollout/global_dataset_state_dict_19.pt`."""
    return Path(folder) / "rollout" / f"global_dataset_state_dict_{rollout_id}.pt"


COUNTERS = (Sample.SpecInfo, Sample.PrefixCacheInfo)
SHARED_TYPES = (str, int, float, bool, type(None), Sample.Status)


def copy_sample(prompt: Sample) -> Sample:
    """A sample of its own made from a prompt: nothing that can change is shared, except images and other media."""
    sample = copy.copy(prompt)
    own = sample.__dict__
    for name, value in own.items():
        if not isinstance(value, SHARED_TYPES):
            own[name] = _copy_containers(value) if name == "multimodal_inputs" else _own(value)
    return sample


def _own(value: Any) -> Any:
    """`copy.deepcopy`, quicker for the two things that most fields of a prompt hold: nothing yet, and counters."""
    if isinstance(value, COUNTERS):
        return copy.copy(value)
    if not value and type(value) in (list, dict):
        return type(value)()
    return copy.deepcopy(value)


def _copy_containers(media: dict[str, Any]) -> dict[str, Any]:
    return {kind: list(items) if isinstance(items, list) else items for kind, items in media.items()}


def _load_dataset(args: Namespace) -> Dataset:
    if args.prompt_data is None:
        raise FlagError(
            "--prompt-data", given=None, expected="a .jsonl or .parquet file of prompts",
            remedy="A source without a file needs --disable-rollout-global-dataset or its own --data-source-path.",
        )  # fmt: skip
    tokenizer = load_tokenizer(args.hf_checkpoint, trust_remote_code=True)
    processor = load_processor(args.hf_checkpoint, trust_remote_code=True)
    if args.dump_details is not None:
        try:
            tokenizer.save_pretrained(str(Path(args.dump_details) / "tokenizer"))
            if processor is not None:
                processor.save_pretrained(str(Path(args.dump_details) / "processor"))
        except OSError as error:
            raise RunDirError(
                f"--dump-details: {args.dump_details} cannot be written ({error.strerror}). Name another folder."
            ) from error
    return open_dataset(
        args,
        args.prompt_data,
        tokenizer,
        processor,
        max_length=args.rollout_max_prompt_len,
        prompt_key=args.input_key,
        label_key=args.label_key,
        metadata_key=args.metadata_key,
        tool_key=args.tool_key,
    )


def open_dataset(
    args: Namespace,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    processor: ProcessorMixin | None,
    *,
    max_length: int | None,
    **columns: str | None,
) -> Dataset:
    """A prompt file, read as the run reads all of its files.

    `columns`: `prompt_key`, `label_key`, `metadata_key` and `tool_key`, in which training and evaluation may differ.
    """
    return Dataset(
        path,
        tokenizer,
        processor,
        max_length,
        multimodal_keys=args.multimodal_keys,
        seed=args.rollout_seed,
        apply_chat_template=args.apply_chat_template,
        apply_chat_template_kwargs=args.apply_chat_template_kwargs,
        context_length=limits.for_prompts_of(args),
        **columns,
    )
