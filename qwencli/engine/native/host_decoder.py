"""The decode step of one sequence on the CPU, in float32: `Decoder.forward` with few operators.

A small model's step is as long as its operators take to dispatch. Here every buffer and every
view is made once, the host knows token, position and slot as plain numbers, and what works on one
row of a few hundred values is numpy's, whose calls take a third of torch's. The matrices and the
attention stay torch's. The arithmetic is that of `decoder_ops` with the norms' divisions last:

    norm(x) W         = (x w) W / rms(x)
    rotate(norm(x) w) = rotate(x w) / rms(x)
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from qwencli.config import Attention
from qwencli.engine.native.decoder import Decoder
from qwencli.engine.native.decoder_ops import Layer, Matrix
from qwencli.engine.native.host_attention import HOST_ATTENTION
from qwencli.engine.native.kv_cache import StaticKVCache
from qwencli.engine.native.rms_norm import RMSNorm
from qwencli.engine.native.rope import Rope

Array = np.ndarray


class HostDecoder:
    """Runs `decoder` over `cache`, both of one sequence. Call under `torch.inference_mode()`."""

    def __init__(
        self, decoder: Decoder, rope: Rope, cache: StaticKVCache, attention: Attention
    ) -> None:
        shape = decoder.shape
        self._rope = rope
        self._angles = rope.rows.numpy().reshape(len(rope.rows), 2, 2, -1)  # [.., D / 2]
        self._embed = decoder.embedding.numpy()
        self._head = _plain(decoder.head)
        self._norm = _Norm(decoder.norm)
        self._hidden = torch.empty(1, shape.hidden_size)
        self._normed = torch.empty(1, shape.hidden_size)
        self._logits = torch.empty(1, shape.vocab_size)
        self._flat_logits = self._logits[0]
        self._x, self._y = self._hidden.numpy()[0], self._normed.numpy()[0]
        self._layers = [_HostLayer(layer) for layer in decoder.layers]

        heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self._qkv = torch.empty(1, (heads + 2 * kv_heads) * dim)
        by_head = self._qkv.numpy().reshape(heads + 2 * kv_heads, dim)
        self._qk, self._kv = by_head[: heads + kv_heads], by_head[heads:]
        self._halves = self._qk.reshape(-1, 2, dim // 2)
        self._swapped = self._halves[:, ::-1]
        self._turned = np.empty_like(self._halves)
        self._scratch = self._turned.reshape(-1, dim)
        self._squares = np.empty(heads + kv_heads, np.float32)
        self._rms = self._squares[:, None]
        self._qk_eps = np.float32(dim * shape.rms_norm_eps)

        self._attend = HOST_ATTENTION[attention](cache, self._qkv, shape)
        self._rows = [layer.numpy()[0] for layer in cache.layers]  # [2 * KVH, max_seq_len, D]
        self._gate_up = torch.empty(1, 2 * shape.intermediate_size)
        self._gate = self._gate_up[:, : shape.intermediate_size]
        self._silu_gate, self._up = np.split(self._gate_up.numpy(), 2, axis=1)
        self._activated = torch.empty(1, shape.intermediate_size)
        self._product = self._activated.numpy()

    def logits(self, token: int, position: int, slot: int) -> torch.Tensor:
        """Logits [V] after `token`, whose keys and values go to `slot`; overwritten next time.

        Args:
            position: rotary position, equal on all axes.
        """
        np.copyto(self._x, self._embed[token])
        self._rope.reach(position + 1)
        cos, sin = self._angles[position]  # [2, D / 2] each
        self._attend.look(slot)
        hidden, qkv, gate_up = self._hidden, self._qkv, self._gate_up
        for index, layer in enumerate(self._layers):
            scale = layer.attn_norm(self._x, self._y)
            if layer.qkv_bias is None:
                torch.addmm(qkv, self._normed, layer.qkv, beta=0, alpha=scale, out=qkv)
            else:
                torch.addmm(layer.qkv_bias, self._normed, layer.qkv, alpha=scale, out=qkv)
            self._turn(layer.qk_weight, cos, sin)
            self._rows[index][:, slot] = self._kv
            hidden.addmm_(self._attend(index), layer.o)
            if layer.o_bias is not None:
                hidden.add_(layer.o_bias)
            scale = layer.mlp_norm(self._x, self._y)
            torch.addmm(gate_up, self._normed, layer.gate_up, beta=0, alpha=scale, out=gate_up)
            F.silu(self._gate, inplace=True)
            np.multiply(self._silu_gate, self._up, self._product)
            hidden.addmm_(self._activated, layer.down)
        scale = self._norm(self._x, self._y)
        logits = self._logits
        torch.addmm(logits, self._normed, self._head, beta=0, alpha=scale, out=logits)
        return self._flat_logits

    def _turn(self, weight: Array | None, cos: Array, sin: Array) -> None:
        """Norm and rotate the query and key heads in place."""
        if weight is not None:
            np.multiply(self._qk, self._qk, self._scratch)
            np.add.reduce(self._scratch, axis=1, out=self._squares)
            np.sqrt(np.add(self._squares, self._qk_eps, self._squares), self._squares)
            np.multiply(self._qk, weight, self._qk)
        np.multiply(self._swapped, sin, self._turned)
        np.multiply(self._halves, cos, self._halves)
        np.add(self._halves, self._turned, self._halves)
        if weight is not None:
            np.divide(self._qk, self._rms, self._qk)


def _plain(matrix: Matrix) -> torch.Tensor:
    assert isinstance(matrix, torch.Tensor), "quantized models take the reference operators"
    return matrix


class _HostLayer:
    """One layer's matrices, and its norms as numpy has them."""

    def __init__(self, layer: Layer) -> None:
        self.qkv, self.qkv_bias = _plain(layer.qkv), layer.qkv_bias
        self.o, self.o_bias = _plain(layer.o), layer.o_bias
        self.gate_up, self.down = _plain(layer.gate_up), _plain(layer.down)
        self.attn_norm, self.mlp_norm = _Norm(layer.attn_norm), _Norm(layer.mlp_norm)
        self.qk_weight = None
        if layer.qk_norm is not None:
            # sqrt(D), because the heads are divided by the root of the sum and not of the mean.
            self.qk_weight = layer.qk_norm.weight.numpy() * np.float32(layer.head_dim**0.5)


class _Norm:
    """`RMSNorm` of one row in two parts: the weighted row, and the factor that is left."""

    def __init__(self, norm: RMSNorm) -> None:
        self._weight = norm.weight.numpy()
        self._count = len(self._weight)
        self._eps = norm.eps

    def __call__(self, x: Array, out: Array) -> float:
        """Write x * weight to `out`; norm(x) is that times the factor returned."""
        np.multiply(x, self._weight, out)
        return 1.0 / math.sqrt(float(x.dot(x)) / self._count + self._eps)
