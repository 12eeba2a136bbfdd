from __future__ import annotations

import torch

from qwencli.engine.instruments.device_events import DeviceEvents, allocator_counts


def test_compilations_are_noted():
    import torch._dynamo

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    with DeviceEvents("cpu") as events:
        compiled(torch.ones(2))
        compiled(torch.ones(2))
        compiled(torch.ones(3))
    compiled(torch.ones(4))
    assert [span.name for span in events.spans] == ["compile", "compile"]
    assert all(span.start_s < span.end_s for span in events.spans)
    torch._dynamo.reset()


def test_off_cuda_there_is_nothing_to_count():
    with DeviceEvents("cpu") as events:
        torch.ones(1).item()
    assert events.syncs is None
    assert allocator_counts("cpu") is None
