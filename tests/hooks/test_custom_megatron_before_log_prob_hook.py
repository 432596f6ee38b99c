"""--custom-megatron-before-log-prob-hook-path: `(args, model, store_prefix)`, bound and checked."""

from __future__ import annotations

from argparse import Namespace

import pytest
from hooks_helpers import bound

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
