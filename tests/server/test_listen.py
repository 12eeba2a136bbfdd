"""Sockets that a server listens at."""

from __future__ import annotations

import asyncio
import json
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.served import Served
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


def chat(headers: str, version: str = "1.1", **more: Any) -> bytes:
    """A chat request as it goes over a connection."""
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}]} | more)
    head = f"POST /v1/chat/completions HTTP/{version}\r\n{headers}"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return (head + body).encode()


def told(running: Served, sent: bytes, count: int | None = None) -> bytes:
    """What comes back, until so many streams have ended or the connection has."""
    host, port = running.address.removeprefix("http://").split(":")
    found = b""
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(sent)
        while count is None or found.count(b"[DONE]\n\n\r\n0\r\n\r\n") < count:
            piece = client.recv(65536)
            if not piece:
                break
            found += piece
    return found


@pytest.mark.parametrize(
    ("version", "header", "count"),
    [("1.0", "", 1), ("1.1", "connection: close\r\n", 1), ("1.1", "", 2)],
)
def test_a_stream_to_a_plain_client(version: str, header: str, count: int) -> None:
    """HTTP/1.0 knows no chunks; one connection carries several answers where nobody closes it."""
    asked = chat(f"host: localhost\r\n{header}", version, stream=True)
    closes = version == "1.0" or bool(header)
    with serving(FakeEngine(SimpleNamespace(batch_invariant=True))) as running:
        found = told(running, asked * count, None if closes else count)
    heads = found.split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert len(heads) == count
    for each in heads:
        head_of, _, rest = each.partition(b"\r\n\r\n")
        chunked = b"transfer-encoding: chunked" in head_of.lower()
        assert chunked == (version == "1.1") == rest.endswith(b"0\r\n\r\n")
        assert b"content-type: text/event-stream; charset=utf-8" in head_of
        assert b"data: [DONE]\n\n" in rest


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\nhost: evil\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"x" * 100_000, 400),
        (b"GET /" + b"x" * 100_000, 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01", 400),
        # Java's client asks for HTTP/2 with each request, and goes on without.
        (chat("host: localhost\r\nconnection: Upgrade, close\r\nupgrade: h2c\r\n"), 200),
        (
            chat("host: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n")
            + b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
            200,
        ),
    ],
    ids=["no host", "two hosts", "long head", "long path", "TLS", "h2c", "websocket and more"],
)
def test_heads_of_requests(sent: bytes, status: int) -> None:
    with serving(FakeEngine(SimpleNamespace(batch_invariant=True))) as running:
        found = told(running, sent)
        assert found.startswith(b"HTTP/1.1 %d " % status)
        assert not running.thread.num_unfinished
        # Others are answered.
        assert b" 200 OK" in told(running, chat("host: localhost\r\nconnection: close\r\n"))
