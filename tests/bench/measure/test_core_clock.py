from __future__ import annotations

import sys

import pytest

from qwencli.bench.measure.os_counters import CoreClock


def system(folder, **khz):
    for core, text in khz.items():
        (folder / core / "cpufreq").mkdir(parents=True)
        (folder / core / "cpufreq" / "scaling_cur_freq").write_text(text)
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="reads files as Linux has them")
def test_the_clock_of_the_core_that_runs_now(tmp_path):
    cores = iter([0, 1, 0, 2, 3])
    where = system(tmp_path, cpu0="5200000\n", cpu1="2100500\n", cpu3="<unknown>\n")
    with CoreClock(where, lambda: next(cores)) as clock:
        assert [clock.read_mhz(), clock.read_mhz()] == [5200.0, 2100.5]
        (where / "cpu0" / "cpufreq" / "scaling_cur_freq").write_text("800000\n")
        assert clock.read_mhz() == 800.0
        assert clock.read_mhz() is None
        assert clock.read_mhz() is None


def test_a_system_that_does_not_tell(tmp_path):
    with CoreClock(tmp_path) as clock:
        assert clock.read_mhz() is None


def test_this_machine_is_read_or_says_nothing():
    with CoreClock() as clock:
        mhz = clock.read_mhz()
    assert mhz is None or 100 < mhz < 10_000
