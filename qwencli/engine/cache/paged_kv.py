"""Keys and values of all rows in one pool of pages, and attention over them in plain operators.

A page holds `PAGE_SIZE` consecutive tokens of one sequence; a row's page table says which pages are
its own, in order. Slot `page * PAGE_SIZE + offset` is a place in the pool. Tokens lie outside
heads, as the projection makes them: a step's tokens are stored by one scatter, and what a prompt
sees of earlier pages is one gather.

Which pages of the KV pool are free. The pages' contents are `paged_kv`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qwencli.engine.cache.kv_cache import KeysValues
from qwencli.engine.device_memory import lazy_zeros
from qwencli.engine.ops.attention import flash_varlen, prompt_plan
from qwencli.models.shapes import TextShape

# Tokens of a page. A row of 300 tokens wastes half a page, a tenth; what attention reads of a page
# is one stretch of memory.
PAGE_SIZE = 64
# Rows that nothing uses write here, and nothing reads it.
SCRATCH_PAGE = 0


class PagePool:
    """Pages 1 to `num_pages` - 1, handed out lowest first; page 0 belongs to idle rows."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, SCRATCH_PAGE, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Pages that one sequence could have at most."""
        return self.num_pages - 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, or None where fewer are free."""
        if count > len(self._free):
            return None
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return taken[::-1]

    def free(self, pages: list[int]) -> None:
        """Give pages back; the last freed are the first to be used again."""
        self._free.extend(reversed(pages))


def pages_for(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_SIZE)


Tensor = torch.Tensor


class PagedKVCache:
    """One tensor a layer, [slots, 2 * KVH, D]: key heads, then value heads.

    As a `KVCache` it has no length and forgets nothing: whose slots are whose is the page tables'.
    """

    batch = 1

    def __init__(
        self, shape: TextShape, num_pages: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = (num_pages * PAGE_SIZE, 2 * shape.num_kv_heads, shape.head_dim)
        self.layers = [lazy_zeros(size, dtype, device) for _ in range(shape.num_layers)]
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

    def truncate(self, length: int) -> None:
        return


@dataclass(frozen=True)
class DecodePages:
    """What one new token of each of B rows sees.

    Args:
        tables: int32 [B, pages], of each row. lengths: int32 [B], tokens of each row after this
            step, at least 1.
        longest: tokens of the longest row at most, as the host knows it.
    """

    tables: Tensor
    lengths: Tensor
    longest: int


@dataclass(frozen=True)
class PackedPrompts:
    """Parts of several prompts side by side: each token sees its own prompt up to itself.

    Args:
        lengths: tokens of each part. contexts: tokens in front of each part, in the pool already.
        starts: int32 [parts + 1] on the device, where each part begins. context_starts: the same
            of what each sees, itself included.
        slots: int64, the pool's slots of all that is seen, by part; None = there is no context.
        flash: whether torch's flash attention takes parts of unequal length here.
    """

    lengths: Sequence[int]
    contexts: Sequence[int]
    starts: Tensor
    context_starts: Tensor
    slots: Tensor | None
    flash: bool


def decode_slots(tables: Tensor, places: Tensor) -> Tensor:
    """The pool's slots, int64 [B], of the tokens at `places` (int64 [B]) of each row."""
    pages = tables.gather(1, (places // PAGE_SIZE)[:, None]).squeeze(1)
    return pages.to(torch.int64) * PAGE_SIZE + places % PAGE_SIZE


def paged_attention(q: Tensor, pool: Tensor, pages: DecodePages) -> Tensor:
    """q [B, H, D] over the pages of `pool` [slots, 2 * KVH, D] -> [B, H * D].

    Gathers what every row might see up to the longest: the reference of the kernel, and what runs
    where there is none.
    """
    batch, heads, dim = q.shape
    kv_heads = pool.shape[1] // 2
    count = -(-pages.longest // PAGE_SIZE)
    seen = pool.view(-1, PAGE_SIZE, 2 * kv_heads, dim)[pages.tables[:, :count].to(torch.int64)]
    seen = seen.flatten(1, 2).transpose(1, 2)  # [B, 2 KVH, count * PAGE_SIZE, D]
    hidden = torch.arange(seen.shape[2], device=q.device) >= pages.lengths[:, None]
    mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
    mask = mask.masked_fill(hidden, float("-inf"))[:, None, None]
    grouped = q.view(batch, kv_heads, heads // kv_heads, dim)
    keys, values = seen.split_with_sizes((kv_heads,) * 2, dim=1)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
    return out.reshape(batch, heads * dim)


def prompt_attention(qkv: Tensor, pool: Tensor, packed: PackedPrompts) -> Tensor:
    """Heads qkv [N, H + 2 * KVH, D] of packed prompts, stored in `pool` too -> [N, H * D]."""
    kv_heads = pool.shape[1] // 2
    q, fresh = qkv.split_with_sizes((qkv.shape[1] - 2 * kv_heads, 2 * kv_heads), dim=1)
    seen = fresh if packed.slots is None else pool.index_select(0, packed.slots)
    keys, values = seen.split_with_sizes((kv_heads,) * 2, dim=1)
    whole = [n + before for n, before in zip(packed.lengths, packed.contexts, strict=True)]
    if packed.flash:
        return flash_varlen(
            q, keys, values, packed.starts, packed.context_starts, max(packed.lengths), max(whole)
        )
    parts = zip(
        q.split_with_sizes(packed.lengths),
        keys.split_with_sizes(whole),
        values.split_with_sizes(whole),
        strict=True,
    )
    return torch.cat([_attend_alone(*part) for part in parts])


def _attend_alone(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The last tokens q [S, H, D] of a sequence with keys and values [T, KVH, D] -> [S, H * D]."""
    length, total = len(q), len(keys)
    plan = prompt_plan(total - length, length, keys.shape[1], q.dtype, q.device)
    q, keys, values = (heads.transpose(0, 1)[None] for heads in (q, keys, values))
    out = F.scaled_dot_product_attention(
        q,
        keys,
        values,
        attn_mask=plan.mask,
        is_causal=plan.mask is None and length > 1,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1).flatten(1)
