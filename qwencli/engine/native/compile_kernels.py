"""Finds out which kernels a model needs on a GPU and compiles them, without touching the GPU.

    python -m qwencli.engine.native.compile_kernels < job

A process of its own, so that a load does not wait for it and no other thread is in its way, which
forks as many as there are cores. Takes a `CompileJob`; writes the list of kernels when all are in
the folder. Status 1 with a line on stderr where it cannot.
"""

from __future__ import annotations

import multiprocessing
import pickle
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from qwencli.engine.kernels.launches import (
    Gpu,
    KernelLaunch,
    compile_for,
    compile_launch,
)
from qwencli.engine.machine.host import usable_cores
from qwencli.engine.native.kernel_cache import (
    CompileJob,
    settle_cache_keys,
    use_folder,
    write_manifest,
)
from qwencli.engine.native.kernel_plan import plan_kernels

MOST_PROCESSES = 32
# Kernels that take longest to compile, the longest first: while they are compiled, others are.
SLOWEST = (
    "decode_attention_kernel",
    "delta_step_kernel",
    "tiled_gemm_kernel",
    "gemm_quantized_kernel",
    "gemv_quantized_kernel",
    "gemm_float16_kernel",
)
_DYNAMO = "torch._dynamo"


def main() -> int:
    job: CompileJob = pickle.load(sys.stdin.buffer)  # what our own parent wrote
    failed = run(job)
    if failed is not None:
        print(failed, file=sys.stderr)
    return 0 if failed is None else 1


def run(job: CompileJob) -> str | None:
    """Compile what a job asks for; returns what went wrong, if anything did."""
    use_folder(Path(job.folder))
    torch.set_num_threads(1)
    settle_cache_keys(Path(job.folder))
    try:
        with without_dynamo():
            launches = plan_kernels(job.planned, job.gpu)
    except AttributeError:  # another torch asks more of its compiler
        launches = plan_kernels(job.planned, job.gpu)
    failed = compile_all(launches, job.gpu)
    if failed is None:
        write_manifest(Path(job.manifest), launches)
    return failed


@contextmanager
def without_dynamo() -> Iterator[None]:
    """Spare the import of torch's compiler, two seconds. Operators over tensors without values ask
    it for one function alone, that keeps it from looking into them."""
    if _DYNAMO in sys.modules:
        yield
        return
    sys.modules[_DYNAMO] = stand_in = _Dynamo(_DYNAMO)
    try:
        yield
    finally:
        if sys.modules.get(_DYNAMO) is stand_in:
            del sys.modules[_DYNAMO]


class _Dynamo(ModuleType):
    """Does what `without_dynamo` says; whoever wants more gets the module itself."""

    @staticmethod
    def disable(function: Any, *how: Any, **more: Any) -> Any:
        return function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        sys.modules.pop(_DYNAMO, None)
        import torch._dynamo

        return getattr(torch._dynamo, name)


def compile_all(launches: Sequence[KernelLaunch], gpu: Gpu) -> str | None:
    """Compile all of `launches` in as many processes as there are cores; returns what went wrong
    first, if anything did."""
    slowest_first = sorted(launches, key=_place)
    count = min(usable_cores(), MOST_PROCESSES, len(launches))
    compile_for(gpu)
    # What Triton imports for its first kernel, and asks the assembler, is then in all processes.
    failed = _compiled(slowest_first.pop())
    if failed is not None or not slowest_first:
        return failed
    # Nothing runs beside this process's one thread, so that a fork of it is whole.
    with multiprocessing.get_context("fork").Pool(count) as pool:
        found = pool.imap_unordered(_compiled, slowest_first)
        return next((failure for failure in found if failure is not None), None)


def _place(launch: KernelLaunch) -> tuple[int, int]:
    """Where a kernel comes among those that are compiled: longest first."""
    slow = SLOWEST.index(launch.kernel) if launch.kernel in SLOWEST else len(SLOWEST)
    tokens = dict(launch.arguments).get("TOKENS", 0)
    return slow, -tokens if isinstance(tokens, int) else 0


def _compiled(launch: KernelLaunch) -> str | None:
    """Compile one; what went wrong is a line."""
    try:
        compile_launch(launch)
    except Exception as error:  # noqa: BLE001 - whatever it is, kernels are compiled when launched
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"{launch.kernel}: {lines[-1]}"
    return None


if __name__ == "__main__":
    sys.exit(main())
