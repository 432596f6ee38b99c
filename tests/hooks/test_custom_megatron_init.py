"""--custom-megatron-init-path: `(args)`, bound and checked; trainers of both backends call it."""

from __future__ import annotations

from argparse import Namespace

import pytest
from hooks_helpers import bound

from miles.errors import HookError, UsageError

ARGS = Namespace()


def test_called_as_the_catalogue_says() -> None:
    hook = bound("custom_megatron_init", "training:megatron_init")
    seen = hook.target.__globals__["SEEN"]
    seen.clear()
    assert hook(ARGS) is None and seen == ["init"] and hook.form == "published"
    assert hook.point.backends == ("fsdp", "megatron") and hook.point.process == "trainer"


def test_a_coroutine_is_refused_before_and_while_the_run_goes() -> None:
    with pytest.raises(UsageError, match="called synchronously"):
        bound("custom_megatron_init", "training:async_init")
    with pytest.raises(HookError, match="returned a coroutine"):
        bound("custom_megatron_init", "training:hidden_coroutine")(ARGS)
