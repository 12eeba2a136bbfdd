"""`--profile` on a GPU: kernels stand in the trace, within the phases that ran them."""

from __future__ import annotations

import json

from PIL import Image

from qwencli.cli import run


def test_a_caption_shows_kernels_within_its_request(checkpoint, tmp_path):
    Image.new("RGB", (64, 48), (90, 10, 200)).save(tmp_path / "picture.png")
    trace = tmp_path / "trace.json"
    base = ["caption", str(tmp_path / "picture.png"), "--model", str(checkpoint("qwen3_vl"))]
    assert run([*base, "--device", "cuda", "--profile", str(trace), "--max-new-tokens", "16"]) == 0
    document = json.loads(trace.read_text())
    assert document["otherData"]["notes"] == []
    events = document["traceEvents"]
    groups = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    spans = [event for event in events if event["ph"] == "X"]
    kernels = [event for event in spans if groups[event["pid"]] == "cuda:0"]
    (request,) = [event for event in spans if "num_new_tokens" in event.get("args", {})]
    (load,) = [event for event in spans if event["name"] == "load"]

    def within(outer):
        end = outer["ts"] + outer["dur"]
        return [each for each in kernels if outer["ts"] <= each["ts"] <= end]

    assert within(load)
    # One and more a layer, a token; those of graphs too.
    assert len(within(request)) > 16
    assert [event["name"] for event in spans if event["name"] == "capture"]
