"""The kernel that norms, turns and stores heads, against the plain operators."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwencli.engine.cache.kv_cache import DynamicKVCache, KVCache, QuantizedKVCache, StaticKVCache
from qwencli.engine.kernels.qk_norm_rope import TOKENS, QkNormRope, QkNormRopeStore
from qwencli.engine.ops.attention import AttentionPlan
from qwencli.engine.ops.decoder_ops import Layer, RMSNorm, Step, qk_norm_rope_store
from qwencli.engine.ops.rope import CosSin, rotate
from qwencli.engine.quant.quantized_tensor import Scheme
from qwencli.models.shapes import TextShape
from tests.engine.kernels.test_fused_ops import OWN, model_of
from tests.engine.native.tiny import CASES, configs
from tests.engine.quant.drawn_matrices import KINDS

CPU = torch.device("cpu")
SLOTS = 128


def drawn(*size: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def angles(batch: int, length: int, dim: int) -> CosSin:
    turns = drawn(batch, length, 1, dim // 2, seed=2)
    cos, sin = turns.cos(), turns.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def cache_of(kind: str, shape: Any, batch: int, written: int) -> KVCache:
    """A cache that holds `written` slots already."""
    text = cast(TextShape, shape)
    cache: KVCache
    if kind == "grows":
        cache = DynamicKVCache(text, batch)
    elif kind == "int8":
        cache = QuantizedKVCache(text, batch, SLOTS, torch.float32, CPU, Scheme.INT8)
    else:
        cache = StaticKVCache(text, batch, SLOTS, torch.float32, CPU)
    if written:
        before = drawn(batch, written, 2 * shape.num_kv_heads, shape.head_dim, seed=3)
        cache.write(0, before, torch.arange(written), written)
    return cache


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["static", "int8", "grows"])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(
    ("batch", "start", "length", "heads", "kv_heads", "dim"),
    [(1, 0, 1, 4, 2, 32), (2, 0, TOKENS + 5, 3, 1, 80), (1, 7, 2 * TOKENS, 2, 2, 64)],
)
def test_queries_keys_and_values_are_those_of_the_plain_operators(
    kind: str, normed: bool, batch: int, start: int, length: int, heads: int, kv_heads: int,
    dim: int,
) -> None:  # fmt: skip
    shape = SimpleNamespace(num_kv_heads=kv_heads, head_dim=dim, num_layers=1)
    norm = RMSNorm(1 + 0.3 * drawn(heads + kv_heads, dim, seed=4), 1e-6)
    layer = cast(
        Layer,
        SimpleNamespace(
            index=0,
            num_heads=heads,
            num_kv_heads=kv_heads,
            qk_norm=norm if normed else None,
            rotary_dim=None,
        ),
    )
    found = []
    for place in (qk_norm_rope_store, QkNormRopeStore()):
        cache = cache_of(kind, shape, batch, start)
        slots = torch.arange(start, start + length)
        plan = AttentionPlan(start + length, None)
        step = cast(
            Step,
            SimpleNamespace(
                rope=[angles(batch, length, dim)], slots=slots, plan=plan, cache=cache, gained=False
            ),
        )
        split = drawn(batch, length, heads + 2 * kv_heads, dim)
        keys, values = place(split, layer, step)
        found.append((split[:, :, :heads], keys, values))
    # A value that is rounded to a byte may fall on the other side.
    most = 0.05 if kind == "int8" else 1e-5
    for plain, own in zip(*found, strict=True):
        assert own.shape == plain.shape and plain.abs().sum() > 0
        assert (own - plain).abs().max() <= most
        assert (own - plain).abs().mean() <= 1e-4


@torch.inference_mode()
def test_heads_without_a_cache_turn_where_they_are_and_others_stay() -> None:
    split, rope = drawn(1, 70, 6, 24), angles(1, 70, 24)
    before = split.clone()
    QkNormRope()(split, rope, rotated=4)
    assert (split[:, :, :4] - rotate(before[:, :, :4], *rope)).abs().max() <= 1e-6
    assert torch.equal(split[:, :, 4:], before[:, :, 4:])


@torch.inference_mode()
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
@settings(max_examples=2)
@given(data=st.data())
def test_pictures_are_encoded_as_with_plain_operators(family: str, data: st.DataObject) -> None:
    config = data.draw(configs(family, CASES[1]))
    plain, own = model_of(config, None), model_of(config, OWN)
    assert plain.shape.vision is not None
    patches = drawn(96, plain.shape.vision.patch_elements)
    expected, got = (m.encode_images(patches, [(1, 12, 8)]) for m in (plain, own))
    pairs = zip((expected.embeds, *expected.deepstack), (got.embeds, *got.deepstack), strict=True)
    for theirs, ours in pairs:
        assert (theirs - ours).abs().max() <= 1e-4 * theirs.abs().max()


def test_launches_that_are_repeated_pass_what_triton_itself_would() -> None:
    """Compiled, which the interpreter is not; `cached_launches` says what it compares."""
    environment = os.environ.copy()
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", "-m", "tests.engine.kernels.cached_launches"]
    root = Path(__file__).parents[3]
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    alike = ["heads", "2", "add_norm", "4", "dequantize", str(len(KINDS))]
    assert ran.stdout.split() == alike
