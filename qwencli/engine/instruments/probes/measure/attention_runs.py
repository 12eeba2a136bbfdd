"""Attention in the shapes of a model, through each SDPA backend and through flash-attn.

What runs (by the names of kernels), and how fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from qwencli.engine.instruments.device_events import device_work
from qwencli.engine.instruments.probes.answers import (
    AttentionRun,
    AttentionRuns,
    FlashAttention,
    Work,
)
from qwencli.engine.instruments.probes.ask import first_line
from qwencli.engine.instruments.timing import compute_dtype, seconds_per_call, still_works
from qwencli.engine.layers import vision_tower
from qwencli.engine.ops.attention import AttentionPlan, Spans, can_flash_decode, decode_mask, sdpa

# Word in a kernel's name -> the SDPA backend it belongs to; the first that fits. What attention
# leaves behind besides (copies of masks, conversions) matches none.
FAMILIES = (
    ("cudnn", "cudnn"),
    ("flash_fwd", "flash"),
    ("flash::", "flash"),
    ("fmha", "mem_efficient"),
    ("attention_kernel", "mem_efficient"),
    ("softmax", "math"),
)


def attention_family(names: tuple[str, ...]) -> str | None:
    """The SDPA backend that these kernels belong to; None where the names do not say."""
    lowered = [name.lower() for name in names]
    return next((family for word, family in FAMILIES if any(word in n for n in lowered)), None)


def attention_kernels(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of kernels that belong to an attention backend."""
    return tuple(n for n in names if any(word in n.lower() for word, _ in FAMILIES))


def short(name: str) -> str:
    """A kernel's name without its return type, template arguments and parameters."""
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return plain.partition("<")[0].partition("(")[0].strip()[:80]


# A picture of 448 x 448 and a question; the cache a caption reaches; the patches of that picture.
PREFILL_TOKENS, CACHED_TOKENS, PATCHES = 256, 1024, 784
_BACKENDS = {
    "flash": "FLASH_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "mem_efficient": "EFFICIENT_ATTENTION",
    "math": "MATH",
}


def attention(device: str, work: Work) -> AttentionRuns:
    """Every phase as torch chooses, then through each backend that can be forced."""
    with torch.inference_mode():
        return AttentionRuns(tuple(_runs(device, work)))


def _runs(device: str, work: Work) -> Iterator[AttentionRun]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for phase, attend in _phases(device, work, chosen=True).items():
        yield _run(device, phase, "chosen", attend)
    for phase, attend in _phases(device, work, chosen=False).items():
        for name, member in _BACKENDS.items():
            backend = getattr(SDPBackend, member, None)
            if backend is not None:
                with sdpa_kernel([backend]):
                    yield _run(device, phase, name, attend)


def _run(device: str, phase: str, backend: str, attend: Callable[[], object]) -> AttentionRun:
    try:
        us = seconds_per_call(device, attend, samples=3) * 1e6
    except RuntimeError as error:  # "No available kernel": the backend does not take this shape
        if not still_works(device):
            raise
        return AttentionRun(phase, backend, error=first_line(str(error)))
    # A backend that was forced and ran is known without its kernels.
    seen = device_work(device, attend) if backend == "chosen" else None
    names = seen.names if seen else ()
    return AttentionRun(
        phase,
        backend,
        us,
        tuple(short(name) for name in attention_kernels(names) or names),
        attention_family(names) if backend == "chosen" else backend,
    )


def _phases(device: str, work: Work, *, chosen: bool) -> dict[str, Callable[[], object]]:
    """The calls that the native engine makes without kernels of its own, on random values.

    Args:
        chosen: False makes them all `scaled_dot_product_attention`, which a backend can be forced
            on.
    """
    dtype = compute_dtype(device)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=dtype, device=device)

    keys, values = (random(1, work.kv_heads, CACHED_TOKENS, work.head_dim) for _ in range(2))
    prompt = random(1, PREFILL_TOKENS, work.heads, work.head_dim)
    token = random(1, 1, work.heads, work.head_dim)
    first_keys, first_values = (x[:, :, :PREFILL_TOKENS] for x in (keys, values))
    slots = torch.arange(CACHED_TOKENS, device=device)
    plan = AttentionPlan(CACHED_TOKENS, decode_mask(slots, slots[-2:-1], None, dtype))
    heads = (work.heads, work.kv_heads, work.head_dim)
    if chosen and can_flash_decode(*heads, dtype, keys.device):
        spans = Spans.on(keys.device)
        spans.slots[1] = CACHED_TOKENS - 1
        plan = AttentionPlan(CACHED_TOKENS, None, spans=spans)
    phases: dict[str, Callable[[], object]] = {
        "prefill": lambda: sdpa(
            prompt, first_keys, first_values, AttentionPlan(PREFILL_TOKENS, None)
        ),
        "decode": lambda: sdpa(token, keys, values, plan),
    }
    if work.vision_heads and work.vision_head_dim:
        patches: Any = [
            random(1, PATCHES, work.vision_heads, work.vision_head_dim) for _ in range(3)
        ]
        phases["vision"] = lambda: vision_tower.sdpa(*patches)
    return phases


TOKENS = 1024


def flash_attention(device: str, work: Work) -> FlashAttention:
    """A causal prompt of TOKENS tokens, a step behind it and a picture through both; the prompt is
    timed.

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

        prompt, in_use = sdpa(), torch.full((1,), TOKENS, dtype=torch.int32, device=device)
        step = flash_attn.flash_attn_with_kvcache(
            q[:, -1:], k, v, cache_seqlens=in_use, causal=True
        )
        pairs = [(flash(), prompt), (step, prompt[:, -1:])]
        if work.vision_heads and work.vision_head_dim:
            patches = [
                torch.randn(1, PATCHES, work.vision_heads, work.vision_head_dim).to(device, dtype)
                for _ in range(3)
            ]
            pairs.append((flash_attn.flash_attn_func(*patches), vision_tower.sdpa(*patches)))
        difference = max(float((got - wanted).abs().max()) for got, wanted in pairs)
        return FlashAttention(
            version=str(flash_attn.__version__),
            flash_us=seconds_per_call(device, flash) * 1e6,
            sdpa_us=seconds_per_call(device, sdpa) * 1e6,
            max_difference=difference,
        )
