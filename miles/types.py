"""The nouns that flow through a run: samples, groups, what rollout and generate functions take and return.

Nothing here imports torch or numpy: plug-ins and the command line import this module before anything heavy.
The published import paths (`miles.utils.types`, `miles.rollout.base_types`, `miles.rollout.filter_hub.base_types`)
re-export these names.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass
class Sample:
    """One prompt with one response, and everything that is known about it.

    Mutable and deliberately loose: plug-ins set attributes that are not declared here, store plain strings as status
    and tensors as reward; all of it survives `copy.deepcopy` and `to_dict` / `from_dict`.

    Example::

        Sample(group_index=3, index=24, prompt="859+467=?", label="1326",
               tokens=[12, 9, 13, 4, 8, 10, 11, 30, 5, 7, 1], response="1326<eos>", response_length=3,
               reward=1.0, rollout_log_probs=[-0.1, -0.02, -0.3], status=Sample.Status.COMPLETED,
               weight_versions=["4"])
    """

    class Status(str, Enum):  # noqa: UP042 (a StrEnum would print as its bare value)
        """Where a sample stands. FAILED is a recoverable failure that may carry a useful partial response.

        A member equals its value, so the plain strings that some plug-ins store count like members.
        """

        PENDING = "pending"
        COMPLETED = "completed"
        TRUNCATED = "truncated"
        ABORTED = "aborted"
        FAILED = "failed"

    @dataclass
    class SpecInfo:
        """Counters of speculative decoding, summed over the engine calls of one sample."""

        spec_accept_token_num: int = 0
        spec_draft_token_num: int = 0
        spec_verify_ct: int = 0
        completion_token_num: int = 0

        @property
        def spec_accept_rate(self) -> float:
            """accepted / drafted tokens; 0.0 without drafts."""
            return self.spec_accept_token_num / self.spec_draft_token_num if self.spec_draft_token_num else 0.0

        @property
        def spec_accept_length(self) -> float:
            """completion tokens per verification step; 0.0 without steps."""
            return self.completion_token_num / self.spec_verify_ct if self.spec_verify_ct else 0.0

        def add(self, meta_info: dict[str, Any]) -> None:
            self.spec_accept_token_num += meta_info.get("spec_accept_token_num", 0)
            self.spec_draft_token_num += meta_info.get("spec_draft_token_num", 0)
            self.spec_verify_ct += meta_info.get("spec_verify_ct", 0)
            self.completion_token_num += meta_info.get("completion_tokens", 0)

        def to_dict(self) -> dict[str, int]:
            return dict(vars(self))

        @staticmethod
        def from_dict(data: dict[str, int]) -> Sample.SpecInfo:
            return Sample.SpecInfo(**data)

    @dataclass
    class PrefixCacheInfo:
        """Prompt tokens that the engine found in its prefix cache, summed over the engine calls of one sample."""

        cached_tokens: int = 0
        total_prompt_tokens: int = 0

        @property
        def prefix_cache_hit_rate(self) -> float:
            return self.cached_tokens / self.total_prompt_tokens if self.total_prompt_tokens else 0.0

        def add(self, meta_info: dict[str, Any]) -> None:
            self.cached_tokens += meta_info.get("cached_tokens", 0)
            self.total_prompt_tokens += meta_info.get("prompt_tokens", 0)

        def to_dict(self) -> dict[str, int]:
            return dict(vars(self))

        @staticmethod
        def from_dict(data: dict[str, int]) -> Sample.PrefixCacheInfo:
            return Sample.PrefixCacheInfo(**data)

    # Which prompt this answers: one group_index per prompt over the whole job, one index per sample (the sort key).
    group_index: int | None = None
    index: int | None = None
    # A rendered string, a raw string, or a message list.
    prompt: str | list[dict[str, Any]] = ""
    # Prompt ids followed by response ids.
    tokens: list[int] = field(default_factory=list)
    # Raw media ("images", "videos"), and the processor's output for them without input_ids and attention_mask.
    multimodal_inputs: dict[str, Any] | None = None
    multimodal_train_inputs: dict[str, Any] | None = None
    response: str = ""
    # How many trailing entries of `tokens` are the response (tool output included).
    response_length: int = 0
    # Any JSON value of the data row.
    label: Any = None
    reward: float | dict[str, Any] | None = None
    # One entry per response token, 1 = trained, 0 = ignored; None means all ones.
    loss_mask: list[int] | None = None
    # One entry per engine call that reported a version.
    weight_versions: list[str] = field(default_factory=list)
    # One float per response token, under the distribution that was sampled from.
    rollout_log_probs: list[float] | None = None
    # int32 [len(tokens) - 1, num_layers, moe_router_topk].
    rollout_routed_experts: np.ndarray | None = None
    # True zeroes the loss mask at conversion; the sample keeps its place in statistics and counts.
    remove_sample: bool = False
    status: Sample.Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)
    train_metadata: dict[str, Any] | None = None
    # Seconds spent outside the engine (tools, environments).
    non_generation_time: float = 0.0
    spec_info: SpecInfo = field(default_factory=SpecInfo)
    prefix_cache_info: PrefixCacheInfo = field(default_factory=PrefixCacheInfo)

    def to_dict(self) -> dict[str, Any]:
        """A shallow copy of all attributes, declared or not; status and counters become plain values."""
        data = dict(self.__dict__)
        data["status"] = self.status.value if isinstance(self.status, Sample.Status) else self.status
        data["spec_info"] = self.spec_info.to_dict()
        data["prefix_cache_info"] = self.prefix_cache_info.to_dict()
        return data

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Sample:
        """The inverse of `to_dict`; keys that are no fields become attributes."""
        data = dict(data)
        status = data["status"]
        known_statuses = {s.value for s in Sample.Status}
        data["status"] = Sample.Status(status) if status in known_statuses else status
        data["spec_info"] = Sample.SpecInfo.from_dict(data.get("spec_info") or {})
        data["prefix_cache_info"] = Sample.PrefixCacheInfo.from_dict(data.get("prefix_cache_info") or {})
        names = {f.name for f in fields(Sample)}
        sample = Sample(**{key: value for key, value in data.items() if key in names})
        for key, value in data.items():
            if key not in names:
                setattr(sample, key, value)
        return sample

    def get_reward_value(self, args: Namespace) -> Any:
        """The scalar reward: `reward` itself, or its entry `args.reward_key` where rewards are dicts."""
        if not args.reward_key:
            return self.reward
        return self.reward[args.reward_key]  # type: ignore[index]

    @property
    def effective_response_length(self) -> int:
        """Response tokens that are trained on."""
        return int(sum(self.loss_mask)) if self.loss_mask is not None else self.response_length

    def validate(self) -> None:
        """Raise AssertionError where the lengths of this sample's columns contradict each other."""
        n = self.response_length
        assert n >= 0, f"response_length must be >= 0, got {n}"
        assert len(self.tokens) >= n, f"response_length {n} exceeds the {len(self.tokens)} tokens"
        if self.loss_mask is not None:
            assert len(self.loss_mask) == n, f"loss_mask length {len(self.loss_mask)} != response_length {n}"
        if self.rollout_log_probs is not None:
            got = len(self.rollout_log_probs)
            assert got == n, f"rollout_log_probs length {got} != response_length {n}"
        if self.rollout_routed_experts is not None:
            got = len(self.rollout_routed_experts)
            assert got == len(self.tokens) - 1, f"rollout_routed_experts length {got} != {len(self.tokens)} tokens - 1"

    def update_from_meta_info(self, args: Namespace, meta_info: dict[str, Any]) -> None:
        """Take over what the engine reports beside the text: counters, weight version, finish reason."""
        if getattr(args, "sglang_speculative_algorithm", None):
            self.spec_info.add(meta_info)
        self.prefix_cache_info.add(meta_info)
        if "weight_version" in meta_info:
            self.weight_versions.append(meta_info["weight_version"])
        finish = STATUS_OF_FINISH_REASON.get(meta_info["finish_reason"]["type"])
        if finish is not None:
            self.status = finish


