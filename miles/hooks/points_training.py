"""The plug points of the trainer processes, in the order of the guide's chapters.

Each Protocol's signature is the call that the core makes; its docstring is the contract.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from miles.hooks.point import Form, Tell
from miles.hooks.registry import plug_point

if TYPE_CHECKING:
    import torch

# ---- 8 to 11: training --------------------------------------------------------------------------------------------


@plug_point(
    flag="--rollout-data-postprocess-path",
    when="Once per training step, after advantages are computed, on every rank of the actor.",
    help="Plug-in: between advantages and training.",
    process="trainer",
    forms=(
        Form(
            "rollout-id",
            "(args: Namespace, rollout_id: int, rollout_data: dict[str, Any]) -> None",
            "three positional arguments",
            tells=(Tell(1, names=("rollout_id", "rollout_step", "step")),),
        ),
        Form(
            "rollout-data",
            "(args: Namespace, rollout_data: dict[str, Any]) -> None",
            "two positional arguments",
            tells=(Tell(1, names=("rollout_data", "samples", "data", "batch")),),
        ),
        Form(
            "groups",
            "(args: Namespace, samples: list[list[Sample]]) -> None",
            "the second parameter is annotated list[list[Sample]]; its samples' loss_mask, remove_sample and metadata"
            " write back",
            tells=(Tell(1, annotations=("list[list[Sample]]", "list[Group]", "Sequence[list[Sample]]")),),
            needs_tell=True,
        ),
        Form(
            "samples",
            "(args: Namespace, samples: list[Sample]) -> None",
            "the second parameter is annotated list[Sample]; the same samples in one flat list",
            tells=(Tell(1, annotations=("list[Sample]", "Sequence[Sample]", "Group")),),
            needs_tell=True,
        ),
        Form("args", "(args: Namespace) -> None", "one positional argument"),
    ),
    pure=True,
)
class RolloutDataPostprocess(Protocol):
    """May change the columns of `rollout_data` in place; the return value is ignored."""

    def __call__(self, args: Namespace, rollout_id: int, rollout_data: dict[str, Any]) -> None: ...


@plug_point(
    flag="--custom-loss-function-path",
    when="Once per micro-batch on the last pipeline stage, with --loss-type custom_loss.",
    help="Plug-in: the loss, with --loss-type custom_loss.",
    process="trainer",
    forms=(
        Form(
            "parallel-state",
            "(args: Namespace, parallel_state: ParallelState, batch: dict[str, Any], logits: torch.Tensor,"
            " sum_of_sample_mean: Callable[[torch.Tensor], torch.Tensor])"
            " -> tuple[torch.Tensor, dict[str, torch.Tensor]]",
            "five positional arguments",
            tells=(Tell(1, names=("parallel_state", "ps")), Tell(2, names=("batch",))),
        ),
        Form(
            "no-parallel-state",
            "(args: Namespace, batch: dict[str, Any], logits: torch.Tensor,"
            " sum_of_sample_mean: Callable[[torch.Tensor], torch.Tensor])"
            " -> tuple[torch.Tensor, dict[str, torch.Tensor]]",
            "four positional arguments",
            tells=(Tell(1, names=("batch",)), Tell(2, names=("logits",))),
        ),
    ),
    pure=True,
)
class CustomLossFunction(Protocol):
    """`(loss, metrics)`: a scalar with gradient and a dict of scalars, both sums over samples of per-sample means.

    `logits` is float32 `[1, T, V/tp]`, not divided by the temperature. `sum_of_sample_mean` reduces a flat tensor over
    the response tokens of the micro-batch.
    """

    def __call__(
        self,
        args: Namespace,
        parallel_state: Any,
        batch: dict[str, Any],
        logits: torch.Tensor,
        sum_of_sample_mean: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, dict[str, Any]]: ...


_TIS_ARGUMENTS = (
    "*, args: Namespace, pg_loss: torch.Tensor, train_log_probs: list[torch.Tensor],"
    " rollout_log_probs: list[torch.Tensor], loss_masks: list[torch.Tensor], total_lengths: list[int],"
    " response_lengths: list[int]"
)
_TIS_RETURNS = " -> tuple[torch.Tensor, list[torch.Tensor], dict[str, torch.Tensor]]"


@plug_point(
    flag="--custom-tis-function-path",
    when="Once per micro-batch inside the policy loss, with --use-tis or --get-mismatch-metrics.",
    help="Plug-in: importance sampling between trainer and engine.",
    process="trainer",
    forms=(
        Form(
            "parallel-state",
            f"({_TIS_ARGUMENTS}, parallel_state: ParallelState, **kwargs: Any){_TIS_RETURNS}",
            "all arguments by keyword",
        ),
        Form(
            "no-parallel-state",
            f"({_TIS_ARGUMENTS}, **kwargs: Any){_TIS_RETURNS}",
            "all arguments by keyword, without parallel_state",
        ),
    ),
    pure=True,
)
class CustomTisFunction(Protocol):
    """`(pg_loss, masks, metrics)`: the new flat per-token loss, the full response masks, flat per-token metrics.

    `train_log_probs` is the trainer's old policy, `rollout_log_probs` the engine's; lists have one tensor per sample.
    """

    def __call__(
        self,
        *,
        args: Namespace,
        pg_loss: torch.Tensor,
        train_log_probs: list[torch.Tensor],
        rollout_log_probs: list[torch.Tensor],
        loss_masks: list[torch.Tensor],
        total_lengths: list[int],
        response_lengths: list[int],
        parallel_state: Any,
    ) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, torch.Tensor]]: ...


@plug_point(
    flag="--custom-pg-loss-reducer-function-path",
    when="Once per micro-batch inside the policy loss, after importance sampling.",
    help="Plug-in: makes the reducer of pg_loss.",
    process="trainer",
    pure=True,
)
class CustomPgLossReducerFunction(Protocol):
    """A function from the flat per-token loss to a scalar, a sum over samples; other metrics keep the default one."""

    def __call__(
        self,
        total_lengths: list[int],
        response_lengths: list[int],
        loss_masks: list[torch.Tensor],
        calculate_per_token_loss: bool = False,
    ) -> Callable[[torch.Tensor], torch.Tensor]: ...


# ---- 17, 20: inside the trainer -------------------------------------------------------------------------------------

_MEGATRON = ("megatron",)
_LIVE_MODEL = "It works on the live model of a trainer."


@plug_point(
    flag="--custom-megatron-init-path",
    when="Once per trainer process, at the end of its initialisation.",
    help="Plug-in: end of the trainer's initialisation.",
    process="trainer",
    replay=_LIVE_MODEL,
)
class CustomMegatronInit(Protocol):
    """Runs after process groups and seeds are set, before the model is built."""

    def __call__(self, args: Namespace) -> None: ...


@plug_point(
    flag="--custom-megatron-before-log-prob-hook-path",
    when="Once per forward-only pass, on every rank, in evaluation mode and under torch.no_grad.",
    help="Plug-in: before every forward-only pass.",
    process="trainer",
    replay=_LIVE_MODEL,
)
class CustomMegatronBeforeLogProbHook(Protocol):
    """`model` is the list of model chunks, with fsdp one; `store_prefix` is "ref_" in the reference pass, else "".

    No pass, no call: with --use-rollout-logprobs the old policy computes nothing.
    """

    def __call__(self, args: Namespace, model: list[torch.nn.Module], store_prefix: str) -> None: ...


@plug_point(
    flag="--custom-megatron-before-train-step-hook-path",
    when="Once per optimizer step, after gradients are zeroed, before the forward pass.",
    help="Plug-in: before every optimizer step.",
    process="trainer",
    replay=_LIVE_MODEL,
)
class CustomMegatronBeforeTrainStepHook(Protocol):
    """`step_id` restarts at 0 in each rollout. Actor and critic differ in `model[0].role`."""

    def __call__(
        self,
        args: Namespace,
        rollout_id: int,
        step_id: int,
        model: list[torch.nn.Module],
        optimizer: Any,
        opt_param_scheduler: Any,
    ) -> None: ...


@plug_point(
    flag="--custom-megatron-post-save-hook-path",
    when="Once per checkpoint on every rank, after it is complete and in force.",
    help="Plug-in: after a checkpoint is saved.",
    process="trainer",
    tolerates=(("drop", "the call is skipped"),),
    retries=True,
    replay="It acts on a checkpoint, and on what is outside of the run.",
)
class CustomMegatronPostSaveHook(Protocol):
    """`checkpoint_dir` is the folder of this checkpoint, `hf_checkpoint_dir` its --save-hf folder or None."""

    def __call__(
        self, args: Namespace, rollout_id: int, checkpoint_dir: str, hf_checkpoint_dir: str | None
    ) -> None: ...


@plug_point(
    flag="--custom-model-provider-path",
    when="Once per model chunk of each trainer process.",
    help="Plug-in: builds the Megatron model.",
    process="trainer",
    backends=_MEGATRON,
    forms=(
        Form(
            "published",
            "(*, pre_process: bool, post_process: bool) -> GPTModel",
            "pre_process= and post_process= by keyword; vp_stage= is passed to a function that names it",
            also=("vp_stage",),
        ),
    ),
    replay=_LIVE_MODEL,
)
class CustomModelProvider(Protocol):
    """A module that behaves like Megatron-Core's GPTModel and has the parameters of --hf-checkpoint, under Megatron's
    names. Its last stage gives logits `[1, T, V/tp]`; a critic's output layer is replaced."""

    def __call__(self, pre_process: bool, post_process: bool, vp_stage: int | None = None) -> torch.nn.Module: ...
