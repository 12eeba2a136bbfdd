"""Other engines' answers, recorded or from a server in this process, as campaigns."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.side_by_side import foreign, llama_bench, openai_endpoint, vllm_latency
from qwencli.bench.compare.comparison import compare
from qwencli.bench.compare.sides import read_side
from qwencli.bench.storage.row_file import read_rows
from qwencli.engine.machine.device import DeviceFacts
from qwencli.errors import BenchError, MissingDependencyError

CPU = DeviceFacts("cpu", None, None, None, None, "2.15", None, None, "no flash", None)
TOKENS = 6


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(foreign, "read_device_facts", lambda device: CPU)


class Endpoint(BaseHTTPRequestHandler):
    """Streams TOKENS words; models called "gone" and "cut" fail."""

    asked: list = []  # noqa: RUF012

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, dict(self.headers), body))
        if body["model"] == "gone":
            self.send_error(404, "no such model")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for index in range(TOKENS):
            time.sleep(0.002)
            self._event({"choices": [{"delta": {"content": f"word{index} "}}]})
        if body["model"] == "cut":
            return
        self._event({"choices": [], "usage": {"prompt_tokens": 70, "completion_tokens": TOKENS}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value):
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    Endpoint.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


def endpoint(url, out, served="m", *more):
    openai_endpoint.script(
        ["--url", url, "--served", served, "--name", "qwen", "--out", str(out), "--runs", "3",
         "--max-new-tokens", str(TOKENS), *more]
    )  # fmt: skip


def test_an_endpoint_becomes_a_campaign_that_can_be_compared(url, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    endpoint(url, tmp_path / "a")
    endpoint(url, tmp_path / "b", "m", "--engine", "vllm")
    path, headers, body = Endpoint.asked[0]
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", "Bearer secret")
    assert (body["max_tokens"], body["temperature"], body["ignore_eos"]) == (TOKENS, 0, True)
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64")
    (cell,) = read_rows(tmp_path / "a" / "cells.csv")
    assert (cell["status"], cell["runs"], cell["verdict"][:8]) in (
        ("ok", "3", "ok"), ("ok", "3", "unstable"),
    )  # fmt: skip
    assert 1 < float(cell["decode_tok_per_s_median"]) < 500
    assert float(cell["ttft_s_median"]) >= 0.002
    runs = read_rows(tmp_path / "a" / "runs.csv")
    assert [row["status"] for row in runs] == ["warmup", "ok", "ok", "ok"]
    assert {row["num_prompt_tokens"] for row in runs} == {"70"}
    assert len(read_rows(tmp_path / "a" / "tokens.csv")) == 4 * TOKENS
    assert (tmp_path / "a" / "report.html").is_file()
    assert "openai" in capsys.readouterr().out
    found = compare(read_side(tmp_path / "a"), read_side(tmp_path / "b"))
    assert len(found.cells) == 1  # matched, though the engines have different names
    assert "secret" not in (tmp_path / "a" / "environment.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("served", "said"), [("gone", "answers 404"), ("cut", "ended before it was done")]
)
def test_an_endpoint_that_fails_is_one_error(url, tmp_path, served, said):
    with pytest.raises(BenchError, match=said):
        endpoint(url, tmp_path / "c", served)
    assert not (tmp_path / "c").exists()


def test_an_endpoint_that_is_not_there(tmp_path):
    with pytest.raises(BenchError, match="gives no answer"):
        endpoint("http://127.0.0.1:1/v1", tmp_path / "c")


def test_an_error_inside_the_stream_is_told():
    lines = [(b'data: {"error": {"message": "out of memory"}}\n', 0.1)]
    with pytest.raises(BenchError, match="out of memory"):
        openai_endpoint.read_stream(iter(lines))


def test_speeds_use_the_servers_own_count_of_tokens(tmp_path):
    lines = [
        (b'data: {"choices": [{"delta": {"content": "ab"}}]}\n', 0.5),
        (b'data: {"choices": [{"delta": {"content": "cd"}}]}\n', 1.5),
        (b'data: {"choices": [], "usage": {"completion_tokens": 5, "prompt_tokens": 9}}\n', 1.5),
        (b"data: [DONE]\n", 1.5),
    ]
    run = openai_endpoint.read_stream(iter(lines))
    assert (run.num_new_tokens, run.token_s, run.text) == (5, (0.5, 1.5), "abcd")
    work = foreign.Work("openai", "m", "none", "Hi", (), 1, 5, "cpu")
    with foreign.ForeignCampaign(tmp_path / "c", work) as campaign:
        campaign.add(run)
    assert read_rows(tmp_path / "c" / "runs.csv")[0]["decode_tok_per_s"] == "4.0"


# `llama-bench -p 0 -n 128 -r 3 -o json`, shortened to the fields around those that are read.
LLAMA = """[
  {
    "build_commit": "b1d5d7a", "model_filename": "model.gguf", "model_type": "qwen3vl 4B Q8_0",
    "n_batch": 2048, "flash_attn": 1, "n_prompt": 0, "n_gen": 128, "n_depth": 0,
    "avg_ns": 421000000, "stddev_ns": 1000000, "avg_ts": 304.1, "stddev_ts": 0.7,
    "samples_ns": [ 420000000, 421000000, 422000000 ],
    "samples_ts": [ 304.762, 304.038, 303.318 ]
  }
]"""
# `vllm bench latency --output-json`.
VLLM_ONE = '{"avg_latency": 0.021, "latencies": [0.02, 0.021, 0.022], "percentiles": {"50": 0.021}}'
VLLM_MANY = '{"avg_latency": 0.52, "latencies": [0.521, 0.52, 0.519], "percentiles": {}}'


def test_llama_bench_as_recorded():
    warm_up, *runs = llama_bench.read_runs(LLAMA)
    assert warm_up.decode_s is None
    assert [round((run.num_new_tokens - 1) / run.decode_s, 2) for run in runs] == [
        304.76, 304.04, 303.32,
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "[]", "{}", '[{"n_gen": 0, "n_prompt": 512}]', "[1]"])
def test_llama_bench_saying_something_else(text):
    with pytest.raises(BenchError, match="another answer than expected"):
        list(llama_bench.read_runs(text))


def test_vllm_as_recorded(tmp_path):
    one, many = map(vllm_latency.read_latencies, (VLLM_ONE, VLLM_MANY))
    work = foreign.Work("vllm", "qwen", "none", "Hi", (), 3, 128, "cpu", "dummy")
    foreign.measure(tmp_path / "c", work, lambda: vllm_latency.runs_of(one, many, 512, 128))
    (cell,) = read_rows(tmp_path / "c" / "cells.csv")
    assert float(cell["decode_tok_per_s_median"]) == pytest.approx(127 / 0.499)
    assert (cell["ttft_s_median"], cell["runs"]) == ("0.021", "3")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"latencies": []}', '{"latencies": [null]}'])
def test_vllm_saying_something_else(text):
    with pytest.raises(BenchError, match="vllm bench"):
        vllm_latency.read_latencies(text)


def test_an_engine_that_is_not_there_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    common = ["--name", "m", "--out", str(tmp_path / "c")]
    with pytest.raises(MissingDependencyError, match="vllm is not installed"):
        vllm_latency.script(["--model", "m", *common])
    with pytest.raises(MissingDependencyError, match="llama-bench is not installed"):
        llama_bench.script(["--gguf", "m.gguf", *common])

    def fails(_):
        raise MissingDependencyError("vllm is not installed", "pip install vllm")

    assert foreign.main(fails) == 1
    assert capsys.readouterr().err == "error: vllm is not installed (pip install vllm)\n"


def test_a_folder_that_is_taken(tmp_path):
    (tmp_path / "x").write_text("", encoding="utf-8")
    work = foreign.Work("vllm", "m", "none", "Hi", (), 1, 5, "cpu")
    with pytest.raises(BenchError, match="is not empty"):
        foreign.ForeignCampaign(tmp_path, work)
