"""A word about what takes long while plug-ins are loaded, before any time limit or watchdog holds."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from miles.hooks.limits import stack_of
from miles.hooks.source import own_place

logger = logging.getLogger("miles.hooks")

# Longer than the import of heavy libraries usually takes.
PATIENCE_S = 10.0


@contextlib.contextmanager
def told_when_slow(what: str) -> Iterator[None]:
    """Says once that `what` is still going on in this thread, and at which line, after PATIENCE_S."""
    thread_id = threading.get_ident()

    def tell() -> None:
        place = own_place(stack_of(thread_id), None, only_users=True)
        where = "" if place is None else f", still at {place}: {place.text}"
        logger.warning("%s has taken %g s%s", what, PATIENCE_S, where)

    timer = threading.Timer(PATIENCE_S, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
