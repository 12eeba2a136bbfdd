"""Keys and values of all rows in one pool of pages (paged KV cache), and which pages are free.

A page holds `PAGE_SIZE` consecutive tokens of one sequence; a row's page table says which pages are
its own, in order. Slot `page * PAGE_SIZE + offset` is a place in the pool. Tokens lie outside
heads, as the projection makes them: a step's tokens are stored by one scatter, and what a prompt
sees of earlier pages is one gather.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qwencli.engine.cache.kv_cache import STORED_TYPE, KeysValues
from qwencli.engine.device_memory import lazy_zeros
from qwencli.engine.quant.quantized_tensor import Scheme, quantize_rows
from qwencli.models.shapes import TextShape

# Tokens of a page. A row of 300 tokens wastes half a page, a tenth; what attention reads of a page
# is one stretch of memory.
PAGE_SIZE = 64
# Rows that nothing uses write here, and nothing reads it.
SCRATCH_PAGE = 0


class PagePool:
    """Pages 1 to `num_pages` - 1, and how many sequences use each; page 0 belongs to idle rows.

    A page whose content has a key (`publish`) is found by it (`share`): several sequences then use
    one page. When the last of them gives it back it is free like others, but stays to be found
    until its place is needed; those not used for longest go first.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, SCRATCH_PAGE, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._users = [0] * num_pages
        self._by_key: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._kept)

    @property
    def capacity(self) -> int:
        """Pages that one sequence could have at most."""
        return self.num_pages - 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages of nobody else's, or None where fewer are free."""
        if count > self.num_free:
            return None
        while len(self._free) < count:
            page, _ = self._kept.popitem(last=False)
            del self._by_key[self._keys.pop(page)]
            self._free.append(page)
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._users[page] = 1
        return taken

    def share(self, keys: Sequence[bytes]) -> list[int]:
        """The pages that are there of these keys, up to the first that is not, for one more
        sequence to read."""
        pages = []
        for key in keys:
            page = self._by_key.get(key)
            if page is None:
                break
            self._kept.pop(page, None)
            self._users[page] += 1
            pages.append(page)
        return pages

    def publish(self, pages: Sequence[int], keys: Sequence[bytes]) -> None:
        """From now on these pages are found by their keys; nothing may be written to them again.
        Of two pages with one key the first stays the one that is found."""
        for page, key in zip(pages, keys, strict=True):
            assert self._users[page], "only a page in use has content"
            if key not in self._by_key and page not in self._keys:
                self._by_key[key], self._keys[page] = page, key

    def claim(self, key: bytes) -> int | None:
        """The page of this key, for one sequence to go on writing to: it is found no more. None
        where it is gone, or in use."""
        page = self._by_key.get(key)
        if page is None or self._users[page]:
            return None
        del self._by_key[key], self._keys[page], self._kept[page]
        self._users[page] = 1
        return page

    def free(self, pages: Sequence[int]) -> None:
        """Give the pages of a sequence back; the last of them are the first to be used again."""
        for page in reversed(pages):
            self._users[page] -= 1
            assert self._users[page] >= 0, "each sequence gives its pages back once"
            if self._users[page]:
                continue
            if page in self._keys:
                self._kept[page] = None
            else:
                self._free.append(page)


