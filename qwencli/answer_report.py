"""How one answer is told: its JSON record, its line of statistics, and what is missing of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from qwencli.errors import QwenCliError
from qwencli.output import counted
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


def shortfall(result: GenerationResult) -> str | None:
    """What is missing of an answer and how to get it; None where it is whole."""
    if result.finish_reason == "length":
        thinking = result.thoughts is not None and not result.text
        what = "thinking took all" if thinking else "the answer is cut off after"
        return f"{what} {counted(result.num_new_tokens, 'new token')} (raise --max-new-tokens)"
    if result.thoughts is not None and not result.text:
        return "the model thought and gave no answer (try another prompt)"
    return None


def stats_line(result: GenerationResult) -> str:
    """One line: tokens, speed, phases, and the modes that ran; what is not known is left out."""
    t, ran = result.timings, result.effective
    kv = None if ran.kv_dtype == ran.dtype else ran.kv_dtype and f"{ran.kv_dtype} keys and values"
    speed = "" if t.decode_tok_per_s is None else f" at {t.decode_tok_per_s:.1f} tok/s"
    cut = " (cut off)" if result.finish_reason == "length" else ""
    cached = f"{result.num_cached_tokens} cached" if result.num_cached_tokens else None
    images = result.num_image_tokens
    prompt = _listed(None if images is None else f"{images} of images", cached)
    phases = _listed(
        None if t.load_s is None else f"load {t.load_s:.2f} s",
        _ms("preprocess", t.preprocess_s),
        _ms("vision", t.vision_encode_s),
        _ms("prefill", t.prefill_s),
        _ms("TTFT", t.ttft_s),
    )
    modes = _listed(ran.engine, ran.quantization, ran.attention, ran.cache, ran.kernels, kv)
    dtype = f", {ran.dtype}" if ran.dtype else ""
    tokens = "-" if result.num_prompt_tokens is None else result.num_prompt_tokens
    return (
        f"{counted(result.num_new_tokens, 'token')}{cut}{speed} | prompt {tokens}"
        + (f" ({prompt})" if prompt else "")
        + f" | {phases} | {modes}{dtype} on {ran.device}{_speculation(result)}"
    )


def _listed(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part is not None)


def _speculation(result: GenerationResult) -> str:
    found = result.speculation
    if found is None:
        return ""
    gain = "" if found.net_gain is None else f", gain {found.net_gain:.2f}"
    return f" | {found.num_accepted} of {found.num_drafted} drafts accepted{gain}"


def _ms(phase: str, seconds: float | None) -> str | None:
    return None if seconds is None else f"{phase} {seconds * 1e3:.0f} ms"
