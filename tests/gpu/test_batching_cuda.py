"""Many requests at once on a CUDA device: kernels and graphs of every bucket of rows."""

from __future__ import annotations

import pytest
import torch

from qwencli.config import DType, EngineName, Kernels, SamplingOptions
from qwencli.engine.cache.paged_kv import PAGE_SIZE, DecodePages
from qwencli.engine.client import generate_many
from qwencli.engine.kernels.paged_attention import PagedAttention
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.ops.paged_attention import paged_attention
from qwencli.messages import GenerationRequest, user_message
from tests.checkpoints import engine_config, picture

CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "dim"),
    [(1, 32, 8, 128), (3, 16, 8, 128), (64, 24, 4, 64), (256, 32, 8, 128)],
)
def test_the_kernel_attends_as_plain_operators_in_float32(dtype, rows, heads, kv_heads, dim):
    torch.manual_seed(rows)
    pages = 12
    pool = torch.randn((rows * pages + 1) * PAGE_SIZE, 2 * kv_heads, dim, device=CUDA, dtype=dtype)
    tables = (torch.randperm(rows * pages, device=CUDA) + 1).view(rows, pages).to(torch.int32)
    lengths = torch.randint(1, pages * PAGE_SIZE, (rows,), device=CUDA, dtype=torch.int32)
    q = torch.randn(rows, heads + 2 * kv_heads, dim, device=CUDA, dtype=dtype)[:, :heads]
    seen = DecodePages(tables, lengths, pages * PAGE_SIZE)
    processors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    got = PagedAttention(processors)(q, pool, seen).float()
    expected = paged_attention(q.float().contiguous(), pool.float(), seen)
    assert (got - expected).norm() / expected.norm() < (1e-5 if dtype is torch.float32 else 5e-3)


@pytest.mark.parametrize("kernels", [Kernels.TRITON, Kernels.TORCH])
def test_answers_in_float32_are_those_of_requests_alone(checkpoint, kernels):
    requests = [
        GenerationRequest(
            (user_message("Why? " * (1 + n % 5), (picture(64 + 32 * (n % 2), 64),) * (n % 3)),),
            SamplingOptions(do_sample=False, max_new_tokens=4 + n % 20),
            ignore_eos=True,
        )
        for n in range(40)
    ]
    config = engine_config(
        checkpoint("qwen3_vl"),
        engine=EngineName.NATIVE,
        device="cuda",
        dtype=DType.FLOAT32,
        kernels=kernels,
    )
    with NativeEngine(config) as engine:
        alone = [engine.generate(request).token_ids for request in requests]
        together = [result.token_ids for result in generate_many(engine, requests)]
    same = sum(one == other for one, other in zip(alone, together, strict=True))
    # Sums of other kernels may turn a near tie.
    assert same >= 0.9 * len(requests)
