"""One process's part in training on a rollout: everything that is the same for every backend.

    plan        rows of each optimizer step
    log-probs   of the old policy, where they are not free    [before log-prob]
    advantages  from rewards, or from a teacher's log-probs
                                                              [rollout-data post-process]
    per step    micro batches -> loss -> gradients -> step    [before train step, loss, TIS, pg reducer]
    metrics     train/* per step, rollout/* and perf/* per rollout

Two things are not computed because they are known. Rows of a rollout's first optimizer step are trained while the
policy still is the old one: their old log-probs are those of their own forward pass. Rows whose gradient is exactly
zero (`miles.loss.exact_zero`) are not run at all; every denominator counts them all the same. With a plug-in that could
see the difference, everything is computed.
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from miles.batch import PackedBatch, TrainBatch, by_count, by_tokens, pack, step_rows
from miles.batch.ragged import IntArray
from miles.config import RunConfig
from miles.errors import UsageError
from miles.hooks import Hooks
from miles.loss import exact_logprobs
from miles.loss.advantages import FROM_A_TEACHER, compute_advantages
from miles.loss.dispatch import compute_loss, loss_scale, step_count
from miles.loss.exact_zero import zero_gradient_rows
from miles.loss.logprobs import TokenLogProbs, linear_log_probs
from miles.loss.published import custom_loss, loss_batch
from miles.loss.reduce import ids_of
from miles.loss.types import LossInputs, LossPlugins, LossSettings
from miles.observe import debug_data
from miles.observe.metrics import compute_rollout_step, timer_metrics
from miles.observe.timers import Timer
from miles.observe.tracking import Tracker
from miles.trainer.advantages import advantage_inputs
from miles.trainer.backend import Backend, MicroLoss, ModelOutput
from miles.trainer.report import column_sums, means_of
from miles.trainer.routing import RoutingTape
from miles.weights import WeightTransport

# Metrics to which a sample of exactly zero gradient would contribute; their mean is over the samples that ran.
OVER_SAMPLES_THAT_RAN = (
    "entropy_loss",
    "ppo_kl",
    "train_rollout_logprob_abs_diff",
    "ois",
    "tis",
    "tis_abs",
    "tis_clipfrac",
)


# Under this name ranks tell each other how many tokens they have trained on.
TOKENS = "tokens"


@dataclass(frozen=True)
class TrainReport:
    """What one rollout did to the model. `metrics` are those of the last optimizer step."""

    rollout_id: int
    steps: int
    metrics: dict[str, float] = field(default_factory=dict)


class TrainActor:
    """Trains one model with one backend. The same class trains an actor on every rank of every layout."""

    def __init__(
        self,
        backend: Backend,
        config: RunConfig,
        args: Namespace,
        hooks: Hooks,
        tracker: Tracker,
        *,
        transport: WeightTransport | None,
        on_step: Callable[[], None],
    ) -> None:
        self.backend, self.config, self.args, self.hooks = backend, config, args, hooks
        self.tracker, self.transport, self._on_step = tracker, transport, on_step
        self.settings = LossSettings.of(config.algorithm)
        self.plugins = LossPlugins(
            tis=hooks.custom_tis_function,
            pg_reducer=hooks.custom_pg_loss_reducer_function,
            args=args,
            parallel_state=backend.parallel,
        )
        if config.algorithm.use_routing_replay and backend.routing is None:
            flag = "rollout-routing-replay" if config.algorithm.use_rollout_routing_replay else "routing-replay"
            raise UsageError(
                f"--use-{flag}: the model in {config.rollout.hf_checkpoint} has no experts to route to. Leave out the "
                "flag, or give a mixture of experts such as Qwen3-MoE."
            )
        self._tape: RoutingTape | None = None  # of the rollout that is being trained
        exact = config.train.true_on_policy_mode
        self._linear_log_probs = exact_logprobs.linear_log_probs if exact else linear_log_probs
        self.temperature = config.rollout.rollout_temperature
        self.weight_version = 0
        self.steps_done = 0
        # The one of the process, to which plug-ins add as well; read and reset once per rollout.
        self.timers = Timer()
        self.timers.reset()
        self._idle_since = time.perf_counter()

    # ---- a rollout -----------------------------------------------------------------------------------------------

    def train(self, rollout_id: int, shard: TrainBatch, global_batch_size: int) -> TrainReport:
        """Train on this rank's `shard`: one optimizer step per `global_batch_size` samples of all ranks."""
        begin = time.perf_counter()
        self.timers.add("train_wait", begin - self._idle_since)
        steps = step_rows(len(shard), global_batch_size // self.backend.parallel.dp_size)
        if not steps:
            self._refuse(
                f"--global-batch-size: {len(shard)} samples fill no optimizer step of {global_batch_size}. Lower it, "
                "or leave out --disable-rollout-trim-samples."
            )
        planned = time.perf_counter()
        self._prepare(rollout_id, shard, steps)
        prepared = time.perf_counter()
        if self.config.algorithm.reset_optimizer_states:
            self.backend.reset_optimizer()
        if self.transport is not None:
            self.transport.suspend()
        metrics: dict[str, float] = {}
        for step_id, rows in enumerate(steps):
            metrics = self._step(rollout_id, step_id, shard, rows, global_batch_size, len(steps))
        end = self._idle_since = time.perf_counter()
        self.timers.add("data_preprocess", planned - begin)
        self.timers.add("log_probs", prepared - planned)
        self.timers.add("actor_train", end - prepared)
        self.timers.add("train", end - begin)
        self._log_rollout(rollout_id, shard)
        return TrainReport(rollout_id, len(steps), metrics)

    def train_shards(self, rollout_id: int, shards: Sequence[TrainBatch], global_batch_size: int) -> TrainReport:
        """`train` on the one of `shards` that is this rank's."""
        return self.train(rollout_id, shards[self.backend.parallel.dp_rank], global_batch_size)

    def _prepare(self, rollout_id: int, shard: TrainBatch, steps: list[IntArray]) -> None:
        """Fill the columns that losses read: advantages, returns, old log-probs."""
        self._tape = self._new_tape(shard)
        if self.config.algorithm.compute_advantages_and_returns:
            if self._needs_all_log_probs():
                self._old_log_probs(shard, np.arange(len(shard)))
            self._advantages(shard)
        postprocess = self.hooks.rollout_data_postprocess
        if postprocess is not None:
            view = shard.as_dict(tensors=True)
            postprocess(self.args, rollout_id, view)
            try:
                view.write_back()
            except UsageError as error:
                self.hooks.reject(str(error), "rollout_data_postprocess")
                raise
        # No loss, and so no plug-in, sees a sample whose score failed; steps count it all the same.
        self._skip = self._zero_rows(shard) | shard.failed
        if self.config.algorithm.compute_advantages_and_returns and not self._needs_all_log_probs():
            late = np.concatenate(list(steps[1:])) if len(steps) > 1 else np.empty(0, np.int64)
            self._old_log_probs(shard, late[~self._skip[late]])
        template = self.config.debug.save_debug_train_data
        if template is not None:
            self._dump(template, rollout_id, shard)

    def _new_tape(self, shard: TrainBatch) -> RoutingTape | None:
        if not self.config.algorithm.use_routing_replay:
            return None
        assert self.backend.routing is not None
        if self.config.algorithm.use_rollout_routing_replay:
            return RoutingTape.of_engine(shard, self.backend.routing)
        return RoutingTape(shard, self.backend.routing)

    def _refuse(self, message: str) -> NoReturn:
        """UsageError, or HookError where a plug-in has made the batch."""
        self.hooks.reject(message, "custom_convert_samples_to_train_data", "custom_reward_post_process")
        raise UsageError(message)

    def _advantages(self, shard: TrainBatch) -> None:
        try:
            inputs = advantage_inputs(shard, self.settings)
        except UsageError as error:
            self._refuse(str(error))
        result = compute_advantages(self.settings.advantage_estimator, inputs)
        shard.response_columns["advantages"] = result.advantages
        shard.response_columns["returns"] = result.returns

    def _needs_all_log_probs(self) -> bool:
        """Whether an estimator, a plug-in, a dump or dropout could tell a saved forward pass from one that was made."""
        hooks = self.hooks
        return (
            self.settings.loss_type == "custom_loss"
            or self.settings.advantage_estimator in FROM_A_TEACHER
            or hooks.rollout_data_postprocess is not None
            or hooks.custom_megatron_before_log_prob_hook is not None
            or hooks.custom_tis_function is not None
            or self.config.debug.save_debug_train_data is not None
            or self.backend.has_dropout
        )

    def _zero_rows(self, shard: TrainBatch) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """bool [N]: rows that need not run."""
        mask = torch.from_numpy(shard.loss_masks)
        ids = ids_of(shard.response_lengths.tolist(), mask.device)
        zero = zero_gradient_rows(
            shard.response_columns.get("advantages"), mask, ids, len(shard), self.settings, self.plugins
        )
        return zero.numpy()

    # ---- passes --------------------------------------------------------------------------------------------------

    def _old_log_probs(self, shard: TrainBatch, rows: IntArray) -> None:
        """Fill the column `log_probs` for `rows`; other rows stay NaN until their own forward pass."""
        before = self.hooks.custom_megatron_before_log_prob_hook
        if before is not None:
            before(self.args, self.backend.model_chunks, "")
        column = shard.response_columns.setdefault("log_probs", torch.full((len(shard.loss_masks),), math.nan))
        unused = self.settings.use_rollout_logprobs and not self.settings.get_mismatch_metrics
        records = self._tape is not None and not self._tape.from_engine
        if unused and not records:
            return
        micros = self._micro_batches(shard, rows)
        for micro, values in zip(micros, self.backend.forward_only(micros, self._read_log_probs)):
            column[micro.response_places.cpu()] = values

    def _read_log_probs(self, micro: PackedBatch, output: ModelOutput) -> Tensor:
        if self._tape is not None and micro.routed_experts is not None:
            assert output.routed_experts is not None
            self._tape.record(micro, output.routed_experts)
        return self._current(micro, output, with_entropy=False).log_probs.float().cpu()

    def _current(self, micro: PackedBatch, output: ModelOutput, *, with_entropy: bool) -> TokenLogProbs:
        """Log-probs at the response tokens, under the distribution that the rollout sampled from."""
        chunk = self.config.train.log_probs_chunk_size
        return self._linear_log_probs(
            output.hidden.index_select(0, micro.predicting),
            output.head_weight,
            micro.targets,
            temperature=self.temperature,
            with_entropy=with_entropy,
            chunk_tokens=chunk if chunk > 0 else None,
        )

    def _micro_batches(self, shard: TrainBatch, rows: IntArray) -> list[PackedBatch]:
        data = self.config.data
        if len(rows) == 0:
            return []
        if data.use_dynamic_batch_size:
            assert data.max_tokens_per_gpu is not None
            budget = data.max_tokens_per_gpu * self.backend.parallel.cp_size
            parts = by_tokens(rows, shard.total_lengths, budget, name_of=shard.name_of)
        else:
            parts = by_count(rows, shard.total_lengths, data.micro_batch_size)
        # Custom losses get logits of every row in full: the published layout.
        share = self.settings.loss_type != "custom_loss"
        experts = None if self._tape is None else self._tape.experts
        return [pack(shard, part, device=self.backend.device, share_prompts=share, experts=experts) for part in parts]

    # ---- an optimizer step ---------------------------------------------------------------------------------------

    def _step(
        self, rollout_id: int, step_id: int, shard: TrainBatch, rows: IntArray, global_batch_size: int, num_steps: int
    ) -> dict[str, float]:
        run = rows[~self._skip[rows]]
        own = (shard.mask_sums[rows].sum(), len(run), shard.mask_sums[run].sum(), shard.num_dropped(rows))
        counts = self.backend.sum_over_ranks(torch.tensor([float(n) for n in own], dtype=torch.float64))
        num_tokens, ran, ran_tokens, dropped = (int(n) for n in counts.tolist())
        num_samples = global_batch_size - dropped
        scale = loss_scale(self.settings, num_samples, num_tokens, dp_size=self.backend.parallel.dp_cp_size)

        def loss_fn(micro: PackedBatch, output: ModelOutput) -> MicroLoss:
            return self._loss(shard, micro, output, scale)

        self.backend.zero_grad()
        before = self.hooks.custom_megatron_before_train_step_hook
        if before is not None:
            before(
                self.args,
                rollout_id,
                step_id,
                self.backend.model_chunks,
                self.backend.optimizer,
                self.backend.scheduler,
            )
        results = self.backend.forward_backward(self._micro_batches(shard, run), loss_fn)
        outcome = self.backend.optimizer_step()
        self.steps_done += 1
        self._on_step()
        total = step_count(self.settings, num_samples, num_tokens)
        over_ran = step_count(self.settings, ran, ran_tokens)
        metrics = {
            f"train/{name}": value / (over_ran if name in OVER_SAMPLES_THAT_RAN else total)
            for name, value in self._summed(results).items()
        }
        if ran == 0:  # every sample had exactly zero gradient, and so exactly zero loss
            metrics["train/loss"] = 0.0
        metrics["train/grad_norm"] = outcome.grad_norm
        metrics["train/lr-pg_0"] = outcome.lr
        metrics["train/exactly_zero_samples"] = global_batch_size - ran
        metrics["train/skipped_step"] = float(outcome.skipped)
        metrics["train/step"] = rollout_id * num_steps + step_id
        self.tracker.log(metrics, step_key="train/step")
        return metrics

    def _summed(self, results: list[dict[str, Tensor]]) -> dict[str, float]:
        """Metrics over all micro batches and ranks. All micro batches must report the same ones."""
        own: dict[str, float] = {}
        if results and any(results):  # a loss of the user's own may report none
            self._check_names([list(r) for r in results])
            table = torch.stack([torch.stack([r[name].float() for name in results[0]]) for r in results])
            own = dict(zip(results[0], table.sum(0).tolist()))
        ranks = [values for values in self.backend.gather_over_ranks(own) if values]
        self._check_names([list(values) for values in ranks])
        return {name: sum(values[name] for values in ranks) for name in (ranks[0] if ranks else ())}

    def _check_names(self, names: list[list[str]]) -> None:
        for other in names[1:]:
            if other != names[0]:
                found = f"expected the same metrics from every micro batch, got {names[0]} and {other}"
                self.hooks.reject(found, "custom_loss_function")
                raise UsageError(f"--loss-type {self.settings.loss_type}: {found}.")

    def _loss(self, shard: TrainBatch, micro: PackedBatch, output: ModelOutput, scale: float) -> MicroLoss:
        columns = {name: micro.column(flat) for name, flat in shard.flat_columns().items()}
        fn = self._custom_loss if self.settings.loss_type == "custom_loss" else self._built_in_loss
        if not self.config.train.recompute_loss_function:
            return fn(shard, micro, output, columns, scale)
        kept: list[MicroLoss] = []

        def run(hidden: Tensor, head_weight: Tensor) -> Tensor:
            kept.append(fn(shard, micro, ModelOutput(hidden, head_weight), columns, scale))
            return kept[-1].loss

        loss = recomputed(run, output.hidden, output.head_weight, use_reentrant=False)
        return MicroLoss(loss, kept[0].metrics)

    def _built_in_loss(
        self, shard: TrainBatch, micro: PackedBatch, output: ModelOutput, columns: dict[str, Tensor], scale: float
    ) -> MicroLoss:
        current = self._current(micro, output, with_entropy=self.settings.loss_type == "policy_loss")
        old = columns.get("log_probs")
        if old is not None:
            # NaN: a row of the first step, whose old policy is the current one.
            own = current.log_probs.detach()
            columns["log_probs"] = torch.where(old.isnan(), own, old)
            shard.response_columns["log_probs"][micro.response_places.cpu()] = columns["log_probs"].float().cpu()
        result = compute_loss(LossInputs.of(micro, current, columns), self.settings, self.plugins, scale)
        return MicroLoss(result.loss, result.metrics)

    def _custom_loss(
        self, shard: TrainBatch, micro: PackedBatch, output: ModelOutput, columns: dict[str, Tensor], scale: float
    ) -> MicroLoss:
        hook = self.hooks.custom_loss_function
        assert hook is not None
        result = custom_loss(
            hook,
            self.args,
            self.backend.parallel,
            micro,
            loss_batch(micro, columns, shard.row_values(micro.rows)),
            output.logits(),
            per_token=self.settings.calculate_per_token_loss,
            scale=scale,
        )
        return MicroLoss(result.loss, result.metrics)

    # ---- after it ------------------------------------------------------------------------------------------------

    def update_weights(self) -> int:
        """Hand the weights to the engines under the next version number, which is returned."""
        begin = time.perf_counter()
        self.weight_version += 1
        if self.transport is not None:
            self.transport.update(self.backend.weights(), self.weight_version)
        self.timers.add("update_weights", time.perf_counter() - begin)
        return self.weight_version

    def restore(self, folder: Path, *, weight_version: int, steps_done: int) -> None:
        """Continue from a checkpoint: weights, optimizer, schedule, counters."""
        self.backend.load(folder, with_optimizer=True)
        self.weight_version, self.steps_done = weight_version, steps_done

    def save(self, folder: Path, *, with_optimizer: bool, background: bool = False) -> None:
        """What `restore` reads, under `folder`, which exists and is empty."""
        self.backend.save(folder, with_optimizer=with_optimizer, background=background)

    def finish_saving(self) -> None:
        """Wait for what `save` writes in the background. Raises what went wrong with it."""
        self.backend.finish_saving()

    def export_hf(self, folder: Path) -> None:
        """A Hugging Face model folder."""
        self.backend.export_hf(folder)

    def offload(self) -> None:
        """Free the device for the engines: nothing to do where both share the same tensors."""

    def onload(self) -> None:
        """The counterpart of `offload`."""

    def _log_rollout(self, rollout_id: int, shard: TrainBatch) -> None:
        """Weight updates and saves count for the rollout that they precede."""
        seconds = self.timers.log_dict()
        self.timers.reset()
        ranks = self.backend.gather_over_ranks({**column_sums(shard), TOKENS: float(shard.total_lengths.sum())})
        tokens = sum(values[TOKENS] for values in ranks)
        metrics = {f"rollout/{name}": value for name, value in means_of(ranks).items()}
        metrics |= {
            **timer_metrics(seconds),
            "perf/actor_train_tok_per_s": tokens / seconds["actor_train"] if seconds["actor_train"] > 0 else 0.0,
            "rollout/step": compute_rollout_step(self.args, rollout_id),
        }
        self.tracker.log(metrics, step_key="rollout/step")

    def _dump(self, template: str, rollout_id: int, shard: TrainBatch) -> None:
        rank = self.backend.parallel.dp_rank
        data = {"rollout_id": rollout_id, "rank": rank, "rollout_data": dict(shard.as_dict(tensors=True))}
        debug_data.write_torch(
            Path(template.format(rollout_id=rollout_id, rank=rank)), data, flag="--save-debug-train-data"
        )
