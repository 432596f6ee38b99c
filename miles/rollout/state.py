"""What the samples of one rollout share: tokenizer, sampling parameters, the concurrency limit, the abort flag.

Plug-ins build one themselves from nothing but `args`; it obeys the `args` it was given. The published singleton of the
function tree is `miles.rollout.sglang_rollout.GenerateState`, a thin subclass.
"""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Awaitable, Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from miles.rollout import context
from miles.rollout.inference_rollout.compatibility import load_generate_function
from miles.rollout.semaphore import Semaphore
from miles.rollout.tokenizer import load_processor, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    from miles.types import GenerateFnInput, GenerateFnOutput, Sample

SEED_RANGE = 2**31
BUILT_IN_GENERATE = "miles.rollout.generate_hub.single_turn.generate"


class GenerateState:
    """Attributes that plug-ins read: args, tokenizer, processor, generate_fn_semaphore, sampling_params, aborted."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.context = context.current(args)
        # Wraps the generate call alone, never the reward.
        self.generate_fn_semaphore = Semaphore(
            max(1, args.sglang_server_concurrency * args.rollout_num_gpus // args.rollout_num_gpus_per_engine)
        )
        self.sampling_params = compute_sampling_params(
            args,
            temperature=args.rollout_temperature,
            top_p=args.rollout_top_p,
            top_k=args.rollout_top_k,
            max_new_tokens=args.rollout_max_response_len,
        )
        self.reset()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.args.hf_checkpoint, trust_remote_code=True)

    @cached_property
    def processor(self) -> ProcessorMixin | None:
        return load_processor(self.args.hf_checkpoint, trust_remote_code=True)

    @cached_property
    def generate_function(self) -> Callable[[GenerateFnInput], Awaitable[GenerateFnOutput]]:
        """`--custom-generate-function-path` in the one-input form, or the built-in one, for plug-ins that call it
        themselves: without the run's guard around it."""
        path = self.args.custom_generate_function_path or BUILT_IN_GENERATE
        return load_generate_function(path)

    def reset(self) -> None:
        """Forget what belongs to one rollout."""
        self.aborted = False

    def params_for(self, sample: Sample, position: int, sampling_params: dict[str, Any]) -> dict[str, Any]:
        """A copy of `sampling_params` that belongs to `sample` alone, with its seed where seeds are in use.

        `position` counts inside the group (training) or among the samples of one prompt (evaluation).
        """
        params = dict(sampling_params)
        if self.args.sglang_enable_deterministic_inference:
            params["sampling_seed"] = self.args.rollout_seed + position
        elif self.context.seeds_each_sample and sample.index is not None:
            params["sampling_seed"] = sample_seed(self.args, sample)
        return params


def sample_seed(args: Namespace, sample: Sample) -> int:
    """A seed in [0, 2^31) that depends on the run's two seeds, the sample and how much of it exists already.

    Training samples are numbered over the whole job and evaluation samples per data set (they have no group), so two
    evaluations of one model draw the same responses, and a response that is resumed does not repeat its beginning.
    """
    kind = "eval" if sample.group_index is None else "train"
    text = f"{args.seed}/{args.rollout_seed}/{kind}/{sample.index}/{len(sample.tokens)}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") % SEED_RANGE


def compute_sampling_params(
    args: Namespace, *, temperature: float, top_p: float, top_k: int, max_new_tokens: int | None
) -> dict[str, Any]:
    """SGLang's sampling parameters as the framework sends them (the published set of keys)."""
    return {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "max_new_tokens": max_new_tokens,
        "stop": args.rollout_stop,
        "stop_token_ids": args.rollout_stop_token_ids,
        "skip_special_tokens": args.rollout_skip_special_tokens,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
    }
