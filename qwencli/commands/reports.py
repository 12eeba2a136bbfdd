"""How one answer is written down: the JSON record and the statistics line."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from qwencli.errors import QwenCliError
from qwencli.results import GenerationResult, Speculation

# How to have more of a file shown than its first picture.
_SHOW_MORE = {
    "frames": "--frames N shows N of them",
    "pages": "--frames N takes animations, no pages: make a file of each",
}
# Files named in one notice.
_MOST_NAMES = 3
T = TypeVar("T")


def caption_record(result: GenerationResult, images: list[str], model: str) -> dict[str, Any]:
    """The object of `caption --json`.

    `image` and its sizes ([width, height], as it came and as the model saw it) are lists only when
    several went into one request, and null when none did.
    """
    # In a chat the request has the pictures of earlier turns too.
    sizes = [list(size) for size in result.image_sizes[-len(images) :]] if images else []
    resized = [list(size) for size in result.resized_sizes[-len(images) :]] if images else []
    return {
        "image": _one_or_all(images),
        "image_size": _one_or_all(sizes),
        "resized_size": _one_or_all(resized),
        "caption": result.text,
        "thoughts": result.thoughts,
        "num_thinking_tokens": result.num_thinking_tokens,
        "model": model,
        "engine": result.effective.engine,
        "quantization": result.effective.quantization,
        "attention": result.effective.attention,
        "cache": result.effective.cache,
        "kernels": result.effective.kernels,
        "kv_dtype": result.effective.kv_dtype,
        "device": result.effective.device,
        "dtype": result.effective.dtype,
        "num_prompt_tokens": result.num_prompt_tokens,
        "num_image_tokens": result.num_image_tokens,
        "num_cached_tokens": result.num_cached_tokens,
        "num_new_tokens": result.num_new_tokens,
        "finish_reason": result.finish_reason,
        "timings": asdict(result.timings),
        "speculate": result.effective.speculate,
        "speculation": speculation_record(result.speculation),
    }


def failure_record(error: QwenCliError, images: list[str], model: str) -> dict[str, Any]:
    """The object of `caption --json` for what could not be captioned."""
    return {
        "image": _one_or_all(images),
        "caption": None,
        "error": error.message,
        "hint": error.hint,
        "model": model,
    }


def _one_or_all(values: list[T]) -> T | list[T] | None:
    return values if len(values) > 1 else values[0] if values else None


def unshown(names: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for each kind of what files hold (`ImagePart.first_of`), of which the first is shown.

    Args:
        names: the files, by kind.
    """
    return [
        f"note: {', '.join(files[:_MOST_NAMES])}"
        + (f" and {len(files) - _MOST_NAMES} more" if len(files) > _MOST_NAMES else "")
        + f": of several {kind} the first is shown ({_SHOW_MORE[kind]})"
        for kind, files in names.items()
    ]


def speculation_record(speculation: Speculation | None) -> dict[str, Any] | None:
    """The object `speculation` of `--json`; None where nothing was drafted."""
    if speculation is None:
        return None
    return {**asdict(speculation), "accept_percent": speculation.accept_percent}


class ProcessTimes:
    """Where the time of a whole process went, from its start to its first answer."""

    def __init__(self) -> None:
        import psutil

        self._began = self._latest = psutil.Process().create_time()
        self._parts: list[str] = []

    def mark(self, what: str) -> None:
        """The time since the last mark was for this."""
        now = time.time()
        self._parts.append(f"{what} {max(now - self._latest, 0.0):.2f} s")
        self._latest = now

    def line(self) -> str:
        whole = f"{max(self._latest - self._began, 0.0):.2f} s"
        return f"process: {', '.join(self._parts)}; first answer after {whole}"
