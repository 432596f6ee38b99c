"""--custom-megatron-before-train-step-hook-path: six positional arguments, bound and checked."""

from __future__ import annotations

from argparse import Namespace

import pytest
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
