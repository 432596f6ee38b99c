"""Prompt files: read, checked as a whole, rendered, filtered by length, shuffled.

    file ── read_rows ──► rows ── _Reader.sample ──► Sample per row ── filter_long_prompt ──► Dataset

Every complaint about the data is a DataError with file and line, raised when the data set is built, so before any
training. Which prompts are taken when, and how often, is `data_source`.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles.errors import DataError, FlagError
from miles.rollout.multimodal import MediaKeys, has_media, split_placeholders
from miles.rollout.tokenizer import process_vision_info
from miles.types import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

logger = logging.getLogger(__name__)

Row = dict[str, Any]

_SLICE = re.compile(r"(?P<path>.*)@\[(?P<start>-?\d*):(?P<stop>-?\d*)\]")
# A tokenizer may put a few tokens of its own before the text.
MOST_ADDED_TOKENS = 8

EXCERPT_LENGTH = 60  # characters of a bad line that are shown


# ---- files -------------------------------------------------------------------------------------------------------


def read_file(path: str) -> Iterator[Row]:
    """The rows of a `.jsonl` or `.parquet` file; `path@[a:b]` keeps rows a (from 0) up to but without b.

    Raises DataError: no such file, another suffix, a line that is no JSON object.
    """
    return (row for _, row in read_rows(path))


def read_rows(path: str) -> Iterator[tuple[int, Row]]:
    """`read_file`, each row with its line in the file (jsonl) or its number (parquet), from 1."""
    name, start, stop = split_slice(path)
    file = Path(name).expanduser()
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "no such file"
        raise DataError(name, f"{what}. Expected a .jsonl or .parquet file.", remedy="Check the path.")
    if file.suffix == ".jsonl":
        lines = islice(_lines(file), start, stop)
        return ((number, _json_object(name, number, line)) for number, line in lines)
    if file.suffix == ".parquet":
        return islice(_parquet_rows(name, file), start, stop)
    raise DataError(
        name, f"expected a file that ends in .jsonl or .parquet, got {file.suffix or 'no ending'!r}.",
        remedy="Convert it: one JSON object per line is .jsonl.",
    )  # fmt: skip


def split_slice(path: str) -> tuple[str, int, int | None]:
    """Example: `split_slice("train.jsonl@[100:]")` is `("train.jsonl", 100, None)`."""
    match = _SLICE.fullmatch(path)
    if match is None:
        return path, 0, None
    start, stop = match["start"], match["stop"]
    if "-" in start + stop:
        raise DataError(match["path"], f"the slice @[{start}:{stop}] counts from the end.", remedy="Count from 0.")
    return match["path"], int(start or 0), int(stop) if stop else None


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, numbered over all lines."""
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            text = line.strip()
            if text:
                yield number, text.removeprefix(b"\xef\xbb\xbf") if number == 1 else text


def _json_object(name: str, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            name, f"expected text in UTF-8, got byte 0x{line[error.start]:02x} at column {error.start + 1}.",
            line=number, remedy="Save the file as UTF-8.",
        ) from error  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise DataError(
            name, f"expected a JSON object, got {_excerpt(line.decode('utf-8'))} ({error}).",
            line=number, remedy="Mend or delete the line.",
        ) from error  # fmt: skip
    if not isinstance(row, dict):
        raise DataError(
            name, f"expected a JSON object like {{\"prompt\": ...}}, got {_excerpt(line.decode('utf-8'))}.",
            line=number, remedy="Mend or delete the line.",
        )  # fmt: skip
    return row


def _parquet_rows(name: str, file: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(name, f"not readable as a Parquet file after {number} rows ({error}).") from error


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= EXCERPT_LENGTH else text[:EXCERPT_LENGTH] + "…")


# ---- rows to samples ---------------------------------------------------------------------------------------------


