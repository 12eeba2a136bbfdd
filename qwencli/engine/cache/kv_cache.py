"""KV caches of one sequence: static, quantized, and a growing one as their reference.

All hand out the same thing, so the decoder does not know which one it has: `write` stores the
new keys and values of one layer and returns what attention may look at, [B, KVH, kv_len, D].
None knows about rotary positions; a `slot` is a place in the sequence, padding included.

The quantized cache has one byte a value: half the memory, and half of what long contexts read. The
key and the value of each token and head have a scale of their own, so tokens never change those
before them and a prefix stays reusable. What a token attends to is what is stored, its own key and
value included: an answer does not depend on how its prompt was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from qwencli.config import KVDType
from qwencli.engine.device_memory import lazy_zeros
from qwencli.engine.quant.quantized_tensor import Scheme, quantize_rows
from qwencli.models.shapes import TextShape

KeysValues = tuple[torch.Tensor, torch.Tensor]


class KVCache(Protocol):
    """`length` is the number of slots in use as the host knows it."""

    length: int
    batch: int

    def write(
        self, layer: int, keys_values: torch.Tensor, slots: torch.Tensor, kv_len: int
    ) -> KeysValues:
        """Store new keys and values; what attention may look at, [B, KVH, kv_len, D] each.

        Args:
            keys_values: [B, 2 * KVH, S, D], keys in front.
            slots: int64 [S], where they go.
        """

    def truncate(self, length: int) -> None:
        """Forget all slots from `length` on."""


class StaticKVCache:
    """One tensor a layer, [B, 2 * KVH, max_seq_len, D]: key heads, then value heads.

    Keys and values lie side by side, as the fused projection makes them, so that a layer stores
    both with one kernel. Heads lie outside slots because decode reads one head's slots in a row.
    Slots beyond `length` hold old but finite values; attention must not look there.
    """

    def __init__(
        self,
        shape: TextShape,
        batch: int,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        size = (batch, 2 * shape.num_kv_heads, max_seq_len, shape.head_dim)
        # Layers are tensors of their own, not views of one: torch.compile cannot write to views
        # that share a base.
        self.layers = [lazy_zeros(size, dtype, device) for _ in range(shape.num_layers)]
        self._kv_heads = shape.num_kv_heads
        self._visible: list[KeysValues] = []
        self._visible_len = -1
        self.batch = batch
        self.max_seq_len = max_seq_len
        self.length = 0

    def write(
        self, layer: int, keys_values: torch.Tensor, slots: torch.Tensor, kv_len: int
    ) -> KeysValues:
        """Store new keys and values [B, S, 2 * KVH, D] at `slots` [S] (on the device) of all rows.

        Returns views of the first `kv_len` slots. No allocation, no synchronisation; slots must
        be below `max_seq_len`. `length` is the caller's to advance.
        """
        self.layers[layer].index_copy_(2, slots, keys_values.transpose(1, 2))
        return self.visible(layer, kv_len)

    def visible(self, layer: int, kv_len: int) -> KeysValues:
        """Views of the first `kv_len` slots."""
        if torch.compiler.is_compiling():
            return self._view(layer, kv_len)
        # Elsewhere views are made once and not at every step: each costs a dispatch.
        if kv_len != self._visible_len:
            self._visible = [self._view(index, kv_len) for index in range(len(self.layers))]
            self._visible_len = kv_len
        return self._visible[layer]

    def truncate(self, length: int) -> None:
        """Forget everything from slot `length` on; the slots before it stay valid."""
        assert 0 <= length <= self.max_seq_len, "the caller knows how much is in the cache"
        self.length = length

    def _view(self, layer: int, kv_len: int) -> KeysValues:
        keys, values = (
            self.layers[layer].narrow(2, 0, kv_len).split_with_sizes((self._kv_heads,) * 2, dim=1)
        )
        return keys, values


class DynamicKVCache:
    """Grows by concatenation, as `transformers` does: the readable reference of the static one."""

    def __init__(self, shape: TextShape, batch: int) -> None:
        self._layers: list[torch.Tensor | None] = [None] * shape.num_layers
        self._kv_heads = shape.num_kv_heads
        self.batch = batch
        self.length = 0

    def write(
        self, layer: int, keys_values: torch.Tensor, slots: torch.Tensor, kv_len: int
    ) -> KeysValues:
        """Append keys and values [B, S, 2 * KVH, D]; `slots` must be the next ones."""
        old, new = self._layers[layer], keys_values.transpose(1, 2)
        grown = new.clone() if old is None else torch.cat((old, new), dim=2)
        assert grown.shape[2] == kv_len, "a growing cache shows exactly what was written"
        self._layers[layer] = grown
        return grown[:, : self._kv_heads], grown[:, self._kv_heads :]

    def truncate(self, length: int) -> None:
        """Drop everything from slot `length` on."""
        self.length = length
        for layer, old in enumerate(self._layers):
            if old is not None:
                # A copy, so that the dropped part's memory is given back.
                self._layers[layer] = old[:, :, :length].clone()


KV_SCHEMES: Mapping[KVDType, Scheme | None] = {
    KVDType.AUTO: None,
    KVDType.INT8: Scheme.INT8,
    KVDType.FP8: Scheme.FP8,
}
STORED_TYPE = {Scheme.INT8: torch.int8, Scheme.FP8: torch.float8_e4m3fn}


class QuantizedKVCache(StaticKVCache):
    """`layers` hold int8 or fp8 (e4m3), `scales` a float32 [B, 2 * KVH, max_seq_len] each.

    Args:
        dtype: of the keys and values that `write` is given and returns.
    """

    def __init__(
        self,
        shape: TextShape,
        batch: int,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
        scheme: Scheme,
    ) -> None:
        super().__init__(shape, batch, max_seq_len, torch.int8, device)
        size = (batch, 2 * shape.num_kv_heads, max_seq_len)
        self.scheme = scheme
        # The bytes under a type that indexing knows; `layers` are the same memory.
        self._bytes = self.layers
        self.layers = [layer.view(STORED_TYPE[scheme]) for layer in self._bytes]
        self.scales = [lazy_zeros(size, torch.float32, device) for _ in self.layers]
        self._dtype = dtype

    def write(
        self, layer: int, keys_values: torch.Tensor, slots: torch.Tensor, kv_len: int
    ) -> KeysValues:
        """As `StaticKVCache.write`, but what it returns are the first `kv_len` slots dequantized.

        That is one layer's keys and values in `dtype`, which no caller keeps. Our own kernels do
        not call this in a decode step: they read the bytes.
        """
        data, scale = quantize_rows(keys_values.float(), self.scheme)
        self._bytes[layer].index_copy_(2, slots, data.view(torch.int8).transpose(1, 2))
        self.scales[layer].index_copy_(2, slots, scale.transpose(1, 2))
        # From the bytes just written: torch.compile does not see that `layers` are the same memory.
        stored = self._bytes[layer].narrow(2, 0, kv_len).view(STORED_TYPE[self.scheme])
        seen = stored.to(self._dtype)
        seen.mul_(self.scales[layer].narrow(2, 0, kv_len).unsqueeze(-1))
        keys, values = seen.chunk(2, dim=1)
        return keys, values