def pages_for(num_tokens: int) -> int:
    """How many pages hold so many tokens; the last one may not be full."""
    return -(-num_tokens // PAGE_SIZE)


Tensor = torch.Tensor


class PagedKVCache:
    """By number of each layer with keys and values a tensor [slots, 2 * KVH, D]: keys, then values.

    As a `KVCache` it has no length and forgets nothing: whose slots are whose is the page tables'.
    """

    batch = 1

    def __init__(
        self, shape: TextShape, num_pages: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = (num_pages * PAGE_SIZE, 2 * shape.num_kv_heads, shape.head_dim)
        self.layers = {layer: lazy_zeros(size, dtype, device) for layer in shape.kv_layers}
        self.num_kv_heads = shape.num_kv_heads
        self.length = 0

    def write(self, layer: int, keys_values: Tensor, slots: Tensor, kv_len: int) -> KeysValues:
        """Store keys and values [B, S, 2 * KVH, D] at `slots` [B * S]; returns those alone."""
        self.layers[layer].index_copy_(0, slots, keys_values.flatten(0, 1))
        return self.own(keys_values)

    def own(self, keys_values: Tensor) -> KeysValues:
        """Keys and values [B, KVH, S, D] of what was just stored."""
        keys, values = keys_values.transpose(1, 2).split_with_sizes((self.num_kv_heads,) * 2, dim=1)
        return keys, values

    def read(self, layer: int, slots: Tensor) -> KeysValues:
        """Keys and values [N, KVH, D] at `slots` [N]."""
        return self._split(self.layers[layer].index_select(0, slots))

    def truncate(self, length: int) -> None:
        return

    def _split(self, keys_values: Tensor) -> KeysValues:
        keys, values = keys_values.split_with_sizes((self.num_kv_heads,) * 2, dim=1)
        return keys, values


class QuantizedPagedKVCache(PagedKVCache):
    """A byte a value, as in `QuantizedKVCache`: `layers` hold int8 or fp8 (e4m3), `scales` a
    float32 [slots, 2 * KVH] each. What a token attends to is what is stored.

    Args:
        dtype: of the keys and values that are given and returned.
    """

    def __init__(
        self,
        shape: TextShape,
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device,
        scheme: Scheme,
    ) -> None:
        super().__init__(shape, num_pages, torch.int8, device)
        self.scheme, self._dtype = scheme, dtype
        # The bytes under a type that indexing knows; `layers` are the same memory.
        self._bytes = self.layers
        stored = STORED_TYPE[scheme]
        self.layers = {index: layer.view(stored) for index, layer in self._bytes.items()}
        size = (num_pages * PAGE_SIZE, 2 * shape.num_kv_heads)
        self.scales = {index: lazy_zeros(size, torch.float32, device) for index in self.layers}

    def write(self, layer: int, keys_values: Tensor, slots: Tensor, kv_len: int) -> KeysValues:
        data, scale = quantize_rows(keys_values.float(), self.scheme)
        self._bytes[layer].index_copy_(0, slots, data.view(torch.int8).flatten(0, 1))
        self.scales[layer].index_copy_(0, slots, scale.flatten(0, 1))
        return self.own(data.to(self._dtype).mul_(scale.unsqueeze(-1)))

    def read(self, layer: int, slots: Tensor) -> KeysValues:
        stored = self._bytes[layer].index_select(0, slots).view(STORED_TYPE[self.scheme])
        scale = self.scales[layer].index_select(0, slots)
        return self._split(stored.to(self._dtype).mul_(scale.unsqueeze(-1)))


@dataclass(frozen=True)
class DecodePages:
    """What the newest tokens of each of B rows see.

    Args:
        tables: int32 [B, pages], of each row.
        places: int64 [B], where in its sequence the first of them is: what each sees ends with
            itself.
        longest: tokens of the longest row at most, itself included, as the host knows it.
        states: int64 [B], slots of the states that rows keep beside their pages; None = none.
        idle: bool [B], rows whose state stays as it is.
    """

    tables: Tensor
    places: Tensor
    longest: int
    states: Tensor | None = None
    idle: Tensor | None = None


@dataclass(frozen=True)
class PackedPrompts:
    """Parts of several prompts side by side: each token sees its own prompt up to itself.

    Args:
        lengths: tokens of each part. contexts: tokens in front of each part, in the pool already.
        starts: int32 [parts + 1] on the device, where each part begins. context_starts: the same
            of what each sees, itself included.
        slots: int64, the pool's slots of all that is seen, by part; None = there is no context.
        flash: whether torch's flash attention takes parts of unequal length here.
        tables: int32 [parts, pages], of each part; None where operations do not read pages.
        states: int64 [parts], slots of the states that sequences keep beside their pages; None =
            none.
    """

    lengths: Sequence[int]
    contexts: Sequence[int]
    starts: Tensor
    context_starts: Tensor
    slots: Tensor | None
    flash: bool
    tables: Tensor | None = None
    states: Tensor | None = None
