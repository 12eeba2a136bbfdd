"""What `bench study` does to a loaded engine: one factor at a time, on, measured, off again.

Nothing here is used when answering; what needs torch stands here because only this layer imports
it. Each function is a context manager that leaves the process as it found it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from qwencli.engine.protocol import Engine
from qwencli.messages import GenerationRequest, ImagePart

if TYPE_CHECKING:
    from qwencli.engine.base_engine import BaseEngine
    from qwencli.engine.hf.engine import TransformersEngine

GIB = 1 << 30
_MIB = 1 << 20
# More than the 1 GB between reserved and allocated memory that is blamed for slow tokens.
GAP_BYTES = 4 * GIB
# The allocator cuts pieces of this size out of blocks of 20 MiB.
_PIECE_BYTES, _PIECES = 4 * _MIB, 256
_MATRIX, _MATMULS, _HEADS, _HEAD_DIM = 4096, 20, 16, 128
SDPA_OPERATOR = "aten::_scaled_dot_product_"
_MATH = "attention_math"
WATCHED_PASSES = 3


@contextmanager
def changed(engine: Engine, **overrides: Any) -> Iterator[None]:
    """The transformers engine with these `Overrides`; see `engine.hf.generate`."""
    from qwencli.engine.hf.generate import NO_OVERRIDES, Overrides

    reference = cast("TransformersEngine", engine)
    reference.overrides = Overrides(**overrides)
    try:
        yield
    finally:
        reference.overrides = NO_OVERRIDES


@contextmanager
def sdpa_backend(name: str) -> Iterator[None]:
    """Allow one backend of `scaled_dot_product_attention` alone, by its name in SDPBackend."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, name)):
        yield


@contextmanager
def counted_sdpa_calls(engine: Engine) -> Iterator[Counter[str]]:
    """Counts which backend's operator ran, as torch's profiler saw it; filled at the end.

    It sees the first WATCHED_PASSES passes, prompt included: the profiler keeps every operator.
    """
    from torch.profiler import ProfilerActivity, profile

    calls: Counter[str] = Counter()
    # Newer versions warn of events that are dropped without acc_events.
    profiler = profile(activities=[ProfilerActivity.CPU], acc_events=True)
    passes = 0

    def after(module: Any, inputs: Any, output: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == WATCHED_PASSES:
            profiler.stop()

    profiler.start()
    with _hooked(engine, None, after):
        yield calls
    assert passes >= WATCHED_PASSES, "every run of a study has more tokens"
    for event in profiler.key_averages():
        if event.key.startswith(SDPA_OPERATOR):
            calls[event.key.removeprefix(SDPA_OPERATOR)] += event.count


def math_percent(calls: Mapping[str, int]) -> float | None:
    """Share of the calls that the math backend took; None for none."""
    total = sum(calls.values())
    return 100 * sum(n for name, n in calls.items() if _MATH in name) / total if total else None


def empty_cache(device: str) -> None:
    """Give the caching allocator's free blocks back to the driver."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


@contextmanager
def reserved_gap(device: str) -> Iterator[None]:
    """The allocator holds GAP_BYTES in one free block."""
    import torch

    block = torch.empty(GAP_BYTES, dtype=torch.uint8, device=device)
    del block
    try:
        yield
    finally:
        empty_cache(device)


@contextmanager
def fragmented(device: str) -> Iterator[None]:
    """The allocator holds large blocks of which every other piece is in use."""
    import torch

    pieces = [torch.empty(_PIECE_BYTES, dtype=torch.uint8, device=device) for _ in range(_PIECES)]
    del pieces[::2]
    try:
        yield
    finally:
        del pieces
        empty_cache(device)


def warm_up_with_matmul(device: str) -> None:
    """Large matrix products and attention calls, as node packs do to wake a GPU."""
    import torch

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    size = _MATRIX if device.startswith("cuda") else _MATRIX // 8
    a = torch.randn(size, size, device=device, dtype=dtype)
    q = torch.randn(1, _HEADS, size // 4, _HEAD_DIM, device=device, dtype=dtype)
    for _ in range(_MATMULS):
        a @ a
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    empty_cache(device)


def warm_up_with_answer(engine: Engine, request: GenerationRequest) -> None:
    """The request itself, once, its answer thrown away."""
    engine.generate(request)


@contextmanager
def linear_patch_embedding(engine: Engine) -> Iterator[None]:
    """The vision tower cuts its patches by a matrix product in place of a 3D convolution.

    Equal arithmetic: the kernel is as large as its stride, so each patch is one row of a product.
    """
    import torch

    embedding = cast("TransformersEngine", engine).model.model.visual.patch_embed
    convolution = embedding.proj
    weight = convolution.weight.reshape(convolution.out_channels, -1)

    def forward(patches: torch.Tensor) -> torch.Tensor:
        rows = patches.view(-1, weight.shape[1]).to(weight.dtype)
        return torch.nn.functional.linear(rows, weight, convolution.bias)

    embedding.forward = forward
    try:
        yield
    finally:
        del embedding.forward  # the class's own is there again


@contextmanager
def timed_first_forward(engine: Engine) -> Iterator[list[float]]:
    """When the model's first pass began and came back on the host, which waits for no device.

    Both on `time.perf_counter`; [] until it has.
    """
    times: list[float] = []

    def before(module: Any, inputs: Any) -> None:
        if not times:
            times.append(time.perf_counter())

    def after(module: Any, inputs: Any, output: Any) -> None:
        if len(times) == 1:
            times.append(time.perf_counter())

    with _hooked(engine, before, after):
        yield times


@contextmanager
def _hooked(engine: Engine, before: Any, after: Any) -> Iterator[None]:
    """Call them (None: nothing) around each pass of the transformers model."""
    model = cast("TransformersEngine", engine).model
    handles = [model.register_forward_hook(after)]
    if before is not None:
        handles.append(model.register_forward_pre_hook(before))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def slow_processor_s(engine: Engine, request: GenerationRequest) -> float | None:
    """Seconds that transformers' image processor without torchvision takes for the request.

    None for a request without pictures. The second of two calls: the first one imports.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    config = cast("BaseEngine", engine).files.prompts.processor
    parts = [part for message in request.messages for part in message.parts]
    pictures = [part.image for part in parts if isinstance(part, ImagePart)]
    if config is None or not pictures:
        return None
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
        patch_size=config.patch_size,
        merge_size=config.merge_size,
        temporal_patch_size=config.temporal_patch_size,
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
    )
    processor(pictures, return_tensors="pt")
    started = time.perf_counter()
    processor(pictures, return_tensors="pt")
    return time.perf_counter() - started
