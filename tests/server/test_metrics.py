"""What a server counts."""

from __future__ import annotations

from types import SimpleNamespace

import httpx

from tests.dataset.fake_engine import FakeEngine
from tests.server.conftest import serving


def test_what_was_answered_is_counted() -> None:
    engine = FakeEngine(SimpleNamespace(batch_invariant=True))
    hi = {"messages": [{"role": "user", "content": "Hi"}]}
    with serving(engine) as running, httpx.Client(base_url=running.address) as http:
        for body in (hi, hi | {"stream": True}, hi | {"n": 2}):
            http.post("/v1/chat/completions", json=body)
        http.get("/health", headers={"host": "evil"})
        counted = http.get("/metrics").text
    lines = [line for line in counted.splitlines() if line.startswith("qwencli_http_responses")]
    assert lines == [
        f'qwencli_http_responses_total{{status="{status}"}} {count}'
        for status, count in ((200, 2), (400, 1), (403, 1))
    ]
    assert 'qwencli_tokens_total{kind="generated"}' in counted
    assert "qwencli_e2e_seconds_count 2" in counted
