from __future__ import annotations

import warnings

import torch

from qwencli.engine.instruments.device_events import DeviceEvents, allocator_counts


def test_waits_for_the_device_are_counted_and_event_waits_are_not():
    tensor = torch.ones(4, device="cuda")
    synchronize = torch.cuda.synchronize
    with DeviceEvents("cuda:0") as events:
        tensor.sum().item()
        torch.cuda.synchronize()
        event = torch.cuda.Event()
        event.record()
        event.synchronize()
    assert events.syncs == 2
    assert torch.cuda.synchronize is synchronize
    assert torch.cuda.get_sync_debug_mode() == 0


def test_other_warnings_still_show():
    with warnings.catch_warnings(record=True) as caught, DeviceEvents("cuda:0"):
        warnings.simplefilter("always")
        warnings.warn("something else", UserWarning, stacklevel=1)
    assert [str(one.message) for one in caught] == ["something else"]


def test_captures_are_noted():
    x = torch.ones(4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with DeviceEvents("cuda:0") as events, torch.cuda.graph(graph):
        x += 1
    assert [span.name for span in events.spans] == ["graph_capture"]


def test_driver_allocations_are_counted():
    torch.cuda.empty_cache()
    before = allocator_counts("cuda:0")
    block = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    del block
    torch.cuda.empty_cache()
    after = allocator_counts("cuda:0")
    assert after.device_allocs >= before.device_allocs + 2
    assert after.alloc_retries == before.alloc_retries
