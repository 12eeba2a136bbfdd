"""Small tensors that are copied to the device together."""

from __future__ import annotations

import torch

from qwencli.engine.device_memory import upload

CUDA = torch.device("cuda")


def test_each_tensor_arrives_as_it_is_however_often_pinned_memory_is_used_again():
    sent = []
    for round_ in range(50):
        first = torch.arange(6).view(2, 3) + round_
        sent.append((first, upload([first, torch.empty(0, dtype=torch.int64), first.t()], CUDA)))
    for first, (one, none, other) in sent:
        assert torch.equal(one.cpu(), first) and torch.equal(other.cpu(), first.t())
        assert none.shape == (0,) and none.is_cuda


def test_the_host_does_not_wait_for_the_device():
    upload([torch.arange(3)], CUDA)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    done = torch.cuda.Event()
    done.record()
    upload([torch.arange(3)], CUDA)
    assert not done.query()
    torch.cuda.synchronize()
