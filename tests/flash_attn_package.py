"""A package `flash_attn` with the signatures, checks and words of the real one, in plain torch.

The real one needs a GPU. From flash-attn 2.8.3: flash_attn_interface.py and flash_api.cpp.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

INTERFACE = '''
import torch

__version__ = "2.8.3"
calls = []


def attend(q, k, v, causal):
    """[S, H, D] over [M, KVH, D]; the last query sees the last key. Nothing seen: zeros."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.float().transpose(0, 1) for x in (q, k, v))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    if causal:
        n, m = scores.shape[1:]
        seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        scores = scores.masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(0, 1)


def check(condition, said):
    if not condition:
        raise RuntimeError(said)


def check_all(q, k, v):
    calls.append((q.shape, k.shape))
    half = q.dtype in (torch.float16, torch.bfloat16)
    check(half, "FlashAttention only support fp16 and bf16 data type")
    check(k.dtype == v.dtype == q.dtype, "query and key must have the same dtype")
    dense = q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    check(dense, "Input tensor must have contiguous last dimension")
    check(q.shape[-1] <= 256, "FlashAttention forward only supports head dimension at most 256")
    whole = q.shape[-2] % k.shape[-2] == 0
    check(whole, "Number of heads in key/value must divide number of heads in query")


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):
    assert q.dim() == k.dim() == 4 and softmax_scale in (None, q.shape[-1] ** -0.5)
    check_all(q, k, v)
    rows = [attend(*row, causal) for row in zip(q, k, v, strict=True)]
    return torch.stack(rows).to(q.dtype)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):
    check_all(q, k, v)
    int32 = cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    check(int32, "cu_seqlens_q must have dtype int32")
    lengths = [x.diff().tolist() for x in (cu_seqlens_q, cu_seqlens_k)]
    parts = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
    return torch.cat([attend(*part, causal) for part in parts]).to(q.dtype)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
    return_softmax_lse=False,
):
    assert q.dim() == k_cache.dim() == 4 and k is v is block_table is softmax_scale is None
    check_all(q, k_cache, v_cache)
    rows, slots = len(q), k_cache.shape[1]
    check(len(k_cache) == rows, "kcache must have shape (batch_size_c, seqlen_k, ...)")
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((rows,), cache_seqlens, dtype=torch.int32)
    for given, name in ((cache_seqlens, "seqlens_k"), (cache_leftpad, "leftpad_k")):
        if given is not None:
            check(given.dtype == torch.int32, f"{name} must have dtype int32")
            check(given.is_contiguous(), f"{name} must be contiguous")
            check(given.shape == (rows,), f"{name} must have shape (batch_size)")
    ends = [slots] * rows if cache_seqlens is None else cache_seqlens.tolist()
    begins = [0] * rows if cache_leftpad is None else cache_leftpad.tolist()
    out = [
        attend(q[row], k_cache[row, begin:end], v_cache[row, begin:end], causal)
        for row, (begin, end) in enumerate(zip(begins, ends, strict=True))
    ]
    return torch.stack(out).to(q.dtype)
'''


@contextmanager
def installed(folder: Path, interface: str = INTERFACE, padding: str = "") -> Iterator[None]:
    """`import flash_attn` finds it, written below `folder`.

    Args:
        interface: its `__init__.py`. padding: its `bert_padding.py`.
    """
    package = folder / "flash_attn"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(interface)
    (package / "bert_padding.py").write_text(padding)
    before = _imported()
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in _imported():
            del sys.modules[name]
        sys.modules.update(before)


def _imported() -> dict[str, ModuleType]:
    return {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "flash_attn"}
