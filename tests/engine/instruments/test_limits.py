from __future__ import annotations

import pytest

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
    assert all(1e-8 < seconds < 1e-3 for seconds in times.eager)
    assert times.graph == ()


def test_memory_is_read_in_two_ways_and_copied(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qwencli.engine.instruments.timing.LARGEST_BUFFER_ON_CPU", 1 << 22)
    rates = memory_rates("cpu", 0.01)
    assert set(rates.read) == {PRODUCT, SUM}
    assert all(1e8 < rate < 1e13 for rate in (*rates.read.values(), rates.copy))
