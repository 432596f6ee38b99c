"""Every plug point of a run, declared once: CATALOG, in the order of the guide's chapters.

A declaration is a `Protocol` (its signature is the call that the core makes, its docstring the contract) under
`@plug_point(...)` (flag, when, process, accepted forms, failure policies). Flags, `--help`, `miles hooks`, `miles
check`, `miles new` and the tests derive from it. `Form`, `Tell` and `PlugPoint` are in `point`; the translation of
each form to the canonical call is in `adapters`.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from miles.hooks.point import Form, PlugPoint, Tell, canonical_signature, normalise_key
from miles.types import (
    DynamicFilterOutput,
    GenerateFnInput,
    GenerateFnOutput,
    Group,
    RolloutFnEvalOutput,
    RolloutFnInput,
    RolloutFnTrainOutput,
    Sample,
)

if TYPE_CHECKING:
    import torch

CATALOG: dict[str, PlugPoint] = {}

C = TypeVar("C", bound=type[Any])

_LOSES_SAMPLE = "the sample leaves training and its group's statistics"
_SKIPPED = "the call is skipped"


def plug_point(*, flag: str, forms: tuple[Form, ...] = (), **declared: Any) -> Callable[[C], C]:
    """Enter the decorated Protocol into CATALOG. Without `forms` its own signature is the one accepted form."""

    def enter(protocol: C) -> C:
        name = normalise_key(flag).replace("-", "_")
        assert name not in CATALOG, name
        accepted = forms or (Form("published", canonical_signature(protocol), "the arguments bind"),)
        CATALOG[name] = PlugPoint(name=name, flag=flag, protocol=protocol, forms=accepted, **declared)
        return protocol

    return enter


# ---- 1, 16: whole rollouts ----------------------------------------------------------------------------------------


def _default_rollout_function() -> str:
    """A whole number in MILES_EXPERIMENTAL_ROLLOUT_REFACTOR picks the default; ValueError for any other text."""
    if bool(int(os.environ.get("MILES_EXPERIMENTAL_ROLLOUT_REFACTOR", "0"))):
        return "miles.rollout.inference_rollout.inference_rollout_common.InferenceRolloutFn"
    return "miles.rollout.sglang_rollout.generate_rollout"


_ROLLOUT_FORMS = (
    Form(
        "data-source",
        "(args: Namespace, rollout_id: int, data_source: DataSource, *, evaluation: bool = False)"
        " -> RolloutFnTrainOutput | RolloutFnEvalOutput",
        "a function of three positional arguments and evaluation=",
    ),
    Form(
        "no-data-source",
        "(args: Namespace, rollout_id: int, *, evaluation: bool = False) -> RolloutFnTrainOutput | RolloutFnEvalOutput",
        "a function of two positional arguments and evaluation=",
    ),
    Form(
        "class",
        "(input: RolloutFnConstructorInput)",
        "a class; its objects are called with RolloutFnTrainInput or RolloutFnEvalInput",
        target="class",
    ),
)


@plug_point(
    flag="--rollout-function-path",
    when="Once per rollout, unless saved rollouts are replayed.",
    help="Plug-in: the whole rollout.",
    process="manager",
    forms=_ROLLOUT_FORMS,
    may_be_async=True,
    default_factory=_default_rollout_function,
)
class RolloutFunction(Protocol):
    """One rollout: prompts in, scored groups out.

    Plug-ins may be functions or classes, `def` or `async def`. A value that is not a RolloutFnTrainOutput is taken as
    its `samples`: `list[list[Sample]]`, one inner list per prompt. Each sample needs `tokens`, `response_length`,
    `reward` and `status`.
    """

    def __call__(self, input: RolloutFnInput) -> RolloutFnTrainOutput | RolloutFnEvalOutput: ...


@plug_point(
    flag="--eval-function-path",
    when="Once per evaluation; a class is instantiated apart from the one for training.",
    help="Plug-in: the evaluation rollout; the rollout function where unset.",
    process="manager",
    forms=_ROLLOUT_FORMS,
    may_be_async=True,
)
class EvalFunction(Protocol):
    """All evaluation data sets, called with `evaluation=True` (or RolloutFnEvalInput).

    A value that is not a RolloutFnEvalOutput is taken as its `data`: data set name -> `{"rewards": [...],
    "truncated": [...], "samples": [...]}`, of which `rewards` is required.
    """

    def __call__(self, input: RolloutFnInput) -> RolloutFnEvalOutput: ...


# ---- 2, 3: one sample ---------------------------------------------------------------------------------------------


@plug_point(
    flag="--custom-generate-function-path",
    when="Once per sample that is not finished, in training and evaluation, while a concurrency slot is held.",
    help="Plug-in: the generation of one sample.",
    process="manager",
    forms=(
        Form(
            "args-sample-params",
            "(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample | list[Sample]",
            "three positional arguments; evaluation= is passed to a function that names it",
            also=("evaluation",),
            excludes=("input",),
        ),
        Form("input", "(input: GenerateFnInput) -> GenerateFnOutput", "one positional argument"),
    ),
    awaited=True,
    instantiates=True,
    tolerates=(("drop", _LOSES_SAMPLE),),
    retries=True,
)
class CustomGenerateFunction(Protocol):
    """The response to one prompt.

    Fills `tokens` (prompt and response ids), `response`, `response_length` and `status`; `loss_mask` where some
    response tokens are not to be trained (tool output), `rollout_log_probs` where importance sampling is on. A reward
    that it sets is kept. Returns the sample, or a list for several samples from one prompt.
    """

    async def __call__(self, input: GenerateFnInput) -> GenerateFnOutput: ...


_NOT_OURS = ("args", "sample", "samples")


@plug_point(
    flag="--custom-rm-path",
    when="Once per generated sample, or once per group with --group-rm.",
    help="Plug-in: the reward.",
    process="manager",
    forms=(
        Form(
            "sample-or-samples",
            "(args: Namespace, sample: Sample) -> float",
            "two positional arguments; a group arrives as a list",
        ),
        Form(
            "sample",
            "(args: Namespace, sample: Sample) -> float",
            "the second parameter is annotated Sample; a group is scored one by one",
            tells=(Tell(1, annotations=("Sample",)),),
            needs_tell=True,
        ),
        Form(
            "samples",
            "(args: Namespace, samples: list[Sample]) -> list[float]",
            "the second parameter is named samples or annotated list[Sample]; a single sample arrives in a list",
            tells=(Tell(1, names=("samples",), annotations=("list[Sample]", "Sequence[Sample]", "Group")),),
            needs_tell=True,
        ),
        Form(
            "trl",
            "(*, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]",
            "a parameter is named completions; called by keyword, columns from metadata and label",
            requires=("completions",),
            excludes=_NOT_OURS,
        ),
        Form(
            "verl",
            "(*, data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any]) -> float",
            "parameters are named solution_str and ground_truth; called by keyword",
            requires=("solution_str", "ground_truth"),
            excludes=_NOT_OURS,
        ),
    ),
    awaited=True,
    instantiates=True,
    tolerates=(("drop", _LOSES_SAMPLE), ("mask", _LOSES_SAMPLE + "; its group keeps its place")),
    retries=True,
)
class CustomRm(Protocol):
    """The reward of one sample: a number, or a dict from which `--reward-key` picks the number.

    None, NaN, an infinity or another type is a failed score, never a number. With `--group-rm` the second argument is
    the list of the group's samples and the return a list of equal length.
    """

    async def __call__(self, args: Namespace, sample: Sample) -> float | dict[str, Any]: ...


# ---- 4 to 7: groups -----------------------------------------------------------------------------------------------


@plug_point(
    flag="--dynamic-sampling-filter-path",
    when="Once per finished group, in order of completion.",
    help="Plug-in: keep or drop a finished group.",
    process="manager",
    tolerates=(("drop", "the group is dropped, counted under the reason filter_failed"),),
)
class DynamicSamplingFilter(Protocol):
    """Whether a group is trained. `reason` is counted as `rollout/dynamic_filter/drop_<reason>`.

    Any other value counts by its truth; None drops the group under the reason `returned_none`.
    """

    def __call__(self, args: Namespace, samples: list[Sample]) -> DynamicFilterOutput: ...


@plug_point(
    flag="--buffer-filter-path",
    when="Once per request for prompts while the buffer holds groups.",
    help="Plug-in: which groups leave the rollout buffer.",
    process="manager",
    forms=(
        Form(
            "live-buffer",
            "(args: Namespace, rollout_id: int | None, buffer: list[list[Sample]], num_samples: int)"
            " -> list[list[Sample]]",
            "four positional arguments; the function removes what it takes",
            tells=(Tell(2, names=("buffer",)),),
        ),
        Form(
            "groups",
            "(samples: list[list[Sample]]) -> list[list[Sample]]",
            "one positional argument; what it leaves out leaves the buffer",
            tells=(Tell(0, names=("samples", "groups", "buffer")),),
        ),
    ),
)
class BufferFilter(Protocol):
    """At most `num_samples` groups out of the buffer, which is the live list: what is returned must be removed."""

    def __call__(
        self, args: Namespace, rollout_id: int | None, buffer: list[Group], num_samples: int
    ) -> list[Group]: ...


@plug_point(
    flag="--rollout-sample-filter-path",
    when="Once per rollout, on the groups that are trained, sorted by index.",
    help="Plug-in: set remove_sample on samples that are not to be trained.",
    process="manager",
    forms=(
        Form(
            "groups",
            "(args: Namespace, samples: list[list[Sample]]) -> None",
            "two positional arguments",
        ),
        Form(
            "samples",
            "(args: Namespace, samples: list[Sample]) -> None",
            "the second parameter is annotated list[Sample]; it receives one flat list",
            tells=(Tell(1, annotations=("list[Sample]", "Sequence[Sample]")),),
            needs_tell=True,
        ),
    ),
)
class RolloutSampleFilter(Protocol):
    """Sets `sample.remove_sample = True` on samples that keep their place in statistics but carry no loss."""

    def __call__(self, args: Namespace, groups: list[Group]) -> None: ...


@plug_point(
    flag="--rollout-all-samples-process-path",
    when="Once per rollout, after the sample filter, on every group that finished.",
    help="Plug-in: see kept and dropped groups.",
    process="manager",
    forms=(
        Form(
            "get-samples",
            "(args: Namespace, all_groups: list[list[Sample]], get_samples: Callable[[int], list[list[Sample]]])"
            " -> None",
            "three positional arguments",
        ),
        Form("groups", "(args: Namespace, samples: list[list[Sample]]) -> None", "two positional arguments"),
    ),
    tolerates=(("drop", _SKIPPED),),
)
class RolloutAllSamplesProcess(Protocol):
    """Sees kept, filtered and surplus groups, sorted by index. `get_samples` is the data source's bound method."""

    def __call__(
        self, args: Namespace, all_groups: list[Group], get_samples: Callable[[int], list[Group]]
    ) -> None: ...


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
        Form("args", "(args: Namespace) -> None", "one positional argument"),
    ),
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


