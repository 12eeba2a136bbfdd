"""Compiles kernels without a GPU.

    python -m tests.engine.kernels.compile_steps CONFIG [CAPABILITY [delta | flash]]

A program of its own, because Triton decides when it is imported whether it interprets. Compiles all
kernels of decode steps and prompts for compute capability 9.0, or for the one that is named (80,
86, 89, 90, 120) those of steps of many rows, of gated delta nets, or of attention of many queries
with all tiles that it has there. Prints a JSON line a kernel: its name, the type it computes with,
how weights and cache are quantized, tokens of the step or prompt, rows of a pool of pages (0 = a
cache of its own), the bytes that a thread keeps in memory because its registers are full, the bytes
of shared memory, how often threads hand each other operands of matrix instructions, and, where
programs count who is the last, how often they do so to join their results.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction
from triton.runtime.driver import driver

from qwencli.config import Quantization
from qwencli.engine import kernels
from qwencli.engine.cache.paged_kv import DecodePages, PackedPrompts
from qwencli.engine.kernels import (
    add_norm,
    chunked_delta,
    fused_ops,
    gated_delta,
    many_rows,
    moe,
)
from qwencli.engine.kernels import tiles as tiles_module
from qwencli.engine.kernels.flash_attention import FlashAttention
from qwencli.engine.kernels.launches import KernelLaunch, compile_described
from qwencli.engine.loading import weights
from qwencli.engine.native.decode_state import DecodeState
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prompt_inputs import ModelPrompt
from qwencli.engine.ops import gated_delta as delta
from qwencli.engine.ops.decoder_ops import Matrix, RMSNorm
from qwencli.engine.ops.moe import Routing
from qwencli.engine.quant.quantized_tensor import LARGEST, QuantizedTensor, Scheme
from qwencli.engine.row_state import RowState
from qwencli.models.shape_reader import read_shape

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
# Processors of a card of each compute capability: A100, RTX 3090, RTX 4090, H200, RTX 5090.
PROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 120: 170}
HOPPER = 90
# Kernels of steps of many rows, and of vision towers.
OF_MANY_ROWS = (
    "add_norm_kernel",
    "decode_attention_kernel",
    "finish_token_kernel",
    "likeliest_kernel",
    "quantize_rows_kernel",
    "tiled_gemm_kernel",
    "verify_drafts_kernel",
    "route_kernel",
    "pick_experts_kernel",
    "sort_pairs_kernel",
    "add_results_kernel",
    "experts_gate_up_kernel",
    "experts_down_kernel",
    "grouped_gemm_kernel",
)
BYTES = {Scheme.INT8: torch.int8, Scheme.FP8: torch.float8_e4m3fn}
CPU = torch.device("cpu")
# Otherwise what differs least from another that is compiled is left out: each takes seconds.
WHOLE = "EVERY_CARD" in os.environ
LOOP = re.compile(r"^(\$L__BB\w+):(.*?)\bbra(?:\.uni)?\s+\1;", re.MULTILINE | re.DOTALL)
PRODUCT = "mma.sync"
EXCHANGE = re.compile(r"\b(?:shfl|bar)\.sync|\.shared\b")


class Compiled:
    """Stands in for a kernel: compiles what would be launched."""

    def __init__(
        self,
        kernel: JITFunction[Any],
        about: dict[str, Any],
        only: Sequence[str] | None,
        few: bool,
    ) -> None:
        self._kernel, self._about, self._few = kernel, about, few
        self._launched: Counter[str] = Counter()
        self._left_out = only is not None and kernel.fn.__name__ not in only
        self._seen: set[str] = set()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **settings: Any) -> None:
            if self._left_out:
                return
            if self._about["tokens"] == 2 and self._kernel.fn.__name__.startswith("gemm"):
                return  # the same instructions as for eight, of which fewer store
            if self._few and not self._is_among_few():
                return
            compiled = self._kernel.warmup(*arguments, grid=grid, **settings)
            described = KernelLaunch.of(self._kernel, arguments, settings)
            assert compile_described(self._kernel, described).hash == compiled.hash, described
            if compiled.hash not in self._seen:
                self._seen.add(compiled.hash)
                found = {
                    "kernel": self._kernel.fn.__name__,
                    "spilled": stack_of(compiled),
                    "shared": compiled.metadata.shared,
                    "exchanges": exchanges_of(compiled.asm["ptx"]),
                    "joining": joining_of(compiled.asm["ptx"]),
                }
                print(json.dumps(self._about | found))

        return launch

    def _is_among_few(self) -> bool:
        """Of products of quantized matrices the first ones, which have all that others have: a
        norm and a bias, a residual, a gate."""
        name = self._kernel.fn.__name__
        if name == "decode_attention_kernel":
            return is_among_few(self._about)
        if not name.endswith("_quantized_kernel"):
            return True
        self._launched[self._about["quantization"]] += 1
        return self._launched[self._about["quantization"]] <= 3


def is_among_few(about: dict[str, Any]) -> bool:
    """Whether a step of `main` is one of those whose attention is compiled where not all are: each
    type and each cache with one token or two and with many lanes, rows of pages with a plain and
    with a quantized cache, and results that are rounded for each kind of weights."""
    tokens, rows, kv = about["tokens"], about["rows"], about["kv"]
    if about["quantization"] is not Quantization.NONE:
        return (rows == 8) if about["quantization"] is Quantization.INT4 else (tokens == 8)
    if kv is Scheme.FP8:
        return tokens == 2 or rows == 8
    plain = kv is None and about["dtype"] != str(torch.float32)
    return tokens != 2 and (rows == 0 or (rows == 8 and plain))


def stack_of(compiled: Any) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", said)
    assert found is not None, said
    return int(found[1])


def exchanges_of(ptx: str) -> int:
    """Through shared memory or from lane to lane, in loops that multiply matrices; where the
    compiler left none, from the first product to the last."""
    found = [body for _, body in LOOP.findall(ptx) if PRODUCT in body]
    if not found and PRODUCT in ptx:
        found = [ptx[ptx.index(PRODUCT) : ptx.rindex(PRODUCT)]]
    return sum(len(EXCHANGE.findall(text)) for text in found)


def joining_of(ptx: str) -> int:
    """Likewise, in the code of the program that arrives last."""
    return len(EXCHANGE.findall(ptx.partition("atom.global")[2]))


def pretend_a_gpu(capability: int) -> None:
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device=None: 0,
        )
    )
    processors, fp8 = PROCESSORS[capability], capability >= 89
    gpu = fused_ops.Launch(processors, dependent=capability >= 90, fp8=fp8, on_gpu=False)
    products = many_rows.Capability(processors, fp8, on_gpu=False)
    fused_ops.Launch.on = classmethod(lambda cls, device: gpu)  # type: ignore[method-assign,assignment]
    many_rows.Capability.of = classmethod(lambda cls, device: products)  # type: ignore[method-assign,assignment]


def record(about: dict[str, Any], only: Sequence[str] | None = None, few: bool = False) -> None:
    """Put a stand-in wherever a module of ours launches a kernel.

    Args:
        only: the kernels that are compiled; None = all.
        few: leaves out what differs least from what is compiled; `make kernels` compiles all.
    """
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        names = vars(importlib.import_module(module.name))
        for name, value in list(names.items()):
            if name.endswith("_kernel") and isinstance(value, JITFunction):
                names[name] = Compiled(value, about, only, few)


def steps_of_rows(model: QwenModel, rows: int) -> None:
    """A greedy step of so many rows over a pool of pages, with a penalty where that differs."""
    cache = model.paged_cache(2)
    token, position, place = (torch.zeros(rows, dtype=torch.int64) for _ in range(3))
    slots, idle = torch.ones(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.bool)
    pages = DecodePages(torch.ones(rows, 1, dtype=torch.int32), place, 1, slots, idle)
    hidden = model.decode_rows(token, position, cache, pages, model.recurrent_states(2))
    vocab_size = len(model.decoder.embedding)
    state = RowState(rows, 1, vocab_size, 1, CPU)
    model.decoder.next_tokens(hidden, model.row_ops(rows), state.buffers(rows), rows > 1)


def verification_of_rows(model: QwenModel, rows: int, size: int) -> None:
    """A step that checks drafts, but for its products."""
    cache, ops = model.paged_cache(2), model.row_ops(rows * size)
    position, place = (torch.zeros(rows, dtype=torch.int64) for _ in range(2))
    pages = DecodePages(torch.ones(rows, 1, dtype=torch.int32), place, 1)
    model.decode_rows(torch.zeros(rows * size, dtype=torch.int64), position, cache, pages)
    vocab_size = len(model.decoder.embedding)
    state = RowState(rows, 1, vocab_size, 1, CPU, with_drafts=True)
    assert ops.verify_rows is not None, "kernels have it"
    logits = torch.zeros(rows * size, vocab_size)
    ops.verify_rows(logits, state.buffers(rows), state.narrow_drafts(rows))


def products_of_rows(about: dict[str, Any]) -> None:
    """Of quantized matrices with each number of rows that has tiles of its own."""
    many, width = many_rows.ManyRows(CPU), 2560
    norm = RMSNorm(torch.ones(width, dtype=torch.bfloat16), 1e-6)
    for scheme in (Scheme.FP8, Scheme.INT8, Scheme.INT4):
        about |= {"quantization": scheme.value}
        for rows in (16, 32, 128, 256, 4096) if WHOLE else (16, 256):
            about |= {"rows": rows}
            x, y = (torch.zeros(rows, width, dtype=torch.bfloat16) for _ in range(2))
            many.product(x, zeros_of(scheme, width, width), norm=norm, onto=y)
        wide, about["rows"] = 4 * width, 16
        both = torch.zeros(16, 2 * wide, dtype=torch.bfloat16)
        many.product(both, zeros_of(scheme, width, wide), gated=True)


def mixtures(about: dict[str, Any]) -> None:
    """Of experts as wide as those of 35B-A3B, with the shared one among them. They need nothing
    that cards differ in: all kinds of weights are compiled where every card is tried."""
    width, inner, half = 2048, 512, torch.bfloat16
    kernels = moe.ExpertKernels(8, CPU, fused_ops.Launch.on(CPU).options, "tf32")
    norm = RMSNorm(torch.ones(width, dtype=half), 1e-6)
    routing = Routing(torch.zeros(257, width, dtype=half), 256, 8, True, 1)
    stacked = 257 * 2 * inner, 257 * width
    for scheme in (None, Scheme.INT8, Scheme.FP8, Scheme.INT4) if WHOLE else (Scheme.INT4,):
        about |= {"quantization": "none" if scheme is None else scheme.value}
        if scheme is None:
            gate_up: Matrix = torch.zeros(stacked[0], width, dtype=half).t()
            down: Matrix = torch.zeros(stacked[1], inner, dtype=half).t()
        else:
            gate_up, down = zeros_of(scheme, stacked[0], width), zeros_of(scheme, stacked[1], inner)
        layer: Any = SimpleNamespace(mlp_norm=norm, gate_up=gate_up, down=down, routing=routing)
        for rows in (2, 16, 2048) if WHOLE else (2, 2048):
            about["rows"] = rows
            hidden = torch.zeros(rows, width, dtype=half)
            (kernels.few if rows <= 8 else kernels.many)(hidden, layer)


def zeros_of(scheme: Scheme, rows: int, columns: int) -> QuantizedTensor:
    if scheme in LARGEST:
        data = torch.zeros(rows, columns, dtype=BYTES[scheme])
        return QuantizedTensor(scheme, data, torch.ones(rows))
    words = torch.zeros(rows, columns // 8, dtype=torch.int32)
    scale, zero = (torch.ones(rows, columns // 128, dtype=torch.float16) for _ in range(2))
    return QuantizedTensor(scheme, words, scale, zero)


def delta_nets_for(capability: int) -> None:
    """Of the shape that a 9B model has: a step, one that checks drafts, and prompts."""
    pretend_a_gpu(capability)
    half, rows, tokens = torch.bfloat16, 2, 4
    about: dict[str, Any] = {"dtype": str(half), "quantization": "none", "tokens": 1}
    record(about)
    k_heads, v_heads, dim, ring = 16, 32, 128, 12
    channels = (2 * k_heads + v_heads) * dim
    conv = torch.zeros(channels, delta.TAPS, dtype=half)
    head, gain = torch.zeros(v_heads), torch.zeros(dim)
    layer = delta.GatedDelta(k_heads, v_heads, dim, dim, conv, head, head, gain, 1e-6)
    state = delta.DeltaState(
        torch.zeros(rows, ring, channels, dtype=half), torch.zeros(rows, v_heads, dim, dim)
    )

    def inputs(count: int) -> delta.DeltaInputs:
        """Of two projections: one of what is wide, one of the gates."""
        wide = torch.zeros(count, channels + v_heads * dim, dtype=half)
        both = torch.zeros(count, 2 * v_heads, dtype=half)
        return delta.DeltaInputs(
            wide[:, :channels], wide[:, channels:], both[:, v_heads:], both[:, :v_heads]
        )

    index = torch.zeros(rows, dtype=torch.int64)
    which = delta.DeltaRows(index, index, torch.zeros(rows, dtype=torch.bool))
    step = gated_delta.DeltaStep(fused_ops.Launch.on(CPU).options)
    with torch.inference_mode():
        step.decode(inputs(rows), layer, state, which)
        about["tokens"] = tokens
        updates = delta.DeltaUpdates.empty(1, rows, tokens, (k_heads, dim), (v_heads, dim), CPU)
        step.verify(inputs(rows * tokens), layer, state, which, updates.of_layer(0))
        gated_delta.adopt_accepted(updates, state.recurrent[None], index, index, index)
        starts = torch.tensor([0, 100, 128], dtype=torch.int32)
        prompts = PackedPrompts([100, 28], [0, 0], starts, starts, None, False)
        about["tokens"] = 128
        chunked_delta.ChunkedDelta()(inputs(128), layer, state, prompts, index)


def flash_for(capability: int) -> None:
    pretend_a_gpu(capability)
    about: dict[str, Any] = {"dtype": str(torch.bfloat16), "quantization": "none", "rows": 0}
    record(about)
    for (card, dim, causal), tiles in tiles_module.FLASH.items():
        if card != divmod(capability, 10):
            continue
        for most, _ in tiles:
            tokens = about["tokens"] = min(most, 1024)
            qkv = torch.zeros(tokens, 3 * 16, dim, dtype=torch.bfloat16)
            q, keys, values = qkv.split(16, dim=1)
            FlashAttention(CPU, tiles, causal)(q, keys, values, tokens)


def many_rows_for(config: dict[str, Any], capability: int) -> None:
    pretend_a_gpu(capability)
    half, shape = torch.bfloat16, read_shape(config)
    about: dict[str, Any] = {"dtype": str(half), "quantization": "none", "tokens": 1}
    record(about, OF_MANY_ROWS)
    own = functools.partial(fused_ops.fused_ops, own_attention=True)
    with torch.inference_mode():
        loaded = weights.dummy(shape, half, CPU, Quantization.NONE)
        for kv in (None, Scheme.INT8, Scheme.FP8) if WHOLE else (None, Scheme.FP8):
            model = QwenModel(shape, loaded, 64, fused=own, kv=kv)
            about["kv"] = kv
            if WHOLE or kv is None:
                for rows in (8, 16) if kv is None else (8,):
                    about["rows"] = rows
                    steps_of_rows(model, rows)
            if WHOLE or kv is not None:
                about |= {"tokens": 4, "rows": 2}
                verification_of_rows(model, 2, 4)
            about["tokens"] = 1
        about["kv"] = None
        products_of_rows(about)
        mixtures(about)
        hidden, gain = torch.zeros(16, 1152, dtype=half), torch.ones(1152, dtype=half)
        add_norm.AddNorm()(hidden, hidden.clone(), gain, gain, 1e-6)


def main(config: dict[str, Any]) -> None:
    pretend_a_gpu(HOPPER)
    about: dict[str, Any] = {}
    record(about, few=not WHOLE)
    shape = read_shape(config)
    half, none = torch.bfloat16, Quantization.NONE
    quantized = (Quantization.INT8, Quantization.FP8, Quantization.INT4)
    for dtype, quantization, kv in (
        (torch.float32, none, None),
        (half, none, None),
        *((half, kind, None) for kind in quantized),
        *((half, none, kind) for kind in (Scheme.INT8, Scheme.FP8)),
    ):
        loaded = weights.dummy(shape, dtype, CPU, quantization)
        own = functools.partial(fused_ops.fused_ops, own_attention=True)
        # What attention gives is rounded alike: two tokens are as many lanes as eight.
        several = (2, 8) if quantization is none else (8,)
        with torch.inference_mode():
            model = QwenModel(shape, loaded, 64, fused=own, kv=kv)
            state = DecodeState(model, model.static_cache(), 64, with_drafts=True)
            for tokens in (1, *several):
                about |= {"dtype": str(dtype), "quantization": quantization, "kv": kv}
                about |= {"tokens": tokens, "rows": 0}
                state.verify_masked(state.kind, tokens, 64)
            # Of rows the result is rounded as that of several tokens.
            for rows in (1, 8) if dtype is half and quantization is none else (8,):
                about |= {"tokens": 1, "rows": rows}
                steps_of_rows(model, rows)
            about |= {"tokens": 40, "rows": 1}
            model.prefill(model.prepare([ModelPrompt([1] * 40)]), model.static_cache())


if __name__ == "__main__":
    config = json.loads(sys.argv[1])
    if len(sys.argv) > 3:
        {"delta": delta_nets_for, "flash": flash_for}[sys.argv[3]](int(sys.argv[2]))
    elif len(sys.argv) > 2:
        many_rows_for(config, int(sys.argv[2]))
    else:
        main(config)
