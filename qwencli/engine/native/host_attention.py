"""Attention of one query over a cache on the CPU, through views that are seldom made anew.

The cache is looked at in lengths of whole `GRAIN`s, and a mask hides the slots not yet written.
The implementations compute softmax(q k^T / sqrt(D) + mask) v for all heads at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from qwencli.config import Attention
from qwencli.engine.native.attention import hidden_score
from qwencli.engine.native.kv_cache import StaticKVCache
from qwencli.models.shapes import TextShape

Tensor = torch.Tensor
GRAIN = 32


class OneQuery(ABC):
    """Attention to `cache` of the query heads at the front of the buffer `qkv` [1, n]."""

    def __init__(self, cache: StaticKVCache, qkv: Tensor, shape: TextShape) -> None:
        size = (1, shape.num_kv_heads, shape.group_size, shape.head_dim)
        self.query = qkv[:, : shape.q_size].view(size)
        self.scale = shape.head_dim**-0.5
        self._cache = cache
        self._hidden = hidden_score(qkv.dtype)
        self._kv_len = 0

    def look(self, slot: int) -> None:
        """Let the query see the slots up to `slot`."""
        if not self._kv_len - GRAIN <= slot < self._kv_len:
            self._kv_len = min((slot // GRAIN + 1) * GRAIN, self._cache.max_seq_len)
            self.mask = torch.empty(1, 1, 1, self._kv_len)
            self._visible = self.mask.numpy()[0, 0, 0]
            self.view_layers(self._kv_len)
        self._visible[: slot + 1] = 0.0
        self._visible[slot + 1 :] = self._hidden

    def keys_values(self, layer: Tensor, kv_len: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, KVH, kv_len, D] of one layer of the cache."""
        keys, values = layer.narrow(2, 0, kv_len).chunk(2, dim=1)
        return keys, values

    @abstractmethod
    def view_layers(self, kv_len: int) -> None:
        """Make the views of all layers that calls will need."""

    @abstractmethod
    def __call__(self, index: int) -> Tensor:
        """What the query takes from layer `index`: [1, H * D], valid until the next call."""


class Eager(OneQuery):
    """Two products of matrices around a softmax."""

    def __init__(self, cache: StaticKVCache, qkv: Tensor, shape: TextShape) -> None:
        super().__init__(cache, qkv, shape)
        self._rows = self.query[0]  # [KVH, G, D]
        self._attended = torch.empty(1, shape.q_size)
        self._by_head = self._attended.view(self._rows.shape)

    def view_layers(self, kv_len: int) -> None:
        self._views = []
        for layer in self._cache.layers:
            keys, values = self.keys_values(layer, kv_len)
            self._views.append((keys[0].transpose(1, 2), values[0]))
        self._scores = torch.empty(*self._rows.shape[:2], kv_len)

    def __call__(self, index: int) -> Tensor:
        keys, values = self._views[index]
        torch.baddbmm(self.mask[0], self._rows, keys, alpha=self.scale, out=self._scores)
        torch.bmm(torch.softmax(self._scores, -1), values, out=self._by_head)
        return self._attended


class Sdpa(OneQuery):
    """torch's scaled_dot_product_attention."""

    def view_layers(self, kv_len: int) -> None:
        self._views = [self.keys_values(layer, kv_len) for layer in self._cache.layers]

    def __call__(self, index: int) -> Tensor:
        keys, values = self._views[index]
        out = F.scaled_dot_product_attention(self.query, keys, values, attn_mask=self.mask)
        return out.view(1, -1)


HOST_ATTENTION: Mapping[Attention, Callable[[StaticKVCache, Tensor, TextShape], OneQuery]] = {
    Attention.EAGER: Eager,
    Attention.SDPA: Sdpa,
}
