"""`--profile`: the file that viewers of traces open."""

from __future__ import annotations

import json
import os
import threading
import time

import pytest
from PIL import Image

from qwencli import tracing
from qwencli.bench.run import campaign_runner
from qwencli.cli import run
from qwencli.engine.instruments.kernel_trace import KernelTrace, kernel_events
from qwencli.errors import OutputError
from qwencli.results import EffectiveConfig, GenerationResult, Timings
from qwencli.tracing import Event, Trace, TraceFile, span
from tests.bench.run.test_worker import make_spec
from tests.bench.run.test_worker import run as run_worker

NUMBER = (int, float)


def read_trace(path):
    """The events of a trace, after checking what the format asks of them: name -> spans."""
    document = json.loads(path.read_text())
    events = document["traceEvents"]
    assert document["displayTimeUnit"] == "ms"
    named = {(e["pid"], e.get("tid")) for e in events if e["name"] == "thread_name"}
    for event in events:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event["ph"] in "XM"
        if event["ph"] == "M":
            assert isinstance(event["args"]["name"], str)
            continue
        assert isinstance(event["ts"], NUMBER)
        assert event["ts"] >= 0
        assert isinstance(event["dur"], NUMBER)
        assert event["dur"] >= 0
        assert (event["pid"], event["tid"]) in named
    spans = [event for event in events if event["ph"] == "X"]
    nest(spans)
    return document, spans


def nest(spans):
    """Raise unless spans of one row lie in each other or side by side, as viewers need it."""
    open_ends = {}
    for each in sorted(spans, key=lambda e: (e["ts"], -e["dur"])):
        ends = open_ends.setdefault((each["pid"], each["tid"]), [])
        end = each["ts"] + each["dur"]
        while ends and ends[-1] <= each["ts"] + 0.01:
            ends.pop()
        assert not ends or end <= ends[-1] + 0.01, each
        ends.append(end)


def answer(start_s, *, server=False, tokens=3):
    """A result of a request that came at `start_s`."""
    token_t_s = tuple(start_s + 0.5 + 0.1 * n for n in range(tokens))
    known = (None,) * 4 if server else (1.0, 0.2, 0.1, 0.15)
    return GenerationResult(
        "text",
        (1,) * tokens,
        "stop",
        10,
        4,
        Timings(*known, 0.5, 0.2, 0.7, 10.0),
        EffectiveConfig("native", "none", "sdpa", "static", "cpu", "float32"),
        token_t_s,
        None,
    )


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(2):
        Image.new("RGB", (40, 30), (90 * number, 10, 200)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def caption(checkpoint, tmp_path):
    def call(*arguments):
        base = ["caption", "--model", str(checkpoint("qwen3_vl")), "--device", "cpu"]
        trace = ["--profile", str(tmp_path / "trace.json")]
        # What a folder asks again it draws: with random weights not every answer has a letter.
        numbers = ["--max-new-tokens", "4", "--seed", "1"]
        return run([*base, *trace, *numbers, *map(str, arguments)])

    return call


@pytest.mark.parametrize("kind", ["one", "several", "folder", "shaped"])
def test_a_caption_shows_its_phases(caption, pictures, tmp_path, kind, capsys):
    one, two = sorted(pictures.iterdir())
    inputs = {
        "one": [one],
        "several": [one, two],
        "folder": [pictures, "--guards", "none"],
        "shaped": [one, "--ban", "x", "--guards", "none"],
    }
    assert caption(*inputs[kind]) == 0
    _, spans = read_trace(tmp_path / "trace.json")
    names = {each["name"] for each in spans}
    assert names >= {
        "python and the command line", "load", "weights", "read", "preprocess", "vision",
        "prefill", "decode step", "detokenize", "decode", "decode picture",
    }  # fmt: skip
    requests = [each for each in spans if "num_new_tokens" in each.get("args", {})]
    assert len(requests) == (2 if kind in ("several", "folder") else 1)
    assert all(each["args"]["num_new_tokens"] == 4 for each in requests)
    assert "trace.json" in capsys.readouterr().err


def test_a_run_that_fails_leaves_its_trace_and_its_own_error(caption, pictures, tmp_path, capsys):
    broken = pictures / "broken.png"
    broken.write_bytes(b"\x89PNG no")
    assert caption(broken, pictures / "0.png") == 1
    assert "broken.png" in capsys.readouterr().err
    _, spans = read_trace(tmp_path / "trace.json")
    assert {"load", "prefill"} <= {each["name"] for each in spans}
    assert caption(pictures / "0.png", "--max-new-tokens", "0") == 2


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("there.json", "exists"),
        ("folder", "is a folder"),
        ("missing/trace.json", "does not exist"),
        ("there.json/trace.json", "is not a folder"),
        ("link.json", "exists"),
        ("/proc/trace.json", "cannot be written"),
    ],
)
def test_a_place_that_does_not_suit_is_one_line_before_anything_is_loaded(
    tmp_path, capsys, place, said
):
    (tmp_path / "there.json").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere")
    for command in (["caption", "x.png"], ["bench", "--dry-run"]):
        assert run([*command, "--profile", str(tmp_path / place)]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert "fault" not in error
    assert (tmp_path / "there.json").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_trace_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = TraceFile(tmp_path / "trace.json")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracing, "_write", full)
    with pytest.raises(OutputError, match=r"trace.json cannot be written \(No space"):
        file.write(Trace(), {})
    assert not list(tmp_path.iterdir())


