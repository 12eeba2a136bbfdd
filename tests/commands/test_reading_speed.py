"""What is said at a terminal while weights are read."""

from __future__ import annotations

from types import SimpleNamespace

from qwencli.commands import start_engine


def test_the_speed_of_reading_is_of_all_that_was_read(monkeypatch):
    engine = SimpleNamespace(weights_read=(0, 0))
    now_s = [100.0]
    monkeypatch.setattr(start_engine.time, "perf_counter", lambda: now_s[0])
    said = start_engine.reading_speed(engine)
    assert said() == ""
    engine.weights_read = (10**9, 8 * 10**9)
    assert said() == ": 1.0 of 8.0 GB"
    for now_s[0], done in ((100.5, 3 * 10**9), (101.0, 9 * 10**9)):
        engine.weights_read = (done, 8 * 10**9)
        told = said()
    assert told == ": 8.0 of 8.0 GB, 7.0 GB/s"
