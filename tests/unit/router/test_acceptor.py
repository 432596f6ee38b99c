"""Connections are taken in bulk, and the lack of file descriptors is a pause."""

from __future__ import annotations

import asyncio
import errno
import socket

import pytest
import uvloop

from miles.engine.listen import bind_port
from miles.router import acceptor
from miles.router.acceptor import Acceptor


class Greets(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        transport.write(b"hello")  # type: ignore[attr-defined]


def clients(listener: socket.socket, count: int) -> list[socket.socket]:
    return [socket.create_connection(listener.getsockname()) for _ in range(count)]


async def greeted(some: list[socket.socket]) -> list[bytes]:
    return await asyncio.wait_for(asyncio.gather(*(asyncio.to_thread(one.recv, 5) for one in some)), 20)


@pytest.mark.parametrize("new_loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_all_that_wait_are_taken_in_one_turn(new_loop) -> None:  # type: ignore[no-untyped-def]
    taken: list[int] = []

    class Counts(Greets):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            taken[-1] += 1

    async def main() -> None:
        def turn() -> None:
            taken.append(0)
            loop.call_soon(turn)

        loop = asyncio.get_running_loop()
        with bind_port("127.0.0.1", 0, flag="--port") as listener:
            waiting = clients(listener, 200)
            turn()
            server = Acceptor(listener, Counts)
            assert await greeted(waiting) == [b"hello"] * 200
            assert max(taken) > 100
            server.close()
            await server.wait_closed()
            late = clients(listener, 1)
            await asyncio.sleep(0.1)
            assert sum(taken) == 200
            for one in (*waiting, *late):
                one.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())


class Scarce:
    """A listener of a system that has no file descriptors for a while."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener, self.refused = listener, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.listener, name)

    def accept(self) -> object:
        if self.refused < 3:
            self.refused += 1
            raise OSError(errno.EMFILE, "Too many open files")
        return self.listener.accept()


def test_without_file_descriptors_it_tries_again_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(acceptor, "PAUSE_S", 0.05)

    async def main() -> None:
        with bind_port("127.0.0.1", 0, flag="--port") as listener:
            scarce = Scarce(listener)
            server = Acceptor(scarce, Greets)  # type: ignore[arg-type]
            waiting = clients(listener, 2)
            assert await greeted(waiting) == [b"hello"] * 2
            assert scarce.refused == 3
            server.close()

    asyncio.run(main())
    assert caplog.text.count("no connection can be accepted for 0.05 s: [Errno 24] Too many open files") == 3
