"""The decode step of one sequence on the CPU, in float32: `Decoder.forward` with few operators.

A small model's step is as long as its operators take to dispatch. Here every buffer and every
view is made once, the host knows token, position and slot as plain numbers, and what works on one
row of a few hundred values is numpy's, whose calls take a third of torch's (`cpu.attention` says
when the cache is, too). The arithmetic is that of `decoder_ops` with the norms' divisions last:

    norm(x) W         = (x w) W / rms(x)
    rotate(norm(x) w) = rotate(x w) / rms(x)

Products of the row with a matrix (gemv) are numpy's on one core, or torch's, which wakes a team of
threads. Of a small matrix a core has read its part before the others are awake, and a team waits
for each of its threads: where another program has a core, a product that takes 10 us takes
milliseconds. MKL, which torch multiplies with on x86, is the exception on Intel's processors: two
cores of one read matrices as small as the bundled model's in two thirds of the time.
"""

from __future__ import annotations

import functools
import math
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from qwencli.config import Attention
from qwencli.engine.cache.kv_cache import StaticKVCache
from qwencli.engine.cpu.attention import CpuAttention
from qwencli.engine.layers.decoder import Decoder
from qwencli.engine.machine.host import cpu_model
from qwencli.engine.ops.decoder_ops import Layer, Matrix, RMSNorm
from qwencli.engine.ops.rope import Rope
from qwencli.models.shapes import TextShape

Array = np.ndarray
# 1 MB in float32, which is what the second-level caches of today's cores hold.
ONE_CORE_VALUES = 2**18


