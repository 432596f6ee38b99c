"""The rollout side of a run: data source, rollout function, conversion. Prompts in, shards of a train batch out.

One `generate` in order; the names in brackets are plug points:

    samples    [rollout function] -> groups          or the samples of --load-debug-rollout-data
    flatten    nested lists -> samples; failed ones set aside
    trim       to a multiple of the global batch size
    dump       --save-debug-rollout-data
    log        [rollout log function], else the default metrics
    convert    [convert samples], else [reward post-process] and the default conversion
    split      one shard per data-parallel rank

The manager runs in a thread (or an actor) of its own; rollout functions run their coroutines on the event loop of
`miles.rollout.loop_thread`, which this class never blocks.
"""

from __future__ import annotations

import logging
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from miles.batch import TrainBatch, TrimmedRollout, check_samples, flatten_groups, split_batch, trim_rollout
from miles.config import RunConfig
from miles.config.model_folder import facts_of
from miles.engine.client import EngineClient
from miles.errors import FlagError, UsageError
from miles.hooks import Hooks
from miles.hooks.values import BadReturn
from miles.observe import debug_data
from miles.observe import metrics as M
from miles.observe.files import prepare_folder
from miles.observe.record import RunRecord
from miles.observe.tracking import Tracker
from miles.rollout import sft_rollout, sglang_rollout
from miles.rollout.data_source import RolloutDataSource
from miles.rollout.evaluate import load_all
from miles.rollout.inference_rollout.inference_rollout_common import InferenceRolloutFn
from miles.rollout.loop_thread import run
from miles.run.conversion import convert, convert_held_out
from miles.trainer.heldout import LossSums
from miles.types import (
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
    Sample,
    is_failed,
)

logger = logging.getLogger(__name__)

# Who may have made samples and columns that no batch can be made of, the likeliest first.
MAKERS = (
    "custom_convert_samples_to_train_data",
    "rollout_function",
    "custom_generate_function",
    "custom_rm",
    "rollout_sample_filter",
    "rollout_all_samples_process",
    "data_source",
)


@dataclass(frozen=True)
class RolloutReport:
    """One rollout, ready to be trained.

    `shards` has one entry per data-parallel rank, `global_batch_size` counts over all of them. `seconds` is the time of
    the rollout function alone.
    """

    rollout_id: int
    shards: list[TrainBatch]
    global_batch_size: int
    seconds: float
    samples: int
    response_tokens: int
    mean_reward: float | None
    failed_scores: int
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalReport:
    """One evaluation after `done` rollouts; `example` is one sample of the first data set with rewards.

    `scores` are what a reader looks at: the mean reward per data set, under its name, and the loss of a data set of
    conversations as `<name>-loss`. Such sets are in `conversations` (one shard per data-parallel rank) and have no loss
    before `RolloutManager.add_losses`.
    """

    done: int
    scores: dict[str, float]
    metrics: dict[str, Any]
    example: Sample | None
    conversations: dict[str, list[TrainBatch]] = field(default_factory=dict)


