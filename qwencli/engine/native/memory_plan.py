"""Decides before a load what fits: how long sequences may be, or that nothing does."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qwencli.config import DType, KVDType, Quantization, SeqLen
from qwencli.engine.cache.prefix_cache import VISION_CACHE_BYTES
from qwencli.engine.layers.vision_tower import PATCHES_KEPT, PIECE, UNDIVIDED
from qwencli.engine.native.model import longest_chunk
from qwencli.engine.spec_decode.ngram import MAX_VERIFY_TOKENS
from qwencli.errors import OutOfMemoryError
from qwencli.models.memory import (
    RUNTIME_BYTES,
    dequantize_bytes,
    image_feature_bytes,
    native_kv_bytes,
    native_weight_bytes,
    prefill_peak_bytes,
    vision_in_pieces_bytes,
    vision_peak_bytes,
)
from qwencli.models.shape_reader import read_shape
from qwencli.models.shapes import ModelShape

# What `--max-seq-len` is when nobody says: long chats with pictures, at a few GB of cache at most.
DEFAULT_MAX_SEQ_LEN = 16384
SMALLEST_MAX_SEQ_LEN = 1024
# Text around the picture of a planned prompt, and its answer.
TEXT_TOKENS = 256
# The largest picture that lengths are shortened for, unless --max-pixels says otherwise.
PLANNED_PIXELS = 1024 * 1024
# States of beginnings that are kept for others to go on from, where the model keeps states.
STATES_KEPT = 8


@dataclass(frozen=True)
class GraphSizes:
    """Tokens of the longest prompt, and patches of the largest picture, that are graphs."""

    tokens: int
    patches: int


# A picture that is encoded whole and the text around it. The kernels of 1,039 tokens and their
# 4,096 patches take an H200 21 ms with a 4B model, and its host 28 to launch one by one.
SIZES = GraphSizes(tokens=2304, patches=UNDIVIDED)
# The same where memory is short: 270 MB less of a 4B model.
SMALL_SIZES = GraphSizes(tokens=1024, patches=2048)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by use, and the sequence length they allow.

    `kept_images` are features of earlier pictures and layouts of their sizes that a session holds
    on to, `graphs` what CUDA graphs of prompts and pictures work in, which is theirs alone.
    `max_image_tokens` is what the largest picture may have for all this to be enough, and
    `graph_sizes` what graphs there may be.
    """

    weights: int
    kv_cache: int
    activations: int
    kept_images: int
    graphs: int
    max_seq_len: int
    max_image_tokens: int
    graph_sizes: GraphSizes

    @property
    def parts(self) -> dict[str, int]:
        return {
            "weights": self.weights,
            f"cache for {self.max_seq_len} tokens": self.kv_cache,
            "kept images": self.kept_images,
            "working memory": self.activations + self.graphs + RUNTIME_BYTES,
        }

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def plan_memory(
    hub_config: Mapping[str, Any],
    name: str,
    *,
    dtype: DType,
    model_limit: int,
    wanted: SeqLen | None,
    free_bytes: int | None,
    max_pixels: int | None = None,
    own_pixels: int = PLANNED_PIXELS,
    quantization: Quantization = Quantization.NONE,
    kv_dtype: KVDType = KVDType.AUTO,
    checkpoint_weights: int | None = None,
    prompt_graphs: bool = False,
    drafting: bool = False,
    draft_head: bool = False,
) -> MemoryPlan:
    """The longest sequences up to `wanted` that fit beside the weights, with pictures as large as
    them.

    Args:
        model_limit: tokens the model was made for.
        wanted: None = our default; "auto" = the model's limit, or what fits of it.
        free_bytes: free memory of the device; None = not known, everything fits.
        max_pixels: of the largest picture, kept as it is; None = up to `own_pixels`, what the
            model takes, and less where that does not fit.
        checkpoint_weights: bytes of the weights where the checkpoint is quantized already.
        prompt_graphs: whether prompts and pictures run as CUDA graphs.
        drafting: whether steps may check drafted tokens.
        draft_head: whether the model's own head drafts them.

    Raises:
        OutOfMemoryError: the weights, or `wanted` tokens beside them, do not fit; with the
            figures and the nearest settings that do.
    """
    shape = read_shape(hub_config, name)
    shape = shape.with_draft_head() if draft_head else shape
    scale = 2 if dtype is DType.FLOAT32 else 1
    weights = checkpoint_weights
    if weights is None:
        weights = native_weight_bytes(shape, quantization, 2 * scale)
    longest_wanted = model_limit if wanted == "auto" else wanted or DEFAULT_MAX_SEQ_LEN
    target = min(model_limit, longest_wanted)
    quantized = quantization is not Quantization.NONE or checkpoint_weights is not None
    dequantize = dequantize_bytes(shape) if quantized else 0

    most_images = image_tokens(shape, max_pixels or own_pixels)
    # A length that was asked for is not shortened for pictures, down to this size.
    least_images = min(most_images, image_tokens(shape, max_pixels or PLANNED_PIXELS))
    quantized_kv = kv_dtype is not KVDType.AUTO
    token_bytes = native_kv_bytes(shape, quantized_kv, 2 * scale)
    # Of one row, and those that every pool has beside it.
    each, updates = state_bytes(shape, 2 * scale, drafting)
    least_states = (2 + STATES_KEPT) * each + updates + head_input_bytes(shape, 1, 2 * scale)
    # Prompts read one layer of a quantized cache back.
    if quantized_kv:
        layers = len(shape.text.kv_layers)
        token_bytes += -(-shape.text.kv_bytes_per_token(2 * scale) // layers)

    def images_beside(tokens: int) -> int:
        """Tokens of the largest picture in sequences of so many."""
        if max_pixels is not None or shape.vision is None:
            return most_images
        return min(most_images, tokens - min(TEXT_TOKENS, tokens // 2))

    sizes = SIZES

    def plan(tokens: int, images: int) -> MemoryPlan:
        peak = max(
            vision_bytes(shape, images),
            prefill_peak_bytes(shape, min(tokens, longest_chunk())) + dequantize,
        )
        return MemoryPlan(
            weights=weights,
            kv_cache=token_bytes * tokens + least_states,
            activations=(peak + image_feature_bytes(shape, images)) * scale,
            kept_images=_kept_image_bytes(shape, images, scale),
            graphs=_graph_bytes(shape, sizes, tokens, dequantize) * scale if prompt_graphs else 0,
            max_seq_len=tokens,
            max_image_tokens=images,
            graph_sizes=sizes,
        )

    whole = plan(target, images_beside(target))
    if free_bytes is None or whole.total <= free_bytes:
        return whole
    sizes = SMALL_SIZES
    if isinstance(wanted, int):
        least = min(least_images, whole.max_image_tokens)
        fitting = [plan(target, images) for images in range(whole.max_image_tokens, least - 1, -64)]
        found = next((each for each in fitting if each.total <= free_bytes), None)
        if found is not None:
            return found

    def longest_with(images: Callable[[int], int]) -> int:
        steps = range(target // 256)  # of 256 tokens
        return (
            256
            * bisect_right(
                steps, free_bytes, key=lambda step: plan(256 * step, images(256 * step)).total
            )
            - 256
        )

    smallest = min(target, SMALLEST_MAX_SEQ_LEN)
    longest = longest_with(images_beside)
    if not isinstance(wanted, int) and longest >= smallest:
        return plan(longest, images_beside(longest))
    longest = longest_with(lambda tokens: min(least_images, images_beside(tokens)))
    length = wanted if isinstance(wanted, int) else smallest
    refused = plan(length, min(least_images, images_beside(length)))
    smaller = {
        mode: native_weight_bytes(shape, mode, 2 * scale)
        for mode in (Quantization.INT8, Quantization.INT4)
        if checkpoint_weights is None
    }
    raise _does_not_fit(name, refused, free_bytes, longest, smaller)


def state_bytes(shape: ModelShape, value_bytes: int, drafting: bool) -> tuple[int, int]:
    """Bytes of a slot of states, and of what the drafts of a step would do to such."""
    tokens, checked = 1, 0
    if drafting:
        from qwencli.engine.spec_decode.policy import MOST_VERIFIED

        tokens, checked = MAX_VERIFY_TOKENS, MOST_VERIFIED
    return shape.text.state_bytes(value_bytes, tokens), shape.text.update_bytes(checked)


def head_input_bytes(shape: ModelShape, rows: int, value_bytes: int) -> int:
    """Bytes of the hidden states that are kept of rows for the head that drafts (`HeadInputs`);
    none for a model without one, or where it is not in use."""
    if not shape.text.draft_head:
        return 0
    from qwencli.engine.spec_decode.mtp import RING

    count = 8  # how far the head is, an int64
    return rows * (RING * shape.text.hidden_size * value_bytes + count)


def _kept_image_bytes(shape: ModelShape, images: int, scale: int) -> int:
    """Features of earlier pictures, and layouts of their sizes: resampled positions, and angles in
    float32. The layout of a large picture takes the room of those."""
    if shape.vision is None:
        return 0
    width, heads = shape.vision.hidden_size, shape.vision.num_heads
    patches = images * shape.vision.merge_area
    kept = max(0, PATCHES_KEPT - patches) if patches > UNDIVIDED else PATCHES_KEPT
    return VISION_CACHE_BYTES + kept * (2 * scale * width + 8 * width // heads)


def vision_bytes(shape: ModelShape, images: int) -> int:
    """Peak bytes of encoding a picture of up to so many tokens, without its features: of the
    largest, or of the largest that is not cut in pieces."""
    if shape.vision is None:
        return 0
    undivided = min(images, UNDIVIDED // shape.vision.merge_area)
    whole = vision_in_pieces_bytes(shape, undivided, UNDIVIDED)
    return max(vision_in_pieces_bytes(shape, images, PIECE), whole)


def _graph_bytes(shape: ModelShape, sizes: GraphSizes, tokens: int, dequantize: int) -> int:
    """Bytes of the CUDA graphs of prompts of up to `tokens` tokens and of pictures, in bfloat16.

    They share their working memory. Beside it lie their inputs and results: hidden states and what
    DeepStack adds to them, patches with their positions and angles, and features.
    """
    tokens, tower = min(tokens, sizes.tokens), shape.vision
    prompt = prefill_peak_bytes(shape, tokens) + dequantize
    hidden = tokens * shape.text.hidden_size * 2
    if tower is None:
        return prompt + hidden
    images = sizes.patches // tower.merge_area
    inputs = hidden * (1 + len(tower.deepstack_layers))
    inputs += sizes.patches * (2 * tower.patch_elements + 2 * tower.hidden_size)
    inputs += sizes.patches * 8 * tower.head_dim + image_feature_bytes(shape, images)
    return max(prompt, vision_peak_bytes(shape, images)) + inputs


def image_tokens(shape: ModelShape, pixels: int) -> int:
    """Tokens of a picture of so many pixels."""
    if shape.vision is None:
        return 0
    return -(-pixels // (shape.vision.patch_size * shape.vision.merge_size) ** 2)


def _does_not_fit(
    name: str,
    plan: MemoryPlan,
    free_bytes: int,
    longest: int,
    smaller: Mapping[Quantization, int],
) -> OutOfMemoryError:
    parts = ", ".join(f"{use} {_gib(size)}" for use, size in plan.parts.items() if size)
    message = f"{name} needs {_gib(plan.total)} GiB ({parts}), and {_gib(free_bytes)} GiB are free"
    if longest >= SMALLEST_MAX_SEQ_LEN:
        return OutOfMemoryError(message, f"--max-seq-len {longest} fits")
    others = plan.total - plan.weights
    for quantization, weights in smaller.items():
        if weights < plan.weights and weights + others <= free_bytes:
            return OutOfMemoryError(message, f"--quantization {quantization} fits")
    return OutOfMemoryError(message, "use a smaller model, or free memory on the device")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
