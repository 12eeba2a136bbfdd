"""Keys and values of all layers: a static cache for the fast path, a growing one as its reference.

Both hand out the same thing, so the decoder does not know which one it has: `write` stores the
new keys and values of one layer and returns what attention may look at, [B, KVH, kv_len, D].
Neither knows about rotary positions; a `slot` is a place in the sequence, padding included.
"""

from __future__ import annotations

from typing import Protocol

import torch

from qwencli.engine.native.shapes import TextShape

KeysValues = tuple[torch.Tensor, torch.Tensor]


class KVCache(Protocol):
    """`length` is the number of slots in use as the host knows it."""

    length: int
    batch: int

    def write(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, kv_len: int
    ) -> KeysValues: ...

    def truncate(self, length: int) -> None: ...


class StaticKVCache:
    """One tensor for the keys and one for the values, [L, B, KVH, max_seq_len, D].

    Heads lie outside positions because decode reads one head's positions in a row. Slots beyond
    `length` hold old but finite values; attention must not look there (`kv_len`, mask).
    """

    def __init__(
        self,
        shape: TextShape,
        batch: int,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        size = (shape.num_layers, batch, shape.num_kv_heads, max_seq_len, shape.head_dim)
        self.keys = torch.zeros(size, dtype=dtype, device=device)
        self.values = torch.zeros(size, dtype=dtype, device=device)
        # Indexing a tensor by layer costs a dispatch; these views are made once.
        self._layers = list(zip(self.keys.unbind(0), self.values.unbind(0), strict=True))
        self.batch = batch
        self.max_seq_len = max_seq_len
        self.length = 0

    def write(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, kv_len: int
    ) -> KeysValues:
        """Store keys and values [B, S, KVH, D] at `slots` [S] (on the device) of all rows.

        Returns views of the first `kv_len` slots. No allocation, no synchronisation; slots must
        be below `max_seq_len`. `length` is the caller's to advance.
        """
        k, v = self._layers[layer]
        k.index_copy_(2, slots, keys.transpose(1, 2))
        v.index_copy_(2, slots, values.transpose(1, 2))
        return k.narrow(2, 0, kv_len), v.narrow(2, 0, kv_len)

    def truncate(self, length: int) -> None:
        """Forget everything from slot `length` on; the slots before it stay valid."""
        assert 0 <= length <= self.max_seq_len, "the caller knows how much is in the cache"
        self.length = length


class DynamicKVCache:
    """Grows by concatenation, as `transformers` does: the readable reference of the static one."""

    def __init__(self, shape: TextShape, batch: int) -> None:
        self._layers: list[KeysValues | None] = [None] * shape.num_layers
        self.batch = batch
        self.length = 0

    def write(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, kv_len: int
    ) -> KeysValues:
        """Append keys and values [B, S, KVH, D]; `slots` must be the next ones."""
        new = keys.transpose(1, 2), values.transpose(1, 2)
        old = self._layers[layer]
        if old is not None:
            new = torch.cat((old[0], new[0]), dim=2), torch.cat((old[1], new[1]), dim=2)
        assert new[0].shape[2] == kv_len, "a growing cache shows exactly what was written"
        self._layers[layer] = new
        return new

    def truncate(self, length: int) -> None:
        """Drop everything from slot `length` on."""
        self.length = length
        for layer, old in enumerate(self._layers):
            if old is not None:
                # A copy, so that the dropped part's memory is given back.
                self._layers[layer] = old[0][:, :, :length].clone(), old[1][:, :, :length].clone()
