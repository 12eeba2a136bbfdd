"""Finds out which kernels a model needs on a GPU and compiles them, without touching the GPU.

    python -m qwencli.engine.native.compile_kernels < job

A program of its own, so that a load does not wait for it and no other thread is in its way: it
imports once, and forks as many processes as there are cores. Takes a `CompileJob`; writes
the list of kernels when all are in the folder. Status 1 with a line on stderr where it cannot.
"""

from __future__ import annotations

import multiprocessing
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from qwencli.engine.kernels.launches import (
    Gpu,
    KernelLaunch,
    compile_for,
    compile_launch,
    settle_cache_keys,
)
from qwencli.engine.machine.host import usable_cores
from qwencli.engine.native.kernel_cache import CompileJob, use_folder, write_manifest
from qwencli.engine.native.kernel_plan import plan_kernels

MOST_PROCESSES = 32


def main() -> int:
    job: CompileJob = pickle.load(sys.stdin.buffer)  # what our own parent wrote
    use_folder(Path(job.folder))
    torch.set_num_threads(1)
    settle_cache_keys()
    launches = plan_kernels(job.planned, job.gpu)
    failed = compile_all(launches, job.gpu)
    if failed is not None:
        print(failed, file=sys.stderr)
        return 1
    write_manifest(Path(job.manifest), launches)
    return 0


def compile_all(launches: Sequence[KernelLaunch], gpu: Gpu) -> str | None:
    """Compile all of `launches` in as many processes as there are cores; returns what went wrong
    first, if anything did."""
    count = min(usable_cores(), MOST_PROCESSES, len(launches))
    # Nothing runs beside this process's one thread, so that a fork of it is whole.
    with multiprocessing.get_context("fork").Pool(count, compile_for, (gpu,)) as pool:
        found = pool.imap_unordered(_compiled, launches)
        return next((failure for failure in found if failure is not None), None)


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
