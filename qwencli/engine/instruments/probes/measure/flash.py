"""The flash-attn package, run and compared with torch's own attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from qwencli.engine.instruments.probes.answers import FlashAttention, Work
from qwencli.engine.instruments.timing import compute_dtype, seconds_per_call

TOKENS = 1024


def flash_attention(device: str, work: Work) -> FlashAttention:
    """A causal prompt of TOKENS tokens through both.

    Raises:
        ImportError, OSError: it does not load (a wheel for another torch).
        RuntimeError: it has no kernel for this device.
    """
    import flash_attn

    dtype = compute_dtype(device)
    with torch.inference_mode():
        q = torch.randn(1, TOKENS, work.heads, work.head_dim, dtype=dtype, device=device)
        k, v = (
            torch.randn(1, TOKENS, work.kv_heads, work.head_dim, dtype=dtype, device=device)
            for _ in range(2)
        )
        wide_k, wide_v = (
            x.transpose(1, 2).repeat_interleave(work.heads // work.kv_heads, 1) for x in (k, v)
        )

        def flash() -> Any:
            return flash_attn.flash_attn_func(q, k, v, causal=True)

        def sdpa() -> torch.Tensor:
            out = F.scaled_dot_product_attention(q.transpose(1, 2), wide_k, wide_v, is_causal=True)
            return out.transpose(1, 2)

        difference = float((flash() - sdpa()).abs().max())
        return FlashAttention(
            version=str(flash_attn.__version__),
            flash_us=seconds_per_call(device, flash) * 1e6,
            sdpa_us=seconds_per_call(device, sdpa) * 1e6,
            max_difference=difference,
        )
