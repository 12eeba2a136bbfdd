"""Sockets that a server listens at."""

from __future__ import annotations

import asyncio
import json
import socket
from types import SimpleNamespace

import pytest

from qwencli.server.listen import listening
from tests.dataset.fake_engine import FakeEngine
from tests.server.conftest import serving


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


@pytest.mark.parametrize(
    ("version", "header", "count"),
    [("1.0", "", 1), ("1.1", "connection: close\r\n", 1), ("1.1", "", 2)],
)
def test_a_stream_to_a_plain_client(version: str, header: str, count: int) -> None:
    """HTTP/1.0 knows no chunks; one connection carries several answers where nobody closes it."""
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "stream": True})
    head = f"POST /v1/chat/completions HTTP/{version}\r\nhost: localhost\r\n{header}"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    engine = FakeEngine(SimpleNamespace(batch_invariant=True))
    with serving(engine) as running:
        host, port = running.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as client:
            client.sendall((head + body).encode() * count)
            found, closes = b"", version == "1.0" or bool(header)
            while closes or found.count(b"[DONE]\n\n\r\n0\r\n\r\n") < count:
                piece = client.recv(65536)
                if not piece:
                    break
                found += piece
    heads = found.split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert len(heads) == count
    for each in heads:
        head_of, _, rest = each.partition(b"\r\n\r\n")
        chunked = b"transfer-encoding: chunked" in head_of.lower()
        assert chunked == (version == "1.1") == rest.endswith(b"0\r\n\r\n")
        assert b"content-type: text/event-stream; charset=utf-8" in head_of
        assert b"data: [DONE]\n\n" in rest
