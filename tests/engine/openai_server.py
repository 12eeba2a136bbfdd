"""A small server that speaks OpenAI's chat completions, and fails in the ways servers do."""

from __future__ import annotations

import base64
import io
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

MODEL = "stand-in"

# Figures that no server means.
ABSURD = {
    "usage": {
        "completion_tokens": 10**30,
        "timings": {"prefill_s": 10**400, "preprocess_s": math.nan, "vision_encode_s": math.inf},
    },
    "qwencli": {"resized_sizes": [[math.inf, 2]], "notes": [None, 3], "effective": {"cache": 7}},
}


def seen(body: dict[str, Any]) -> str:
    """A caption that tells the pictures of the last question."""
    content = body["messages"][-1]["content"]
    parts = content if isinstance(content, list) else []
    sizes = []
    for part in parts:
        if part["type"] == "image_url":
            kind, data = part["image_url"]["url"].split(";base64,")
            picture = Image.open(io.BytesIO(base64.b64decode(data)))
            assert kind == f"data:image/{picture.format.lower()}"
            red, green, blue = picture.convert("RGB").getpixel((0, 0))
            sizes.append(f"{picture.width}x{picture.height} of {red},{green},{blue}")
    return "A picture " + " and ".join(sizes) if sizes else "An answer."


@dataclass
class StandIn:
    """What the server does and what it was asked.

    Args:
        fault: of the nth request (from 0): "" = answer. See `_Handler.do_POST`.
        say: the answer's text.
    """

    fault: Callable[[int], str] = lambda number: ""
    say: Callable[[dict[str, Any]], str] = seen
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": MODEL}])
    # Status and body in place of the list of models.
    listing: tuple[int, bytes] | None = None
    key: str | None = None
    usage: bool = True
    step_s: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _server: ThreadingHTTPServer | None = None

    @contextmanager
    def running(self) -> Iterator[StandIn]:
        handler = type("Handler", (_Handler,), {"stand_in": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.kill()
            thread.join()

    def kill(self) -> None:
        """End as a killed process does: connections break, and nobody listens."""
        if self._server is not None:
            server, self._server = self._server, None
            server.shutdown()
            server.server_close()
            server.break_connections()

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def break_connections(self) -> None:
        for connection in self.connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def handle_error(self, request: Any, client_address: Any) -> None:
        return  # connections that break are wanted


class _Handler(BaseHTTPRequestHandler):
    stand_in: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        return

    def do_GET(self) -> None:
        if self._refused():
            return
        if not self.path.endswith("/models"):
            self._json(404, {"detail": "Not Found"})
            return
        if self.stand_in.listing is not None:
            status, data = self.stand_in.listing
            self._send(status, "application/json", data)
            return
        self._json(200, {"object": "list", "data": self.stand_in.models})

    def do_POST(self) -> None:
        stand_in = self.stand_in
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        with stand_in._lock:
            number = len(stand_in.bodies)
            stand_in.bodies.append(body)
        with stand_in.counted():
            self._answer(body, stand_in.fault(number))

    def _answer(self, body: dict[str, Any], fault: str) -> None:
        text = self.stand_in.say(body)
        if fault.isdecimal():
            self._json(int(fault), {"error": {"message": f"asked to fail with {fault}"}})
        elif fault == "html":
            self._send(200, "text/html", b"<html>hello</html>")
        elif fault == "no json":
            self._send(200, "application/json", b"{nothing")
        elif fault == "deep":
            self._send(200, "application/json", b"[" * 100_000)
        elif fault in ("whole", "parts", "absurd"):
            parts = [{"type": "thinking"}, {"type": "text", "text": text}, 5]
            message = {"role": "assistant", "content": parts if fault == "parts" else text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            told = {"choices": [choice], "usage": self._usage(text)}
            self._json(200, told | (ABSURD if fault == "absurd" else {}))
        elif fault == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif fault == "hang":
            time.sleep(30)
        else:
            self._stream(text, fault)

    def _stream(self, text: str, fault: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        words = text.split(" ")
        for number, word in enumerate(words):
            if fault == "cut" and number == 1:
                return
            if fault == "error inside" and number == 1:
                self._event({"error": {"message": "out of memory"}})
                return
            time.sleep(self.stand_in.step_s)
            piece = word if number == 0 else f" {word}"
            self._event({"choices": [{"index": 0, "delta": {"content": piece}}]})
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        if self.stand_in.usage:
            self._event({"choices": [], "usage": self._usage(text)})
        self.wfile.write(b"data: [DONE]\n\n")

    @staticmethod
    def _usage(text: str) -> dict[str, int]:
        return {"prompt_tokens": 20, "completion_tokens": 2 * len(text.split(" "))}

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(b": hello\n\ndata: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()

    def _refused(self) -> bool:
        wanted = self.stand_in.key
        if wanted is None or self.headers.get("Authorization") == f"Bearer {wanted}":
            return False
        self._json(401, {"error": {"message": "wrong key"}})
        return True

    def _json(self, status: int, value: Any) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _send(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if 300 <= status < 400:
            self.send_header("Location", "http://elsewhere.example/v1")
        self.end_headers()
        self.wfile.write(data)
