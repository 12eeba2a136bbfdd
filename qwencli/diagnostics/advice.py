"""Which settings to start with on this machine for one model, and what to expect of them.

Memory comes from `qwencli.models.memory`. Speed is a roofline: a token takes at least the time to
read its bytes (weights, keys and values) at the measured bandwidth. What its kernels add comes from
what a kernel costs in a graph here, for plain torch operators from another GPU (`launches`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qwencli.config import Attention, Cache, DType, EngineName, Kernels, Quantization
from qwencli.diagnostics.decode_work import (
    fused_kernels_per_token,
    image_tokens,
    operators_ms_per_token,
    operators_per_token,
    token_bytes,
    token_is_cached,
)
from qwencli.diagnostics.machine import Machine, Unreadable
from qwencli.engine.instruments.probes.ask import Outcome
from qwencli.engine.machine.device import CudaDevice
from qwencli.engine.machine.gpu_sensors import GpuReading
from qwencli.models.memory import CPU_VALUE_BYTES, MemoryEstimate, estimate, kv_cache_bytes
from qwencli.models.shapes import ModelShape

# What may be filled: the rest is for fragments, and on Windows for what the desktop takes later.
FILL, FILL_ON_WINDOWS = 0.95, 0.85
# Longest first: chats with pictures, a long caption, a short one.
SEQUENCES = (16384, 8192, 4096, 2048)
# Largest first; a megapixel is 1024 tokens and keeps the first token quick.
PIXELS = (1024 * 1024, 724 * 724, 512 * 512, 384 * 384)
# A caption's middle: 230 tokens of prompt and picture, a few hundred of answer.
TYPICAL_CONTEXT = 512
# The most exact first: what is rounded is rounded to make it fit, or because the user says so.
# Speed would turn the order round (results/2026-11-25-h100-engines: 331, 584 and 846 tok/s), and
# quality hardly tells them apart (results/2026-11-24-quality-cpu: 0.0, 0.0 and 0.2 points lost).
WAYS = (Quantization.NONE, Quantization.INT8, Quantization.INT4)
# Smallest compute capability of the native engine's fused kernels.
TRITON_SINCE = (8, 0)


@dataclass(frozen=True)
class Advice:
    """Settings by the names of `caption`'s options; None = leave it at its default.

    Args:
        vram_bytes: what they need by estimate; None where nothing fits.
        limit_tok_per_s: no faster than this; expected_tok_per_s: about this.
    """

    model: str
    why: tuple[str, ...]
    device: str | None = None
    dtype: DType | None = None
    engine: EngineName | None = None
    quantization: Quantization | None = None
    attention: Attention | None = None
    cache: Cache | None = None
    kernels: Kernels | None = None
    max_seq_len: int | None = None
    max_pixels: int | None = None
    vram_bytes: int | None = None
    limit_tok_per_s: float | None = None
    expected_tok_per_s: float | None = None


@dataclass(frozen=True)
class _Fit:
    quantization: Quantization
    kernels: Kernels
    max_seq_len: int
    max_pixels: int | None
    memory: MemoryEstimate


def advise(machine: Machine) -> Advice:
    """Advice for the machine's model; only `model` and `why` where nothing can run."""
    model = machine.model
    try:
        device = machine.device
    except Unreadable as error:
        return Advice(model, (f"{error}, so nothing can run",))
    shape = machine.shape
    if not device.startswith("cuda"):
        return _without_gpu(machine, shape, model, device)
    cuda, gpu = machine.cuda_device, machine.gpu
    assert cuda is not None, "device names it"
    windows = machine.system.name == "Windows" or machine.system.wsl is not None
    free = gpu.free_memory_bytes if gpu and gpu.free_memory_bytes else cuda.total_memory_bytes
    room = int(free * (FILL_ON_WINDOWS if windows else FILL))
    fit = next(_fits(shape, room, _kernels(machine, cuda)), None)
    if fit is None:
        return Advice(model, (_nothing_fits(shape, room, model),), device)
    limit, expected, speed = _speed(machine, gpu, shape, fit)
    need = fit.memory.total
    return Advice(
        model,
        (
            f"{fit.quantization} needs {need / 1e9:.1f} of {free / 1e9:.1f} GB free (weights "
            f"{fit.memory.weights / 1e9:.1f}, cache of {fit.max_seq_len} tokens "
            f"{fit.memory.kv_cache / 1e9:.1f}, the rest while working)",
            *speed,
        ),
        device=device,
        dtype=DType.BFLOAT16 if cuda.capability >= (8, 0) else DType.FLOAT16,
        engine=EngineName.NATIVE,
        quantization=fit.quantization,
        attention=Attention.AUTO,
        cache=Cache.STATIC_GRAPH,
        kernels=fit.kernels,
        max_seq_len=fit.max_seq_len,
        max_pixels=fit.max_pixels,
        vram_bytes=need,
        limit_tok_per_s=limit,
        expected_tok_per_s=expected,
    )