class CpuDecoder:
    """Runs `decoder` over `cache`, both of one sequence. Call under `torch.inference_mode()`.

    Args:
        attention: that of torch. with_numpy: whether short contexts may have numpy's.
    """

    def __init__(
        self,
        decoder: Decoder,
        rope: Rope,
        cache: StaticKVCache,
        attention: Attention,
        with_numpy: bool,
    ) -> None:
        shape = decoder.shape
        self._rope = rope
        self._angles = rope.rows.numpy().reshape(len(rope.rows), 2, 1, 2, -1)  # [.., D / 2]
        self._embed = decoder.embedding.numpy()
        rows = _Rows(shape)
        self._x = rows.hidden.numpy()[0]
        self._layers = [_CpuLayer(layer, rows) for layer in decoder.layers]
        self._norm = _Norm(decoder.norm, rows)
        self._head = product(rows.normed, _plain(decoder.head), None, rows.logits)
        self._logits = rows.logits[0]

        heads, dim = shape.num_heads + shape.num_kv_heads, shape.head_dim
        by_head = rows.qkv.numpy().reshape(-1, dim)
        self._qk, self._queries = by_head[:heads], by_head[: shape.num_heads]
        self._new = by_head[shape.num_heads :]  # keys and values
        self._halves = self._qk.reshape(-1, 2, dim // 2)
        self._swapped = self._halves[:, ::-1]
        self._turned = np.empty_like(self._halves)
        self._scratch = self._turned.reshape(-1, dim)
        self._squares = np.empty(heads, np.float32)
        self._rms = self._squares[:, None]
        # Whole arrays of what would otherwise be spread at every layer, which costs twice the time.
        self._cos, self._sin = self._cos_sin = np.empty((2, *self._halves.shape), np.float32)
        self._ones = np.ones(dim, np.float32)
        self._qk_eps = np.full(heads, dim * shape.rms_norm_eps, np.float32)
        self._scale = np.float32(dim**-0.5)

        query = rows.qkv[:, : shape.q_size]
        self._attention = CpuAttention(attention, cache, query, rows.attended, shape, with_numpy)
        self._slots = [layer.numpy()[0] for layer in cache.layers]  # [2 * KVH, max_seq_len, D]
        self._gate = rows.gate_up[:, : shape.intermediate_size]
        self._silu_gate, self._up = np.split(rows.gate_up.numpy()[0], 2)
        self._activated = rows.activated.numpy()[0]

    def logits(self, token: int, position: int, slot: int) -> torch.Tensor:
        """Logits [V] after `token`, whose keys and values go to `slot`; overwritten next time.

        Args:
            position: rotary position, equal on all axes.
        """
        np.copyto(self._x, self._embed[token])
        self._rope.reach(position + 1)
        np.copyto(self._cos_sin, self._angles[position])
        attend = self._attention.set_position(slot)
        for index, layer in enumerate(self._layers):
            layer.qkv.write(layer.attn_norm())
            self._turn(layer.qk_weight)
            self._slots[index][:, slot] = self._new
            attend(index)
            layer.o.add()
            layer.gate_up.write(layer.mlp_norm())
            F.silu(self._gate, inplace=True)
            np.multiply(self._silu_gate, self._up, self._activated)
            layer.down.add()
        self._head.write(self._norm())
        return self._logits

    def _turn(self, weight: Array | None) -> None:
        """Norm and rotate the query and key heads in place, and scale the queries."""
        qk, halves = self._qk, self._halves
        if weight is None:
            np.multiply(self._queries, self._scale, self._queries)
        else:
            np.multiply(qk, qk, self._scratch)
            self._scratch.dot(self._ones, self._squares)  # a sum costs three times as much
            np.sqrt(np.add(self._squares, self._qk_eps, self._squares), self._squares)
            np.multiply(qk, weight, qk)
        np.multiply(self._swapped, self._sin, self._turned)
        np.multiply(halves, self._cos, halves)
        np.add(halves, self._turned, halves)
        if weight is not None:
            np.divide(qk, self._rms, qk)


class _Rows:
    """What a step works on, [1, n] each."""

    def __init__(self, shape: TextShape) -> None:
        self.hidden = torch.empty(1, shape.hidden_size)
        self.normed = torch.empty(1, shape.hidden_size)
        self.qkv = torch.empty(1, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim)
        self.attended = torch.empty(1, shape.q_size)
        self.gate_up = torch.empty(1, 2 * shape.intermediate_size)
        self.activated = torch.empty(1, shape.intermediate_size)
        self.logits = torch.empty(1, shape.vocab_size)


def _plain(matrix: Matrix) -> torch.Tensor:
    assert isinstance(matrix, torch.Tensor), "quantized models take the reference operators"
    return matrix


class _CpuLayer:
    """One layer's products, and its norms as numpy has them."""

    def __init__(self, layer: Layer, rows: _Rows) -> None:
        self.attn_norm, self.mlp_norm = _Norm(layer.attn_norm, rows), _Norm(layer.mlp_norm, rows)
        self.qkv = product(rows.normed, _plain(layer.qkv), layer.qkv_bias, rows.qkv)
        self.o = product(rows.attended, _plain(layer.o), layer.o_bias, rows.hidden)
        self.gate_up = product(rows.normed, _plain(layer.gate_up), None, rows.gate_up)
        self.down = product(rows.activated, _plain(layer.down), None, rows.hidden)
        self.qk_weight = None
        if layer.qk_norm is not None:
            # sqrt(D), because the heads are divided by the root of the sum and not of the mean.
            # The queries' scale takes it away again.
            weight = layer.qk_norm.weight.numpy().copy()
            weight[layer.num_heads :] *= np.float32(layer.head_dim**0.5)
            self.qk_weight = weight


class _Norm:
    """`RMSNorm` of the hidden state in two parts: the weighted row, and the factor that is left."""

    def __init__(self, norm: RMSNorm, rows: _Rows) -> None:
        self._x, self._y = rows.hidden.numpy()[0], rows.normed.numpy()[0]
        self._weight = norm.weight.numpy()
        self._count = len(self._weight)
        self._eps = norm.eps

    def __call__(self) -> float:
        """Write x * weight to the normed row; norm(x) is that times the factor returned."""
        np.multiply(self._x, self._weight, self._y)
        return 1.0 / math.sqrt(float(self._x.dot(self._x)) / self._count + self._eps)


class Product(Protocol):
    """x W of a row x [1, in] and a matrix W [in, out], into or onto a row [1, out]."""

    def write(self, factor: float) -> None:
        """out = factor x W + bias. May overwrite x."""

    def add(self) -> None:
        """out += x W + bias."""


class OneCore:
    """numpy's."""

    def __init__(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        self._x, self._weight, self._out = x.numpy()[0], weight.numpy(), out.numpy()[0]
        self._bias = None if bias is None else bias.numpy()
        self._product = np.empty_like(self._out)

    def write(self, factor: float) -> None:
        np.multiply(self._x, factor, self._x)
        self._x.dot(self._weight, self._out)
        if self._bias is not None:
            np.add(self._out, self._bias, self._out)

    def add(self) -> None:
        self._x.dot(self._weight, self._product)
        np.add(self._out, self._product, self._out)
        if self._bias is not None:
            np.add(self._out, self._bias, self._out)


class Team:
    """torch's."""

    def __init__(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        self._x, self._weight, self._bias, self._out = x, weight, bias, out

    def write(self, factor: float) -> None:
        out = self._out
        if self._bias is None:
            torch.addmm(out, self._x, self._weight, beta=0, alpha=factor, out=out)
        else:
            torch.addmm(self._bias, self._x, self._weight, alpha=factor, out=out)

    def add(self) -> None:
        self._out.addmm_(self._x, self._weight)
        if self._bias is not None:
            self._out.add_(self._bias)


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> Product:
    """The faster of the two. Which one it is depends on the matrix and the machine alone, so that
    the same request gives the same text again."""
    alone = weight.numel() <= ONE_CORE_VALUES and not _teams_are_quick()
    return OneCore(x, weight, bias, out) if alone else Team(x, weight, bias, out)


def _teams_are_quick() -> bool:
    return torch.get_num_threads() > 1 and _has_intels_mkl()


@functools.cache
def _has_intels_mkl() -> bool:
    intel = "intel" in (cpu_model() or "").lower()
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return intel and has_mkl
