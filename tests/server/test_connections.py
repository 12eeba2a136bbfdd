"""Clients that go, that end their side, that read nothing, and too many of them."""

from __future__ import annotations

import contextlib
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
from qwencli.server import app, connection, image_urls
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


@pytest.fixture
def opened() -> Iterator[Callable[[Any, bytes], socket.socket]]:
    """Opens a connection to a server, and sends something; all are closed at the end."""
    with contextlib.ExitStack() as clients:

        def opened(running: Any, sent: bytes) -> socket.socket:
            host, port = running.address.removeprefix("http://").split(":")
            client = clients.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(20)
            client.connect((host, int(port)))
            client.sendall(sent)
            return client

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
    monkeypatch.setattr(app, "read_schema", slow)
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
    opened, way: str, followed: bool, stream: bool
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
from qwencli.server.app import ServerSettings, create_app
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
