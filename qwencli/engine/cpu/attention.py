"""Attention of one query over a cache on the CPU, through views that are seldom made anew.

The implementations compute softmax(q k^T) v for all heads at once; queries come scaled. torch's see
the cache in lengths of whole `GRAIN`s, and a mask hides the slots not yet written. numpy's is for
short contexts, for the reasons that products have (`cpu.decoder`), where the user has not named
another one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F

from qwencli.config import Attention
from qwencli.engine.cache.kv_cache import StaticKVCache
from qwencli.engine.ops.attention import hidden_score
from qwencli.models.shapes import TextShape

Tensor = torch.Tensor
GRAIN = 32
# Keys and values of a layer up to which one core attends sooner.
ONE_CORE_VALUES = 2**17


class DecodeAttention(ABC):
    """Attention to `cache` of the scaled query heads `query` [1, H * D].

    A call with a layer's index leaves what the query takes from it in `attended` [1, H * D].
    """

    def __init__(
        self, cache: StaticKVCache, query: Tensor, attended: Tensor, shape: TextShape
    ) -> None:
        self._cache, self._query, self._attended = cache, query, attended
        self._size = (shape.num_kv_heads, shape.group_size, shape.head_dim)

    @abstractmethod
    def set_position(self, slot: int) -> None:
        """Let the query see the slots up to `slot`."""

    @abstractmethod
    def __call__(self, index: int) -> None: ...


class NumpyAttention(DecodeAttention):
    """numpy's products around a softmax, on one core, over exactly the slots in use."""

    def __init__(
        self, cache: StaticKVCache, query: Tensor, attended: Tensor, shape: TextShape
    ) -> None:
        super().__init__(cache, query, attended, shape)
        kv_heads, group, dim = self._size
        self._row = query.numpy().reshape(kv_heads, group, 1, dim)
        self._out = attended.numpy().reshape(kv_heads, group, 1, dim)
        layers = [layer.numpy()[0][:, None] for layer in cache.layers]  # [2 * KVH, 1, S, D]
        self._whole = [(kv[:kv_heads].swapaxes(2, 3), kv[kv_heads:]) for kv in layers]

        self._heads = kv_heads * group
        self._sums = np.empty((kv_heads, group, 1, 1), np.float32)
        self._flat_sums = self._sums.reshape(-1)

    def set_position(self, slot: int) -> None:
        seen = slot + 1
        self._views = [(keys[..., :seen], values[:, :, :seen]) for keys, values in self._whole]
        self._scores = np.empty((*self._size[:2], 1, seen), np.float32)
        self._flat_scores = self._scores.reshape(self._heads, seen)
        self._ones = np.ones(seen, np.float32)

    def __call__(self, index: int) -> None:
        # Not torch.softmax: it wakes a team for a few hundred values.
        keys, values = self._views[index]
        scores, sums = self._scores, self._sums
        np.matmul(self._row, keys, out=scores)
        np.maximum.reduce(scores, axis=3, out=sums, keepdims=True)
        np.exp(np.subtract(scores, sums, scores), scores)
        self._flat_scores.dot(self._ones, self._flat_sums)
        np.divide(np.matmul(scores, values, out=self._out), sums, self._out)


class _MaskedAttention(DecodeAttention):
    """The torch implementations' views and mask."""

    def __init__(
        self, cache: StaticKVCache, query: Tensor, attended: Tensor, shape: TextShape
    ) -> None:
        super().__init__(cache, query, attended, shape)
        self._hidden = hidden_score(query.dtype)
        self._kv_len = 0

    def set_position(self, slot: int) -> None:
        if not self._kv_len - GRAIN <= slot < self._kv_len:
            self._kv_len = min((slot // GRAIN + 1) * GRAIN, self._cache.max_seq_len)
            self._mask = torch.empty(1, 1, 1, self._kv_len)
            self._visible = self._mask.numpy()[0, 0, 0]
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


class EagerAttention(_MaskedAttention):
    """Two products of matrices around a softmax."""

    def view_layers(self, kv_len: int) -> None:
        self._rows, self._out = self._query.view(self._size), self._attended.view(self._size)
        self._views = []
        for layer in self._cache.layers:
            keys, values = self.keys_values(layer, kv_len)
            self._views.append((keys[0].transpose(1, 2), values[0]))
        self._scores = torch.empty(*self._size[:2], kv_len)

    def __call__(self, index: int) -> None:
        keys, values = self._views[index]
        torch.baddbmm(self._mask[0], self._rows, keys, out=self._scores)
        torch.bmm(torch.softmax(self._scores, -1), values, out=self._out)


class SdpaAttention(_MaskedAttention):
    """torch's scaled_dot_product_attention."""

    def view_layers(self, kv_len: int) -> None:
        size = (1, *self._size)
        self._rows, self._out = self._query.view(size), self._attended.view(size)
        self._views = [self.keys_values(layer, kv_len) for layer in self._cache.layers]

    def __call__(self, index: int) -> None:
        keys, values = self._views[index]
        self._out.copy_(
            F.scaled_dot_product_attention(
                self._rows, keys, values, attn_mask=self._mask, scale=1.0
            )
        )


_LONG: Mapping[Attention, Callable[[StaticKVCache, Tensor, Tensor, TextShape], DecodeAttention]] = {
    Attention.EAGER: EagerAttention,
    Attention.SDPA: SdpaAttention,
}


class CpuAttention:
    """torch's `attention`, and numpy in short contexts where `with_numpy` lets it."""

    def __init__(
        self,
        attention: Attention,
        cache: StaticKVCache,
        query: Tensor,
        attended: Tensor,
        shape: TextShape,
        with_numpy: bool,
    ) -> None:
        self._short = NumpyAttention(cache, query, attended, shape)
        self._long = _LONG[attention](cache, query, attended, shape)
        slot_values = 2 * shape.num_kv_heads * shape.head_dim
        self._short_slots = ONE_CORE_VALUES // slot_values if with_numpy else 0

    def set_position(self, slot: int) -> DecodeAttention:
        """What attends to the slots up to `slot`."""
        chosen = self._short if slot < self._short_slots else self._long
        chosen.set_position(slot)
        return chosen