# ---- 12 to 15: samples to batches, logging, data ------------------------------------------------------------------


@plug_point(
    flag="--custom-reward-post-process-path",
    when="Once per rollout in the default conversion, on the flat list of trained samples.",
    help="Plug-in: raw rewards to training rewards.",
    process="manager",
)
class CustomRewardPostProcess(Protocol):
    """`(raw_rewards, rewards)`, each with one number (or 1-D tensor) per sample."""

    def __call__(self, args: Namespace, samples: list[Sample]) -> tuple[list[float], list[float]]: ...


@plug_point(
    flag="--custom-convert-samples-to-train-data-path",
    when="Once per rollout, in place of the default conversion and of the reward post-processing.",
    help="Plug-in: samples to train data.",
    process="manager",
)
class CustomConvertSamplesToTrainData(Protocol):
    """Columns with one entry per sample: `tokens`, `response_lengths`, `loss_masks`, `rewards`, and optional ones."""

    def __call__(self, args: Namespace, samples: list[Sample]) -> dict[str, Any]: ...


@plug_point(
    flag="--custom-rollout-log-function-path",
    when="Once per rollout, before conversion, on the flat list of trained samples.",
    help="Plug-in: log a training rollout.",
    process="manager",
    tolerates=(("drop", "the default logging runs"),),
)
class CustomRolloutLogFunction(Protocol):
    """True to skip the default logging. `rollout_time` is in seconds."""

    def __call__(
        self,
        rollout_id: int,
        args: Namespace,
        samples: list[Sample],
        rollout_extra_metrics: dict[str, Any] | None,
        rollout_time: float,
    ) -> bool: ...