def test_without_a_trace_nothing_is_noted():
    with span("a") as noted:
        assert noted is None
    assert tracing.active() is None
    assert span("a") is span("b")


def test_threads_have_rows_of_their_own(tmp_path):
    def work():
        with span("outer", bytes=3), span("inner"):
            time.sleep(0.002)

    with tracing.tracing() as trace:
        threads = [threading.Thread(target=work, name=f"reader_{n}") for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    TraceFile(tmp_path / "t.json").write(trace, {"command": "test"})
    document, spans = read_trace(tmp_path / "t.json")
    assert document["otherData"]["command"] == "test"
    assert len({each["tid"] for each in spans}) == 2
    assert [each["args"] for each in spans if each["name"] == "outer"] == [{"bytes": 3}] * 2


def test_requests_that_overlap_are_side_by_side(tmp_path):
    trace = Trace()
    for start_s in (0.0, 0.2, 0.9, 5.0):
        trace.add_answer(f"at {start_s}", answer(start_s))
    TraceFile(tmp_path / "t.json").write(trace, {})
    _, spans = read_trace(tmp_path / "t.json")
    rows = {each["name"]: each["tid"] for each in spans if each["name"].startswith("at")}
    assert rows["at 0.0"] == rows["at 0.9"] == rows["at 5.0"] != rows["at 0.2"]
    waiting = [each for each in spans if each["name"] == "waiting and preprocess"]
    assert waiting[0]["dur"] == pytest.approx(250_000)


def test_of_a_server_is_shown_what_is_seen_from_here(tmp_path):
    trace = Trace()
    trace.add_answer("remote", answer(1.0, server=True))
    TraceFile(tmp_path / "t.json").write(trace, {})
    _, spans = read_trace(tmp_path / "t.json")
    assert [each["name"] for each in spans] == ["remote", "first token", "decode", "decode"]


def test_a_trace_has_an_end(monkeypatch, tmp_path):
    monkeypatch.setattr(tracing, "MOST_EVENTS", 10)
    trace = Trace()
    trace.add(Event("here", "row", str(n), n, n + 1) for n in range(8))
    trace.add_answer("too much", answer(0.0))
    TraceFile(tmp_path / "t.json").write(trace, {})
    document, spans = read_trace(tmp_path / "t.json")
    assert len(spans) == 8
    assert document["otherData"]["events_left_out"] == 6


def test_the_profilers_clock_is_ours():
    import torch

    trace = Trace()
    kernels = KernelTrace(trace, ("cpu_op",))
    torch.ones(4)
    begun_s = time.perf_counter()
    torch.ones(64, 64) @ torch.ones(64, 64)
    ended_s = time.perf_counter()
    trace.endings[0]()
    kernels.close()  # the second time nothing happens
    product = next(each for each in trace.events if each.name == "aten::mm")
    assert begun_s - 0.01 < product.start_s < product.end_s < ended_s + 0.01


def test_kernels_are_those_of_the_gpu():
    about = {"device": 1, "stream": 7, "grid": [2, 1, 1], "block": [128, 1, 1]}
    recorded = {
        "baseTimeNanoseconds": 2_000_000_000,
        "traceEvents": [
            {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 5e5, "dur": 1e6, "args": about},
            {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunch", "ts": 1, "dur": 1},
            {"ph": "i", "name": "mark", "ts": 1},
        ],
    }
    (event,) = kernel_events(recorded, offset_s=1.0)
    grid = {"grid": [2, 1, 1], "block": [128, 1, 1]}
    assert event == Event("cuda:1", "stream 7", "gemm", 1.5, 2.5, grid)


def test_a_worker_tells_its_trace_before_its_end(monkeypatch):
    messages, _ = run_worker(make_spec(profile=True))
    kinds = [message["type"] for message in messages]
    assert kinds[-2:] == ["trace", "end"]
    told = json.loads(json.dumps(messages[-2]["events"]))
    assert {"run 0", "run 1", "run 2", "prefill"} <= {each[2] for each in told}
    assert "trace" not in [message["type"] for message in run_worker(make_spec())[0]]
    place = campaign_runner._PlannedProcess(None, 1, "[1/1]", "a cell")
    with tracing.tracing() as trace:
        campaign_runner._add_trace(place, told)
    groups = {each.group for each in trace.events}
    assert groups >= {"[1/1] a cell: requests"}
    assert all(f"{os.getpid()}" in group or "requests" in group for group in groups)