class RolloutManager:
    """Owns the data source and the rollout and evaluation functions of one run."""

    def __init__(
        self,
        config: RunConfig,
        args: Namespace,
        hooks: Hooks,
        client: EngineClient | None,
        tracker: Tracker,
        record: RunRecord,
        dp_size: Callable[[], int],
    ) -> None:
        self.config, self.args, self.hooks, self.client = config, args, hooks, client
        self.tracker, self.record, self._dp_size = tracker, record, dp_size
        facts = facts_of(str(config.rollout.hf_checkpoint))
        self._vocab_size = None if facts is None else facts.vocab_size
        for flag, folder in outputs(config):
            prepare_folder(folder, flag)
        self.data_source: Any = hooks.data_source(args)
        if hooks.buffer_filter is not None:
            self.data_source.buffer_filter = hooks.buffer_filter
        given = RolloutFnConstructorInput(args=args, data_source=self.data_source)
        self._rollout_fn = hooks.rollout_function.build(given)
        self._eval_fn = hooks.eval_function.build(given)
        if config.eval.eval_interval is not None and self._can_evaluate():
            self._read_eval_data()

    def _can_evaluate(self) -> bool:
        """Without an engine only losses can be computed, which is what supervised fine-tuning is judged by."""
        return not self.config.debug.debug_train_only or self.config.algorithm.loss_type == "sft_loss"

    def _read_eval_data(self) -> None:
        """What is wrong with an evaluation set is said now, and not after the training that it is to judge."""
        if isinstance(self._eval_fn, InferenceRolloutFn):
            load_all(self._eval_fn.state, self._eval_fn.eval_prompt_dataset_cache)
        elif self.hooks.eval_function.target is sglang_rollout.generate_rollout:
            sglang_rollout.load_eval_data(self.args)
        elif self.hooks.eval_function.target is sft_rollout.generate_rollout:
            sft_rollout.load_eval_data(self.args)

    # ---- training ------------------------------------------------------------------------------------------------

    def generate(self, rollout_id: int) -> RolloutReport:
        """One rollout. Raises HookError where a plug-in failed, ErrorBudgetExceeded where too many calls did."""
        self.tracker.rollout_id = rollout_id
        self.hooks.begin_rollout()
        begin = time.perf_counter()
        output = self._samples(rollout_id)
        seconds = time.perf_counter() - begin
        flat = flatten_groups(output.samples)
        with self._rejecting("rollout_function", "rollout_sample_filter", "custom_generate_function"):
            check_samples(flat)
            trimmed = self._trim(flat)
        self._tell_what_is_left_over(rollout_id, len(flat), trimmed.global_batch_size)
        samples = trimmed.samples
        if self.config.debug.save_debug_rollout_data:
            debug_data.save(self.config.debug.save_debug_rollout_data, rollout_id, samples)
        scored = [s for s in samples if not is_failed(s)]
        logged = self._log_rollout(rollout_id, samples, output.metrics, seconds)
        self.record.write_rollout(rollout_id, samples)
        with self._rejecting(*MAKERS):
            batch = convert(self.config, self.args, self.hooks, samples)
            self._check_vocabulary(batch)
        learns_from_text = self.config.algorithm.loss_type == "sft_loss"  # its rewards are all 0 and mean nothing
        return RolloutReport(
            rollout_id=rollout_id,
            shards=split_batch(batch, self._dp_size(), balance=self.config.data.balance_data),
            global_batch_size=trimmed.global_batch_size,
            seconds=seconds,
            samples=len(samples),
            response_tokens=sum(s.response_length for s in flat),
            mean_reward=None if learns_from_text else M.mean_reward(scored, self.config.reward.reward_key),
            failed_scores=len(samples) - len(scored),
            metrics=logged,
        )

    @contextmanager
    def _rejecting(self, *names: str) -> Iterator[None]:
        """What batches cannot be made of is told as a failure of the plug-in that made it, where there is one."""
        try:
            yield
        except UsageError as error:
            self.hooks.reject(str(error), *names)
            raise

    def _check_vocabulary(self, batch: TrainBatch) -> None:
        """The model's embedding has a row for each token id, and none for any other."""
        size = self._vocab_size
        wrong = np.flatnonzero((batch.tokens < 0) | (batch.tokens >= size)) if size is not None else ()
        if len(wrong):
            row = int(np.searchsorted(batch.token_offsets, wrong[0], side="right")) - 1
            raise UsageError(
                f"{batch.name_of(row)} has the token id {batch.tokens[wrong[0]]}, expected ids from 0 to {size - 1}, "
                "the vocabulary of --hf-checkpoint. Take ids from the tokenizer of that folder."
            )

    def _trim(self, samples: list[Sample]) -> TrimmedRollout:
        """Recorded samples are taken as they are; without a trainer there is no step to fill."""
        debug, data = self.config.debug, self.config.data
        if debug.debug_rollout_only and data.global_batch_size is None:
            return TrimmedRollout(samples, len(samples))
        buffer = self.config.rollout_buffer
        return trim_rollout(
            samples,
            data.global_batch_size,
            dp_size=self._dp_size(),
            dynamic=buffer.use_dynamic_global_batch_size,
            enabled=not buffer.disable_rollout_trim_samples and debug.load_debug_rollout_data is None,
        )

    def _tell_what_is_left_over(self, rollout_id: int, num_samples: int, step: int) -> None:
        over = num_samples % max(step, 1)
        if over and not self.config.debug.debug_rollout_only:
            logger.warning(
                "rollout %d: %d of %d samples fill no whole optimizer step of %d (--global-batch-size) and are not "
                "trained on", rollout_id, over, num_samples, step,
            )  # fmt: skip

    def _samples(self, rollout_id: int) -> RolloutFnTrainOutput:
        debug = self.config.debug
        if debug.load_debug_rollout_data:
            loaded = debug_data.load(debug.load_debug_rollout_data, rollout_id, debug.load_debug_rollout_data_subsample)
            return RolloutFnTrainOutput(samples=[loaded])
        output = self.hooks.rollout_function.run(self._rollout_fn, RolloutFnTrainInput(rollout_id), run)
        if not output.samples:
            problem = f"rollout {rollout_id} returned no samples, expected a non-empty list of groups"
            self.hooks.rollout_function.reject(BadReturn("none", problem))
        return output

    def _log_rollout(
        self, rollout_id: int, samples: list[Sample], extra: dict[str, Any] | None, seconds: float
    ) -> dict[str, Any]:
        """The plug-in's logging or the default one; what the default one logged."""
        hook = self.hooks.custom_rollout_log_function
        scored = [s for s in samples if not is_failed(s)]
        if hook is not None and hook(rollout_id, self.args, scored, extra, seconds):
            return {}
        if self.config.debug.load_debug_rollout_data:
            return {}
        logged = M.rollout_metrics(
            samples,
            reward_key=self.config.reward.reward_key,
            category_key=self.config.tracking.log_reward_category,
            with_zero_std=not self.config.algorithm.use_critic,
            with_pass_rate=self.config.tracking.log_passrate,
            extra=extra,
        )
        if self.config.tracking.log_multi_turn:
            logged |= M.multi_turn_metrics(samples, self.config.rollout.rollout_max_response_len)
        logged |= M.perf_metrics(samples, seconds, self.args.rollout_num_gpus)
        logged["rollout/step"] = M.compute_rollout_step(self.args, rollout_id)
        self.tracker.log(logged, step_key="rollout/step")
        return logged

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def eval(self, done: int) -> EvalReport | None:
        """All evaluation data sets, after `done` rollouts; None where `_can_evaluate` says so.

        Plug-ins and metrics know an evaluation by the rollout that it follows; that before training counts as 0 there.
        """
        if not self._can_evaluate():
            return None
        rollout_id = max(done - 1, 0)
        self.tracker.rollout_id = done - 1
        self.hooks.begin_rollout()
        output = self.hooks.eval_function.run(self._eval_fn, RolloutFnEvalInput(rollout_id), run)
        assert isinstance(output, RolloutFnEvalOutput)
        if self.config.debug.save_debug_rollout_data:
            everything = [s for d in output.data.values() for s in d.get("samples", [])]
            debug_data.save(self.config.debug.save_debug_rollout_data, f"eval_{rollout_id}", everything)
        hook = self.hooks.custom_eval_rollout_log_function
        conversations = {name: e["conversations"] for name, e in output.data.items() if "conversations" in e}
        output.data = {name: e for name, e in output.data.items() if "conversations" not in e}
        logged = M.eval_metrics(
            output.data,
            group_size={d.name: d.n_samples_per_eval_prompt for d in self.config.eval.eval_datasets},
            with_pass_rate=self.config.tracking.log_passrate,
            reward_key=self.config.reward.eval_reward_key or self.config.reward.reward_key,
            category_key=self.config.tracking.log_reward_category,
            extra=output.metrics,
        )
        shown = {name: dict(entry) for name, entry in output.data.items()}
        only_losses = bool(conversations) and not output.data
        if not only_losses and (hook is None or not hook(rollout_id, self.args, shown, output.metrics)):
            self._log_evaluation(done, logged)
        for name, entry in output.data.items():
            if entry.get("samples"):
                self.record.write_rollout(done, entry["samples"], evaluation=name)
        first = next(iter(output.data.values()), {}).get("samples") or [None]
        scores = {name: logged[f"eval/{name}"] for name in output.data if f"eval/{name}" in logged}
        shards = {name: self._held_out(name, samples) for name, samples in conversations.items()}
        return EvalReport(done, scores, logged, first[0], shards)

    def _log_evaluation(self, done: int, metrics: dict[str, Any]) -> None:
        step = M.compute_rollout_step(self.args, max(done - 1, 0))
        self.tracker.log({**metrics, "eval/step": step}, step_key="eval/step")

    def _held_out(self, name: str, samples: list[Sample]) -> list[TrainBatch]:
        """The conversations of one evaluation set as shards of about equally many rows."""
        with self._rejecting("eval_function"):
            check_samples(samples)
            batch = convert_held_out(samples)
            self._check_vocabulary(batch)
            if not batch.loss_masks.any():
                raise UsageError(
                    f"evaluation set {name!r}: no token of its {len(batch)} conversations is learned, so that they "
                    "have no loss. Expected assistant messages without step_loss_mask 0."
                )
        size = self._dp_size()
        return [batch.select(np.arange(rank, len(batch), size)) for rank in range(size)]

    def add_losses(self, report: EvalReport, losses: Mapping[str, LossSums]) -> EvalReport:
        """Log the losses that the trainer computed for `report.conversations`; the report with them."""
        self.tracker.rollout_id = report.done - 1
        metrics = {}
        for name, sums in losses.items():
            metrics |= {f"eval/{name}-loss": sums.loss, f"eval/{name}-perplexity": sums.perplexity}
        self._log_evaluation(report.done, metrics)
        scores = {f"{name}-loss": sums.loss for name, sums in losses.items()}
        return replace(report, scores={**report.scores, **scores}, metrics={**report.metrics, **metrics})

    # ---- state ---------------------------------------------------------------------------------------------------

    def save(self, rollout_id: int) -> None:
        """Data position, buffer and plug-in state after `rollout_id`."""
        if self.config.data.rollout_global_dataset:
            self.hooks.data_source.enter(self.data_source.save, rollout_id)
        # The default data source writes all of its state itself; a plug-in with `state_dict` may not.
        state = {
            name: value
            for name, value in self.hooks.state_dict().items()
            if name != "data_source" or not isinstance(self.data_source, RolloutDataSource)
        }
        for name, value in state.items():
            problem = debug_data.unreadable(value)
            if problem is not None:
                self.hooks.reject(
                    f"state_dict returned what no checkpoint gives back, expected numbers, text, lists, "
                    f"dicts and tensors ({problem})",
                    name,
                )
        if state:
            path = _plug_in_state(self.args.save, rollout_id)
            debug_data.write_torch(path, state, flag="--save")

    def load(self, rollout_id: int) -> None:
        """Continue after `rollout_id`; called once at every start, with -1 where nothing came before."""
        if self.config.data.rollout_global_dataset:
            self.hooks.data_source.enter(self.data_source.load, rollout_id)
        if self.args.load is None:
            return
        path = _plug_in_state(self.args.load, rollout_id)
        if path.exists():
            self.hooks.load_state_dict(debug_data.read_torch(path, flag="--load"))

    def num_rollout_per_epoch(self) -> int:
        """Raises FlagError where the data source does not say how long an epoch is."""
        dataset = getattr(self.data_source, "dataset", None)
        if dataset is None:
            raise FlagError(
                "--num-epoch",
                given=f"--data-source-path {self.hooks.data_source.path} has no `dataset` whose length could be taken.",
                remedy="Give --num-rollout.",
            )
        prompts, size = len(dataset), self.config.data.rollout_batch_size
        if prompts < size:
            raise FlagError("--rollout-batch-size", given=size, expected=f"at most {prompts}, the prompts of an epoch")
        return prompts // size


def outputs(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(flag, folder) of everything that the run will write outside of its run directory; templates up to a field."""
    debug, checkpoint = config.debug, config.checkpoint
    if checkpoint.save is not None:
        yield "--save", checkpoint.save
    for flag, template in (
        ("--save-hf", checkpoint.save_hf),
        ("--dump-details" if debug.dump_details else "--save-debug-rollout-data", debug.save_debug_rollout_data),
        ("--dump-details" if debug.dump_details else "--save-debug-train-data", debug.save_debug_train_data),
    ):
        if template is not None:
            yield flag, os.path.dirname(template.partition("{")[0]) or "."


def _plug_in_state(root: str, rollout_id: int) -> Path:
    return Path(root) / "rollout" / f"plug_ins_{rollout_id}.pt"
