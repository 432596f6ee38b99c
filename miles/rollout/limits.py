"""How many tokens the engine of a run takes in one request, as far as the model's folder says.

    a prompt that leaves no room for a response   refused when the data is read (`dataset`), else at its request
    prompt + response that are too long together  the response ends where the context is full, and the run says so once

SGLang refuses both at the request, in the middle of a run.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from functools import lru_cache

from miles.config.model_folder import facts_of
from miles.rollout import context

logger = logging.getLogger(__name__)

# Rollout functions that send every prompt of the data to the engine as it is.
BUILT_IN_ROLLOUTS = (
    "miles.rollout.sglang_rollout.generate_rollout",
    "miles.rollout.inference_rollout.inference_rollout_common.InferenceRolloutFn",
)


@lru_cache(maxsize=4)
def _of_model(folder: str) -> int | None:
    facts = facts_of(folder)
    return None if facts is None else facts.context_length


def context_length(args: Namespace) -> int | None:
    """Most tokens of prompt and response together: --sglang-context-length or the model's own, whichever is less.

    None where neither says, as for the name of a model on the hub, or for `args` of a plug-in's own test.
    """
    settings = vars(args)
    folder, given = settings.get("hf_checkpoint"), settings.get("sglang_context_length")
    own = _of_model(folder) if folder else None
    return own if given is None else given if own is None else min(own, given)


def for_prompts_of(args: Namespace) -> int | None:
    """`context_length` where the prompts of the data go to the engine as they are; None where a plug-in decides."""
    settings = vars(args)
    decided = settings.get("custom_generate_function_path") is not None or settings.get("debug_train_only")
    if decided or settings.get("rollout_function_path") not in BUILT_IN_ROLLOUTS:
        return None
    return context_length(args)


def tell_cut(args: Namespace, prompt_tokens: int, wanted: int, limit: int) -> None:
    """Say, once per run, that a response ends before --rollout-max-response-len because the context is full."""
    run = context.installed()
    if run is None or "cut" in run.told:
        return
    run.told.add("cut")
    logger.warning(
        "a prompt of %d tokens and a response of %d do not fit the context of %d tokens of --hf-checkpoint: such "
        "responses end where the context is full (status truncated). --rollout-max-response-len %d leaves room for "
        "this prompt; --rollout-max-prompt-len leaves long prompts out.",
        prompt_tokens, wanted, limit, limit - prompt_tokens,
    )  # fmt: skip
