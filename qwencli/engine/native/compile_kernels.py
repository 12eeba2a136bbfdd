"""Finds out which kernels a model needs on a GPU and compiles them, without touching the GPU.

    python -m qwencli.engine.native.compile_kernels < job

A process of its own, so that a load does not wait for it and no other thread is in its way, which
forks as many as there are cores. Takes a `CompileJob`; writes the list of kernels when all are in
the folder. Status 1 with a line on stderr where it cannot. A fork of the process that loads needs
no imports (`run_in_fork`).
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

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
    "flash_attention_kernel",
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


def run_in_fork(job: CompileJob, pipe: int) -> NoReturn:
    """Run a job in a process that was just forked, of which it touches neither GPU nor files: a
    point to `pipe` for each kernel, and behind them what went wrong; status 1 then."""
    failed: str | None = "interrupted"
    try:
        gc.disable()  # what is garbage here may be the other process's memory of the GPU
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        for file in [int(each.name) for each in Path("/proc/self/fd").iterdir()]:
            if file > 2 and file != pipe:
                with suppress(OSError):
                    os.close(file)
        failed = run(job, lambda: os.write(pipe, b"."))
    except Exception as error:  # noqa: BLE001 - whatever it is, kernels are compiled when launched
        failed = _line_of(error)
    finally:
        with suppress(OSError):
            os.write(pipe, (failed or "").encode())
        os._exit(0 if failed is None else 1)


def run(job: CompileJob, done: Callable[[], object] = lambda: None) -> str | None:
    """Compile what a job asks for; returns what went wrong, if anything did.

    Args:
        done: called behind the plan and each kernel.
    """
    use_folder(Path(job.folder))
    torch.set_num_threads(1)
    settle_cache_keys(Path(job.folder))
    try:
        with without_dynamo():
            launches = plan_kernels(job.planned, job.gpu)
    except AttributeError:  # another torch asks more of its compiler
        launches = plan_kernels(job.planned, job.gpu)
    done()
    failed = compile_all(launches, job.gpu, done)
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


def compile_all(
    launches: Sequence[KernelLaunch], gpu: Gpu, done: Callable[[], object] = lambda: None
) -> str | None:
    """Compile all of `launches` in as many processes as there are cores; returns what went wrong
    first, if anything did."""
    if not launches:
        return None
    count = min(usable_cores(), MOST_PROCESSES, len(launches))
    compile_for(gpu)
    # Nothing runs beside this process's one thread, so that a fork of it is whole.
    with multiprocessing.get_context("fork").Pool(count) as pool:
        for failure in pool.imap_unordered(_compiled, sorted(launches, key=_place)):
            if failure is not None:
                return failure
            done()
    return None


def _place(launch: KernelLaunch) -> tuple[int, int]:
    """Where a kernel comes among those that are compiled: longest first."""
    slow = SLOWEST.index(launch.kernel) if launch.kernel in SLOWEST else len(SLOWEST)
    tokens = dict(launch.arguments).get("TOKENS", 0)
    return slow, -tokens if isinstance(tokens, int) else 0


def _compiled(launch: KernelLaunch) -> str | None:
    """Compile one, and what launches it; what went wrong is a line."""
    try:
        compiled = compile_launch(launch)
    except Exception as error:  # noqa: BLE001 - whatever it is, kernels are compiled when launched
        return f"{launch.kernel}: {_line_of(error)}"
    # Before 3.9 Triton has a C compiler build a launcher for each signature, and keeps that too;
    # later ones ask a driver, which this process does not have, for the one that they all share.
    with suppress(Exception):
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(compiled.src, compiled.metadata)
    return None


def _line_of(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


if __name__ == "__main__":
    sys.exit(main())
