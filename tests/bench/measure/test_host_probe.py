from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time

import pytest

from qwencli.bench.measure import host_probe as token_probe
from qwencli.bench.measure.cpu_calibration import CpuCalibration
from qwencli.bench.measure.host_probe import LEARNING, HostProbe, TokenProbe
from qwencli.bench.measure.os_counters import CoreClock, Waits, system_times, waits
from qwencli.bench.storage import columns
from qwencli.results import EffectiveConfig, GenerationChunk, GenerationResult, Timings

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells this on Linux alone")
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")

TOKEN_S = 0.003
RAN = EffectiveConfig("native", "none", "sdpa", "static", "cpu", "float32")
TIMINGS = Timings(0.0, 0.0, None, 0.0, 0.0, 0.0, 0.0, 1.0)


def tokens(count, disturb=None, at=20):
    """A stream of `count` tokens; `disturb()` runs while token `at` is made."""
    for index in range(count):
        time.sleep(TOKEN_S)
        if disturb and index == at:
            disturb()
        yield GenerationChunk("", (index,))
    yield GenerationChunk("", (), GenerationResult("", (), "length", 1, 0, TIMINGS, RAN, (), None))


def watch(disturb=None, count=30, probe=None):
    probe = probe or TokenProbe("cpu")
    with probe, HostProbe() as host:
        probe.drain(tokens(count, disturb))
    return probe.rows(host.collections)


def named(rows, event):
    return [row for row in rows if row["event"] == event]


def disturbed(disturb, probe=None):
    """The row of the token in which `disturb()` ran: a busy machine makes others late as well."""
    at = []

    def at_work():
        disturb()
        at.append(time.perf_counter())

    rows = named(watch(at_work, probe=probe), "token")
    return next(row for row in rows if row["t_s"] - row["span_ms"] / 1e3 < at[0] <= row["t_s"])


def spin(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_rows_tell_the_mean_clock_of_the_core(monkeypatch):
    clocks = iter([9000.0, 4000.0, *[2000.0] * 40])
    monkeypatch.setattr(CoreClock, "read_mhz", lambda clock: next(clocks))
    rows = watch()
    assert [row["core_mhz"] for row in named(rows, "prefill")] == [4000.0]
    assert [row["core_mhz"] for row in named(rows, "decode")] == [2000.0]


@pytest.mark.parametrize(("token_s", "within"), [(0.02, [2, 8, 14, 20, 26]), (0.009, [])])
def test_the_hosts_pace_is_measured_at_the_end_and_between_long_tokens(
    monkeypatch, token_s, within
):
    at, taken = {"s": 1000.0, "token": 0}, []

    def measure():
        taken.append(at["token"])
        return CpuCalibration(float(at["token"]), 200.0)

    monkeypatch.setattr(token_probe, "calibrate_cpu", measure)
    monkeypatch.setattr(time, "perf_counter", lambda: at["s"])
    probe = TokenProbe("cpu")
    taken.clear()  # what the first walk needs has been made
    with probe:
        for _ in range(30):
            at["token"] += 1
            at["s"] += token_s
            probe.note()
    assert taken == [*within, 30]
    assert probe.cpu_calibration() == {
        "cpu_loop_us": pytest.approx(sum(taken) / len(taken)), "pointer_chase_us": 200.0,
    }  # fmt: skip


def test_a_run_has_a_row_for_each_phase_in_columns_of_the_file():
    rows = watch()
    assert len(named(rows, "prefill")) == len(named(rows, "decode")) == 1
    assert all(set(row) <= set(columns.HOST) for row in rows)
    assert [row["t_s"] for row in rows] == sorted(row["t_s"] for row in rows)
    assert named(rows, "decode")[0]["tokens"] == 29
    assert named(rows, "decode")[0]["span_ms"] >= 29 * TOKEN_S * 1e3


def test_a_token_that_sleeps_used_no_processor():
    row = disturbed(lambda: time.sleep(0.3))
    assert row["span_ms"] >= 300
    assert row["main_cpu_ms"] < 75


def test_a_token_that_works_used_it():
    row = disturbed(lambda: spin(0.08))
    assert row["main_cpu_ms"] >= 75


def test_collections_are_noted_with_their_time():
    heap = [{} for _ in range(200_000)]
    start = time.perf_counter()
    rows = watch(gc.collect)
    longest = max(named(rows, "gc"), key=lambda row: row["span_ms"])
    assert longest["span_ms"] > 1.0
    assert start < longest["t_s"] - longest["span_ms"] / 1e3 < longest["t_s"] < time.perf_counter()
    assert len(heap) == 200_000


@linux
def test_another_python_thread_is_seen_at_work():
    working, done, stop = threading.Event(), threading.Event(), threading.Event()

    def work():
        working.wait()
        spin(0.08)
        done.set()
        stop.wait()  # a thread that has ended has no times to be read

    thread = threading.Thread(target=work)
    thread.start()
    try:
        row = disturbed(lambda: (working.set(), done.wait()))
    finally:
        stop.set()
        thread.join()
    assert row["other_python_ms"] >= 60
    assert row["main_cpu_ms"] < row["span_ms"] / 2


@posix
def test_going_on_after_a_stop_is_noted():
    before = signal.getsignal(signal.SIGCONT)
    rows = watch(lambda: os.kill(os.getpid(), signal.SIGCONT))
    assert len(named(rows, "stop")) == 1
    assert signal.getsignal(signal.SIGCONT) is before


def test_what_is_slow_is_learnt_from_the_run_before():
    probe = TokenProbe("cpu")
    watch(probe=probe)
    assert disturbed(lambda: time.sleep(0.3), probe=probe)["span_ms"] >= 300
    assert LEARNING < 20


def test_one_token_has_no_decode():
    rows = watch(count=1)
    assert not named(rows, "decode")
    assert len(named(rows, "prefill")) == 1


def test_waits_of_the_main_thread_and_of_its_helpers_are_told_apart():
    earlier = (b"5 1000000 1", b"7000000 0 1", b"1 0 1")
    later = (b"6 3000000 2", b"9000000 500000 2", b"1 4000000 9")
    assert waits(earlier, later) == Waits(main_ms=2.0, helper_ms=4.0, helper_cpu_ms=2.0)
    assert waits(earlier[:1], later[:1]) == Waits(2.0, 0.0, 0.0)
    assert waits((), ()) is None
    assert waits(earlier, later[:1]) is None


def test_a_thread_that_ended_costs_its_own_figures_alone():
    earlier, later = (b"5 1000000 1", b"7 0 1"), (b"6 3000000 2", b"")
    assert waits(earlier, later) == Waits(2.0, 0.0, 0.0)


@linux
def test_rows_tell_waits_of_helpers_and_limits_of_the_control_group():
    decode = named(watch(), "decode")[0]
    for name in ("runqueue_ms", "main_runqueue_ms", "helper_runqueue_ms", "helper_cpu_ms"):
        assert decode[name] >= 0.0
    assert {"throttled_ms", "cpu_pressure_ms", "memory_pressure_ms"} <= decode.keys()


@linux
def test_the_system_is_busy_while_this_process_is():
    before = system_times()
    spin(0.15)
    after = system_times()
    assert after.busy_ms - before.busy_ms >= 100
    assert after.steal_ms >= before.steal_ms
