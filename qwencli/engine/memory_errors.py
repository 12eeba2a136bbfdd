"""Recognises running out of memory in torch's many words for it, and says what to change."""

from __future__ import annotations

from qwencli.errors import OutOfMemoryError

# torch reports host exhaustion as a plain RuntimeError; these are the phrases it uses.
_HOST_PHRASES = ("can't allocate memory", "not enough memory", "DefaultCPUAllocator", "bad alloc")


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
