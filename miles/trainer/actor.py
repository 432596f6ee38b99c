"""One process's part in training on a rollout: everything that is the same for every backend.

    plan        rows of each optimizer step
    values      of the critic, for PPO                        [before log-prob]
    log-probs   of the reference model; of the old policy,
                where they are not free                       [before log-prob]
    advantages  from rewards, or from a teacher's log-probs
    critic      its own optimizer steps                       [before train step]
                                                              [rollout-data post-process]
    per step    micro batches -> loss -> gradients -> step    [before train step, loss, TIS, pg reducer]
    metrics     train/* per step, rollout/* and perf/* per rollout

Two things are not computed because they are known. Rows of a rollout's first optimizer step are trained while the
policy still is the old one: their old log-probs are those of their own forward pass. Rows whose gradient is exactly
zero (`miles.loss.exact_zero`) are not run at all; every denominator counts them all the same. With a plug-in that could
see the difference, everything is computed.

Weights other than those in training (reference model, older policies) are `miles.trainer.snapshots`, the critic is
`miles.trainer.critic`.
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from miles.batch import PackedBatch, TrainBatch, by_count, by_tokens, pack, step_rows
from miles.batch.ragged import IntArray
from miles.config import RunConfig
from miles.errors import StepError, UsageError
from miles.hooks import Hooks
from miles.loss.advantages import FROM_A_TEACHER, PENALIZED, compute_advantages
from miles.loss.dispatch import compute_loss, loss_scale, step_count
from miles.loss.exact_zero import zero_gradient_rows
from miles.loss.logprobs import TokenLogProbs
from miles.loss.published import custom_loss, loss_batch
from miles.loss.reduce import ids_of
from miles.loss.types import LossInputs, LossPlugins, LossSettings
from miles.loss.whiten import whiten
from miles.observe import debug_data
from miles.observe.metrics import compute_rollout_step, timer_metrics
from miles.observe.timers import Timer
from miles.observe.tracking import Tracker
from miles.trainer.advantages import advantage_inputs
from miles.trainer.backend import Backend, MicroLoss, ModelOutput
from miles.trainer.flops import TRAINING, forward_flops
from miles.trainer.heldout import LossSums
from miles.trainer.kept import keep_step, listed
from miles.trainer.report import column_sums, means_of
from miles.trainer.routing import RoutingTape
from miles.trainer.snapshots import OlderPolicies, Reference
from miles.weights import WeightTransport

if TYPE_CHECKING:
    from miles.trainer.critic import Critic

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
    """What one rollout did to the model. `metrics` are those of the last optimizer step, `notices` what the user should
    know."""

    rollout_id: int
    steps: int
    metrics: dict[str, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Restoring:
    """What a run takes from a checkpoint beside the weights. The two numbers are where its counters go on.

    `with_optimizer`: moments and schedule, where the checkpoint has them. `weights_alone`: a run that begins, which has
    a reference and older policies of its own.

    Example: `Restoring(weight_version=20, steps_done=40)`
    """

    weight_version: int = 0
    steps_done: int = 0
    with_optimizer: bool = True
    weights_alone: bool = False


class TrainActor:
    """Trains one model with one backend. The same class trains an actor on every rank of every layout."""

    # What the names of its metrics begin with, after "train/".
    prefix = ""

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
        critic: Critic | None = None,
    ) -> None:
        self.backend, self.config, self.args, self.hooks = backend, config, args, hooks
        self.tracker, self.transport, self._on_step = tracker, transport, on_step
        self.settings = LossSettings.of(config.algorithm, config.rollout)
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
        self.temperature = config.rollout.rollout_temperature
        self.weight_version = 0
        self.steps_done = 0
        self.critic = critic
        self.reference = Reference.of(config, backend)
        self.older = OlderPolicies(backend) if config.rollout.keep_old_actor else None
        self._notices: list[str] = []
        # Of this rank's passes in this rollout, by timer.
        self._flops: defaultdict[str, float] = defaultdict(float)
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
        self._notices = []
        if self.older is not None:
            self.older.begin_training()
        for name in ("log_probs", "actor_train"):
            self.timers.add(name, 0.0)  # reported also where nothing of the kind was needed
        self.timers.add("data_preprocess", time.perf_counter() - begin)
        critic_only = self.critic is not None and rollout_id < self.config.algorithm.num_critic_only_steps
        self._tape = self._new_tape(shard)
        self._evaluate(shard, critic_only)
        metrics: dict[str, float] = {}
        if self.critic is not None:
            metrics = self.critic.learn(rollout_id, shard, steps, global_batch_size)
            self._notices += self.critic.take_notices()
        if not critic_only:
            self._prepare(rollout_id, shard, steps)
            metrics = self._learn(rollout_id, shard, steps, global_batch_size)
            if self.reference is not None and self.reference.is_due(rollout_id):
                with self.timers.context("ref_model_update"):
                    self.reference.weights = self.backend.snapshot()
        end = self._idle_since = time.perf_counter()
        self.timers.add("train", end - begin)
        self._log_rollout(rollout_id, shard)
        return TrainReport(rollout_id, len(steps), metrics, self.take_notices())

    def train_shards(self, rollout_id: int, shards: Sequence[TrainBatch], global_batch_size: int) -> TrainReport:
        """`train` on the one of `shards` that is this rank's."""
        return self.train(rollout_id, shards[self.backend.parallel.dp_rank], global_batch_size)

    def _learn(
        self, rollout_id: int, shard: TrainBatch, steps: list[IntArray], global_batch_size: int
    ) -> dict[str, float]:
        """The optimizer steps of a rollout; the metrics of the last one."""
        with self.timers.context("actor_train"):
            if self.config.algorithm.reset_optimizer_states:
                self.backend.reset_optimizer()
            if self.transport is not None:
                self.transport.suspend()
            metrics: dict[str, float] = {}
            for step_id, rows in enumerate(steps):
                metrics = self._step(rollout_id, step_id, shard, rows, global_batch_size, len(steps))
        return metrics

    def take_notices(self) -> list[str]:
        notices, self._notices = self._notices, []
        return notices

    def _evaluate(self, shard: TrainBatch, critic_only: bool) -> None:
        """The passes that advantages need, and the advantages. A rollout that trains the critic alone is not evaluated
        by the policy, and so has no KL in its returns."""
        if not self.config.algorithm.compute_advantages_and_returns:
            return
        if self.critic is not None:
            self.critic.evaluate(shard)
        if not critic_only:
            self._reference_log_probs(shard)
            if self._needs_all_log_probs():
                self._old_log_probs(shard, np.arange(len(shard)))
        self._advantages(shard)

    def _prepare(self, rollout_id: int, shard: TrainBatch, steps: list[IntArray]) -> None:
        """What is left before the first step: the plug-in's changes, the rows that need not run, late log-probs."""
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
        advantages = result.advantages
        if self.settings.normalize_advantages:
            advantages = whiten(advantages, torch.from_numpy(shard.loss_masks), self.backend.sum_over_ranks)
        shard.response_columns["advantages"] = advantages
        shard.response_columns["returns"] = result.returns

    def _needs_all_log_probs(self) -> bool:
        """Whether an estimator, a plug-in, a dump or dropout could tell a saved forward pass from one that was made."""
        hooks = self.hooks
        return (
            self.settings.loss_type == "custom_loss"
            or self.settings.advantage_estimator in FROM_A_TEACHER
            or (self.settings.advantage_estimator in PENALIZED and self.settings.kl_coef != 0)
            or self.older is not None
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
        records = self._tape is not None and not self._tape.from_engine
        if self.settings.use_rollout_logprobs and not self.settings.get_mismatch_metrics and not records:
            shard.response_columns["log_probs"] = torch.full((len(shard.loss_masks),), math.nan)
            return  # nobody reads them
        with self.timers.context("log_probs"), nullcontext() if self.older is None else self.older.in_use():
            self._pass(shard, "log_probs", rows, self._read_log_probs)

    def _reference_log_probs(self, shard: TrainBatch) -> None:
        if self.reference is not None:
            with self.timers.context("ref_log_probs"), self.backend.using(self.reference.weights):
                self._pass(
                    shard,
                    "ref_log_probs",
                    np.arange(len(shard)),
                    self._read_log_probs,
                    store_prefix="ref_",
                    replays=False,
                )

    def _pass(
        self,
        shard: TrainBatch,
        name: str,
        rows: IntArray,
        read: Callable[[PackedBatch, ModelOutput], Tensor],
        *,
        store_prefix: str = "",
        replays: bool = True,
    ) -> None:
        """Fill the column `name` for `rows` by a pass without gradients. Other weights route tokens as they like:
        their passes are none that `replays`."""
        hook = self.hooks.custom_megatron_before_log_prob_hook
        before = None if hook is None else lambda: hook(self.args, self.backend.model_chunks, store_prefix)
        micros = self._micro_batches(shard, rows, replays=replays)
        self._flops[name] += self._forward_flops(shard.total_lengths[rows])
        record = self._tape.record if self._tape is not None and replays else None
        for micro, values in zip(micros, self.backend.forward_only(micros, read, record, before)):
            if name not in shard.response_columns:
                shard.response_columns[name] = torch.full((len(shard.loss_masks),), math.nan, dtype=values.dtype)
            shard.response_columns[name][micro.response_places.cpu()] = values
        shard.response_columns.setdefault(name, torch.full((len(shard.loss_masks),), math.nan))

    def _forward_flops(self, lengths: IntArray) -> float:
        """This rank's share of a pass over rows of these lengths."""
        return forward_flops(self.backend.hf_config, lengths) / self.config.layout.model_size

    def _read_log_probs(self, micro: PackedBatch, output: ModelOutput) -> Tensor:
        return self._current(micro, output, with_entropy=False).log_probs.float()

    def _current(self, micro: PackedBatch, output: ModelOutput, *, with_entropy: bool) -> TokenLogProbs:
        """Log-probs at the response tokens, under the distribution that the rollout sampled from."""
        chunk = self.config.train.log_probs_chunk_size
        return output.log_probs(
            micro,
            temperature=self.temperature,
            with_entropy=with_entropy,
            chunk_tokens=chunk if chunk > 0 else None,
        )

    def _micro_batches(self, shard: TrainBatch, rows: IntArray, *, replays: bool = True) -> list[PackedBatch]:
        data = self.config.data
        if len(rows) == 0:
            return []
        if data.use_dynamic_batch_size:
            assert data.max_tokens_per_gpu is not None
            ranks = self.backend.parallel.cp_size
            parts = by_tokens(
                rows, shard.total_lengths, data.max_tokens_per_gpu, num_ranks=ranks, name_of=shard.name_of
            )
        else:
            parts = by_count(rows, shard.total_lengths, data.micro_batch_size)
        # Custom losses get logits of every row in full: the published layout.
        share = self.settings.loss_type != "custom_loss" and self.backend.shares_prompts
        experts = self._tape.experts if self._tape is not None and replays else None
        return [pack(shard, part, device=self.backend.device, share_prompts=share, experts=experts) for part in parts]

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def evaluate_shards(self, sets: Mapping[str, Sequence[TrainBatch]]) -> dict[str, LossSums]:
        """The loss of each evaluation set, of whose shards (one per data-parallel rank) this rank takes its own."""
        rank = self.backend.parallel.dp_rank
        return {name: self._loss_sums(name, shards[rank]) for name, shards in sets.items()}

    def _loss_sums(self, name: str, shard: TrainBatch) -> LossSums:
        log_probs = torch.zeros(len(shard.loss_masks))
        try:
            micros = self._micro_batches(shard, np.arange(len(shard)), replays=False)
        except UsageError as error:
            raise UsageError(f"evaluation set {name!r}: {error}") from error
        for micro, values in zip(micros, self.backend.forward_only(micros, self._read_log_probs)):
            log_probs[micro.response_places.cpu()] = values.float()
        return LossSums.from_tensor(self.backend.sum_over_ranks(LossSums.tensor_of(shard, log_probs)))

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

        self._flops["actor_train"] += TRAINING * self._forward_flops(shard.total_lengths[run])
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
        micros = self._micro_batches(shard, run)
        results = self.backend.forward_backward(micros, lambda micro, output: self._loss(shard, micro, output, scale))
        own_loss = sum(float(result.loss) for result in results)
        finite = not self.backend.on_any_rank(not math.isfinite(own_loss))
        outcome = self.backend.optimizer_step() if finite else self.backend.skip_step()
        if outcome.skipped:
            failed = [micro for micro, result in zip(micros, results) if not math.isfinite(float(result.loss))]
            bad = [row for micro in failed for row in micro.rows.tolist()]
            self._step_failed(rollout_id, step_id, shard, rows, "gradient" if finite else "loss", bad)
        self.steps_done += 1
        self._on_step()
        total = step_count(self.settings, num_samples, num_tokens)
        over_ran = step_count(self.settings, ran, ran_tokens)
        metrics = {
            f"train/{self.prefix}{name}": value / (over_ran if name in OVER_SAMPLES_THAT_RAN else total)
            for name, value in self._summed([result.metrics for result in results]).items()
        }
        if ran == 0 and not self.prefix:  # every sample had exactly zero gradient, and so exactly zero loss
            metrics["train/loss"] = 0.0
        metrics[f"train/{self.prefix}grad_norm"] = outcome.grad_norm
        metrics[f"train/{self.prefix}lr-pg_0"] = outcome.lr
        metrics[f"train/{self.prefix}exactly_zero_samples"] = global_batch_size - ran
        metrics[f"train/{self.prefix}skipped_step"] = float(outcome.skipped)
        metrics["train/step"] = rollout_id * num_steps + step_id
        self.tracker.log(metrics, step_key="train/step")
        return metrics

    def _step_failed(
        self, rollout_id: int, step_id: int, shard: TrainBatch, rows: IntArray, what: str, bad: list[int]
    ) -> None:
        """Keep this rank's rows of a step whose loss or gradient is not finite (`bad`: those of its micro-batches with
        such a loss), and say so: as an error under `--nan-policy stop`. Every rank calls this, and returns or raises
        when all have kept theirs: the first that fails ends the others."""
        rank = self.backend.parallel.dp_rank
        name = f"{self.prefix}step_{rollout_id}_{step_id}_rank{rank}.pt"
        file = Path(str(self.config.run.run_dir)) / "failures" / name
        if self.backend.parallel.speaks:
            keep_step(file, rollout_id, rank, shard.select(rows))
        ranks = self.backend.gather_over_ranks({shard.name_of(row): 1.0 for row in bad})
        names = [name for of_rank in ranks for name in of_rank]
        whose = f" for a micro-batch with {listed(names)}" if names else ""
        step = f"{self.prefix.rstrip('-') or 'optimizer'} step {step_id}"
        where = f"rollout {rollout_id}, {step}: the {what} is not finite{whose}."
        others = "" if len(ranks) == 1 else f", those of other ranks in {name.removesuffix(f'{rank}.pt')}*.pt beside it"
        kept = f"Its samples are in {file}{others}; --load-debug-rollout-data with that file trains on them again."
        if self.config.run.nan_policy == "stop":
            raise StepError(f"--nan-policy stop: {where} {kept}")
        self._notices.append(f"{where} The step is skipped (--nan-policy skip). {kept}")

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
            kept.append(fn(shard, micro, replace(output, hidden=hidden, head_weight=head_weight), columns, scale))
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
            loss_batch(
                micro,
                columns,
                shard.row_values(micro.rows),
                parallel_state=self.backend.parallel,
                **output.layout,
            ),
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
        if self.older is not None:
            self.older.advance()
        if self.transport is not None:
            self.transport.update(self.backend.weights(), self.weight_version)
        self.timers.add("update_weights", time.perf_counter() - begin)
        return self.weight_version

    def save(
        self, folder: Path, *, with_optimizer: bool, background: bool = False, critic_folder: Path | None = None
    ) -> None:
        """Everything that `restore` reads, under `folder`, which exists and is empty. The critic, which
        `restore_critic` reads, goes to a folder in it, or to `critic_folder`."""
        self.backend.save(folder, with_optimizer=with_optimizer, background=background)
        if self.reference is not None:
            self.reference.save(folder)
        if self.older is not None:
            self.older.save(folder)
        if self.critic is not None:
            if critic_folder is None:
                critic_folder = folder / "critic"
                critic_folder.mkdir(exist_ok=True)
            self.critic.save(critic_folder, with_optimizer=with_optimizer, background=background)

    def finish_saving(self) -> None:
        """Wait for what `save` writes in the background. Raises what went wrong with it."""
        self.backend.finish_saving()
        if self.critic is not None:
            self.critic.finish_saving()

    def restore(self, folder: Path, how: Restoring) -> None:
        """Continue from a checkpoint: weights, and as `how` says optimizer, schedule, counters, older weights."""
        self.backend.load(folder, with_optimizer=how.with_optimizer)
        if self.reference is not None and not how.weights_alone:
            self.reference.restore(folder)
        if self.older is not None:
            self.older.restore(None if how.weights_alone else folder)
        self.weight_version, self.steps_done = how.weight_version, how.steps_done

    def restore_critic(self, folder: Path, *, with_optimizer: bool) -> None:
        """Continue the critic from what `save` wrote."""
        assert self.critic is not None
        self.critic.backend.load(folder, with_optimizer=with_optimizer)

    def saved(self, rollout_id: int, folder: Path, hf_folder: Path | None) -> None:
        """A checkpoint is complete and in force."""
        hook = self.hooks.custom_megatron_post_save_hook
        if hook is not None:
            hook(self.args, rollout_id, str(folder), None if hf_folder is None else str(hf_folder))

    def export_hf(self, folder: Path) -> None:
        """A Hugging Face model folder."""
        self.backend.export_hf(folder)

    def _log_rollout(self, rollout_id: int, shard: TrainBatch) -> None:
        """Weight updates and saves count for the rollout that they precede."""
        seconds, flops = self.timers.log_dict(), self._flops
        self.timers.reset()
        self._flops = defaultdict(float)
        ranks = self.backend.gather_over_ranks({**column_sums(shard), TOKENS: float(shard.total_lengths.sum())})
        tokens = sum(values[TOKENS] for values in ranks)
        metrics = {f"rollout/{name}": value for name, value in means_of(ranks).items()}
        metrics |= {
            **timer_metrics(seconds),
            **{f"perf/{name}_tflops": flops[name] / seconds[name] / 1e12 for name in flops if seconds.get(name)},
            "perf/actor_train_tok_per_s": tokens / seconds["actor_train"] if seconds.get("actor_train") else 0.0,
            "rollout/step": compute_rollout_step(self.args, rollout_id),
        }
        self.tracker.log(metrics, step_key="rollout/step")

    def _dump(self, template: str, rollout_id: int, shard: TrainBatch) -> None:
        rank = self.backend.parallel.dp_rank
        if not self.backend.parallel.speaks:
            return
        data = {"rollout_id": rollout_id, "rank": rank, "rollout_data": dict(shard.as_dict(tensors=True))}
        debug_data.write_torch(
            Path(template.format(rollout_id=rollout_id, rank=rank)), data, flag="--save-debug-train-data"
        )
