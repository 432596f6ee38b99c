"""--miles-router-middleware-paths: classes made with `(app, router=)`; later paths are outer."""

from __future__ import annotations

import pytest
from hooks_helpers import bound_hooks

from miles.errors import UsageError


def test_called_as_the_catalogue_says() -> None:
    hooks = bound_hooks("miles_router_middleware", "training:Middleware", "training:Outer")
    first, second = hooks.miles_router_middleware
    made = second(first("app", router="router"), router="router")
    assert type(made).__name__ == "Outer" and made.router == "router" and made.app.app == "app"
    assert {hook.form for hook in hooks.miles_router_middleware} == {"class"}


def test_each_is_recorded() -> None:
    hooks = bound_hooks("miles_router_middleware", "training:Middleware", "training:Outer")
    assert set(hooks.sources()) == {"--miles-router-middleware-paths[0]", "--miles-router-middleware-paths[1]"}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("WithoutRouter", "unexpected keyword argument 'router'"),
        ("agent", "name a class"),
    ],
)
def test_found_wrong_before_the_start(name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        bound_hooks("miles_router_middleware", f"training:{name}")
