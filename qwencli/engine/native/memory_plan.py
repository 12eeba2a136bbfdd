"""Decides before a load what fits: how long sequences may be, or that nothing does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwencli.config import DType, Quantization
from qwencli.errors import OutOfMemoryError
from qwencli.models.memory import (
    RUNTIME_BYTES,
    kv_cache_bytes,
    prefill_peak_bytes,
    vision_peak_bytes,
    weight_bytes,
)
from qwencli.models.shape_reader import read_shape
from qwencli.models.shapes import ModelShape

# What `--max-seq-len` is when nobody says: long chats with pictures, at a few GB of cache at most.
DEFAULT_MAX_SEQ_LEN = 16384
SMALLEST_MAX_SEQ_LEN = 1024
# Text around the picture of a planned prompt.
PROMPT_TOKENS = 1024
# The largest picture we plan for unless --max-pixels says otherwise.
PLANNED_PIXELS = 1024 * 1024


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by use, and the sequence length they allow."""

    weights: int
    kv_cache: int
    activations: int
    max_seq_len: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations + RUNTIME_BYTES


def plan_memory(
    hub_config: Mapping[str, Any],
    name: str,
    *,
    dtype: DType,
    model_limit: int,
    wanted: int | None,
    free_bytes: int | None,
    max_pixels: int | None = None,
) -> MemoryPlan:
    """The longest sequences up to `wanted` (None = our default) that fit beside the weights.

    Args:
        model_limit: tokens the model was made for.
        free_bytes: free memory of the device; None = not known, everything fits.
        max_pixels: of the largest picture; None = a megapixel.

    Raises:
        OutOfMemoryError: the weights, or `wanted` tokens beside them, do not fit; with the
            figures and the nearest settings that do.
    """
    shape = read_shape(hub_config, name)
    scale = 2 if dtype is DType.FLOAT32 else 1
    weights = weight_bytes(shape) * scale
    target = min(model_limit, wanted or DEFAULT_MAX_SEQ_LEN)

    image_tokens = _image_tokens(shape, max_pixels or PLANNED_PIXELS)

    def plan(tokens: int) -> MemoryPlan:
        peak = max(
            vision_peak_bytes(shape, image_tokens),
            prefill_peak_bytes(shape, min(tokens, PROMPT_TOKENS + image_tokens)),
        )
        return MemoryPlan(
            weights, kv_cache_bytes(shape, tokens) * scale, peak * scale, max_seq_len=tokens
        )

    if free_bytes is None or plan(target).total <= free_bytes:
        return plan(target)
    longest = _longest(shape, plan(target).total - plan(target).kv_cache, free_bytes, scale)
    smallest = min(target, SMALLEST_MAX_SEQ_LEN)
    if wanted is None and longest >= smallest:
        return plan(longest)
    raise _does_not_fit(shape, name, plan(wanted or smallest), free_bytes, longest)


def _image_tokens(shape: ModelShape, pixels: int) -> int:
    if shape.vision is None:
        return 0
    return -(-pixels // (shape.vision.patch_size * shape.vision.merge_size) ** 2)


def _longest(shape: ModelShape, fixed: int, free_bytes: int, scale: int) -> int:
    """Most tokens whose keys and values fit beside `fixed`, in steps of 256."""
    return max(0, (free_bytes - fixed) // (kv_cache_bytes(shape, 256) * scale) * 256)


def _does_not_fit(
    shape: ModelShape, name: str, plan: MemoryPlan, free_bytes: int, longest: int
) -> OutOfMemoryError:
    working = plan.activations + RUNTIME_BYTES
    message = (
        f"{name} needs {_gib(plan.total)} GiB (weights {_gib(plan.weights)}, cache for "
        f"{plan.max_seq_len} tokens {_gib(plan.kv_cache)}, working memory {_gib(working)}), and "
        f"{_gib(free_bytes)} GiB are free"
    )
    if longest >= SMALLEST_MAX_SEQ_LEN:
        return OutOfMemoryError(message, f"--max-seq-len {longest} fits")
    others = plan.total - plan.weights
    for quantization in (Quantization.INT8, Quantization.INT4):
        if weight_bytes(shape, quantization) + others <= free_bytes:
            return OutOfMemoryError(
                message, f"--engine transformers --quantization {quantization} fits"
            )
    return OutOfMemoryError(message, "use a smaller model, or free memory on the device")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
