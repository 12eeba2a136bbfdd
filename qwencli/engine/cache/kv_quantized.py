"""A static cache of one byte a value: half the memory, and half of what long contexts read.

The key and the value of each token and head have a scale of their own, so tokens never change
those before them and a prefix stays reusable. What a token attends to is what is stored, its own
key and value included: an answer does not depend on how its prompt was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qwencli.config import Cache, KVDType
from qwencli.engine.cache.kv_cache import KeysValues, StaticKVCache
from qwencli.engine.native.lazy_zeros import lazy_zeros
from qwencli.engine.quant.quantized_tensor import Scheme, quantize_rows
from qwencli.errors import UnsupportedModeError
from qwencli.models.shapes import TextShape

KV_SCHEMES: Mapping[KVDType, Scheme | None] = {
    KVDType.AUTO: None,
    KVDType.INT8: Scheme.INT8,
    KVDType.FP8: Scheme.FP8,
}
_STORED = {Scheme.INT8: torch.int8, Scheme.FP8: torch.float8_e4m3fn}


def resolve_kv(wanted: KVDType, cache: Cache) -> Scheme | None:
    """How keys and values are quantized; None = not.

    Raises:
        UnsupportedModeError: the cache mode stores them as the model computes them.
    """
    if wanted is not KVDType.AUTO and cache is Cache.DYNAMIC:
        raise UnsupportedModeError(
            f"--kv-dtype {wanted}: the dynamic cache keeps keys and values as they are computed",
            nearest=f"--cache {Cache.STATIC}",
        )
    return KV_SCHEMES[wanted]


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
        self.layers = [layer.view(_STORED[scheme]) for layer in self._bytes]
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
        stored = self._bytes[layer].narrow(2, 0, kv_len).view(_STORED[self.scheme])
        seen = stored.to(self._dtype)
        seen.mul_(self.scales[layer].narrow(2, 0, kv_len).unsqueeze(-1))
        keys, values = seen.chunk(2, dim=1)
        return keys, values