def _fits(shape: ModelShape, room: int, kernels: Kernels) -> Iterator[_Fit]:
    """What fits into `room` bytes, best first: the way before the length before the picture."""
    for quantization in WAYS:
        for length in SEQUENCES:
            for pixels in PIXELS if shape.vision else (None,):
                memory = estimate(
                    shape,
                    quantization,
                    context_tokens=length,
                    image_tokens=image_tokens(shape, pixels) if pixels else 0,
                )
                if memory.total <= room:
                    yield _Fit(quantization, kernels, length, pixels, memory)


def _nothing_fits(shape: ModelShape, room: int, model: str) -> str:
    from qwencli.models.resolve import recommended_model

    least = estimate(shape, Quantization.INT4, context_tokens=SEQUENCES[-1], image_tokens=256)
    smaller = recommended_model(room, Quantization.INT4)
    return (
        f"{model} does not fit: 4-bit needs {least.total / 1e9:.1f} GB, {room / 1e9:.1f} GB may be "
        "used" + (f"; {smaller.name} fits" if smaller else "")
    )


def _speed(
    machine: Machine, gpu: GpuReading | None, shape: ModelShape, fit: _Fit
) -> tuple[float | None, float | None, tuple[str, ...]]:
    """(limit, expectation, reasons); None where nothing is known of the bandwidth."""
    measured = machine.measured("bandwidth")
    vendor = gpu.vendor_bytes_per_s if gpu else None
    rate = (measured.token_bytes_per_s or measured.read_bytes_per_s) if measured else vendor
    if rate is None:
        return None, None, ()
    size = token_bytes(shape, fit.quantization) + kv_cache_bytes(shape, TYPICAL_CONTEXT)
    read_s = size / rate
    reasons = [
        f"a token reads {size / 1e9:.2f} GB at {rate / 1e9:.0f} GB/s "
        f"({'measured' if measured else 'what clock and bus width promise'}): "
        f"{read_s * 1e3:.2f} ms, at most {1 / read_s:.0f} tok/s"
    ]
    added_ms, why = _added_ms(machine, fit)
    if added_ms is None:
        return 1 / read_s, None, tuple(reasons)
    expected = 1 / (read_s + added_ms / 1e3)
    reasons.append(f"{why} {added_ms:.2f} ms: about {expected:.0f} tok/s")
    return 1 / read_s, expected, tuple(reasons)


def _added_ms(machine: Machine, fit: _Fit) -> tuple[float | None, str]:
    """What the kernels add to the time of reading, and why; None where it is not known here."""
    layers = machine.work.layers
    if fit.kernels is Kernels.TORCH and fit.quantization is not Quantization.NONE:
        return None, ""  # they read each matrix back first, which was not measured on a GPU
    if fit.kernels is Kernels.TORCH:
        return operators_ms_per_token(layers), (
            f"its {operators_per_token(layers):.0f} kernels add, as on an H200, about"
        )
    launches = machine.measured("launch-rate")
    if launches is None or launches.graph_us is None:
        return None, ""
    count = fused_kernels_per_token(layers)
    return count * launches.graph_us / 1e3, (
        f"{count} fused kernels at {launches.graph_us:.1f} us in a graph add"
    )


def _kernels(machine: Machine, cuda: CudaDevice) -> Kernels:
    """Whether Triton can be counted on; where it was tried, whether it worked."""
    tried = machine.answered("triton")
    works = tried is None or tried.outcome is Outcome.OK
    there = machine.version("triton") or machine.version("triton-windows")
    fits = cuda.capability >= TRITON_SINCE
    return Kernels.TRITON if there and works and fits else Kernels.TORCH


def _without_gpu(machine: Machine, shape: ModelShape, model: str, device: str) -> Advice:
    memory = machine.section("memory")
    free = memory.available_bytes or memory.total_bytes
    needs = {way: estimate(shape, way, value_bytes=CPU_VALUE_BYTES).total for way in WAYS}
    way = next((way for way, need in needs.items() if need <= free), None)
    why = [
        f"no CUDA device: {model} needs {needs[Quantization.NONE] / 1e9:.1f} of {free / 1e9:.1f} "
        "GB of host memory, unquantized in float32"
    ]
    if way is None:
        least = needs[Quantization.INT4] / 1e9
        why.append(
            f"it does not fit, nor in 4bit ({least:.1f} GB); the bundled model `scenes` does"
        )
        return Advice(model, tuple(why), device)
    if way is not Quantization.NONE:
        why.append(f"--quantization {way} fits: {needs[way] / 1e9:.1f} GB")
    measured = machine.measured("bandwidth")
    limit = None
    if measured:
        rate = measured.token_bytes_per_s or measured.read_bytes_per_s
        size = token_bytes(shape, way, CPU_VALUE_BYTES)
        limit = rate / size
        cached = (
            f", as it stays in a cache (memory: {measured.read_bytes_per_s / 1e9:.1f} GB/s)"
            if token_is_cached(measured)
            else ""
        )
        why.append(
            f"what a token reads ({size / 1e6:,.0f} MB) comes at {rate / 1e9:.1f} GB/s{cached}: "
            f"at most {limit:.1f} tok/s"
        )
    return Advice(
        model,
        tuple(why),
        device=device,
        dtype=DType.AUTO,
        engine=EngineName.NATIVE,
        quantization=way,
        attention=Attention.AUTO,
        cache=Cache.STATIC,
        limit_tok_per_s=limit,
    )
