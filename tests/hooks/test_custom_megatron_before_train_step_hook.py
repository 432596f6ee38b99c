"""--custom-megatron-before-train-step-hook-path: six positional arguments, bound and checked."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch
from hooks_helpers import bound

from miles.errors import UsageError


def test_called_as_the_catalogue_says() -> None:
    hook = bound("custom_megatron_before_train_step_hook", "training:before_train_step")
    seen = hook.target.__globals__["SEEN"]
    seen.clear()
    hook(Namespace(), 7, 1, ["chunk"], "optimizer", "scheduler")
    assert seen == [(7, 1)] and hook.form == "published" and hook.point.backends == ("fsdp", "megatron")


def test_too_few_parameters_are_found_before_the_start() -> None:
    with pytest.raises(UsageError, match=r"the call passes \(args, rollout_id, step_id, model, optimizer, opt_param"):
        bound("custom_megatron_before_train_step_hook", "training:before_log_prob")


# ---- in a trainer (with Megatron: tests/parallel/test_megatron_plug_ins.py) -----------------------------------------


def test_once_per_step_with_zero_gradients_in_training_mode(stage: Any) -> None:
    seen: list[tuple[int, int]] = []

    def before(
        args: Namespace, rollout_id: int, step_id: int, model: list[torch.nn.Module], optimizer: Any, scheduler: Any
    ) -> None:
        seen.append((rollout_id, step_id))
        assert type(model) is list and model[0].training and torch.is_grad_enabled()
        assert all(p.grad is None or not p.grad.any() for p in model[0].parameters())
        assert optimizer.param_groups and scheduler.lr > 0

    s = stage("--num-steps-per-rollout", 2, custom_megatron_before_train_step_hook=before)
    for rollout_id in range(2):
        s.train(s.rollout(rollout_id), rollout_id)
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_what_it_freezes_stays(stage: Any) -> None:
    """Called before the forward pass: the step already is without the frozen parameter."""

    def before(args: Namespace, rollout_id: int, step_id: int, model: list[Any], *_: Any) -> None:
        model[0].get_input_embeddings().weight.requires_grad_(False)

    s = stage(custom_megatron_before_train_step_hook=before)
    embedding = s.actor.backend.model.get_input_embeddings().weight
    first, other = embedding.detach().clone(), s.actor.backend.model.model.norm.weight.detach().clone()
    try:
        s.train(s.rollout())
    finally:
        embedding.requires_grad_(True)
    assert torch.equal(embedding, first)
    assert not torch.equal(s.actor.backend.model.model.norm.weight, other)
