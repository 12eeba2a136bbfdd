"""A planted slowdown: nothing in the first run, its share of the token time in all others."""

from __future__ import annotations

import itertools
import statistics
import sys
from pathlib import Path

import pytest

from qwencli.bench.inject.slowdown_worker import SlowedEngine
from qwencli.bench.run.bench_run import RunSettings, run_bench
from qwencli.bench.storage.row_file import read_rows
from qwencli.config import EngineConfig, ModelSource, ModelSpec, SamplingOptions
from qwencli.engine.instruments import disturbances
from qwencli.messages import GenerationRequest, user_message
from qwencli.output import Output
from tests.bench.inject.busy_engine import BusyEngine

MODEL = ModelSpec("busy", ModelSource.LOCAL, hub_config={})


@pytest.fixture
def request_of_40():
    return GenerationRequest(
        messages=(user_message("Say something.", ()),),
        sampling=SamplingOptions(max_new_tokens=40),
        ignore_eos=True,
    )


def test_each_token_but_those_of_the_first_run_takes_so_much_longer(request_of_40, monkeypatch):
    asked, waits = [], []

    def waiting(device, seconds):
        asked.append((device, seconds))
        return lambda: waits.append(seconds)

    monkeypatch.setattr(disturbances, "waiting", waiting)
    with SlowedEngine(BusyEngine(EngineConfig(model=MODEL)), percent=3.0) as engine:
        first = engine.generate(request_of_40)
        assert not waits
        usual_s = statistics.median(first.itl_ms) / 1e3
        assert asked == [("cpu", pytest.approx(0.03 * usual_s))]
        engine.generate(request_of_40)
        assert len(waits) == 40
        engine.generate(request_of_40)
        assert (len(waits), len(asked)) == (80, 1)


def test_the_host_waits_for_as_long_as_asked(monkeypatch):
    at = itertools.count()
    monkeypatch.setattr(disturbances.time, "perf_counter", lambda: next(at) / 1024)
    wait = disturbances.waiting("cpu", 16 / 1024)
    for turn in range(1, 11):
        wait()
        assert next(at) == 18 * turn - 1  # the first look, and one for each step of the clock


def test_a_campaign_with_a_slowdown_is_slower_and_measures_no_limits(make_plan, cpu, tmp_path):
    times = {}
    worker = str(Path(__file__).with_name("busy_engine.py"))
    for name, extra in (("plain", ["plain"]), ("planted", ["100"])):
        command = [sys.executable, worker, *extra]
        how = RunSettings(resume=False, timeout_s=60.0, limits=False)
        folder = tmp_path / name
        plan = make_plan("busy", runs=3, tokens=60)
        assert run_bench(plan, cpu, folder, [], Output(quiet=True), how, command) == 0
        rows = [row for row in read_rows(folder / "tokens.csv") if row["itl_ms"]]
        times[name] = [[float(r["itl_ms"]) for r in rows if r["run"] == n] for n in "0123"]
        assert read_rows(folder / "probes.csv") == read_rows(folder / "roofline.csv") == []
    # Twice the time for each token but the first run's; a busy machine slows some further.
    fastest = {name: min(itertools.chain(*runs[1:])) for name, runs in times.items()}
    assert fastest["plain"] <= statistics.median(times["plain"][0]) * 1.2
    assert fastest["planted"] > statistics.median(times["planted"][0]) * 1.2
