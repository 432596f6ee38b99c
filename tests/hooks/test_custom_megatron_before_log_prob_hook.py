"""--custom-megatron-before-log-prob-hook-path: `(args, model, store_prefix)`, bound and checked."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch
from hooks_helpers import bound
from hooks_stage import BASE

from miles.errors import UsageError


def test_called_as_the_catalogue_says() -> None:
    hook = bound("custom_megatron_before_log_prob_hook", "training:before_log_prob")
    seen = hook.target.__globals__["SEEN"]
    seen.clear()
    for prefix in ("ref_", ""):
        hook(Namespace(), ["chunk"], prefix)
    assert seen == ["ref_", ""] and hook.form == "published" and hook.point.backends == ("fsdp", "megatron")


def test_too_few_parameters_are_found_before_the_start() -> None:
    with pytest.raises(UsageError, match="too many positional arguments"):
        bound("custom_megatron_before_log_prob_hook", "training:megatron_init")


# ---- in a trainer (with Megatron: tests/parallel/test_megatron_plug_ins.py) -----------------------------------------


def passes(stage: Any, *flags: object) -> list[tuple[str, bool, bool]]:
    """(prefix, training mode, gradients) of every call in one rollout."""
    seen: list[tuple[str, bool, bool]] = []

    def before(args: Namespace, model: list[torch.nn.Module], store_prefix: str) -> None:
        assert type(model) is list and len(model) == 1
        seen.append((store_prefix, model[0].training, torch.is_grad_enabled()))

    s = stage("--micro-batch-size", 1, *flags, custom_megatron_before_log_prob_hook=before)
    s.train(s.rollout())
    assert s.actor.backend.model_chunks[0].training and torch.is_grad_enabled()
    return seen


def test_once_per_pass_in_evaluation_mode(stage: Any) -> None:
    assert passes(stage) == [("", False, False)]
    reference = ("--use-kl-loss", "--kl-loss-coef", "0.1", "--ref-load", BASE)
    assert passes(stage, *reference) == [("ref_", False, False), ("", False, False)]


def test_no_pass_no_call(stage: Any) -> None:
    assert passes(stage, "--use-rollout-logprobs") == []
    assert passes(stage, "--loss-type", "sft_loss", "--disable-compute-advantages-and-returns") == []


def test_what_it_sets_holds_in_the_pass(stage: Any) -> None:
    """It may choose another mode of a layer: nothing comes between it and the pass."""
    modes: list[bool] = []

    def before(args: Namespace, model: list[torch.nn.Module], store_prefix: str) -> None:
        embedding = model[0].get_input_embeddings()
        embedding.train()
        embedding.register_forward_hook(lambda module, *_: modes.append(module.training))

    s = stage(custom_megatron_before_log_prob_hook=before)
    report = s.rollout()
    try:
        s.train(report)
    finally:
        s.actor.backend.model.get_input_embeddings()._forward_hooks.clear()
    assert modes and all(modes)
