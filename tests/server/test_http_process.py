"""A server as the command has it: HTTP in a process of its own, the engine in this one."""

from __future__ import annotations

import base64
import io
import json
import pickle
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from PIL import Image

from benchmarks import served as own_server
from benchmarks.served import Served
from qwencli import errors
from qwencli.config import EngineConfig
from qwencli.engine.factory import create_engine
from qwencli.errors import EngineError, QwenCliError, UnsupportedModeError
from qwencli.results import GenerationChunk
from qwencli.server import answers
from qwencli.server.settings import ServerSettings
from tests.dataset.fake_engine import FakeEngine
from tests.server.conftest import serving

CHAT = "/v1/chat/completions"


def picture(side: int = 64) -> dict[str, Any]:
    data = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(data, "PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def asked(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": "Describe the scene."}]
    return {"messages": [{"role": "user", "content": content}], "temperature": 0} | more


def until(true: Any, timeout_s: float = 20) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def apart(scenes_config: EngineConfig) -> Iterator[Served]:
    settings = ServerSettings("scenes", max_pixels=1_000_000)
    with own_server.serving(create_engine(scenes_config), settings) as running:
        yield running


@pytest.fixture
def client(apart: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=apart.address, timeout=60) as opened:
        yield opened


def streamed(client: httpx.Client, body: dict[str, Any]) -> str:
    text = ""
    with client.stream("POST", CHAT, json=body | {"stream": True}) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                told = json.loads(line[6:])
                assert "error" not in told, told
                text += told["choices"][0]["delta"].get("content") or ""
    return text


def test_answers_are_those_of_one_process(
    client: httpx.Client, scenes_config: EngineConfig
) -> None:
    bodies = [
        asked(max_tokens=20),
        asked(picture(), max_tokens=30),
        asked(picture(), max_tokens=12, logprobs=True, top_logprobs=2),
        asked(max_tokens=20, response_format={"type": "json_object"}),
    ]

    def answered(to: httpx.Client) -> list[Any]:
        found = [to.post(CHAT, json=body).raise_for_status().json() for body in bodies]
        return [(each["choices"][0]["message"], each["choices"][0]["logprobs"]) for each in found]

    with (
        serving(create_engine(scenes_config)) as together,
        httpx.Client(base_url=together.address, timeout=60) as other,
    ):
        expected = answered(other)
    assert answered(client) == expected
    assert streamed(client, bodies[1]) == expected[1][0]["content"]


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (asked({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}), 400, ""),
        (asked(picture(1200)), 400, "pixels"),
        (asked(max_tokens=100_000), 400, "new tokens are asked for"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "tokens"),
        (asked(model="another"), 404, "is not served here"),
    ],
    ids=["no picture", "large picture", "many tokens", "long prompt", "other model"],
)
def test_what_is_wrong_with_a_request_is_told_alike(
    client: httpx.Client, body: dict[str, Any], status: int, told: str
) -> None:
    for stream in (False, True):
        reply = client.post(CHAT, json=body | {"stream": stream})
        error = reply.json()["error"]
        assert reply.status_code == status and told in error["message"], error
    assert client.post(CHAT, json=asked(max_tokens=2)).status_code == 200


def test_the_moment_of_an_engine_elsewhere(client: httpx.Client, apart: Served) -> None:
    client.post(CHAT, json=asked(max_tokens=2)).raise_for_status()
    state = client.get("/status").json()
    assert state["running"] == state["waiting"] == 0 and state["idle_s"] >= 0
    assert state["rows"] == apart.thread.max_rows
    assert state["effective"]["engine"] == apart.thread.engine.effective.engine
    (entry,) = client.get("/v1/models").json()["data"]
    assert entry["max_model_len"] == apart.thread.engine.max_seq_len
    assert 'qwencli_tokens_total{kind="generated"}' in client.get("/metrics").text