class _Reader:
    """Turns rows of one file into samples. Holds what all rows share, so that an error can name file and flag."""

    def __init__(
        self,
        path: str,
        tokenizer: PreTrainedTokenizerBase,
        processor: ProcessorMixin | None,
        *,
        prompt_key: str,
        multimodal_keys: dict[str, str] | None,
        label_key: str | None,
        tool_key: str | None,
        metadata_key: str,
        apply_chat_template: bool,
        apply_chat_template_kwargs: dict[str, Any] | None,
    ) -> None:
        self.path, _, _ = split_slice(path)
        self.tokenizer, self.processor = tokenizer, processor
        self.prompt_key, self.label_key = prompt_key, label_key
        self.tool_key, self.metadata_key = tool_key, metadata_key
        self.media = MediaKeys(multimodal_keys) if multimodal_keys else None
        self.renders = apply_chat_template
        self.template_kwargs = apply_chat_template_kwargs or {}

    def sample(self, line: int, row: Row) -> Sample:
        metadata = self._metadata(line, row)
        tools = self._tools(line, row)
        if tools is not None:
            metadata["tools"] = tools
        prompt = self._prompt(line, row)
        self._check_text(line, prompt)
        sample = Sample(
            prompt=self._render(line, prompt, tools) if self.renders else prompt,
            label=None if self.label_key is None else self._required(line, row, self.label_key, "--label-key"),
            metadata=metadata,
            multimodal_inputs=self._media(line, prompt),
        )
        if self.renders and isinstance(row[self.prompt_key], list):
            # Rewards that score conversations need to know that this is one.
            sample.prompt_messages = prompt  # type: ignore[attr-defined]
        return sample

    def _required(self, line: int, row: Row, key: str, flag: str) -> Any:
        if key not in row:
            raise DataError(
                self.path, f"{flag} {key}: no such key in this row; its keys: {', '.join(map(repr, row)) or 'none'}.",
                line=line, remedy=f"Name one of them with {flag}, or mend the row.",
            )  # fmt: skip
        return row[key]

    def _prompt(self, line: int, row: Row) -> str | list[Row]:
        prompt = self._required(line, row, self.prompt_key, "--input-key")
        is_messages = isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) for m in prompt)
        if not isinstance(prompt, str) and not is_messages:
            raise DataError(
                self.path, f"--input-key {self.prompt_key}: expected a string or a list of messages "
                f'like {{"role": "user", "content": "..."}}, got {_excerpt(json.dumps(prompt, default=repr))}.',
                line=line,
            )  # fmt: skip
        if isinstance(prompt, str) and (self.renders or self.media):
            prompt = [{"role": "user", "content": prompt}]
        if self.media:
            return split_placeholders(self.path, line, prompt, row, self.media)
        return prompt

    def _check_text(self, line: int, prompt: str | list[Row]) -> None:
        """JSON can spell half of a character, at which tokenizers raise a TypeError."""
        try:
            (prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, default=repr)).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                self.path, f"the prompt holds half of a character, {error.object[error.start]!r}.",
                line=line, remedy="Mend the text; a character above \\uffff is written as two of them.",
            ) from error  # fmt: skip

    def _metadata(self, line: int, row: Row) -> Row:
        metadata = row.get(self.metadata_key) or {}
        if isinstance(metadata, str):
            metadata = self._decoded(line, metadata, "--metadata-key", self.metadata_key)
        if not isinstance(metadata, dict):
            raise DataError(
                self.path, f"--metadata-key {self.metadata_key}: expected an object, got {_excerpt(str(metadata))}.",
                line=line,
            )  # fmt: skip
        return metadata

    def _tools(self, line: int, row: Row) -> list[Row] | None:
        tools = row.get(self.tool_key) if self.tool_key is not None else None
        if tools is None:
            return None
        if isinstance(tools, str):
            tools = self._decoded(line, tools, "--tool-key", self.tool_key)
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise DataError(
                self.path,
                f"--tool-key {self.tool_key}: expected a list of tools, got {_excerpt(str(tools))}.",
                line=line,
            )
        return tools

    def _decoded(self, line: int, text: str, flag: str, key: str | None) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            raise DataError(
                self.path, f"{flag} {key}: expected JSON, got {_excerpt(text)} ({error}).", line=line
            ) from error

    def _render(self, line: int, messages: str | list[Row], tools: list[Row] | None) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=True, **self.template_kwargs
            )
        except Exception as error:  # templates are programs: they raise what they like
            if getattr(self.tokenizer, "chat_template", "") is None:
                raise FlagError(
                    "--apply-chat-template", given="the tokenizer of --hf-checkpoint has no chat template.",
                    remedy="Leave the flag out and render the prompts yourself, or use a chat model's tokenizer.",
                ) from error  # fmt: skip
            raise DataError(
                self.path, f"the chat template cannot render this prompt ({type(error).__name__}: {error}).", line=line
            ) from error

    def _media(self, line: int, prompt: str | list[Row]) -> Row | None:
        if self.processor is None:
            return None
        if isinstance(prompt, str):
            raise DataError(
                self.path, "the model has a multimodal processor, which needs message lists; this prompt is a string.",
                line=line, remedy="Add --apply-chat-template, or --multimodal-keys.",
            )  # fmt: skip
        return process_vision_info(prompt, self.processor) if has_media(prompt) else None


# ---- length ------------------------------------------------------------------------------------------------------


def prompt_lengths(
    samples: list[Sample], tokenizer: PreTrainedTokenizerBase, processor: ProcessorMixin | None
) -> list[int]:
    """Tokens of each prompt as the engine will see it: rendered where it is a message list, media included."""
    texts = [s.prompt if isinstance(s.prompt, str) else _rendered(s, tokenizer) for s in samples]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
    if processor is not None:
        for i, sample in enumerate(samples):
            if sample.multimodal_inputs:
                lengths[i] = len(processor(text=texts[i], **sample.multimodal_inputs)["input_ids"][0])
    return lengths


