"""What the nodes ask of the ComfyUI that they run in: its interrupt flag, progress bar and memory.

Everything is found in modules that ComfyUI has loaded already, never imported. Where they are not
there, or lack a name, nothing happens: nodes also run in tests and in scripts.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

_HOOKED = "_qwencli_gives_back"
_hooking = threading.Lock()


def _management() -> Any:
    return sys.modules.get("comfy.model_management")


def _call(name: str, *values: object) -> Any:
    """What a function of `comfy.model_management` returns; None where there is none."""
    function = getattr(_management(), name, None)
    return None if function is None else function(*values)


def check_interrupted() -> None:
    """Raise ComfyUI's InterruptProcessingException where the user has asked for a stop."""
    _call("throw_exception_if_processing_interrupted")


def is_interruption(error: BaseException) -> bool:
    kind = getattr(_management(), "InterruptProcessingException", None)
    return kind is not None and isinstance(error, kind)


def free_models() -> None:
    """Have ComfyUI take its own models off the GPU, and give the memory back."""
    _call("unload_all_models")
    _call("soft_empty_cache")


def empty_cache() -> None:
    """Have ComfyUI give memory back that it holds and does not use."""
    _call("soft_empty_cache")


def model_bytes() -> int | None:
    """What a model may take on ComfyUI's device, which gives all of it up when asked to."""
    device = _call("get_torch_device")
    total = None if device is None else _call("get_total_memory", device)
    if total is None:
        return None
    # On a CPU weights become float32, twice what the estimates for a GPU count; a GPU holds what
    # drivers and the desktop need.
    return int(total) // 2 if str(device).startswith("cpu") else int(total) * 9 // 10


def progress(total: int) -> Callable[[int], None]:
    """The bar of the node that runs now; call what is returned with how many of `total` are done.

    ComfyUI raises its InterruptProcessingException from it too.
    """
    bar = getattr(sys.modules.get("comfy.utils"), "ProgressBar", None)
    if bar is None:
        return lambda done: None
    update: Callable[[int], None] = bar(total).update_absolute
    return update


def when_memory_is_wanted(*give_back: Callable[[str], None]) -> None:
    """Call each of `give_back` with a device for as long as ComfyUI needs more memory there than is
    free; the device is "" where it wants that of all.

    ComfyUI has no registry for that. Loading a model and its button "unload models" both go through
    `model_management.free_memory(memory_required, device, ...)`, so that is wrapped, once. Its own
    models go first: they wait in host memory and come back sooner than ours would.
    """
    management = _management()
    with _hooking:
        original = getattr(management, "free_memory", None)
        if original is None or hasattr(original, _HOOKED):
            return

        @functools.wraps(original)
        def free_memory(memory_required: float, device: Any, *rest: Any, **named: Any) -> Any:
            unloaded = original(memory_required, device, *rest, **named)
            for each in give_back:
                free = _call("get_free_memory", device)
                if free is not None and free >= memory_required:
                    break
                each("" if device is None else str(device))
            return unloaded

        setattr(free_memory, _HOOKED, True)
        management.free_memory = free_memory
