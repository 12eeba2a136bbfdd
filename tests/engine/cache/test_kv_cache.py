from __future__ import annotations

import pytest
import torch

from qwencli.engine.cache.kv_cache import DynamicKVCache, KVCache, StaticKVCache
from qwencli.models.shape_reader import read_shape
from tests.models.test_shape_reader import TEXT

SHAPE = read_shape({"model_type": "qwen2", **TEXT}).text
CPU = torch.device("cpu")


def caches() -> list[KVCache]:
    return [StaticKVCache(SHAPE, 2, 16, torch.float32, CPU), DynamicKVCache(SHAPE, 2)]


def write(cache: KVCache, layer: int, start: int, new: torch.Tensor) -> torch.Tensor:
    """Keys and values [B, 2 * KVH, kv_len, D] as attention sees them."""
    stop = start + new.shape[1]
    return torch.cat(cache.write(layer, new, torch.arange(start, stop), stop), dim=1)


def some(length: int) -> torch.Tensor:
    return torch.randn(2, length, 2 * SHAPE.num_kv_heads, SHAPE.head_dim)


@pytest.mark.parametrize("cache", caches(), ids=["static", "dynamic"])
def test_what_was_written_is_seen_layer_by_layer(cache: KVCache) -> None:
    for layer in (0, 3):
        first, second = some(5), some(1)
        assert torch.equal(write(cache, layer, 0, first), first.transpose(1, 2))
        seen = write(cache, layer, 5, second)
        assert torch.equal(seen, torch.cat((first, second), 1).transpose(1, 2))
        cache.truncate(0)


@pytest.mark.parametrize("cache", caches(), ids=["static", "dynamic"])
def test_truncating_keeps_what_is_before(cache: KVCache) -> None:
    first, second = some(6), some(2)
    write(cache, 1, 0, first)
    cache.truncate(4)
    assert cache.length == 4
    seen = write(cache, 1, 4, second)
    assert torch.equal(seen, torch.cat((first[:, :4], second), 1).transpose(1, 2))


def test_the_static_cache_never_moves() -> None:
    cache = StaticKVCache(SHAPE, 2, 16, torch.float32, CPU)
    address = cache.layers[0].data_ptr()
    keys, _ = cache.write(0, some(3), torch.arange(3), 3)
    again, values = cache.write(0, some(1), torch.tensor([3]), 8)
    assert keys.data_ptr() == again.data_ptr() == address
    assert values.shape == (2, SHAPE.num_kv_heads, 8, SHAPE.head_dim)
    assert sum(layer.nbytes for layer in cache.layers) == 2 * 16 * SHAPE.kv_bytes_per_token(4)
