"""Fixed work tells how fast a host is: the same each time, and an interrupt counts for nothing."""

from __future__ import annotations

import itertools

from qwencli.bench.measure import cpu_calibration as host_pace
from qwencli.bench.measure.cpu_calibration import CpuCalibration, calibrate_cpu


def test_the_walk_is_longer_than_the_loop():
    pace = calibrate_cpu()
    assert 0 < pace.cpu_loop_us < pace.pointer_chase_us


def test_an_interrupt_within_it_counts_for_nothing(monkeypatch):
    loops, walks = iter([9e6, 4000, 5000, 4500, 8e7]), iter([300_000, 9e9, 200_000])
    monkeypatch.setattr(host_pace, "_loop_ns", lambda: next(loops))
    monkeypatch.setattr(host_pace, "_walk_ns", lambda objects: next(walks))
    assert calibrate_cpu() == CpuCalibration(4.0, 200.0)


def test_each_walk_is_over_objects_of_its_own_in_no_order_of_theirs():
    """Else the second would find what the first has fetched, and the first what lies ahead."""
    walks = host_pace._places()
    places = [[id(number) for number in walk] for walk in walks]
    assert len({place for walk in places for place in walk}) == sum(map(len, walks))
    for walk in places:
        ahead = sum(0 < after - before <= 64 for before, after in itertools.pairwise(walk))
        assert ahead < len(walk) / 100
    assert host_pace._places() is walks
