"""A process that must not outlive the one that started it: engines and routers of a run."""

from __future__ import annotations

import os
import select
import threading
import time

POLL_S = 1.0
"""How often a system without process descriptors is asked whether the parent is still there."""


def die_with(parent: int) -> None:
    """End this process, whatever it does, as soon as `parent` has ended; at once if it has already.

    Unlike PR_SET_PDEATHSIG, which fires when the *thread* that started this process ends, this waits for the process.
    """
    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=_wait, args=(parent,), name="miles-parent", daemon=True).start()


def _wait(parent: int) -> None:
    try:
        descriptor = os.pidfd_open(parent)
    except (AttributeError, OSError):
        while os.getppid() == parent:
            time.sleep(POLL_S)
    else:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if os.getppid() == parent:  # else it ended meanwhile, and its number may be somebody else's
            poll.poll()
    os._exit(1)
