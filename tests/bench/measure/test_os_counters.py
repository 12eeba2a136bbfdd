"""Control groups of both versions, of containers and of none, as made-up files."""

from __future__ import annotations

import pytest

from qwencli.bench.measure.os_counters import CgroupStats, Stalls

V2 = "0::/pod/worker\n"
V1 = "5:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n0::/\n"


def made(tmp_path, membership, mounts):
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(membership)
    (proc / "self" / "mountinfo").write_text(
        "".join(
            f"36 31 0:35 {root} {tmp_path}{point} rw shared:1 - {kind} cgroup {options}\n"
            for root, point, kind, options in mounts
        )
    )
    return proc


def write(folder, name, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def stalls(proc, between=lambda: None):
    with CgroupStats(proc) as group:
        before = group.read()
        between()
        return group.stalls(before, group.read())


def stat(usec):
    return f"usage_usec 5\nnr_periods 9\nnr_throttled 2\nthrottled_usec {usec}\n"


def some(usec):
    return f"some avg10=0.00 avg60=0.00 avg300=0.00 total={usec}\nfull avg10=0.00 total=1\n"


def test_a_limit_of_this_group_or_of_one_above_is_found(tmp_path):
    proc = made(tmp_path, V2, [("/", "/sys", "cgroup2", "rw")])
    own, above = tmp_path / "sys/pod/worker", tmp_path / "sys/pod"
    write(own, "cpu.stat", stat(1000))
    write(above, "cpu.stat", stat(5000))
    write(own, "cpu.pressure", some(100))

    def goes_on():
        write(above, "cpu.stat", stat(95000))
        write(own, "cpu.pressure", some(40100))

    assert stalls(proc, goes_on) == Stalls(90.0, 40.0, None, None)


@pytest.mark.parametrize("root", ["/docker/a", "/"])
def test_version_1_counts_in_nanoseconds_wherever_a_container_has_its_mount(tmp_path, root):
    proc = made(tmp_path, V1, [(root, "/sys/cpu", "cgroup", "rw,cpu,cpuacct")])
    folder = tmp_path / "sys/cpu" / ("" if root != "/" else "docker/a")
    write(folder, "cpu.stat", "nr_periods 1\nnr_throttled 0\nthrottled_time 0\n")
    found = stalls(proc, lambda: write(folder, "cpu.stat", "throttled_time 7000000\n"))
    assert found.throttled_ms == 7.0


def test_without_a_group_the_whole_systems_pressure_is_read(tmp_path):
    proc = made(tmp_path, V2, [])
    write(proc / "pressure", "memory", some(0))
    found = stalls(proc, lambda: write(proc / "pressure", "memory", some(3000)))
    assert found == Stalls(None, None, 3.0, None)


def test_a_system_without_groups_tells_nothing(tmp_path):
    assert stalls(tmp_path / "none") == Stalls()


def test_pressure_that_was_turned_off_is_not_zero(tmp_path):
    proc = made(tmp_path, V2, [("/", "/sys", "cgroup2", "rw")])
    write(tmp_path / "sys/pod/worker", "cpu.pressure", "")
    assert stalls(proc).cpu_pressure_ms is None
