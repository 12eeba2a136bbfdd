from __future__ import annotations

import pytest

from qwencli.engine.instruments import timing
from qwencli.engine.instruments.timing import (
    PRODUCT,
    SUM,
    launch_times,
    memory_rates,
    read_bandwidth,
)


def test_limits_of_the_cpu_are_measured():
    assert 1e8 < read_bandwidth("cpu", 1 << 22) < 1e13
    times = launch_times("cpu")
    assert len(times.eager) > 1
    # A busy machine may stop for a while in some samples, not in all of them.
    assert min(times.eager) > 1e-8
    assert min(times.eager) < 1e-3
    assert times.graph == ()


def test_memory_is_read_in_two_ways_and_copied(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qwencli.engine.instruments.timing.LARGEST_BUFFER_ON_CPU", 1 << 22)
    rates = memory_rates("cpu", 0.01)
    assert set(rates.read) == {PRODUCT, SUM}
    assert all(1e8 < rate < 1e13 for rate in (*rates.read.values(), rates.copy))


def test_the_fastest_of_samples_that_fit_into_a_time_slice(monkeypatch: pytest.MonkeyPatch):
    """Beside other programs each of long samples was cut into, and the machine looked slow."""
    taken = []

    def timed(device, work, calls, samples):
        taken.append(calls)
        yield 1e-9

    monkeypatch.setattr(timing, "samples_s", timed)
    monkeypatch.setattr(timing, "_warm_seconds", lambda device, work: 1e-4)
    timing.sustained("cpu", lambda: None, 0.0)
    timing.sustained("cuda:0", lambda: None, 0.0)
    assert taken == [10, 200]
