"""The kernels of --batch-invariant on a CUDA device: bits that do not depend on the rows."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from qwencli.config import EngineName, Quantization, SamplingOptions
from qwencli.engine.client import generate_many
from qwencli.engine.kernels.batch_invariant import ROWS, batch_invariant_ops, product
from qwencli.engine.kernels.fused_ops import fused_ops
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.quant.quantized_tensor import Scheme
from qwencli.messages import GenerationRequest, user_message
from tests.checkpoints import engine_config, picture
from tests.engine.ops.test_batch_invariant import QUANTIZED, Rows, model_of, run_mix, texts_of

CUDA = torch.device("cuda")
OWN = functools.partial(fused_ops, own_attention=True)
MIX = (
    (True, [(2, 3), (0, 20), (1, 150)]),
    (False, [(1, 1), (2, 1)]),
    (True, [(2, 2), (1, 9)]),
    (False, [(0, 1)]),
    (False, [(2, 1), (0, 1), (1, 1)]),
)
MODES = [
    (torch.bfloat16, Quantization.NONE, None),
    (torch.float32, Quantization.NONE, None),
    (torch.bfloat16, Quantization.INT8, None),
    (torch.bfloat16, Quantization.INT4, None),
    (torch.bfloat16, Quantization.FP8, None),
    (torch.bfloat16, Quantization.NONE, Scheme.INT8),
    (torch.bfloat16, Quantization.NONE, Scheme.FP8),
]


@torch.inference_mode()
@pytest.mark.parametrize(
    ("dtype", "depth", "width"),
    [
        (torch.bfloat16, 2560, 6144),
        (torch.bfloat16, 2560, 19_456),
        (torch.bfloat16, 9728, 2560),
        (torch.float32, 96, 33),
    ],
)
def test_a_rows_product_has_the_same_bits_among_any_others(dtype, depth, width):
    torch.manual_seed(depth)
    x = torch.randn(5 * ROWS + 3, depth, device=CUDA, dtype=dtype)
    matrix = torch.randn(width, depth, device=CUDA, dtype=dtype).t()
    whole = product(x, matrix)
    exact = x.double() @ matrix.double()
    assert (whole - exact).norm() / exact.norm() < (1e-5 if dtype is torch.float32 else 5e-3)
    for rows in (1, 2, 8, 9, ROWS, 200):
        assert torch.equal(product(x[:rows], matrix), whole[:rows])
        assert torch.equal(product(x[-rows:], matrix), whole[-rows:])


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "quantization", "kv"), MODES)
def test_tokens_give_the_same_bits_in_a_mix_and_nearly_the_reference(dtype, quantization, kv):
    shape = {**QUANTIZED, "head_dim": 128, "num_attention_heads": 8}
    texts = texts_of([30, 200, 9])
    model = model_of(
        shape, quantization, kv, dtype, CUDA, fused=OWN, batch_invariant=batch_invariant_ops
    )
    run_mix(model, texts, list(MIX))
    plain = model_of(shape, quantization, kv, dtype, CUDA, batch_invariant=None)
    if kv is not None:  # plain prompts attend to what they have not rounded yet
        return
    found, expected = Rows(model, texts).finish(), Rows(plain, texts).finish()
    near = 1e-3 if dtype is torch.float32 else 5e-2
    for own, reference in zip(found, expected, strict=True):
        assert (own - reference.float()).norm() / reference.float().norm() < near


@pytest.mark.parametrize("quantization", [Quantization.NONE, Quantization.INT4])
def test_answers_of_a_mix_are_those_of_requests_alone(checkpoint, quantization):
    """Steps and prompts in graphs, pictures, drawn tokens, shared beginnings, a lone stream."""
    requests = [
        GenerationRequest(
            (user_message("Why? " * (1 + n % 5), (picture(64 + 32 * (n % 2), 64),) * (n % 3)),),
            SamplingOptions(max_new_tokens=4 + n, **settings),
            ignore_eos=True,
        )
        for n, settings in zip(
            range(18),
            itertools.cycle(({"do_sample": False}, {"temperature": 1.2, "seed": 5})),
            strict=False,
        )
    ]
    config = engine_config(
        checkpoint("qwen3_vl"),
        engine=EngineName.NATIVE,
        device="cuda",
        quantization=quantization,
        batch_invariant=True,
    )
    with NativeEngine(config) as engine:
        alone = [engine.generate(request).token_ids for request in requests]
        for _ in range(3):  # the third runs graphs of prompts
            together = [result.token_ids for result in generate_many(engine, requests)]
            assert together == alone
