"""A hub on this machine: serves one repository over real HTTP, or fails in a chosen way."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "a" * 40


class FakeHub:
    """Serves `files` (name -> bytes) as the repository `repo_id`.

    Args:
        refuse: (status, headers) to answer everything with, None to serve.
        cut: name of a file whose transfer breaks in the middle, None for none.
    """

    def __init__(self, repo_id, files):
        self.repo_id = repo_id
        self.files = files
        self.refuse = None
        self.cut = None
        self.requests = []

    def siblings(self):
        return [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]

    def tree(self):
        return [
            {"type": "file", "path": name, "size": len(data), "oid": etag(data)}
            for name, data in self.files.items()
        ]


def etag(data):
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def handler_of(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, *, body):
            path = self.path.split("?")[0]
            hub.requests.append((self.command, path))
            if hub.refuse is not None:
                status, headers = hub.refuse
                return self.reply(status, b"{}", headers, body)
            if path.startswith("/api/models/") and "/tree/" in path:
                return self.reply(200, json.dumps(hub.tree()).encode(), {}, body)
            if path.startswith("/api/models/"):
                info = {"id": hub.repo_id, "sha": COMMIT, "siblings": hub.siblings()}
                return self.reply(200, json.dumps(info).encode(), {}, body)
            data = hub.files.get(path.rpartition("/")[2])
            if data is None:
                return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": COMMIT}
            return self.reply(200, data, headers, body, cut=path.endswith(hub.cut or "\0"))

        def reply(self, status, data, headers, body, cut=False):
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            if body:
                self.wfile.write(data[: len(data) // 2] if cut else data)

        def log_message(self, *args):
            pass

    return Handler


@contextmanager
def serve(hub):
    """Run the hub; yields its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
