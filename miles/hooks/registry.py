"""CATALOG and the decorator that enters a plug point into it. What is in it: `points_rollout`, `points_training`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from miles.hooks.point import Form, PlugPoint, canonical_signature, normalise_key

CATALOG: dict[str, PlugPoint] = {}

C = TypeVar("C", bound=type[Any])


def plug_point(*, flag: str, forms: tuple[Form, ...] = (), **declared: Any) -> Callable[[C], C]:
    """Enter the decorated Protocol into CATALOG. Without `forms` its own signature is the one accepted form."""

    def enter(protocol: C) -> C:
        name = normalise_key(flag).replace("-", "_")
        assert name not in CATALOG, name
        accepted = forms or (Form("published", canonical_signature(protocol), "the arguments bind"),)
        CATALOG[name] = PlugPoint(name=name, flag=flag, protocol=protocol, forms=accepted, **declared)
        return protocol

    return enter
