"""Sockets that a server listens at."""

from __future__ import annotations

import asyncio
import socket

from qwencli.server.listen import listening


def test_what_is_written_is_sent_at_once() -> None:
    """No small piece of an answer waits until the one before it is acknowledged."""

    async def option() -> int:
        made: asyncio.Future[asyncio.Transport] = asyncio.get_running_loop().create_future()

        class Accepted(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                made.set_result(transport)

        opened = listening("127.0.0.1", 0)
        async with await asyncio.get_running_loop().create_server(Accepted, sock=opened):
            with socket.create_connection(opened.getsockname()):
                accepted = (await made).get_extra_info("socket")
                return accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    assert asyncio.run(option())
