"""Supervised fine-tuning as a rollout function: conversations become finished samples, no engine is needed.

Used with these flags:

    miles train --rollout-function-path miles.rollout.sft_rollout.generate_rollout --loss-type sft_loss \
        --disable-compute-advantages-and-returns --debug-train-only --input-key messages --loss-mask-type template

An evaluation is the loss of held-out conversations: `--eval-prompt-data held-out heldout.jsonl --eval-interval 10`.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from miles.config.evaluation import EvalDatasetConfig
from miles.errors import FlagError, UsageError
from miles.rollout.data_source import copy_sample, open_dataset
from miles.rollout.loss_mask import MultiTurnLossMaskGenerator, get_response_lengths
from miles.rollout.singleton import SingletonMeta
from miles.rollout.tokenizer import load_tokenizer
from miles.types import Group, RolloutFnEvalOutput, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

logger = logging.getLogger(__name__)

# Made on first use and again when `args` name another model or scheme.
TOKENIZER: PreTrainedTokenizerBase | None = None
PROCESSOR: ProcessorMixin | None = None  # a text model has none
MASK_GENERATOR: MultiTurnLossMaskGenerator | None = None
SAMPLE_PRINTED = False
_made_for: tuple[str, str] | None = None


def generate_rollout(
    args: Namespace, rollout_id: int, data_buffer: Any, evaluation: bool = False
) -> list[Group] | RolloutFnEvalOutput:
    """Take `rollout_batch_size` groups of one conversation each; fill tokens, response_length, loss_mask, reward 0.

    With `evaluation`, all held-out conversations in the same form. Raises FlagError for settings that do not go with
    it, UsageError where the mask scheme does not fit the template, DataError for files that cannot be read.
    """
    global SAMPLE_PRINTED
    if evaluation:
        return RolloutFnEvalOutput({name: {"conversations": kept} for name, kept in load_eval_data(args).items()})
    if not args.rollout_global_dataset:
        raise FlagError(
            "--disable-rollout-global-dataset", given="the SFT rollout reads its conversations from a file."
        )
    generator = _mask_generator(args)
    groups: list[Group] = data_buffer.get_samples(args.rollout_batch_size)
    for group in groups:
        if len(group) != 1:
            raise FlagError("--n-samples-per-prompt", given=len(group), expected="1 for the SFT rollout")
        fill(group[0], generator)
    if groups and not SAMPLE_PRINTED:
        SAMPLE_PRINTED = True
        first = groups[0][0]
        learned = generator.get_text_from_loss_mask(first.tokens[-len(first.loss_mask or []) :], first.loss_mask or [])
        logger.info("first conversation: %d tokens, learned: %r", len(first.tokens), learned)
    return groups


def load_eval_data(args: Namespace) -> dict[str, list[Sample]]:
    """The conversations of every evaluation set, read and masked once per run."""
    return HeldOut().of(args)


class HeldOut(metaclass=SingletonMeta):
    """The evaluation sets of a run, filled in."""

    def __init__(self) -> None:
        self._sets: dict[tuple[Any, ...], list[Sample]] = {}

    def of(self, args: Namespace) -> dict[str, list[Sample]]:
        return {dataset.name: self._read(args, dataset) for dataset in args.eval_datasets}

    def _read(self, args: Namespace, dataset: EvalDatasetConfig) -> list[Sample]:
        key = (*dataset.cache_key, args.hf_checkpoint, args.loss_mask_type)
        if key not in self._sets:
            generator = _mask_generator(args)
            rows = open_dataset(
                args,
                dataset.path,
                generator.tokenizer,
                PROCESSOR,
                max_length=args.eval_max_prompt_len,
                prompt_key=dataset.input_key,
                label_key=dataset.label_key,
                metadata_key=dataset.metadata_key,
                tool_key=dataset.tool_key,
            )
            samples = [copy_sample(row) for row in rows.samples]
            for index, sample in enumerate(samples):
                sample.index = index
                fill(sample, generator)
            self._sets[key] = samples
        return self._sets[key]


def _mask_generator(args: Namespace) -> MultiTurnLossMaskGenerator:
    global TOKENIZER, MASK_GENERATOR, _made_for
    wanted = (args.hf_checkpoint, args.loss_mask_type)
    if MASK_GENERATOR is None or _made_for != wanted:
        TOKENIZER = load_tokenizer(args.hf_checkpoint, trust_remote_code=True)
        MASK_GENERATOR = MultiTurnLossMaskGenerator(TOKENIZER, tokenizer_type=args.loss_mask_type)
        _made_for = wanted
    return MASK_GENERATOR


def fill(sample: Sample, generator: MultiTurnLossMaskGenerator) -> Sample:
    """Make `sample.prompt`, a message list, a sample that is ready to be trained on; its status stays PENDING.

    The response begins at the first learned token. A conversation without one keeps its place in the batch with a
    response of one token that carries no loss.
    """
    if not isinstance(sample.prompt, list):
        raise FlagError(
            "--input-key", given=sample.prompt, expected='a list of messages like {"role": "user", "content": "..."}',
            remedy="Leave out --apply-chat-template too: it turns messages into text.",
        )  # fmt: skip
    if sample.multimodal_inputs:
        raise FlagError("--multimodal-keys", given="the SFT rollout learns from text alone, so far.")
    token_ids, mask = generator.get_loss_mask(sample.prompt, tools=sample.metadata.get("tools"))
    if len(token_ids) < 2:
        raise UsageError(
            f"conversation {sample.index} has {len(token_ids)} tokens, expected at least 2: each token is predicted "
            "from those before it. Take it out of the data."
        )
    # The first token has nothing before it that could predict it.
    length = min(get_response_lengths([mask])[0], len(token_ids) - 1)
    if length == 0:
        logger.warning("conversation %s has nothing to learn: no assistant message, or all masked", sample.index)
        length = 1
    sample.tokens = token_ids
    sample.response_length = length
    sample.loss_mask = mask[-length:]
    sample.reward = 0
    return sample
