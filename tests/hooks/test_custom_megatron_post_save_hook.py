"""--custom-megatron-post-save-hook-path: `(args, rollout_id, checkpoint_dir, hf_checkpoint_dir)`; may be retried."""

from __future__ import annotations

from argparse import Namespace

import pytest
from hooks_helpers import bound

from miles.errors import HookError
from miles.hooks import bind, function_registry

KEY = "custom-megatron-post-save-hook"


def test_called_as_the_catalogue_says() -> None:
    hook = bound("custom_megatron_post_save_hook", "training:post_save")
    seen = hook.target.__globals__["SEEN"]
    seen.clear()
    hook(Namespace(), 3, "ckpt", None)
    assert seen == ["ckpt"] and hook.form == "published"


def test_it_is_retried_at_once_and_may_be_skipped() -> None:
    attempts: list[int] = []

    def save(args: Namespace, rollout_id: int, checkpoint_dir: str, hf_checkpoint_dir: str | None) -> None:
        attempts.append(rollout_id)
        if len(attempts) < 3:
            raise OSError("bucket is busy")

    with function_registry.temporary("test:save", save):
        args = Namespace(custom_megatron_post_save_hook_path="test:save")
        patient = bind(args, policies={KEY: "retry:2"}).custom_megatron_post_save_hook
        lax = bind(args, policies={KEY: "drop"}).custom_megatron_post_save_hook
        strict = bind(args).custom_megatron_post_save_hook
    assert patient is not None and lax is not None and strict is not None
    patient(args, 7, "ckpt", None)
    assert attempts == [7, 7, 7] and patient.stats.calls == 1 and patient.stats.failures == 0
    attempts.clear()
    assert lax(args, 7, "ckpt", None) is None and lax.stats.failures == 1
    attempts.clear()
    with pytest.raises(HookError, match="OSError: bucket is busy"):
        strict(args, 7, "ckpt", None)
