from __future__ import annotations

from types import SimpleNamespace

from qwencli.engine.limits import count_work, device_work, launch_rate, read_bandwidth


def test_limits_of_the_cpu_are_measured():
    assert 1e8 < read_bandwidth("cpu", 1 << 22) < 1e13
    rate = launch_rate("cpu")
    assert 1e3 < rate.eager < 1e8
    assert rate.graph is None


def test_there_is_nothing_to_count_on_a_cpu():
    def must_not_run():
        raise AssertionError

    assert device_work("cpu", must_not_run) is None


def event(name, where, us=0.0):
    return SimpleNamespace(
        name=name,
        device_type=f"DeviceType.{where}",
        time_range=SimpleNamespace(elapsed_us=lambda: us),
    )


def test_launches_kernels_and_their_time_are_counted_apart():
    events = [
        event("aten::mm", "CPU"),
        event("cudaLaunchKernel", "CPU"),
        event("cudaGraphLaunch", "CPU"),
        event("cudaMemcpyAsync", "CPU"),
        event("cudaStreamSynchronize", "CPU"),
        event("gemv_kernel", "CUDA", 30.0),
        event("rms_norm", "CUDA", 5.0),
        event("Memcpy DtoH (Device -> Pinned)", "CUDA", 1.0),
    ]
    found = count_work(events)
    assert (found.launches, found.kernels, found.busy_ms) == (3, 2, 0.036)
    assert count_work(events[:5]) is None
