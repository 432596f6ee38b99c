"""Shared by the tests of plug points: bind one miniature plug-in by its path."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from miles.hooks import CATALOG, Hook, Hooks, bind
from miles.types import Sample

PLUGINS = Path(__file__).parent / "plugins"


def path_of(name: str) -> str:
    """`rewards:constant` -> the path of that function among the miniature plug-ins."""
    file, _, function = name.partition(":")
    return f"{PLUGINS / file}.py:{function}"


def bound_hooks(point: str, *names: str, args: dict[str, Any] | None = None, **settings: Any) -> Hooks:
    paths = [path_of(name) for name in names]
    dest = CATALOG[point].dest
    given = Namespace(**{"reward_key": None, dest: paths if CATALOG[point].plural else paths[0], **(args or {})})
    return bind(given, **settings)


def bound(point: str, name: str, *, whole_run: bool = False, **settings: Any) -> Any:
    """The Hook of one plug-in; with `whole_run` the Hooks that hold it."""
    hooks = bound_hooks(point, name, **settings)
    hook = getattr(hooks, point)
    assert isinstance(hook, Hook)
    return hooks if whole_run else hook


def sample(index: int = 0, **fields: Any) -> Sample:
    fields = {"group_index": 0, "prompt": "2+2=", "response": "4", "label": "4", "tokens": [1, 2, 3], **fields}
    return Sample(index=index, response_length=1, **fields)


def group(size: int = 3, **fields: Any) -> list[Sample]:
    return [sample(i, **fields) for i in range(size)]


def answered(index: int, **fields: Any) -> Sample:
    """A sample that generation is done with: two prompt tokens, two response tokens."""
    fields = {"status": Sample.Status.COMPLETED, "rollout_log_probs": [-0.5, -0.5], **fields}
    return Sample(index=index, tokens=[6, 7, 8, 9], response="89", response_length=2, **fields)
