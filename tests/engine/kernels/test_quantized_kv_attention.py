"""Attention over quantized caches in 16 bits against a reference in float64, in Triton's
interpreter: where a context ends, how many parts it has, and how many tokens are new."""

from __future__ import annotations

import math

import pytest
import torch

from qwencli.engine.cache.kv_cache import QuantizedKVCache
from qwencli.engine.kernels import fused_ops as fused_module
from qwencli.engine.kernels.tiles import AttentionTiles
from qwencli.engine.loading import weights
from qwencli.engine.native.model import QwenModel
from qwencli.engine.ops.attention import AttentionPlan
from qwencli.engine.ops.decoder_ops import Step
from qwencli.engine.quant.quantized_tensor import Scheme
from qwencli.models.shape_reader import read_shape
from tests.engine.kernels.test_fused_ops import OWN
from tests.engine.kernels.test_skinny_gemm import WITH_IDLE_LANES, config, relative

SLOTS = 300
CPU = torch.device("cpu")
SCHEMES = [Scheme.INT8, Scheme.FP8]
HALF = torch.float16


class Attending:
    """One layer's attention of a model in float16, and what it should find."""

    def __init__(self, heads: int, kv_heads: int, dim: int, scheme: Scheme, batch: int = 1) -> None:
        shape = read_shape(config(heads, kv_heads, dim))
        loaded = weights.dummy(shape, HALF, CPU)
        self.model = QwenModel(shape, loaded, SLOTS, fused=OWN, kv=scheme)
        self.model.rope.reach(SLOTS)
        self.layer = self.model.decoder.layers[0]
        self.heads, self.kv_heads, self.dim, self.batch = heads, kv_heads, dim, batch
        self.generator = torch.Generator().manual_seed(5)
        cache = self.model.static_cache(batch)
        assert isinstance(cache, QuantizedKVCache)
        self.cache = cache

    def values(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.generator).to(HALF)

    def fill(self, length: int, of_values: float = 1.0) -> None:
        """Old keys and values in slots before `length`; those after it are as bad as can be."""
        old = self.values(self.batch, SLOTS, 2 * self.kv_heads, self.dim)
        old[:, :, self.kv_heads :] *= of_values
        # Some tokens are much larger than others.
        old[:, ::7] *= 8
        self.cache.write(0, old, torch.arange(SLOTS), 1)
        self.cache.layers[0].view(torch.int8)[:, :, length:] = 0x7F
        self.cache.scales[0][:, :, length:] = float("nan")

    def attend(self, qkv: torch.Tensor, slot: int, tokens: int) -> torch.Tensor:
        at = torch.full((self.batch,), slot)
        step = Step(
            batch=self.batch, length=tokens, rope=None, slots=at[:1],
            plan=AttentionPlan(slot + tokens, None), cache=self.cache, attention=self.model._attend,
            ops=self.model.step_ops, positions=at,
        )  # fmt: skip
        return self.model.step_ops.attend(qkv, self.layer, step)

    def expected(self, qkv: torch.Tensor, slot: int, tokens: int) -> torch.Tensor:
        """Of keys and values as they are stored by now."""
        dim, rows = self.dim, []
        stored = self.cache.layers[0].double() * self.cache.scales[0].double()[..., None]
        stored = stored[:, :, : slot + tokens]
        keys, values = stored.chunk(2, dim=1)
        group = self.heads // self.kv_heads
        angles = self.model.rope.rows[slot : slot + tokens].double()
        for b in range(self.batch):
            new = qkv[b * tokens : (b + 1) * tokens, : self.heads * dim].double()
            q = new.view(tokens, self.heads, dim)
            norm = self.layer.qk_norm
            if norm is not None:
                q = q * (q.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
                q = q * norm.weight[: self.heads].double()
            turned = torch.cat((q[..., dim // 2 :], q[..., : dim // 2]), -1)
            q = q * angles[:, None, 0] + turned * angles[:, None, 1]
            k = keys[b].repeat_interleave(group, 0)
            v = values[b].repeat_interleave(group, 0)
            scores = torch.einsum("thd,hsd->hts", q, k) / math.sqrt(dim)
            late = torch.arange(slot + tokens)[None, :] > slot + torch.arange(tokens)[:, None]
            found = scores.masked_fill(late, -math.inf).softmax(-1) @ v
            rows.append(found.transpose(0, 1).reshape(tokens, -1))
        return torch.cat(rows)


def tiles(monkeypatch: pytest.MonkeyPatch, block: int, splits: int, warps: int) -> None:
    chosen = AttentionTiles(block, splits, warps)
    monkeypatch.setattr(fused_module, "attention_tiles", lambda *_: chosen)


def check(asked: Attending, length: int, tokens: int) -> None:
    qkv = asked.values(asked.batch * tokens, (asked.heads + 2 * asked.kv_heads) * asked.dim)
    found = asked.attend(qkv, length, tokens)
    assert relative(found.double(), asked.expected(qkv, length, tokens)) < 2e-3


@WITH_IDLE_LANES
@torch.inference_mode()
@pytest.mark.parametrize("tokens", [1, 4, 8])
@pytest.mark.parametrize("length", [0, 1, 63, 64, 205])
@pytest.mark.parametrize(("splits", "warps"), [(1, 2), (8, 1)])
def test_contexts_of_any_length_are_attended_to(
    tokens: int, length: int, splits: int, warps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every length with both formats, and every number of tokens."""
    scheme = SCHEMES[(length + tokens // 4 + splits // 8) % 2]
    tiles(monkeypatch, 32, splits, warps)
    asked = Attending(4, 1, 64, scheme)
    asked.fill(length)
    check(asked, length, tokens)


@WITH_IDLE_LANES
@torch.inference_mode()
@pytest.mark.parametrize(("scheme", "tokens"), [(Scheme.INT8, 3), (Scheme.FP8, 1)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(2, 2, 32), (10, 1, 64), (17, 1, 32), (6, 2, 128), (1, 1, 256)]
)
def test_heads_of_any_size_and_number(
    scheme: Scheme, tokens: int, heads: int, kv_heads: int, dim: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tiles(monkeypatch, 64, 2, 4)
    asked = Attending(heads, kv_heads, dim, scheme)
    asked.fill(150)
    check(asked, 150, tokens)


@torch.inference_mode()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_sequence_of_a_batch_sees_its_own(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles(monkeypatch, 64, 2, 4)
    asked = Attending(4, 2, 64, scheme, batch=3)
    asked.fill(100)
    check(asked, 100, 1)


@torch.inference_mode()
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [1e-4, 100.0])
def test_weights_keep_their_precision_whatever_the_values_are(
    scheme: Scheme, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are multiplied in float16 with their values' scales, which it could not hold."""
    tiles(monkeypatch, 64, 1, 4)
    asked = Attending(4, 1, 64, scheme)
    asked.fill(250, size)
    qkv = asked.values(1, 6 * 64)
    qkv[:, 5 * 64 :] *= size
    found = asked.attend(qkv, 250, 1)
    assert relative(found.double(), asked.expected(qkv, 250, 1)) < (2e-3 if size > 1 else 1e-2)
