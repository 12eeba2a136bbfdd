"""Answers held to a schema on a CUDA device: graphs in two halves, masks sent beside them."""

from __future__ import annotations

import json

import pytest
import torch

from qwencli.config import Cache, DType, EngineName, Kernels, SamplingOptions
from qwencli.engine.client import generate_many
from qwencli.engine.constrained import SchemaCheck, read_schema
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.native.sampler import TokenMasks, masked
from qwencli.messages import GenerationRequest, user_message
from tests.checkpoints import engine_config, picture

CUDA = torch.device("cuda")
FIELDS = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 12},
        "name": {"type": "string", "maxLength": 4},
    },
    "required": ["kind", "count", "name"],
    "additionalProperties": False,
}


def test_masks_are_applied_as_on_the_host():
    torch.manual_seed(0)
    rows, vocab_size = 5, 1007
    masks = TokenMasks(rows, vocab_size, CUDA)
    masks.host.copy_(torch.randint(-(2**31), 2**31, masks.host.shape, dtype=torch.int64))
    logits = torch.randn(3, vocab_size)
    expected = masked(logits, masks.host[:3])
    assert torch.equal(masked(logits.cuda(), masks.sent(3)).cpu(), expected)


@pytest.fixture(scope="module")
def requests() -> list[GenerationRequest]:
    """Held and free, greedy and drawn, with pictures and without."""
    schema = read_schema(json.dumps(FIELDS), "schema")
    made = []
    for n in range(40):
        drawn = {"temperature": 1.2, "top_k": (0, 20)[n % 2], "seed": n}
        sampling = {"do_sample": False} if n % 3 else drawn
        message = user_message("Why? " * (1 + n % 5), (picture(64, 64),) * (n % 3))
        options = SamplingOptions(**sampling, max_new_tokens=60 if n % 4 else 4 + n)
        made.append(GenerationRequest((message,), options, schema=schema if n % 4 else None))
    return made


@pytest.mark.parametrize("kernels", [Kernels.TRITON, Kernels.TORCH])
def test_answers_together_are_those_alone_and_meet_the_schema(checkpoint, requests, kernels):
    config = engine_config(
        checkpoint("qwen3_vl"),
        engine=EngineName.NATIVE,
        device="cuda",
        dtype=DType.FLOAT32,
        kernels=kernels,
    )
    with NativeEngine(config) as engine:
        alone = [engine.generate(request) for request in requests]
        for _ in range(2):  # the second time every graph is there
            together = list(generate_many(engine, requests))
    same = sum(a.token_ids == b.token_ids for a, b in zip(alone, together, strict=True))
    # Sums of other kernels may turn a near tie.
    assert same >= 0.85 * len(requests)
    held = [
        each.text
        for request, *both in zip(requests, alone, together, strict=True)
        for each in both
        if request.schema is not None and each.finish_reason == "stop"
    ]
    check = SchemaCheck(read_schema(json.dumps(FIELDS), "schema"))
    assert len(held) > 20 and not any(map(check, held))


@pytest.mark.parametrize("cache", [Cache.STATIC, Cache.STATIC_COMPILE, Cache.DYNAMIC])
def test_every_cache_mode_holds_a_lone_answer(checkpoint, requests, cache):
    config = engine_config(
        checkpoint("qwen3_vl"), engine=EngineName.NATIVE, device="cuda", cache=cache
    )
    with NativeEngine(config) as engine:
        result = engine.generate(requests[1])
    assert result.finish_reason == "length" or not SchemaCheck(requests[1].schema)(result.text)
