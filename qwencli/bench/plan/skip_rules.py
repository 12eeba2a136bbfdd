"""Why a cell cannot run on this machine, as a table of small rules.

Only what is certain without loading a model stands here. An engine that finds out more when
it loads raises UnsupportedModeError, and the cell becomes a skipped row all the same.
"""

from __future__ import annotations

from collections.abc import Callable

from qwencli.bench.plan.cells import BenchCell
from qwencli.config import Attention, Cache, EngineName, Kernels, KVDType, Quantization, Speculate
from qwencli.engine.machine.device import DeviceFacts

Rule = Callable[[BenchCell, DeviceFacts], str | None]

BITSANDBYTES = (Quantization.INT8, Quantization.INT4)


def _native(cell: BenchCell, facts: DeviceFacts) -> str | None:
    if cell.engine is not EngineName.NATIVE:
        return None
    if cell.cache is Cache.STATIC_GRAPH and facts.kind != "cuda":
        return "CUDA graphs need a CUDA device; static is the nearest here"
    return None


def _kernels(cell: BenchCell, facts: DeviceFacts) -> str | None:
    if cell.kernels is not Kernels.TRITON:
        return None
    if cell.engine is not EngineName.NATIVE or cell.cache is not Cache.STATIC_GRAPH:
        return "triton kernels need the native engine and static-graph"
    return None


def _kv_dtype(cell: BenchCell, facts: DeviceFacts) -> str | None:
    if cell.kv_dtype is KVDType.AUTO:
        return None
    if cell.engine is not EngineName.NATIVE or cell.cache is Cache.DYNAMIC:
        return f"{cell.kv_dtype} keys and values need the native engine and a static cache"
    return None


def _speculate(cell: BenchCell, facts: DeviceFacts) -> str | None:
    if cell.speculate is Speculate.OFF:
        return None
    if cell.engine is not EngineName.NATIVE:
        return "drafted tokens need the native engine"
    if cell.cache in (Cache.DYNAMIC, Cache.STATIC_COMPILE):
        return f"{cell.cache} cannot check drafted tokens; static is the nearest"
    return None


def _graph(cell: BenchCell, facts: DeviceFacts) -> str | None:
    if cell.cache is Cache.STATIC_GRAPH and cell.engine is EngineName.TRANSFORMERS:
        return "static-graph needs the native engine; static-compile is the nearest here"
    return None


def _fp8(cell: BenchCell, facts: DeviceFacts) -> str | None:
    if cell.quantization is Quantization.FP8 and cell.engine is EngineName.TRANSFORMERS:
        return "fp8 needs the native engine; 8bit is the nearest here"
    return None


def _flash(cell: BenchCell, facts: DeviceFacts) -> str | None:
    return facts.flash_attn_blocker if cell.attention is Attention.FLASH else None


def _bitsandbytes(cell: BenchCell, facts: DeviceFacts) -> str | None:
    if cell.quantization not in BITSANDBYTES or cell.engine is not EngineName.TRANSFORMERS:
        return None
    if facts.bitsandbytes_version is None:
        return f"{cell.quantization} needs bitsandbytes, which is not installed"
    if cell.cache is Cache.STATIC_COMPILE:
        return "transformers does not compile a bitsandbytes model; static is the nearest"
    return None


def _compile(cell: BenchCell, facts: DeviceFacts) -> str | None:
    return facts.compile_blocker if cell.cache is Cache.STATIC_COMPILE else None


RULES: tuple[Rule, ...] = (
    _native,
    _kernels,
    _kv_dtype,
    _speculate,
    _graph,
    _fp8,
    _flash,
    _bitsandbytes,
    _compile,
)


def work_of(cell: BenchCell, facts: DeviceFacts) -> tuple[str, ...]:
    """The cell's axes with every choice that is left to the engine made as it makes it here: two
    cells with equal work differ in nothing but their names (`engine.resolve`, `kernel_choice`)."""
    axes = cell.axes()
    native, on_gpu = cell.engine is EngineName.NATIVE, facts.kind == "cuda"
    own_kernels = native and on_gpu and cell.cache is Cache.STATIC_GRAPH
    if not own_kernels and cell.kernels is Kernels.AUTO:
        axes["kernels"] = Kernels.TORCH
    may_choose = native and (
        (own_kernels and cell.kernels is not Kernels.TORCH)
        or (not on_gpu and cell.cache is Cache.STATIC)
    )
    if cell.attention is Attention.AUTO and not may_choose:
        axes["attention"] = Attention.SDPA
    return tuple(axes.values())


def skip_reason(cell: BenchCell, facts: DeviceFacts) -> str | None:
    """The first reason why `cell` cannot run, or None."""
    return next((reason for rule in RULES if (reason := rule(cell, facts))), None)