STATUS_OF_FINISH_REASON = {
    "stop": Sample.Status.COMPLETED,
    "length": Sample.Status.TRUNCATED,
    "abort": Sample.Status.ABORTED,
}

Group = list[Sample]
"""The samples of one prompt. Multi-sample generate functions put a `list[Sample]` where a Sample stands."""


@dataclass(frozen=True)
class Failure:
    """A plug-in call that failed and was tolerated by its policy. Never a number: nothing can train on it.

    A sample whose score failed carries one as its attribute `failure`, has `reward is None` and status FAILED.

    Example::

        Failure(flag="--custom-rm-path", path="my.rewards.grade", kind="exception",
                message="ZeroDivisionError: division by zero", location="my/rewards.py:31",
                sample_index=24, bundle="runs/x/failures/000001")
    """

    flag: str
    path: str
    kind: str  # "exception", "none", "nan", "type", "length" or "timeout"
    message: str
    location: str  # file:line of the innermost frame in the user's own code
    sample_index: int | None = None
    bundle: str | None = None  # folder that `miles replay` re-runs
    dropped: bool = False  # its policy is `drop`: optimizer steps do not count the sample either


def is_failed(sample: Any) -> bool:
    """True for a sample whose score failed under a tolerant policy."""
    return getattr(sample, "failure", None) is not None


