"""Clients that go, that end their side, that read nothing, and too many of them."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from qwencli.engine.request import StepOutput
from qwencli.results import GenerationChunk
from qwencli.server import body_requests, connection, image_urls
from qwencli.server.known_heads import KnownHeads, find_head
from tests.dataset.fake_engine import FakeEngine
from tests.server.conftest import serving
from tests.server.test_listen import chat


class TalkingEngine(FakeEngine):
    """Says `text` at each step, and ends after `most` of them."""

    def __init__(self, text: str = "word ", most: int = sys.maxsize) -> None:
        super().__init__(SimpleNamespace(batch_invariant=True))  # type: ignore[arg-type]
        self.text, self.most = text, most

    def step(self) -> list[StepOutput]:
        time.sleep(0.01)
        found = []
        for number, (request, said) in list(self._requests.items()):
            self._requests[number] = (request, said + 1)
            if said < self.most:
                found.append(StepOutput(number, GenerationChunk(self.text, (1,))))
            else:
                del self._requests[number]
                found.append(StepOutput(number, self._chunk(request())))
        return found


@pytest.fixture(params=[False, True], ids=["", "head known"])
def opened(request: pytest.FixtureRequest) -> Iterator[Callable[[Any, bytes], socket.socket]]:
    """Opens a connection to a server, and sends something; all are closed at the end. With "head
    known" the head has come before, where it is one that is kept, and so h11 knows nothing of it.
    """
    with contextlib.ExitStack() as clients:

        def connected(running: Any, sent: bytes) -> socket.socket:
            host, port = running.address.removeprefix("http://").split(":")
            client = clients.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(20)
            client.connect((host, int(port)))
            client.sendall(sent)
            return client

        def opened(running: Any, sent: bytes) -> socket.socket:
            connection._known_heads._heads.clear()
            found = find_head(sent) if request.param else None
            if found is not None:
                client = connected(running, sent[: found.body_at] + b"?" * found.length)
                assert client.recv(65536).startswith(b"HTTP/1.1 4")
                client.close()
            return connected(running, sent)

        yield opened


def rest(client: socket.socket) -> bytes:
    found = b""
    while piece := client.recv(65536):
        found += piece
    return found


def until(is_so: Callable[[], bool], most_s: float = 20.0) -> None:
    begun_s = time.monotonic()
    while not is_so():
        assert time.monotonic() - begun_s < most_s
        time.sleep(0.005)


resource = pytest.importorskip("resource")
HOST = "host: localhost\r\n"


def test_the_end_does_not_wait_for_clients(opened, caplog) -> None:
    """One that sent half a body, one that takes nothing of its answer, one that waits."""
    with serving(TalkingEngine("word " * 20_000)) as running:
        half = opened(running, chat(HOST)[:-20])
        silent = opened(running, chat(HOST, stream=True))
        whole = opened(running, chat(HOST))
        others = [opened(running, b"GET /hea"), opened(running, b"")]
        until(lambda: running.thread.num_unfinished == 2)
        time.sleep(0.5)  # until nothing more can be written
        begun_s = time.monotonic()
    # A second for what was written, and uvicorn's looks.
    assert time.monotonic() - begun_s < 2.5
    for client in (half, whole):
        found = rest(client)
        assert b" 503 " in found and b"has stopped" in found
    for client in (silent, *others):
        client.close()
    assert [each.getMessage() for each in caplog.records] == []


def test_the_end_does_not_wait_for_other_servers(opened, caplog, monkeypatch) -> None:
    """Nor for a schema that takes long to read."""
    going = threading.Event()
    asked = []

    def slow(*given: Any) -> Any:
        asked.append(given)
        going.wait(30)

    monkeypatch.setattr(image_urls, "fetched", slow)
    monkeypatch.setattr(body_requests, "read_schema", slow)
    picture = {"type": "image_url", "image_url": {"url": "http://a.example/a.png"}}
    with serving(TalkingEngine(), allow_image_urls=True) as running:
        for more in (
            {"messages": [{"role": "user", "content": [picture]}]},
            {"response_format": {"type": "json_object"}},
        ):
            opened(running, chat(HOST, **more))
        until(lambda: len(asked) == 2)
        begun_s = time.monotonic()
    assert time.monotonic() - begun_s < 3
    going.set()
    assert [each.getMessage() for each in caplog.records] == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_a_client_that_ends_its_side_has_its_answers(opened, stream: bool, count: int) -> None:
    with serving(TalkingEngine(most=20)) as running:
        client = opened(running, chat(HOST, stream=stream) * count)
        client.shutdown(socket.SHUT_WR)
        found = rest(client)
    assert found.count(b"HTTP/1.1 200 OK") == count
    assert found.count(b"data: [DONE]\n\n" if stream else b'"finish_reason": "stop"') == count


def test_half_a_request_behind_one_is_not_waited_for(opened) -> None:
    with serving(TalkingEngine(most=5)) as running:
        client = opened(running, chat(HOST) + chat(HOST)[:-5])
        client.shutdown(socket.SHUT_WR)
        begun_s = time.monotonic()
        found = rest(client)
        assert time.monotonic() - begun_s < 5
    assert found.count(b"HTTP/1.1 200 OK") == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("followed", [False, True], ids=["", "pipelined"])
@pytest.mark.parametrize("way", ["closes", "resets", "ends, then closes"])
def test_a_client_that_goes_ends_its_request(
    opened, caplog, way: str, followed: bool, stream: bool
) -> None:
    with serving(TalkingEngine()) as running:
        client = opened(running, chat(HOST, stream=stream) * (1 + followed))
        until(lambda: running.thread.num_running == 1)
        if way == "ends, then closes":
            client.shutdown(socket.SHUT_WR)
            time.sleep(0.1)
            assert running.thread.num_running == 1
        elif way == "resets":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        until(lambda: running.thread.num_unfinished == 0, 2)
    assert [each.getMessage() for each in caplog.records] == []


def test_a_plain_client_that_ends_its_side_is_gone(opened) -> None:
    """HTTP/1.0 knows no answer before the answer, which would tell whether it waits."""
    with serving(TalkingEngine()) as running:
        client = opened(running, chat(HOST, "1.0"))
        until(lambda: running.thread.num_running == 1)
        client.shutdown(socket.SHUT_WR)
        until(lambda: running.thread.num_unfinished == 0, 2)
        assert rest(client) == b""


def test_nothing_is_said_of_a_reader_that_takes_too_long(opened, caplog) -> None:
    with serving(TalkingEngine("word " * 20_000), write_s=0.3) as running:
        client = opened(running, chat(HOST, stream=True))
        until(lambda: running.thread.num_unfinished == 1)
        until(lambda: running.thread.num_unfinished == 0)
        client.close()
    assert [each.getMessage() for each in caplog.records] == []


def test_nothing_is_written_to_a_client_that_is_found_to_be_gone() -> None:
    """Pieces that wait while the server is busy are written in one turn of the loop, and the first
    write finds that the client is gone."""
    written: list[bytes] = []
    transport = SimpleNamespace(write=written.append, is_closing=lambda: len(written) == 2)
    cycle = SimpleNamespace(
        scope={"http_version": "1.1"}, default_headers=[], disconnected=False, on_response=None
    )
    there: Any = SimpleNamespace(cycle=cycle, transport=transport, is_told=False)
    stream = connection.Stream(there, [], b":")
    for piece in (b"one", b"two", b"three", b"four"):
        stream.write(piece)
    stream.write(b"", last=True)
    assert len(written) == 2 and b"two" in written[1]


def test_too_many_connections(opened, monkeypatch) -> None:
    monkeypatch.setattr(connection, "most_connections", lambda: 2)
    monkeypatch.setattr(connection, "REFUSED_AT_ONCE", 1)
    health = f"GET /health HTTP/1.1\r\n{HOST}\r\n".encode()
    with serving(FakeEngine(SimpleNamespace(batch_invariant=True))) as running:
        held = [opened(running, health) for _ in range(2)]
        assert all(b" 200 OK" in client.recv(1000) for client in held)
        refused = opened(running, b"")
        assert b" 503 " in refused.recv(1000)
        refused.sendall(chat(HOST))
        assert refused.recv(1000) == b""  # closed, not reset
        for client in held:
            client.close()
        until(lambda: httpx.get(f"{running.address}/health").status_code == 200)


def test_as_many_files_as_the_system_allows() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 1024:
        pytest.skip("this system allows few files")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (600, before[1]))
        few = connection.most_connections()
        connection.allow_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 600
        assert few < 600 < connection.most_connections() + 512
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        connection.allow_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) >= before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# With the files that it has open itself it can take some forty connections.
CROWDED = """
import resource, sys
from types import SimpleNamespace
from qwencli.server import connection
from qwencli.server.app import create_app
from qwencli.server.settings import ServerSettings
from qwencli.server.engine_thread import EngineThread
from qwencli.server.listen import listening, run_server, server_for
from tests.dataset.fake_engine import FakeEngine

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
connection.most_connections = lambda: 1000
thread = EngineThread(FakeEngine(SimpleNamespace(batch_invariant=True)))
thread.start()
opened = listening("127.0.0.1", 0)
server = server_for(create_app(thread, ServerSettings("any")))
say = lambda line: print(line, file=sys.stderr)
run_server(server, opened, lambda: print(opened.getsockname()[1], flush=True), say)
thread.close()
"""


def test_clients_wait_where_files_run_out(opened) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CROWDED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        running = SimpleNamespace(address=f"http://127.0.0.1:{process.stdout.readline().strip()}")
        health = f"GET /health HTTP/1.1\r\n{HOST}connection: close\r\n\r\n".encode()
        silent = [opened(running, b"") for _ in range(100)]
        time.sleep(0.5)
        waiting = opened(running, health)
        for client in silent:
            client.close()
        assert b" 200 OK" in rest(waiting)
        process.terminate()
        _, said = process.communicate(timeout=20)
    assert said.count("\n") == 1 and "cannot open another connection: too many open files" in said


@pytest.mark.parametrize("size", [1000, 2000])
def test_a_body_that_is_here_at_once_has_the_same_limit(opened, size: int) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}]}).ljust(size).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\n{HOST}content-type: application/json\r\n"
    chunked = f"{head}transfer-encoding: chunked\r\n\r\n{size:x}\r\n".encode()
    with serving(TalkingEngine(most=1), max_body_bytes=1000) as running:
        for sent in (
            f"{head}content-length: {size}\r\n\r\n".encode() + body,
            chunked + body + b"\r\n0\r\n\r\n",
        ):
            assert (
                opened(running, sent)
                .recv(65536)
                .startswith(b"HTTP/1.1 200" if size == 1000 else b"HTTP/1.1 413")
            )


def outcome(data: bytes) -> dict[str, Any]:
    """What was answered, whatever pieces it came in."""
    heads = re.findall(rb"HTTP/1\.1 .*?\r\n\r\n", data, re.DOTALL)
    return {
        "heads": [re.sub(rb"date: [^\r]+\r\n|length: \d+", b"", head) for head in heads],
        "answers": re.findall(rb"A picture \w+", data),  # some are told words in front of it
        "ends": (data.count(b"data: [DONE]\n\n"), data.count(b"\r\n0\r\n\r\n")),
        "errors": re.findall(rb'{"error": .*?}}', data),
    }


@pytest.mark.parametrize(
    "requests",
    [
        [chat(HOST, stream=True)] * 3,
        [chat(HOST), chat(HOST, stream=True), chat(HOST, stream=True), chat(HOST)],
        [chat(HOST, stream=True), chat(HOST, model="another"), chat(HOST, stream=True)],
        [chat(HOST, stream=True), b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"],
        [chat(HOST, max_tokens=0), chat(HOST, stream=True)],
        [chat("host: a.example\r\n"), chat(HOST, stream=True)],
        [chat(HOST + "origin: http://a.example\r\n")] * 2,
    ],
)
@pytest.mark.parametrize("cut", [None, -1, "head"])
@pytest.mark.parametrize("in_turns", [False, True])
def test_known_heads_change_nothing(opened, monkeypatch, requests, cut, in_turns: bool) -> None:
    """Whether requests come in pieces, and one while another one is answered."""
    last = b"POST /none HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n"
    found = []
    with serving(TalkingEngine(most=5)) as running:
        for finds in (lambda data: None, find_head):
            monkeypatch.setattr(connection, "find_head", finds)
            client = opened(running, b"")
            for each in [*requests, last]:
                at = each.index(b"\r\n\r\n") + 4 if cut == "head" else cut
                client.sendall(each[:at])
                time.sleep(0.01)
                client.sendall(b"" if at is None else each[at:])
                time.sleep(0.01)
                until(lambda: not (in_turns and running.thread.num_unfinished))
            data = b""
            while b"there is no /none here" not in data:
                piece = client.recv(65536)
                assert piece, data
                data += piece
            client.close()
            found.append(outcome(data))
    assert found[0] == found[1]
    assert len(found[0]["heads"]) == len(requests) + 1
    assert connection._known_heads._heads  # so some were known


def test_heads_are_known_where_the_loop_hands_out_bytearrays(monkeypatch, caplog) -> None:
    """As that of Windows does, with some versions of Python always."""
    received, known = connection.HttpConnection.data_received, KnownHeads()
    monkeypatch.setattr(connection, "_known_heads", known)
    monkeypatch.setattr(
        connection.HttpConnection,
        "data_received",
        lambda self, data: received(self, bytearray(data)),
    )
    with (
        serving(TalkingEngine(most=1)) as running,
        httpx.Client(base_url=running.address) as client,
    ):
        for _ in range(3):
            body = {"messages": [{"role": "user", "content": "Hi"}]}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert known._heads
    assert [each.getMessage() for each in caplog.records] == []


@pytest.mark.parametrize(
    "head",
    [
        "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1",
        "POST / HTTP/1.1\r\nHost: a",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 123456",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1",
        f"POST / HTTP/1.1\r\nHost: a\r\nX: {'x' * 5000}\r\nContent-Length: 1",
    ],
)
def test_heads_that_are_not_kept(head: str) -> None:
    assert find_head(f"{head}\r\n\r\n.".encode()) is None


def test_a_known_head_is_the_same_but_for_its_length() -> None:
    heads, scope = KnownHeads(), {"method": "POST", "path": "/", "raw_path": b"/"}
    scope |= {"query_string": b"", "http_version": "1.1"}
    first = find_head(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 7\r\nA: b\r\n\r\n.......")
    assert first is not None and first.length == 7
    headers = [(b"host", b"a"), (b"content-length", b"7"), (b"a", b"b")]
    heads.learn(first.key, {**scope, "headers": headers})
    again = find_head(b"POST / HTTP/1.1\r\nHost: a\r\ncontent-length: 12\r\nA: b\r\n\r\n.")
    assert again is not None and heads.get(again.key) is None  # other letters
    again = find_head(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 12\r\nA: b\r\n\r\n.")
    assert again is not None and again.length == 12
    known = heads.get(again.key)
    assert known is not None
    assert known.headers(12) == [(b"host", b"a"), (b"content-length", b"12"), (b"a", b"b")]


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("1.0", []),
        ("1.1", [(b"connection", b"close")]),
        ("1.1", [(b"expect", b"100-continue")]),
        ("1.1", [(b"transfer-encoding", b"chunked")]),
        ("1.1", [(b"upgrade", b"h2c")]),
        ("1.1", [(b"content-length", b"2")]),
    ],
)
def test_heads_that_say_how_to_read_are_not_kept(version: str, said) -> None:
    heads = KnownHeads()
    headers = [(b"host", b"a"), (b"content-length", b"2"), *said]
    heads.learn(b"key", {"http_version": version, "headers": headers})
    assert heads.get(b"key") is None


@pytest.mark.parametrize(
    "first",
    [
        b"Content-Length: 2\r\nA: b\r\nContent-Length: 2\r\n\r\n{}",
        b"Content-Length: 22\r\n\n{}\r\nContent-Length: 2\r\n\r\n",
    ],
)
def test_heads_that_h11_reads_otherwise_are_not_kept(opened, first: bytes) -> None:
    """A length that is said twice, and an end that is none to others: with another number in its
    place the second request would be read as nobody else reads it."""
    connection._known_heads._heads.clear()
    with serving(TalkingEngine(most=1)) as running:
        sent = b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST.encode() + first
        assert opened(running, sent).recv(65536).startswith(b"HTTP/1.1 4")
        assert not connection._known_heads._heads


def test_only_so_many_heads_are_kept() -> None:
    heads, headers = KnownHeads(), [(b"content-length", b"2")]
    scope = {"method": "POST", "path": "/", "raw_path": b"/", "query_string": b""}
    for number in range(1000):
        key = b"POST /%d HTTP/1.1\r\nContent-Length: " % number
        heads.learn(key, {**scope, "http_version": "1.1", "headers": headers})
    assert len(heads._heads) <= 64 and heads.get(key) is not None
