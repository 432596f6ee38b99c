"""The plug points of the process that makes samples (and of the router), in the order of the guide's chapters.

Each Protocol's signature is the call that the core makes; its docstring is the contract.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any, Protocol

from miles.hooks.point import Form, Tell
from miles.hooks.registry import plug_point
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

_LOSES_SAMPLE = "the sample leaves its group; optimizer steps go on as if it had never been asked for"
_MASKS_SAMPLE = "the sample leaves the statistics of its group and carries no loss, but counts as a sample of its step"
_SKIPPED = "the call is skipped"
_WHOLE_ROLLOUT = (
    "A whole rollout needs its data source and engines; replay the generate function or the reward, or run it again "
    "with --debug-rollout-only."
)


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
    replay=_WHOLE_ROLLOUT,
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
    replay=_WHOLE_ROLLOUT,
)
class EvalFunction(Protocol):
    """All evaluation data sets, called with `evaluation=True` (or RolloutFnEvalInput).

    A value that is not a RolloutFnEvalOutput is taken as its `data`: data set name -> `{"rewards": [...],
    "truncated": [...], "samples": [...]}`, of which `rewards` is required, or -> `{"conversations": [...]}`: finished
    samples, of which the trainer computes the loss (`eval/<name>-loss`, `eval/<name>-perplexity`).
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
    tolerates=(("drop", _LOSES_SAMPLE), ("mask", _MASKS_SAMPLE)),
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
    tolerates=(("drop", _LOSES_SAMPLE), ("mask", _MASKS_SAMPLE)),
    retries=True,
    pure=True,
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
    pure=True,
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
    pure=True,
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
    pure=True,
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


# ---- 12 to 15: samples to batches, logging, data ------------------------------------------------------------------


@plug_point(
    flag="--custom-reward-post-process-path",
    when="Once per rollout in the default conversion, on the flat list of trained samples.",
    help="Plug-in: raw rewards to training rewards.",
    process="manager",
    pure=True,
)
class CustomRewardPostProcess(Protocol):
    """`(raw_rewards, rewards)`, each with one number (or 1-D tensor) per sample."""

    def __call__(self, args: Namespace, samples: list[Sample]) -> tuple[list[float], list[float]]: ...


@plug_point(
    flag="--custom-convert-samples-to-train-data-path",
    when="Once per rollout, in place of the default conversion and of the reward post-processing.",
    help="Plug-in: samples to train data.",
    process="manager",
    pure=True,
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
    replay="It lives as long as the run; `miles train --debug-rollout-only --num-rollout 1` tries it out.",
)
class DataSourceClass(Protocol):
    """An object with `get_samples(n)` -> n groups, `add_samples(groups)` (also `[]`), `save(rollout_id)` and
    `load(rollout_id)`."""

    def __call__(self, args: Namespace) -> Any: ...


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
    replay="It handles the requests of a router that is running.",
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
    replay="It talks to the session server of a run.",
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
    pure=True,
    replay="It is a list, which nothing calls.",
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
    """The tool's answer as text, which is appended to the conversation and carries no loss."""

    async def __call__(self, name: str, params: dict[str, Any]) -> str: ...