@plug_point(
    flag="--custom-eval-rollout-log-function-path",
    when="Once per evaluation.",
    help="Plug-in: log an evaluation.",
    process="manager",
    tolerates=(("drop", "the default logging runs"),),
)
class CustomEvalRolloutLogFunction(Protocol):
    """True to skip the default logging. `data`: data set name -> `{"rewards": [...], ...}`."""

    def __call__(
        self, rollout_id: int, args: Namespace, data: dict[str, dict[str, Any]], extra_metrics: dict[str, Any] | None
    ) -> bool: ...


@plug_point(
    flag="--data-source-path",
    when="Once per run, before the first rollout.",
    help="Plug-in: where prompts come from.",
    process="manager",
    forms=(
        Form("class", "(args: Namespace) -> None", "a class of one positional argument", target="class"),
        Form("factory", "(args: Namespace) -> DataSource", "a function of one positional argument"),
    ),
    methods=("get_samples", "add_samples", "save", "load"),
    default_factory=lambda: "miles.rollout.data_source.RolloutDataSourceWithBuffer",
)
class DataSourceClass(Protocol):
    """An object with `get_samples(n)` -> n groups, `add_samples(groups)` (also `[]`), `save(rollout_id)` and
    `load(rollout_id)`."""

    def __call__(self, args: Namespace) -> Any: ...


# ---- 17, 20: Megatron ---------------------------------------------------------------------------------------------

