"""What a call changed in the samples it was given, attribute by attribute."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from typing import Any

from miles.types import Sample

# What a batch is made of: a plug-in that is asked for a verdict has no business changing it.
TRAINED = (
    "tokens",
    "response",
    "response_length",
    "loss_mask",
    "rollout_log_probs",
    "status",
    "reward",
    "remove_sample",
    "label",
    "prompt",
    "group_index",
    "index",
)


class Watch:
    """A snapshot of some samples.

    Example: `watch = Watch(samples)`, then a call, then `watch.changed()` is `["response", "tokens"]`.
    """

    def __init__(self, samples: Iterable[Sample], *, allowed: Collection[str] = ()) -> None:
        self._names = [name for name in TRAINED if name not in allowed]
        self._before = [(s, {n: copy.deepcopy(vars(s)[n]) for n in self._names}) for s in samples]

    def changed(self) -> list[str]:
        """The attributes that differ now in any of the samples."""
        return [n for n in self._names if any(not same(before[n], vars(s).get(n)) for s, before in self._before)]


def same(a: Any, b: Any) -> bool:
    """Equality that tensors and arrays have, too; what cannot be compared counts as changed."""
    if a is b:
        return True
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    try:
        equal = a == b
        return bool(equal.all()) if hasattr(equal, "all") else bool(equal)
    except Exception:  # objects of plug-ins compare as they like
        return False
