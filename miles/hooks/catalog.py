"""Every plug point of a run, declared once: CATALOG, name -> PlugPoint.

A declaration is a `Protocol` (its signature is the call that the core makes, its docstring the contract) under
`@plug_point(...)` (flag, when, process, accepted forms, failure policies): `points_rollout` has those of the process
that makes samples, `points_training` those of the trainers. Flags, `--help`, `miles hooks`, `miles check`, `miles new`
and the tests derive from them. The translation of each form to the canonical call is in `adapters`.
"""

from __future__ import annotations

from miles.hooks import points_rollout, points_training
from miles.hooks.point import PlugPoint, normalise_key
from miles.hooks.registry import CATALOG

__all__ = ["CATALOG", "plug_point_named", "points_rollout", "points_training"]


def plug_point_named(text: str) -> PlugPoint | None:
    """A plug point by name, flag or key: `custom_rm`, `--custom-rm-path`, `custom-rm`."""
    return CATALOG.get(normalise_key(text).replace("-", "_"))
