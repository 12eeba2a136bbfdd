"""How far a set is, and how long it will take."""

from __future__ import annotations

import json

import pytest

from qwencli.commands.caption_folder import what_computes
from qwencli.commands.options import RunOptions
from qwencli.dataset.pipeline import Captioned, Failed, Task
from qwencli.dataset.progress import Progress, _rates_file, duration, keep_rate, kept_rate
from qwencli.dataset.sources import Item
from qwencli.errors import InputError
from qwencli.models.resolve import resolve_model
from qwencli.output import Output
from tests.dataset.fake_engine import RAN, TIMINGS


def outcome(good=True):
    from qwencli.results import GenerationResult

    task = Task(Item("a.png"))
    if not good:
        return Failed(task, InputError("no"))
    result = GenerationResult("a", (1, 2, 3, 4), "stop", 5, 0, TIMINGS, RAN, (), None)
    return Captioned(task, "a", "What?", None, result)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "less than a second"),
        (0, "0 s"),
        (59, "59 s"),
        (200, "3 min 20 s"),
        (7200, "2 h"),
        (90_000 * 3, "3 days 3 h"),
    ],
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_lines_where_there_is_no_terminal(capsys):
    now = [0.0]
    said = []
    progress = Progress(100, Output(), said.append, lambda: now[0])
    with progress.shown("cpu"):
        for number in range(40):
            now[0] += 0.5
            progress.add(outcome(good=number != 3))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["30 of 100, 1 failed, 2.0 captions/s, 8 tok/s, 35 s left"]
    assert said[0].done == 30 and said[0].gpu_percent is None


def test_a_rate_is_kept(tmp_path):
    computes = {"model": "m", "device": "cpu"}
    assert kept_rate(computes) is None
    keep_rate(computes, 4, 1.0, "cpu")
    assert kept_rate(computes) is None
    keep_rate(computes, 600, 60.0, "cpu")
    rate = kept_rate(computes)
    assert rate.captions_per_s == 10.0
    assert rate.estimate(1200).startswith("about 2 min, at the 10.00 captions/s that this machine")
    assert kept_rate({**computes, "quantization": "4bit"}) is None
    _rates_file().write_text('{"x": 3', encoding="utf-8")
    assert kept_rate(computes) is None


def test_rates_of_servers_are_kept_apart():
    """A server says nothing of the speed of another, whatever model both name."""
    spec = resolve_model("scenes")

    def computes(*endpoints, schema=None):
        return what_computes(RunOptions(endpoint=list(endpoints)), spec, "auto", schema)

    first, second = "http://user:secret@a:8000/v1", "http://b:8000/v1"
    keep_rate(computes(first), 600, 60.0, "a")
    keep_rate(computes(second), 600, 6.0, "b")
    assert kept_rate(computes(first)).captions_per_s == 10.0
    assert kept_rate(computes(second)).captions_per_s == 100.0
    for other in (computes(), computes(first, second), computes(first, schema="{}")):
        assert kept_rate(other) is None
    keep_rate(computes(first, second), 600, 5.0, "both")
    assert kept_rate(computes(second, first)).captions_per_s == 120.0
    assert "secret" not in _rates_file().read_text(encoding="utf-8")


def test_events_and_estimates(caption, pictures, capsys):
    folder = pictures(*(f"{n}.png" for n in range(20)))
    assert caption(folder, "--dry-run") == 0
    assert "estimate: none yet" in capsys.readouterr().err
    (folder / "bad.jpg").write_bytes(b"x")
    assert caption(folder, "--json") == 1
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    assert events[0]["event"] == "start" and events[0]["to_caption"] == 21
    end = events[-1]
    assert end["event"] == "end" and (end["captioned"], end["failed"]) == (20, 1)
    assert end["failures"].endswith("failures.jsonl") and end["captions_per_s"] > 0
    assert sum(event["event"] == "caption" for event in events) == 20
    assert "captions/s" in err and "tok/s" in err
    more = pictures("more.png", folder="more")
    assert caption(more, "--dry-run", "--json") == 0
    out, err = capsys.readouterr()
    plan = json.loads(out)
    assert plan["event"] == "plan" and plan["estimate_s"] > 0
    assert plan["estimate_from"]["captions"] == 20
    assert "that this machine reached with this model on cpu (20 captions" in err
