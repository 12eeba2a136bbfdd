"""What is wrong with a request has OpenAI's form and the right status; it leaves nothing behind."""

from __future__ import annotations

import base64
import http.server
import io
import json
import re
import socket
import threading
import time
import zlib

import httpx
import pytest
from PIL import Image

from qwencli.engine.factory import create_engine
from qwencli.server import image_urls
from qwencli.server.image_urls import fetched
from tests.server.conftest import Served, serving

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def client(served: Served):
    with httpx.Client(base_url=served.address, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def guarded(scenes_config):
    """A server with a key and narrow limits."""
    limits = {"max_body_bytes": 1 << 20, "max_waiting": 2}
    with (
        serving(create_engine(scenes_config), api_key="a key", **limits) as running,
        httpx.Client(base_url=running.address, timeout=60) as made,
    ):
        yield made, running


@pytest.fixture
def hurried(scenes_config):
    """A server that waits half a second: only what takes longer is asked of it."""
    with (
        serving(create_engine(scenes_config), answer_s=0.5, body_s=0.5) as running,
        httpx.Client(base_url=running.address, timeout=60) as made,
    ):
        yield made


def asked(**more) -> dict:
    return {
        "model": "scenes",
        "max_tokens": 4,
        "messages": [{"role": "user", "content": "Hi"}],
    } | more


def showing(url: str) -> dict:
    part = {"type": "image_url", "image_url": {"url": url}}
    return asked(messages=[{"role": "user", "content": [part]}])


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def bomb() -> bytes:
    """A small PNG file of 12,000 x 12,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    side = 12_000
    head = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes((side // 8 + 1) * side))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def told(answer: httpx.Response, status: int) -> dict:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert not re.search("Input should|Unable to|pydantic|discriminator", error["message"])
    assert "--" not in error["message"] or "--allow-image-urls" in error["message"]
    return error


WRONG = {
    "no messages": asked(messages=[]),
    "messages of a wrong type": asked(messages="Hi"),
    "a number as text": asked(max_tokens="4"),
    "true for a number": asked(temperature=True),
    "too hot": asked(temperature=2.5),
    "not a number": '{"messages": [{"role": "user", "content": "Hi"}], "top_p": NaN}',
    "a role that is none": asked(messages=[{"role": "robot", "content": "Hi"}]),
    "a part that is none": asked(messages=[{"role": "user", "content": [{"type": "audio"}]}]),
    "no tokens": asked(max_tokens=0),
    "too many tokens": asked(max_tokens=10**9),
    "more than the context": asked(max_tokens=8192, messages=[
        {"role": "user", "content": "word " * 12000}
    ]),
    "far more than the context": asked(messages=[
        {"role": "user", "content": "word " * 400_000}
    ]),
    "10,000 messages": asked(messages=[{"role": "user", "content": "Hi"}] * 10_000),
    "bad base64": showing("data:image/png;base64,@@@@"),
    "no picture": showing(data_url(b"hello")),
    "an empty picture": showing(data_url(b"")),
    "a damaged picture": showing(data_url(b"\x89PNG\r\n\x1a\n" + b"x" * 50)),
    "a bomb": showing(data_url(bomb())),
    "a file": showing("file:///etc/passwd"),
    "a path": showing("/etc/passwd"),
    "an address": showing("http://example.com/a.png"),
    "a surrogate": '{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "bad JSON": '{"messages": [',
    "deep JSON": "[" * 100_000,
    "no object": "[]",
    "several answers": asked(n=3),
    "a switch that is a word": asked(logprobs="yes"),
    "a list of stops that is none": asked(stop={"a": 1}),
    "half a token": asked(max_tokens=1.5),
    "a tool without a name": asked(tools=[{"type": "function", "function": {"name": ""}}]),
    "too many tools": asked(tools=[{"type": "function", "function": {"name": "f"}}] * 129),
    "a tool that must be called": asked(tool_choice="required"),
    "a format of no kind": asked(response_format={}),
    "a format that is none": asked(response_format={"type": "xml"}),
    "a bias": asked(logit_bias={"50256": -100}),
    "functions of old": asked(functions=[{"name": "f"}]),
    "a spoken answer": asked(modalities=["text", "audio"], audio={"voice": "a"}),
    "a stop that is empty": asked(stop=[""]),
    "a schema that is none": asked(response_format={
        "type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}
    }),
    "a schema nothing can meet": asked(response_format={
        "type": "json_schema",
        "json_schema": {"name": "a", "schema": {"type": "integer", "minimum": 3, "maximum": 1}},
    }),
    "tools where the template has none": asked(tools=[
        {"type": "function", "function": {"name": "f"}}
    ]),
    "arguments that are not JSON": asked(messages=[
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
    ]),
    "arguments of great depth": asked(messages=[
        {"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": '{"a":' * 900 + "1" + "}" * 900}}
        ]}
    ]),
    "the likeliest of no logprobs": asked(top_logprobs=2),
    "too many logprobs": asked(logprobs=True, top_logprobs=21),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_bodies_are_told_so(client, served: Served, name: str, stream: bool) -> None:
    body = WRONG[name]
    text = json.dumps(body | {"stream": stream}) if isinstance(body, dict) else body
    answer = client.post(CHAT, content=text, headers={"content-type": "application/json"})
    error = told(answer, 400)
    assert error["type"] == "invalid_request_error"
    if name.endswith("more than the context"):
        assert error["code"] == "context_length_exceeded"
    assert served.thread.num_unfinished == 0


@pytest.mark.parametrize(
    ("content", "place", "said"),
    [
        (5, "messages.0.content", "must be a string"),
        (["Hi"], "messages.0.content.0", "object"),
        ([{"type": "audio"}], "messages.0.content.0", "'text', 'image_url'"),
        ([{"type": "text"}], "messages.0.content.0.text", "is missing"),
        ([{"type": "image_url", "image_url": "a"}], "messages.0.content.0.image_url", "object"),
        (
            [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": 5}}],
            "messages.0.content.1.image_url.url",
            "must be a string",
        ),
        (
            [{"type": "image_url", "image_url": {}}],
            "messages.0.content.0.image_url.url",
            "is missing",
        ),
    ],
)
def test_the_place_of_what_is_wrong_is_the_bodys(client, content, place: str, said: str) -> None:
    error = told(
        client.post(CHAT, json=asked(messages=[{"role": "user", "content": content}])), 400
    )
    assert error["param"] == place and error["message"].startswith(f"{place}: ")
    assert said in error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("data", [b"no picture", b"", bomb()], ids=["none", "empty", "large"])
def test_the_place_of_a_bad_picture_is_told(client, data: bytes, stream: bool) -> None:
    good = io.BytesIO()
    Image.new("RGB", (56, 56)).save(good, "PNG")
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(each)}}
        for each in (good.getvalue(), data)
    ]
    body = asked(messages=[{"role": "user", "content": parts}], stream=stream)
    error = told(client.post(CHAT, json=body), 400)
    assert error["param"] == "messages.0.content.1.image_url.url"


@pytest.mark.parametrize(
    ("items", "place"),
    [
        (
            [
                {"role": "user", "content": "Hi"},
                {"role": "user", "content": [{"type": "input_image", "image_url": url}]},
            ],
            "input.1.content.0.image_url",
        )
        for url in (data_url(b"no picture"), "data:image/png;base64,?", "file:///a.png")
    ]
    + [
        (
            [
                {"type": "function_call", "name": "f", "arguments": "{}"},
                {"type": "function_call", "name": "f", "arguments": "5"},
                {"role": "user", "content": "Hi"},
            ],
            "input.1.arguments",
        ),
        (
            [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}] * 1000}],
            "input",
        ),
    ],
    ids=["no picture", "no base64", "no data URL", "no arguments", "too many"],
)
def test_the_place_of_what_is_wrong_in_a_response_is_its_bodys(client, items, place: str) -> None:
    error = told(client.post("/v1/responses", json={"input": items, "instructions": "Brief."}), 400)
    assert error["param"] == place


@pytest.mark.parametrize(
    ("wrong", "place", "said"),
    [
        ({"input": [{"type": "robot"}]}, "input.0", "an item is of type message"),
        ({"input": ["Hi"]}, "input.0", "an item is of type message"),
        ({"conversation": "conv_1"}, "conversation", "nothing is kept here"),
        ({"conversation": {"id": "conv_1"}}, "conversation", "nothing is kept here"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "nothing is kept here"),
        ({"top_logprobs": 2}, "top_logprobs", "log-probabilities"),
        ({"include": ["message.output_text.logprobs"]}, "include", "log-probabilities"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is kept here"),
    ],
)
def test_a_response_from_what_is_not_kept_is_refused(client, wrong, place: str, said: str) -> None:
    body = {"input": "Hi", "max_output_tokens": 4} | wrong
    error = told(client.post("/v1/responses", json=body), 400)
    assert error["param"] == place and said in error["message"]


def test_other_statuses(client) -> None:
    assert told(client.post(CHAT, json=asked(model="gpt-5")), 404)["code"] == "model_not_found"
    told(client.get("/v1/nothing"), 404)
    told(client.get(CHAT), 405)
    told(client.post(CHAT, content=b"{}", headers={"content-type": "text/plain"}), 415)
    for host in ("elsewhere.example", "localhost:80@elsewhere.example", "[::1]elsewhere.example"):
        told(client.get("/v1/models", headers={"host": host}), 403)
    told(client.get("/v1/models", headers={"origin": "http://elsewhere.example"}), 403)
    assert "access-control-allow-origin" not in client.get("/v1/models").headers
    assert client.get("/health").json()["status"] == "ok"


def test_the_key(guarded) -> None:
    client, _ = guarded
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic a key"}):
        error = told(client.post(CHAT, json=asked(), headers=headers), 401)
        assert error["code"] == "invalid_api_key"
    told(client.get("/metrics"), 401)
    told(client.get("/v1/models", headers={b"authorization": b"Bearer \xff\xfe"}), 401)
    assert client.get("/health").status_code == client.get("/").status_code == 200
    right = {"authorization": "Bearer a key"}
    assert client.post(CHAT, json=asked(), headers=right).status_code == 200


def test_limits_of_time(hurried) -> None:
    def dripping():
        for _ in range(20):
            time.sleep(0.1)
            yield b" "

    json_type = {"content-type": "application/json"}
    told(hurried.post(CHAT, content=dripping(), headers=json_type), 408)
    long = asked(max_tokens=8000, ignore_eos=True)
    assert told(hurried.post(CHAT, json=long), 504)["code"] == "timeout"
    with hurried.stream("POST", CHAT, json=long | {"stream": True}) as events:
        text = "".join(events.iter_text())
    assert "not complete within" in text and "[DONE]" not in text


def test_limits_of_body_and_queue(guarded) -> None:
    client, running = guarded
    right = {"authorization": "Bearer a key"}
    told(client.post(CHAT, json=asked(user="x" * (1 << 20)), headers=right), 413)
    piece = json.dumps(asked(user="x" * (1 << 20))).encode()
    json_type = right | {"content-type": "application/json"}
    told(client.post(CHAT, content=iter([piece, piece]), headers=json_type), 413)
    waiting = running.thread._max_waiting
    running.thread._max_waiting = -running.thread.max_rows
    try:
        answer = client.post(CHAT, json=asked(), headers=right)
        assert told(answer, 429)["type"] == "rate_limit_error" and answer.headers["retry-after"]
    finally:
        running.thread._max_waiting = waiting
    assert running.thread.num_unfinished == 0


def test_a_reader_that_takes_nothing_and_one_that_goes_hold_nobody(client, served: Served) -> None:
    address = served.address.removeprefix("http://").split(":")
    body = json.dumps(asked(max_tokens=8000, ignore_eos=True, stream=True)).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    for keeps in (True, False):
        with socket.create_connection((address[0], int(address[1]))) as raw:
            raw.sendall(head + body)
            if not keeps:
                raw.recv(16)
            else:
                started = time.monotonic()
                assert client.post(CHAT, json=asked()).status_code == 200
                assert time.monotonic() - started < 20
    until = time.monotonic() + 60
    while served.thread.num_unfinished and time.monotonic() < until:
        time.sleep(0.02)
    assert served.thread.num_unfinished == 0
    used, _ = served.thread.engine.kv_pages
    assert used == 0


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "0.0.0.0", "::1", "fd00::1",
     "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "100.64.0.1", "224.0.0.1",
     "::127.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b:1::7f00:1", "fec0::1", "192.0.0.8"],
)  # fmt: skip
def test_no_address_of_a_private_network_is_asked(monkeypatch, address: str) -> None:
    """Whatever name it has, also where a public server sends us there."""
    asked_for = []

    def found(host, port, **more):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: asked_for.append(a))
    for url in (
        "http://pictures.example/a.png",
        f"http://[{address}]/" if ":" in address else f"http://{address}/",
    ):
        with pytest.raises(ValueError, match="public internet"):
            fetched(url)
    assert asked_for == []


def test_pictures_of_public_addresses_and_redirections(monkeypatch) -> None:
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/a.png":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(data.getvalue())
            elif self.path == "/large":
                self.send_response(200)
                self.end_headers()
                with_errors = self.wfile
                try:
                    for _ in range(80):
                        with_errors.write(bytes(1 << 20))
                except OSError:
                    pass
            else:
                self.send_response(302)
                self.send_header(
                    "location", {"/moved": "/a.png"}.get(self.path, "http://inside.example/")
                )
                self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    real = image_urls._is_public
    names = {"pictures.example": "127.0.0.1", "inside.example": "10.0.0.1"}
    look_up = socket.getaddrinfo
    monkeypatch.setattr(image_urls, "_is_public", lambda ip: ip == "127.0.0.1" or real(ip))
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: look_up(names.get(host, host), *a, **k)
    )
    address = f"http://pictures.example:{server.server_address[1]}"
    try:
        assert fetched(f"{address}/a.png") == fetched(f"{address}/moved") == data.getvalue()
        with pytest.raises(ValueError, match="public internet"):
            fetched(f"{address}/away")
        with pytest.raises(ValueError, match="larger than"):
            fetched(f"{address}/large")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
