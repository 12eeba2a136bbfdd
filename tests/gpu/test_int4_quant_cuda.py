"""int4 made in one pass on a GPU is that of the reference; what a thread writes is what is read."""

from __future__ import annotations

import pytest
import torch

from qwencli.config import DType, Quantization
from qwencli.engine.kernels.int4_quant import quantize
from qwencli.engine.loading import weight_cache, weights
from qwencli.engine.quant.quantized_tensor import Scheme
from qwencli.models.builtin import bundled_folder
from qwencli.models.folder import read_config
from qwencli.models.quantized_cache import cache_file
from qwencli.models.shape_reader import read_shape
from tests.engine.kernels.test_int4_quant import assert_alike

CUDA = torch.device("cuda")


@pytest.mark.parametrize(("rows", "columns"), [(6144, 2560), (2561, 192), (7, 96)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matrices_are_those_of_the_reference(rows: int, columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator(CUDA).manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator, device=CUDA) * 0.02
    assert_alike(weight.to(dtype))


def test_it_is_one_pass() -> None:
    weight = torch.randn(19456, 2560, device=CUDA, dtype=torch.bfloat16)
    quantize(weight, Scheme.INT4)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    quantize(weight, Scheme.INT4)
    end.record()
    end.synchronize()
    print(f"{weight.nbytes / start.elapsed_time(end) / 1e6:.0f} GB/s of bfloat16 read")
    assert start.elapsed_time(end) < 5.0  # the reference takes some 10 ms on an H200


def test_a_file_written_while_the_gpu_works_is_what_it_holds() -> None:
    folder = bundled_folder()
    shape = read_shape(read_config(folder))
    file = cache_file(folder, Quantization.INT4, DType.BFLOAT16)
    loads = []
    for _ in range(2):
        loads.append(
            weights.load(
                folder,
                shape,
                torch.bfloat16,
                CUDA,
                Quantization.INT4,
                cache_file=file,
                quantizer=quantize,
            )
        )
        torch.cuda.synchronize()
        writer = loads[-1].keeping
        if writer is not None:
            writer.begin()
            writing = weight_cache.BackgroundWriter(writer, CUDA)
            x = torch.randn(2048, 2048, device=CUDA)
            for _ in range(50):
                x = torch.tanh(x @ x)
            assert writing.end(60.0) is None
    first, second = loads
    assert first.keeping is not None
    assert second.keeping is None
    for name, matrix in first.matrices.items():
        for part, tensor in matrix.parts.items():
            assert torch.equal(tensor, second.matrices[name].parts[part]), (name, part)
