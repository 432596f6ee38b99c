"""Any value as JSON: what metrics, records and summaries pass through before they are written.

Valid JSON only: a non-finite float becomes null (the metrics writer says beside it which number it was). Leaves the
writing to its callers.
"""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

# Settings that no record and no tracker may hold.
SECRET_SETTINGS = frozenset({"wandb_key"})


def to_jsonable(value: Any) -> Any:
    """`value` made of dicts with text keys, lists, text, numbers, booleans and None.

    Arrays and tensors become lists, scalars of numpy and torch plain numbers, dataclasses and namespaces dicts, enums
    their value; what has no form in JSON becomes its `str`.
    """
    if isinstance(value, Enum):
        return to_jsonable(value.value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key.value if isinstance(key, Enum) else key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((to_jsonable(item) for item in value), key=repr)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_jsonable(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Namespace):
        return to_jsonable(vars(value))
    if callable(getattr(value, "tolist", None)):
        return to_jsonable(value.tolist())
    return str(value)


def dumps(value: Any, *, indent: int | None = None) -> str:
    """`value` as one JSON text; never NaN or Infinity, which are not JSON."""
    return json.dumps(to_jsonable(value), indent=indent, allow_nan=False)


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config`, at any depth, without the settings that must not be written down (SECRET_SETTINGS)."""
    return {
        key: without_secrets(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in SECRET_SETTINGS
    }


def as_number(value: Any) -> float | int | None:
    """`value` as a plain number where it is one (int, float, bool, or a numpy or torch scalar), else None."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str | bytes | Mapping | list | tuple | None) or not callable(getattr(value, "item", None)):
        return None
    try:
        item = value.item()
    except (ValueError, RuntimeError):  # numpy and torch: more than one element
        return None
    return as_number(item)