def refuse_what_the_engine_would(
    path: str, prompts: Iterable[tuple[int, Sample]], tokenizer: PreTrainedTokenizerBase, context_length: int
) -> None:
    """Raise DataError for the first prompt that is empty, or so long that no token of a response would fit.

    `prompts` come with their lines. Only texts that could be too long are tokenized: a token has at least one byte.
    """
    suspects: list[tuple[int, Sample]] = []
    for line, sample in prompts:
        text = sample.prompt if isinstance(sample.prompt, str) else _rendered(sample, tokenizer)
        if not text:
            raise DataError(path, "the prompt is empty.", line=line, remedy="Expected some text; delete the line.")
        if len(text.encode()) + MOST_ADDED_TOKENS >= context_length:
            suspects.append((line, sample))
    lengths = prompt_lengths([sample for _, sample in suspects], tokenizer, None) if suspects else []
    too_long = [(line, n) for (line, _), n in zip(suspects, lengths, strict=True) if n >= context_length]
    if too_long:
        line, length = too_long[0]
        others = f", and {len(too_long) - 1} more prompts likewise" if len(too_long) > 1 else ""
        raise DataError(
            path, f"a prompt of {length} tokens leaves no room for a response in the model's context of "
            f"{context_length}{others}.",
            line=line, remedy=f"Leave such prompts out with --rollout-max-prompt-len {context_length - 1} (for "
            "evaluation data --eval-max-prompt-len), or shorten them.",
        )  # fmt: skip


def _rendered(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> str:
    tools = sample.metadata.get("tools")
    return tokenizer.apply_chat_template(sample.prompt, tools=tools, tokenize=False, add_generation_prompt=True)


def filter_long_prompt(
    origin_samples: list[Sample],
    tokenizer: PreTrainedTokenizerBase,
    processor: ProcessorMixin | None,
    max_length: int | None,
) -> list[Sample]:
    """The samples whose prompt has at most `max_length` tokens; all of them for None. Drops are logged."""
    if max_length is None or not origin_samples:
        return origin_samples
    lengths = prompt_lengths(origin_samples, tokenizer, processor)
    kept = [s for s, length in zip(origin_samples, lengths, strict=True) if length <= max_length]
    dropped = len(origin_samples) - len(kept)
    if dropped:
        logger.warning(
            "dropped %d of %d prompts: longer than %d tokens (--rollout-max-prompt-len); lengths go from %d to %d",
            dropped, len(origin_samples), max_length, min(lengths), max(lengths),
        )  # fmt: skip
    return kept


# ---- the data set ------------------------------------------------------------------------------------------------


class Dataset:
    """The prompts of one file, in the order of the file (`origin_samples`) and of the current epoch (`samples`).

    Example: `Dataset("train.jsonl", tokenizer, None, 512, prompt_key="prompt", label_key="label")[0]` is
    `Sample(prompt="859+467=?", label="1326")`.

    Raises DataError (see `read_rows`; a missing key; no row; every prompt longer than `max_length` tokens; a prompt
    that leaves no room for a response in `context_length` tokens) and FlagError (no chat template to apply).
    """

    def __init__(
        self,
        path: str,
        tokenizer: PreTrainedTokenizerBase,
        processor: ProcessorMixin | None,
        max_length: int | None,
        *,
        prompt_key: str = "text",
        multimodal_keys: dict[str, str] | None = None,
        label_key: str | None = None,
        tool_key: str | None = None,
        metadata_key: str = "metadata",
        seed: int = 42,
        apply_chat_template: bool = False,
        apply_chat_template_kwargs: dict[str, Any] | None = None,
        context_length: int | None = None,
    ) -> None:
        reader = _Reader(
            path,
            tokenizer,
            processor,
            prompt_key=prompt_key,
            multimodal_keys=multimodal_keys,
            label_key=label_key,
            tool_key=tool_key,
            metadata_key=metadata_key,
            apply_chat_template=apply_chat_template,
            apply_chat_template_kwargs=apply_chat_template_kwargs,
        )
        numbered = [(line, reader.sample(line, row)) for line, row in read_rows(path)]
        everything = [sample for _, sample in numbered]
        if not everything:
            raise DataError(path, "the data set is empty.", remedy="Expected at least one row.")
        if reader.media:
            reader.media.warn_about_oddities(path)
        self.origin_samples = filter_long_prompt(everything, tokenizer, processor, max_length)
        if not self.origin_samples:
            raise DataError(
                path, f"all {len(everything)} prompts are longer than {max_length} tokens; the shortest has "
                f"{min(prompt_lengths(everything, tokenizer, processor))}.",
                remedy="Raise --rollout-max-prompt-len (for evaluation data --eval-max-prompt-len).",
            )  # fmt: skip
        if context_length is not None and processor is None:
            kept = set(map(id, self.origin_samples))
            prompts = ((line, sample) for line, sample in numbered if id(sample) in kept)
            refuse_what_the_engine_would(reader.path, prompts, tokenizer, context_length)
        self.samples = self.origin_samples
        self.epoch_id = -1
        self.seed = seed

    def shuffle(self, new_epoch_id: int) -> None:
        """Put `samples` in the order of an epoch: a permutation that depends on seed + epoch alone."""
        if self.epoch_id == new_epoch_id:
            return
        order = list(range(len(self.origin_samples)))
        random.Random(self.seed + new_epoch_id).shuffle(order)
        self.samples = [self.origin_samples[i] for i in order]
        self.epoch_id = new_epoch_id

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def __len__(self) -> int:
        return len(self.samples)
