"""--custom-model-provider-path: `pre_process=` and `post_process=` by keyword, `vp_stage=` for those who name it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hooks_helpers import bound_hooks

from miles.errors import HookError
from miles.hooks import function_registry


class Model(torch.nn.Module):
    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.given = given


def two(pre_process: bool, post_process: bool) -> Model:
    return Model(pre_process=pre_process, post_process=post_process)


def published(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> Model:
    return Model(pre_process=pre_process, post_process=post_process, vp_stage=vp_stage)


def keywords_only(*, post_process: bool, pre_process: bool) -> Model:
    return two(pre_process, post_process)


def anything(**given: Any) -> Model:
    return Model(**given)


def hook_of(fn: Callable[..., Any]) -> Any:
    with function_registry.temporary("test:it", fn):
        return bound_hooks("custom_model_provider", "x:y", args={"custom_model_provider_path": "test:it"})


BOTH = {"pre_process": True, "post_process": False}


@pytest.mark.parametrize(
    ("fn", "given"),
    [(two, BOTH), (published, {**BOTH, "vp_stage": 1}), (keywords_only, BOTH), (anything, BOTH)],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_called_as_the_catalogue_says(fn: Callable[..., Any], given: dict[str, Any]) -> None:
    hook = hook_of(fn).custom_model_provider
    assert hook(True, False, vp_stage=1).given == given and hook.form == "published"


@pytest.mark.parametrize(
    ("value", "says"), [(None, "returned None, expected a model"), (3, "returned an int, expected a model")]
)
def test_what_is_no_model(value: Any, says: str) -> None:
    with pytest.raises(HookError, match=says):
        hook_of(lambda pre_process, post_process: value).custom_model_provider(True, True)