def is_dropped(sample: Any) -> bool:
    """True for a failed sample that has left its group under the policy `drop`; under `mask` it keeps its place."""
    return is_failed(sample) and bool(sample.failure.dropped)


# ---- rollout functions -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RolloutFnConstructorInput:
    """What a rollout class is built with, as its one positional argument."""

    args: Namespace
    data_source: Any


@dataclass(frozen=True)
class RolloutFnBaseInput:
    rollout_id: int

    @property
    def evaluation(self) -> bool:
        raise NotImplementedError


@dataclass(frozen=True)
class RolloutFnTrainInput(RolloutFnBaseInput):
    @property
    def evaluation(self) -> bool:
        return False


@dataclass(frozen=True)
class RolloutFnEvalInput(RolloutFnBaseInput):
    @property
    def evaluation(self) -> bool:
        return True


@dataclass
class RolloutFnTrainOutput:
    """The groups of one rollout. `metrics` are logged under the keys given."""

    samples: list[Group]
    metrics: dict[str, Any] | None = None


@dataclass
class RolloutFnEvalOutput:
    """Per data set name: `rewards` (required), `truncated`, `samples`; or `conversations` alone, which are samples that
    nothing was generated for: ready to be trained on, they get a loss from the trainer in place of rewards.

    Example: `{"carry": {"rewards": [1.0, 0.0], "truncated": [False, False], "samples": [...]}}`,
    `{"heldout": {"conversations": [...]}}`
    """

    data: dict[str, dict[str, Any]]
    metrics: dict[str, Any] | None = None


RolloutFnInput = RolloutFnTrainInput | RolloutFnEvalInput
RolloutFnOutput = RolloutFnTrainOutput | RolloutFnEvalOutput


# ---- generate functions ------------------------------------------------------------------------------------------


class HasArgs(Protocol):
    args: Namespace


@dataclass(frozen=True)
class GenerateFnInput:
    """What a one-input generate function receives. `sampling_params` belongs to this call alone."""

    state: HasArgs
    sample: Sample
    sampling_params: dict[str, Any]
    evaluation: bool

    @property
    def args(self) -> Namespace:
        return self.state.args


@dataclass(frozen=True)
class GenerateFnOutput:
    samples: Sample | list[Sample]


# ---- filters -----------------------------------------------------------------------------------------------------


@dataclass
class DynamicFilterOutput:
    """Whether a finished group is trained; `reason` is counted as `rollout/dynamic_filter/drop_<reason>`."""

    keep: bool
    reason: str | None = None


# ---- shared by trainer and engines -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParamInfo:
    """One parameter as the trainer announces it to the engines."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    attrs: dict[str, Any]
    size: int
    src_rank: int


RolloutBatch = dict[str, Any]
"""The published dict view of a train batch: column name -> list with one entry per sample."""


@dataclass(frozen=True)
class MultimodalType:
    name: str
    placeholder: str


class MultimodalTypes:
    """The media types that a prompt may carry, each with the placeholder that stands for one item."""

    IMAGE = MultimodalType("image", "<image>")
    VIDEO = MultimodalType("video", "<video>")
    AUDIO = MultimodalType("audio", "<audio>")

    @classmethod
    def all(cls) -> list[MultimodalType]:
        return [cls.IMAGE, cls.VIDEO, cls.AUDIO]

    @classmethod
    def get(cls, name: str) -> MultimodalType | None:
        return next((t for t in cls.all() if t.name == name), None)
