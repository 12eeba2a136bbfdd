from __future__ import annotations

from types import SimpleNamespace

import pytest

from qwencli.engine.instruments.device_events import count_work, covered, device_work


def test_there_is_nothing_to_count_on_a_cpu():
    def must_not_run():
        raise AssertionError

    assert device_work("cpu", must_not_run) is None


def event(name, where, start_us=0.0, end_us=0.0):
    return SimpleNamespace(
        name=name,
        device_type=f"DeviceType.{where}",
        time_range=SimpleNamespace(start=start_us, end=end_us),
    )


def test_launches_kernels_and_their_time_are_counted_apart():
    events = [
        event("aten::mm", "CPU"),
        event("cudaLaunchKernel", "CPU"),
        event("cudaGraphLaunch", "CPU"),
        event("cudaMemcpyAsync", "CPU"),
        event("cudaStreamSynchronize", "CPU"),
        event("gemv_kernel", "CUDA", 0.0, 30.0),
        event("rms_norm", "CUDA", 28.0, 33.0),
        event("Memcpy DtoH (Device -> Pinned)", "CUDA", 40.0, 41.0),
    ]
    found = count_work(events)
    assert (found.launches, found.kernels, found.busy_ms) == (3, 2, 0.034)
    assert found.names == ("gemv_kernel", "rms_norm")
    assert count_work(events[:5]) is None


@pytest.mark.parametrize(
    ("spans", "length"),
    [([], 0), ([(1, 3)], 2), ([(5, 6), (1, 3)], 3), ([(1, 4), (2, 3), (3, 6)], 5)],
)
def test_overlapping_kernels_keep_the_device_busy_once(spans, length):
    assert covered(spans) == length