def test_many_at_once_leave_nothing_behind(apart: Served) -> None:
    """Some go away in the middle."""

    def one(number: int) -> None:
        with httpx.Client(base_url=apart.address, timeout=60) as own:
            if number % 3:
                text = streamed(own, asked(max_tokens=20 + number, ignore_eos=True))
                assert text
                return
            body = asked(max_tokens=500, ignore_eos=True, stream=True)
            with own.stream("POST", CHAT, json=body) as reply:
                next(reply.iter_lines())

    threads = [threading.Thread(target=one, args=(number,)) for number in range(12)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    until(lambda: not apart.thread.num_unfinished)
    with httpx.Client(base_url=apart.address) as own:
        until(lambda: own.get("/status").json()["running"] == 0)


def test_pages_of_answers_that_nobody_waits_for_are_free(client: httpx.Client) -> None:
    body = asked(max_tokens=500, ignore_eos=True, stream=True, logprobs=True)  # in the pool of many
    with client.stream("POST", CHAT, json=body) as reply:
        next(reply.iter_lines())
        assert client.get("/status").json()["kv_pages"]["used"] > 0
    until(lambda: client.get("/status").json()["kv_pages"]["used"] == 0)


class Held(FakeEngine):
    """Answers when it is let."""

    def __init__(self) -> None:
        super().__init__(SimpleNamespace(batch_invariant=False), max_rows=1)
        self.go = threading.Event()

    def stream(self, request: Any) -> Any:
        self.go.wait(30)
        return super().stream(request)


def test_more_than_may_wait_are_refused() -> None:
    engine = Held()
    with (
        own_server.serving(engine, ServerSettings("any"), max_waiting=1) as running,
        httpx.Client(base_url=running.address, timeout=30) as client,
    ):
        waiting = [
            threading.Thread(target=lambda: httpx.post(running.address + CHAT, json=asked()))
            for _ in range(2)
        ]
        for each in waiting:
            each.start()
        until(lambda: running.thread.num_unfinished == 2)
        reply = client.post(CHAT, json=asked())
        assert reply.status_code == 429
        assert reply.json()["error"]["type"] == "rate_limit_error"
        engine.go.set()
        for each in waiting:
            each.join()
        assert client.post(CHAT, json=asked()).status_code == 200


class Broken(FakeEngine):
    def stream(self, request: Any) -> Any:
        raise RuntimeError("the device is lost")


def test_an_engine_that_has_failed_ends_the_server() -> None:
    broken = Broken(SimpleNamespace(batch_invariant=False))
    with own_server.serving(broken, ServerSettings("any")) as running:
        for _ in range(10):
            try:
                reply = httpx.post(running.address + CHAT, json=asked(), timeout=30)
            except httpx.HTTPError:
                break
            assert reply.status_code in (500, 503)
        until(lambda: not (running.http and running.http.is_alive))
        assert running.thread.failure is not None


def test_a_process_that_ends_by_itself_leaves_nothing_running() -> None:
    engine = Held()
    with own_server.serving(engine, ServerSettings("any")) as running:
        body = json.dumps(asked()).encode()
        asking = threading.Thread(target=lambda: _posted(running.address, body))
        asking.start()
        until(lambda: running.thread.num_unfinished == 1)
        assert running.http is not None
        running.http.kill()
        engine.go.set()
        asking.join()
        until(lambda: not running.thread.num_unfinished)


class Unsendable(FakeEngine):
    """Its second answer has a piece that no pipe takes."""

    def __init__(self) -> None:
        super().__init__(SimpleNamespace(batch_invariant=False), max_rows=1)
        self.count = 0

    def stream(self, request: Any) -> Any:
        self.count += 1
        if self.count == 2:
            yield GenerationChunk("text", (1,), thoughts=threading.Lock())  # type: ignore[arg-type]
        yield from super().stream(request)


def test_an_answer_that_cannot_be_sent_costs_no_other() -> None:
    with (
        own_server.serving(Unsendable(), ServerSettings("any")) as running,
        httpx.Client(base_url=running.address, timeout=30) as client,
    ):
        replies = [client.post(CHAT, json=asked() | {"stream": False}) for _ in range(3)]
        assert [each.status_code for each in replies] == [200, 500, 200]
        assert "cannot be sent" in replies[1].json()["error"]["message"]
        until(lambda: not running.thread.num_unfinished)


def _posted(address: str, body: bytes) -> None:
    with pytest.raises(httpx.HTTPError):
        httpx.post(address + CHAT, content=body, headers={"content-type": "application/json"})


def classes() -> list[type[QwenCliError]]:
    found = [each for module in (errors, answers) for each in vars(module).values()]
    return [each for each in found if isinstance(each, type) and issubclass(each, QwenCliError)]


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_errors_arrive_as_they_were_sent(kind: type[QwenCliError]) -> None:
    sent = kind("what is wrong", "what to do")
    arrived = pickle.loads(pickle.dumps(sent))
    assert type(arrived) is kind and str(arrived) == str(sent)
    assert vars(arrived) == vars(sent)
    nearest = UnsupportedModeError("no", nearest="static")
    assert pickle.loads(pickle.dumps(nearest)).nearest == "static"


def test_an_end_by_itself_is_an_error() -> None:
    engine = FakeEngine(SimpleNamespace(batch_invariant=False))
    with own_server.serving(engine, ServerSettings("any")) as running:
        assert running.http is not None
        threading.Timer(0.3, running.http.kill).start()
        with pytest.raises(EngineError, match="has ended with"):
            running.http.wait()
        assert running.thread.failure is None
