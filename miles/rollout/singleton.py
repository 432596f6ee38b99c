"""A metaclass for classes of which a process has one instance: the first caller's."""

from __future__ import annotations

import threading
from typing import Any


class SingletonMeta(type):
    """The first call builds the instance; every later call, from any thread, returns it and ignores its arguments."""

    _instances: dict[type, Any] = {}  # noqa: RUF012 (shared by all classes on purpose)
    # Reentrant: a constructor may ask for other singletons.
    _lock = threading.RLock()

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls not in SingletonMeta._instances:
            with SingletonMeta._lock:
                if cls not in SingletonMeta._instances:
                    SingletonMeta._instances[cls] = super().__call__(*args, **kwargs)
        return SingletonMeta._instances[cls]

    @staticmethod
    def clear_all_instances() -> None:
        """Forget every instance, so that the next call builds anew (tests)."""
        SingletonMeta._instances.clear()