_MEGATRON = ("megatron",)


@plug_point(
    flag="--custom-megatron-init-path",
    when="Once per trainer process, at the end of Megatron's initialisation.",
    help="Plug-in: end of Megatron init.",
    process="trainer",
    backends=_MEGATRON,
)
class CustomMegatronInit(Protocol):
    """Runs after model-parallel groups, seeds and tokenizer are set, before the model is built."""

    def __call__(self, args: Namespace) -> None: ...


@plug_point(
    flag="--custom-megatron-before-log-prob-hook-path",
    when="Once per forward-only pass, on every rank, under torch.no_grad.",
    help="Plug-in: before every forward-only pass.",
    process="trainer",
    backends=_MEGATRON,
)
class CustomMegatronBeforeLogProbHook(Protocol):
    """`model` is the list of model chunks; `store_prefix` is "ref_" in the reference pass, else ""."""

    def __call__(self, args: Namespace, model: list[torch.nn.Module], store_prefix: str) -> None: ...


@plug_point(
    flag="--custom-megatron-before-train-step-hook-path",
    when="Once per optimizer step, after gradients are zeroed, before the forward pass.",
    help="Plug-in: before every optimizer step.",
    process="trainer",
    backends=_MEGATRON,
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
    when="Once per checkpoint, after it is complete.",
    help="Plug-in: after a checkpoint is saved.",
    process="trainer",
    tolerates=(("drop", _SKIPPED),),
    retries=True,
)
class CustomMegatronPostSaveHook(Protocol):
    """`hf_checkpoint_dir` is None where no Hugging Face folder was written."""

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
)
class CustomModelProvider(Protocol):
    """A module that behaves like Megatron-Core's GPTModel."""

    def __call__(self, pre_process: bool, post_process: bool, vp_stage: int | None = None) -> torch.nn.Module: ...


# ---- 18: router ---------------------------------------------------------------------------------------------------


@plug_point(
    flag="--miles-router-middleware-paths",
    when="Once per router, which then sends every request through it; later paths are outer.",
    help="Plug-in: Starlette middleware classes of the miles router.",
    process="router",
    plural=True,
    default_factory=lambda: "",
    forms=(
        Form(
            "class",
            "(app: ASGIApp, *, router: MilesRouter)",
            "a class of one positional argument and router=",
            target="class",
        ),
    ),
)
class MilesRouterMiddleware(Protocol):
    """An ASGI middleware class, usually a `starlette.middleware.base.BaseHTTPMiddleware` with `async dispatch`."""

    def __call__(self, app: Any, *, router: Any) -> Any: ...


# ---- loaded by the built-in generate functions --------------------------------------------------------------------


@plug_point(
    flag="--custom-agent-function-path",
    when="Once per sample by miles.rollout.generate_hub.agentic_tool_call.",
    help="Plug-in: the agent of agentic_tool_call.",
    process="manager",
    forms=(
        Form(
            "published",
            "(*, base_url: str, prompt: str | list[dict[str, Any]], request_kwargs: dict[str, Any]) -> None",
            "all arguments by keyword; metadata= is passed to a function that names it",
            also=("metadata",),
        ),
    ),
    awaited=True,
    retries=True,
)
class CustomAgentFunction(Protocol):
    """Talks to `base_url` as to an OpenAI server; the conversation is recorded there and becomes the sample."""

    async def __call__(
        self,
        *,
        base_url: str,
        prompt: str | list[dict[str, Any]],
        request_kwargs: dict[str, Any],
        metadata: dict[str, Any] | None = None,
    ) -> Any: ...


@plug_point(
    flag="--generate-tool-specs-path",
    when="Once per sample by miles.rollout.generate_hub.multi_turn.",
    help="Plug-in: list of OpenAI tool specifications for multi_turn.",
    process="manager",
    forms=(Form("list", "() -> list[dict[str, Any]]", "a list", target="value"),),
)
class GenerateToolSpecs(Protocol):
    """The list itself, one OpenAI tool specification per tool."""

    def __call__(self) -> list[dict[str, Any]]: ...


@plug_point(
    flag="--generate-execute-tool-function-path",
    when="Once per tool call by miles.rollout.generate_hub.multi_turn.",
    help="Plug-in: executes one tool call for multi_turn.",
    process="manager",
    awaited=True,
    retries=True,
)
class GenerateExecuteToolFunction(Protocol):
    """The tool's answer as text."""

    async def __call__(self, name: str, params: dict[str, Any]) -> str: ...


def plug_point_named(text: str) -> PlugPoint | None:
    """A plug point by name, flag or key: `custom_rm`, `--custom-rm-path`, `custom-rm`."""
    return CATALOG.get(normalise_key(text).replace("-", "_"))
