"""Weights that arrive over a stream of their own are those in the file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from qwencli.engine.loading import reader
from qwencli.engine.loading.reader import Reader
from qwencli.errors import ModelFileError
from qwencli.models.weight_files import stored_tensors

CUDA = torch.device("cuda")


@pytest.fixture
def stored(tmp_path, monkeypatch):
    # Tensors have many pieces, and the ring is used many times over.
    monkeypatch.setattr(reader, "GPU_STAGING_BYTES", 1 << 20)
    tensors = {f"t{n}": torch.randn(700 + n, 1031, dtype=torch.bfloat16) for n in range(24)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors, stored_tensors([tmp_path / "model.safetensors"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_several_tensors_in_flight_in_memory_that_was_just_used(stored, dtype):
    tensors, found = stored
    with Reader(CUDA) as reading:
        for _ in range(3):
            begun = []
            for name, tensor in tensors.items():
                # Its memory goes to the next tensor while the GPU still writes to it.
                torch.randn(tensor.shape, device=CUDA).mul_(3)
                to = torch.empty(tensor.shape, dtype=dtype, device=CUDA)
                begun.append((name, to, reading.begin(found[name], to.view(-1))))
            for name, to, one in begun:
                one.wait()
                assert torch.equal(to.cpu(), tensors[name].to(dtype)), name


def test_a_file_that_ends_early_is_said_and_nothing_hangs(stored):
    tensors, found = stored
    file = found["t0"].file
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    with pytest.raises(ModelFileError, match="ended while reading"), Reader(CUDA) as reading:
        for name in tensors:
            reading.as_stored(found[name])
