"""--generate-tool-specs-path: the list itself, which nothing copies."""

from __future__ import annotations

from typing import Any

import pytest
from hooks_helpers import bound, bound_hooks

from miles.errors import UsageError
from miles.hooks import function_registry


def test_the_list_itself() -> None:
    specs = bound("generate_tool_specs", "training:specs")
    assert specs() is specs.target and specs.form == "list"
    assert specs()[0]["function"]["name"] == "add"


def test_a_function_is_refused() -> None:
    with pytest.raises(UsageError, match="name a value"):
        bound("generate_tool_specs", "training:agent")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"type": "function"}, "found     specs, a dict, not a list"),
        ("add", "found     specs, a str, not a list"),
        (["add"], "found     specs, a list with a str at place 0"),
    ],
    ids=str,
)
def test_what_is_no_list_of_specifications(value: Any, says: str) -> None:
    with function_registry.temporary("test:specs", value), pytest.raises(UsageError) as caught:
        bound_hooks("generate_tool_specs", "x:y", args={"generate_tool_specs_path": "test:specs"})
    assert says in str(caught.value)
