"""Device memory: given back, run out of, filled lazily, and written from the host.

Running out of it is recognised in torch's many words for that. `upload` sends small tensors
together: a copy of ordinary memory waits until the device has done all that was given to it before,
for a prompt that is its pictures' encoding, during which the host could launch the decoder.
"""

from __future__ import annotations

import math
import mmap
import sys
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from qwencli.errors import OutOfMemoryError

if TYPE_CHECKING:
    import torch

# What torch gives a tensor of a GPU is a multiple of this.
_BLOCK_BYTES = 512
# torch reports host exhaustion as a plain RuntimeError; these are the phrases it uses.
_HOST_PHRASES = ("can't allocate memory", "not enough memory", "DefaultCPUAllocator", "bad alloc")

# CUDA graphs that are alive. What they captured of cuBLAS goes on writing to the workspace that it
# had then, wherever that memory has gone since.
captured_graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()


def release(device: str) -> None:
    """Return free memory of this process to the device; callers drop their references first."""
    import gc

    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        # cuBLAS holds a workspace for every stream it has seen, outside what empty_cache returns.
        if not captured_graphs:
            torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
    elif device == "mps":
        torch.mps.empty_cache()


def reserve(device: torch.device, sizes: Iterable[int]) -> None:
    """Have a GPU's memory for tensors of so many bytes in one piece, which torch then cuts up: each
    piece that it asks the device for takes half a millisecond, and there are hundreds."""
    import torch

    if device.type == "cuda":
        each = _BLOCK_BYTES
        with suppress(torch.OutOfMemoryError):  # said when the tensors find no room
            torch.empty(
                sum(-(-size // each) * each for size in sizes), dtype=torch.uint8, device=device
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of a device or of the host ran out, however torch says it."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in text.lower() or any(phrase in text for phrase in _HOST_PHRASES)
    )


def is_device_lost(error: BaseException) -> bool:
    """Whether nothing runs on the device any more."""
    import torch

    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def out_of_memory_error(
    device: str, doing: str, error: BaseException, *, num_image_tokens: int = 0
) -> OutOfMemoryError:
    """One line with the figures, and the settings that would help most first."""
    if num_image_tokens:
        hint = (
            "lower --max-pixels, send fewer images, lower --max-new-tokens, or --quantization 4bit"
        )
    else:
        hint = (
            "use --quantization 8bit or 4bit, a smaller model, or close other programs on the GPU"
        )
    return OutOfMemoryError(f"out of memory on {device} while {doing}{_figures(device)}", hint)


def _figures(device: str) -> str:
    if not device.startswith("cuda"):
        return ""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device)
    gib = 2**30
    return (
        f" ({free / gib:.1f} GiB free of {total / gib:.1f}, {ours / gib:.1f} held by this process)"
    )


def lazy_zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros of a size that few requests use up.

    On the CPU torch.zeros writes every page; this asks the system for pages that are zero already
    and become resident one by one. Huge pages are declined: a cache whose heads lie 4 MB apart
    would make 2 MB resident for the first token of each head. numpy asks for them.
    """
    import torch

    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    pages = mmap.mmap(-1, max(1, math.prod(size)) * dtype.itemsize)
    if sys.platform == "linux":
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=math.prod(size)).view(size)


def upload(tensors: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Tensors of one type on the host -> the same on `device`, there in one copy."""
    import torch

    if device.type != "cuda" or not tensors:
        return tuple(tensor.to(device) for tensor in tensors)
    sizes = [tensor.numel() for tensor in tensors]
    # torch keeps pinned memory until the copies from it are done.
    pinned = torch.empty(sum(sizes), dtype=tensors[0].dtype, pin_memory=True)
    torch.cat([tensor.flatten() for tensor in tensors], out=pinned)
    sent = pinned.to(device, non_blocking=True).split_with_sizes(sizes)
    return tuple(part.view(tensor.shape) for part, tensor in zip(sent, tensors, strict=True))
