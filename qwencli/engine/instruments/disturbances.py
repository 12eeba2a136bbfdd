"""Things that slow an engine down on purpose, for the fault injector of `bench inject`.

Nothing here is used when answering; what needs torch stands here because only this layer imports
it. `python -m qwencli.engine.instruments.disturbances` is a second program on the GPU: it
multiplies matrices from a line "go" on its stdin until a line "stop", and ends when stdin closes.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, cast

_SOURCE = "def work(x):\n" + "".join(f"    x = x * {i}.5 + {i}\n" for i in range(1, 25))
_MIB = 1 << 20
_MATRIX = 8192
# Cycles of the kernel that tells how long one takes: some 20 ms.
_SPUN = 40_000_000

# Makes the device, or the host where that computes, do nothing for a while; returns at once on a
# GPU.
Wait = Callable[[], None]


def compile_for(seconds: float) -> None:
    """Compile functions that were never compiled before, one after the other."""
    import torch

    end = time.perf_counter() + seconds
    for number in itertools.count():
        scope: dict[str, Any] = {}
        # A code object of its own each time: torch compiles the same one only a few times.
        exec(compile(_SOURCE, f"<disturbance {number}>", "exec"), scope)
        work: Callable[[torch.Tensor], torch.Tensor] = torch.compile(
            scope["work"], backend="eager", dynamic=False
        )
        work(torch.ones(4))
        if time.perf_counter() >= end:
            return


def forget_compilations() -> None:
    """Drop what `compile_for` compiled: every compiled function of this process."""
    import torch

    torch.compiler.reset()


def churn_allocator(device: str, seconds: float, seed: int) -> None:
    """Take blocks of many sizes from the driver, free every other one, give all back."""
    import torch

    chance = random.Random(seed)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        blocks = [
            torch.empty(chance.randrange(2 * _MIB, 128 * _MIB), dtype=torch.uint8, device=device)
            for _ in range(24)
        ]
        del blocks[::2]
        torch.cuda.empty_cache()
        del blocks
        torch.cuda.empty_cache()


def capture_graphs(device: str, seconds: float) -> None:
    """Capture small CUDA graphs that nobody replays."""
    import torch

    end = time.perf_counter() + seconds
    with torch.cuda.device(device):
        x = torch.ones(64, device=device)
        while time.perf_counter() < end:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                x += 1


def synchronize(device: str) -> None:
    import torch

    torch.cuda.synchronize(device)


def waiting(device: str, seconds: float) -> Wait:
    """What takes the device so long, with the GPU's clock as it is now."""
    if not device.startswith("cuda"):
        return lambda: _spin(seconds)
    import torch

    place, cuda = torch.device(device), cast("Any", torch.cuda)
    with cuda.device(place):
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        # The first call loads the kernel, which would be taken for its time.
        cuda._sleep(1)
        start.record()
        cuda._sleep(_SPUN)
        end.record()
        end.synchronize()
    cycles = round(_SPUN * seconds / (start.elapsed_time(end) / 1e3))

    def wait() -> None:
        with cuda.device(place):
            cuda._sleep(cycles)

    return wait


def _spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _keep_gpu_busy(going: threading.Event) -> None:
    import torch

    a = torch.randn(_MATRIX, _MATRIX, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    torch.mm(a, a, out=b)
    torch.cuda.synchronize()
    print("ready", flush=True)
    while True:
        going.wait()
        for _ in range(4):
            torch.mm(a, a, out=b)
        torch.cuda.synchronize()


def main() -> int:
    going = threading.Event()
    threading.Thread(target=_keep_gpu_busy, args=(going,), daemon=True).start()
    commands = {"go": going.set, "stop": going.clear}
    for line in sys.stdin:
        commands[line.strip()]()
    return 0


if __name__ == "__main__":
    # Without the interpreter's own way out, which would stop a thread in the middle of a CUDA call.
    os._exit(main())
