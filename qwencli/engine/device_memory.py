"""Gives device memory back, and recognises running out of it in torch's many words for that."""

from __future__ import annotations

from qwencli.errors import OutOfMemoryError

# torch reports host exhaustion as a plain RuntimeError; these are the phrases it uses.
_HOST_PHRASES = ("can't allocate memory", "not enough memory", "DefaultCPUAllocator", "bad alloc")


def release(device: str) -> None:
    """Return free memory of this process to the device; callers drop their references first."""
    import gc

    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        # cuBLAS holds a workspace for every stream it has seen, outside what empty_cache returns.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
    elif device == "mps":
        torch.mps.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in text.lower() or any(phrase in text for phrase in _HOST_PHRASES)
    )


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
