"""Keys and values of all layers: a static cache for the fast path, a growing one as its reference.

Both hand out the same thing, so the decoder does not know which one it has: `write` stores the
new keys and values of one layer and returns what attention may look at, [B, KVH, kv_len, D].
Neither knows about rotary positions; a `slot` is a place in the sequence, padding included.
"""

from __future__ import annotations

from typing import Protocol

import torch

from qwencli.engine.native.lazy_zeros import lazy_zeros
from qwencli.models.shapes import TextShape

KeysValues = tuple[torch.Tensor, torch.Tensor]


class KVCache(Protocol):
    """`length` is the number of slots in use as the host knows it."""

    length: int
    batch: int

    def write(
        self, layer: int, keys_values: torch.Tensor, slots: torch.Tensor, kv_len: int
    ) -> KeysValues: ...

    def truncate(self, length: int) -> None: ...


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
