"""How many requests are on their way at once: the others wait in a line of bounded length, first come, first served."""

from __future__ import annotations

import asyncio
from collections import deque


class LineFull(Exception):
    """Too many requests wait already."""


class Gate:
    """At most `limit` requests inside, at most `max_waiting` in line.

    Example::

        await gate.enter()
        try:
            ...
        finally:
            gate.leave()
    """

    def __init__(self, limit: int, max_waiting: int) -> None:
        self.limit, self.max_waiting = limit, max_waiting
        self.inside = 0
        self._line: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._line)

    async def enter(self) -> None:
        """Raises LineFull. Whoever is cancelled while waiting is not inside."""
        if self.inside < self.limit:
            self.inside += 1
            return
        if len(self._line) >= self.max_waiting:
            raise LineFull
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was our turn already
                self.leave()
            else:
                self._line.remove(turn)
            raise

    def leave(self) -> None:
        """One goes out; its place goes to the first in line."""
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.inside -= 1
