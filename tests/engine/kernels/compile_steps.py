"""Compiles the kernels of decode steps and prompts for compute capability 9.0; needs no GPU.

A program of its own, because Triton decides when it is imported whether it interprets. Prints a
JSON line a kernel: its name, the type it computes with, how weights and cache are quantized, tokens
of the step or prompt, rows of a pool of pages (0 = a cache of its own), the bytes that a thread
keeps in memory because its registers are full, how often threads hand each other operands of matrix
instructions, and, where programs count who is the last, how often they do so to join their results.
"""

from __future__ import annotations

import functools
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
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
from qwencli.engine.cache.paged_kv import DecodePages
from qwencli.engine.kernels import fused_ops
from qwencli.engine.loading import weights
from qwencli.engine.native.decode_state import DecodeState
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prompt_inputs import Prompt
from qwencli.engine.quant.quantized_tensor import Scheme
from qwencli.engine.runner import RowState
from qwencli.models.shape_reader import read_shape

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
# An H100 or H200: processors, launches that overlap, instructions for fp8.
HOPPER = fused_ops.Launch(132, True, True)
CPU = torch.device("cpu")
LOOP = re.compile(r"^(\$L__BB\w+):(.*?)\bbra(?:\.uni)?\s+\1;", re.MULTILINE | re.DOTALL)
PRODUCT = "mma.sync"
EXCHANGE = re.compile(r"\b(?:shfl|bar)\.sync|\.shared\b")


class Compiled:
    """Stands in for a kernel: compiles what would be launched."""

    def __init__(self, kernel: JITFunction[Any], about: dict[str, Any]) -> None:
        self._kernel, self._about = kernel, about
        self._seen: set[str] = set()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **settings: Any) -> None:
            if self._about["tokens"] == 2 and self._kernel.fn.__name__.startswith("gemm"):
                return  # the same instructions as for eight, of which fewer store
            compiled = self._kernel.warmup(*arguments, grid=grid, **settings)
            if compiled.hash not in self._seen:
                self._seen.add(compiled.hash)
                found = {
                    "kernel": self._kernel.fn.__name__,
                    "spilled": stack_of(compiled),
                    "exchanges": exchanges_of(compiled.asm["ptx"]),
                    "joining": joining_of(compiled.asm["ptx"]),
                }
                print(json.dumps(self._about | found))

        return launch


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


def pretend_a_gpu() -> None:
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device=None: 0,
        )
    )
    fused_ops.Launch.on = classmethod(lambda cls, device: HOPPER)  # type: ignore[method-assign,assignment]


def record(about: dict[str, Any]) -> None:
    """Put a stand-in wherever a module of ours launches a kernel."""
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        names = vars(importlib.import_module(module.name))
        for name, value in list(names.items()):
            if name.endswith("_kernel") and isinstance(value, JITFunction):
                names[name] = Compiled(value, about)


def main(config: dict[str, Any]) -> None:
    pretend_a_gpu()
    about: dict[str, Any] = {}
    record(about)
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
            cache = model.paged_cache(2)
            for rows in (1, 8) if dtype is half and quantization is none else (8,):
                about |= {"tokens": 1, "rows": rows}
                whole = [torch.zeros(rows, dtype=torch.int64) for _ in range(3)]
                pages = DecodePages(torch.ones(rows, 1, dtype=torch.int32), whole[0], 1)
                hidden = model.decode_rows(whole[1], whole[2], cache, pages)
                state_of_rows = RowState(rows, 1, len(model.decoder.embedding), 1, CPU)
                buffers = state_of_rows.buffers(rows)
                model.decoder.next_tokens(hidden, model.row_ops(rows), buffers, rows > 1)
            about |= {"tokens": 40, "rows": 1}
            model.prefill(model.prepare([Prompt([1] * 40)]), model.static_cache())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
