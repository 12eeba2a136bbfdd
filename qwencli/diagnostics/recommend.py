"""Which modes to start with on this machine."""

from __future__ import annotations

from qwencli.config import Attention, Cache, DType, EngineName, Quantization
from qwencli.diagnostics.machine import Machine

# bf16 weights of the recommended 4B model and room for cache and vision, in bytes.
_BF16_4B_BYTES = 11e9


def recommend(machine: Machine) -> dict[str, str]:
    """Mode by axis and `why`; {"why": ...} alone where torch does not load."""
    try:
        torch = machine.torch
    except (ImportError, OSError):
        return {"why": "torch does not load, so nothing can run"}
    if not torch.devices:
        return {
            "device": "mps" if torch.mps else "cpu",
            "dtype": DType.AUTO.value,
            "quantization": Quantization.NONE.value,
            "attention": Attention.SDPA.value,
            "engine": EngineName.NATIVE.value,
            "cache": Cache.STATIC.value,
            "why": "no CUDA device: the small models are the usable ones",
        }
    device = max(torch.devices, key=lambda found: found.total_memory_bytes)
    fits = device.total_memory_bytes >= _BF16_4B_BYTES
    memory = f"{device.total_memory_bytes / 1e9:.0f} GB"
    return {
        "device": f"cuda:{device.index}",
        "dtype": (DType.BFLOAT16 if device.capability >= (8, 0) else DType.FLOAT16).value,
        "quantization": (Quantization.NONE if fits else Quantization.INT4).value,
        "attention": Attention.SDPA.value,
        "engine": (EngineName.NATIVE if fits else EngineName.TRANSFORMERS).value,
        "cache": (Cache.STATIC_GRAPH if fits else Cache.DYNAMIC).value,
        "why": f"a 4B model {'fits' if fits else 'does not fit'} {memory} without quantization; "
        "`qwencli bench` measures the other modes",
    }
