"""Bytes of a model, from its shape alone: what it needs to load and run, what one token reads.

Knows no device and no torch. Each part is a function of its own so that later planning (batch
sizes, `max_pixels` from free memory) can combine them; `estimate` is their sum for one request,
`decode_bytes` the numerator of MBU.

What results call quantized weights (`stored_label`, `with_activation_bits`):

    int8            stored so; activations are multiplied as they are
    int8-w8a8       and activations are rounded to 8 bits (w: bits of a weight, a: of an activation)
    int4-g128-w4a8, fp8-e4m3-w8a16, awq-int4-g128-w4a8+none
    int8+int8-w8a8  of experts activations are as they are, of other matrices rounded

Labels of results from before 2026-11-25 have no such ending whatever ran.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from qwencli.config import EngineName, Quantization
from qwencli.models.quant_formats import PackedFormat, PackedLayer, packed_layer
from qwencli.models.shapes import ModelShape
from qwencli.models.tensors import (
    canonical_name,
    expected_tensors,
    is_decoder_matrix,
    is_quantizable,
    matrix_size,
    with_experts_as_stored,
)
from qwencli.models.weight_files import StoredTensor

_BITS = re.compile(r"-w\d+a\d+(?=\+|$)")


def with_activation_bits(label: str, weight_bits: int, activation_bits: int | None) -> str:
    """The label of weights whose products round vectors to so many bits; None = they do not."""
    return label if activation_bits is None else f"{label}-w{weight_bits}a{activation_bits}"


def stored_label(label: str) -> str:
    """How the weights are stored, whatever multiplies them."""
    return "+".join(dict.fromkeys(_BITS.sub("", label).split("+")))


# The three columns of a listing and of `vram_requirement`, smallest first.
LISTED: dict[str, Quantization] = {
    "4bit": Quantization.INT4,
    "8bit": Quantization.INT8,
    "full": Quantization.NONE,
}
# One request of a caption: an image of a megapixel (1024 tokens), a prompt and a long answer.
DEFAULT_CONTEXT_TOKENS = 4096
DEFAULT_IMAGE_TOKENS = 1024
# CUDA context, cuBLAS workspace and allocator rounding. An allowance, not a measurement.
RUNTIME_BYTES = 600_000_000

_HALF = GPU_VALUE_BYTES = 2  # bytes of a bfloat16
# `--dtype auto` is float32 on a CPU (`engine.resolve.resolve_dtype`).
CPU_VALUE_BYTES = 4
_NF4_BLOCK = 64
NF4_BYTES_PER_WEIGHT = 1 / 2 + 4 / _NF4_BLOCK


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by use. `activations` is the peak of the vision tower or the prefill, not their sum."""

    weights: int
    kv_cache: int
    activations: int
    runtime: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations + self.runtime


def weight_bytes(
    shape: ModelShape,
    quantization: Quantization = Quantization.NONE,
    value_bytes: int = _HALF,
) -> int:
    """Bytes of the weights as the transformers engine loads them; the rest stays as it is.

    4bit: bitsandbytes NF4 without double quantization, half a byte and a float32 absmax for each
    block of 64 (QLoRA, arXiv 2305.14314, section 3). 8bit: LLM.int8(), a byte and a float32
    scale for each output row (arXiv 2208.07339). fp8: a byte and a float32 scale for each tensor.

    Args:
        value_bytes: of a value that is not quantized.
    """
    total = 0
    for name, size in expected_tensors(shape).items():
        count = prod(size)
        if quantization is Quantization.NONE or not is_quantizable(name, size):
            total += count * value_bytes
        elif quantization is Quantization.INT4:
            total += count // 2 + -(-count // _NF4_BLOCK) * 4
        elif quantization is Quantization.INT8:
            total += count + size[0] * 4
        else:
            total += count + 4
    return total


def native_weight_bytes(shape: ModelShape, quantization: Quantization, value_bytes: int) -> int:
    """Bytes of the weights as the native engine keeps them (`engine.quant.quantized_tensor`).

    8bit and fp8: a byte, and a float32 scale for each output row. 4bit: half a byte and two
    float16 for each group of 128, and the head at 8 bits. A tied embedding is kept as it is, for
    looking up, beside the quantized head.

    Args:
        value_bytes: of a value that is not quantized.
    """
    total = 0
    for name, size in expected_tensors(shape).items():
        count = prod(size)
        head = name == "lm_head.weight"
        if quantization is Quantization.NONE or not is_decoder_matrix(name, size):
            total += count * value_bytes
        else:
            total += native_matrix_bytes(quantization, head, *matrix_size(size))
    if quantization is not Quantization.NONE and shape.text.tied_head:
        text = shape.text
        total += native_matrix_bytes(quantization, True, text.vocab_size, text.hidden_size)
    return total + draft_projection_bytes(shape)


def draft_projection_bytes(shape: ModelShape) -> int:
    """Bytes of the 4-bit output projection of a head that drafts tokens; 0 without one."""
    text = shape.text
    if not text.draft_head:
        return 0
    return native_matrix_bytes(Quantization.INT4, False, text.vocab_size, text.hidden_size)


def packed_weight_bytes(
    shape: ModelShape, packed: PackedFormat, stored: Mapping[str, StoredTensor], value_bytes: int
) -> int:
    """Bytes of a pre-quantized checkpoint as the native engine keeps it.

    The decoder's matrices and the head stay packed; the rest is unpacked to `value_bytes` a value.
    """
    shape = with_experts_as_stored(shape, stored)
    layers = packed_layers(shape, packed, stored)
    return draft_projection_bytes(shape) + sum(
        layers[name].loaded_bytes
        if name in layers and ".visual." not in name
        else prod(size) * value_bytes
        for name, size in expected_tensors(shape).items()
    )


def packed_layers(
    shape: ModelShape, packed: PackedFormat, stored: Mapping[str, StoredTensor]
) -> dict[str, PackedLayer]:
    """The layers that a checkpoint stores packed, by the names of `expected_tensors`."""

    def found() -> Iterator[tuple[str, PackedLayer]]:
        named = {canonical_name(name, shape): tensor for name, tensor in stored.items()}
        names = sorted(named)
        for name, size in expected_tensors(shape).items():
            layer = packed_layer(name, size, named, names, packed)
            if layer is not None and not layer.missing:
                yield name, layer

    return dict(found())


def native_matrix_bytes(quantization: Quantization, head: bool, rows: int, columns: int) -> int:
    """Bytes of one quantized matrix [rows, columns] of the native engine."""
    if quantization is Quantization.INT4 and not head:
        return rows * columns // 2 + 4 * rows * -(-columns // 128)
    return rows * columns + 4 * rows


def kv_cache_bytes(shape: ModelShape, tokens: int, batch: int = 1) -> int:
    """Bytes that sequences of so many tokens keep, bfloat16: 2 x attention layers x kv heads x
    head_dim for each token, and the state of the other layers once a sequence."""
    text = shape.text
    return (text.kv_bytes_per_token(_HALF) * tokens + text.state_bytes(_HALF)) * batch


def native_kv_bytes(shape: ModelShape, quantized: bool, value_bytes: int) -> int:
    """Bytes of one token's keys and values in a static cache of the native engine.

    QuantizedTensor: a byte a value, and a float32 scale for each head's key and value.

    Args:
        value_bytes: of a value where they are not quantized.
    """
    text = shape.text
    if not quantized:
        return text.kv_bytes_per_token(value_bytes)
    return 2 * len(text.kv_layers) * text.num_kv_heads * (text.head_dim + 4)


def vision_peak_bytes(shape: ModelShape, image_tokens: int) -> int:
    """Peak bytes of encoding an image of `image_tokens` tokens (after merging), bfloat16.

    The larger of a block's two halves, with attention that does not store its matrix (sdpa,
    flash): residual, normed input, q, k, v and output; or residual, normed input, the
    up-projections and their activation. Besides them the pixels (float32) and the features that
    go to the decoder, DeepStack's included. `eager` attention adds heads x patches^2 values.
    """
    tower = shape.vision
    if tower is None:
        return 0
    patches = image_tokens * tower.merge_area
    attention = 6 * tower.hidden_size
    # Gated towers (Qwen2.5-VL) hold two up-projections and their product.
    ups = 3 if tower.gated_mlp else 2
    mlp = 2 * tower.hidden_size + ups * tower.intermediate_size
    pixels = tower.patch_elements * 4
    return patches * (max(attention, mlp) * _HALF + pixels) + image_feature_bytes(
        shape, image_tokens
    )


def vision_in_pieces_bytes(shape: ModelShape, image_tokens: int, piece: int) -> int:
    """Peak bytes of encoding an image as the native engine does, bfloat16, without the features
    that it makes: of all patches their pixels, positions, angles (float32), residual, queries, keys
    and values; of `piece` patches what is inside a block.
    """
    tower = shape.vision
    if tower is None:
        return 0
    patches, width = image_tokens * tower.merge_area, tower.hidden_size
    whole = (tower.patch_elements + 5 * width) * _HALF + 8 * width // tower.num_heads
    ups = 3 if tower.gated_mlp else 2
    inside = (3 * width + ups * tower.intermediate_size) * _HALF
    return patches * whole + min(patches, piece) * inside


def image_feature_bytes(shape: ModelShape, image_tokens: int) -> int:
    """Bytes of what the decoder takes from pictures, DeepStack's features included, bfloat16."""
    tower = shape.vision
    if tower is None:
        return 0
    return image_tokens * tower.out_hidden_size * (1 + len(tower.deepstack_layers)) * _HALF


def prefill_peak_bytes(shape: ModelShape, tokens: int) -> int:
    """Peak bytes of the prefill beyond weights and cache, bfloat16, logits of one position.

    A layer's MLP is the peak: residual, normed input, gate, up and their product; or a mixture of
    experts: what each one makes of its tokens; or a gated delta net: what its projection gives,
    what the convolution makes of that, and in float32 the corrected values, the decayed keys of
    each value head, and the output. Sampling holds the last position's logits as bfloat16, float32,
    sorted, and the order (int64).
    """
    text, inside = shape.text, 3 * shape.text.intermediate_size
    if text.moe is not None:
        slots = text.moe.top_k + text.moe.shared_is_stacked
        inside = max(inside, slots * (text.moe.intermediate_size + 2 * text.hidden_size))
    if text.delta is not None:
        delta = text.delta
        keys = delta.num_v_heads * delta.k_head_dim
        inside = max(inside, 2 * delta.conv_dim + 5 * delta.value_dim + 2 * keys)
    layer = tokens * (2 * text.hidden_size + inside) * _HALF
    return layer + text.vocab_size * (_HALF + 4 + 4 + 8)


def dequantize_bytes(shape: ModelShape) -> int:
    """Bytes of the largest quantized matrix that a prompt of the native engine has in bfloat16:
    gate and up of a layer in one, or queries, keys and values with what gates them. One is there at
    a time, and the head never whole, nor experts but one.
    """
    text = shape.text
    queries = 2 * text.q_size if text.gated_attention else text.q_size
    whole, moe = 2 * text.intermediate_size, text.moe
    if moe is not None and not moe.dense_layers:
        whole = 2 * max(moe.intermediate_size, moe.shared_intermediate_size)
    rows = max(whole, queries + 2 * text.kv_size)
    if text.delta is not None:
        rows = max(rows, text.delta.conv_dim + text.delta.value_dim)
    return rows * text.hidden_size * _HALF


def estimate(
    shape: ModelShape,
    quantization: Quantization = Quantization.NONE,
    *,
    engine: EngineName = EngineName.NATIVE,
    context_tokens: int = DEFAULT_CONTEXT_TOKENS,
    image_tokens: int = DEFAULT_IMAGE_TOKENS,
    value_bytes: int = _HALF,
) -> MemoryEstimate:
    """Device memory for one request of `context_tokens` (prompt, image and new tokens).

    Args:
        value_bytes: of a value that is not quantized: `CPU_VALUE_BYTES` where a CPU computes.
    """
    peak = max(vision_peak_bytes(shape, image_tokens), prefill_peak_bytes(shape, context_tokens))
    weights = native_weight_bytes if engine is EngineName.NATIVE else weight_bytes
    return MemoryEstimate(
        weights=weights(shape, quantization, value_bytes),
        kv_cache=kv_cache_bytes(shape, context_tokens) * value_bytes // _HALF,
        activations=peak * value_bytes // _HALF,
        runtime=RUNTIME_BYTES,
    )


# Scheme, as engines report it -> bytes of a quantized matrix of [rows, columns]. Sources as in
# `memory.weight_bytes`.
_QUANTIZED: Mapping[str, Callable[[int, int], float]] = {
    "bnb-nf4": lambda rows, columns: rows * columns * NF4_BYTES_PER_WEIGHT,
    "bnb-int8": lambda rows, columns: rows * columns + 4 * rows,
}
# Those of the native engine, which quantizes the head too.
_NATIVE = {
    "int8": Quantization.INT8,
    "fp8-e4m3": Quantization.FP8,
    "int4-g128": Quantization.INT4,
}
_QUANTIZED_KV = ("int8", "fp8-e4m3")
# Pre-quantized checkpoints in the native engine, whose heads are as they came: unquantized in all
# but a few. Then a byte or half a byte, and scales (int4: and zeros, of two bytes each) of groups.
_PREQUANTIZED = re.compile(
    r"(?:awq|gptq|ct|hf|fbgemm|modelopt|scaled)-(int4|int8|fp8-e4m3)(?:-g(\d+))?"
)


def decode_bytes(
    shape: ModelShape,
    scheme: str,
    value_bytes: int,
    context_tokens: float,
    kv_dtype: str | None = None,
) -> float | None:
    """Bytes read for one token of one sequence.

    Every weight of the decoder that a token takes (of experts those that are chosen) and the output
    head once, one row of the embedding, the keys and values of `context_tokens`, and the state of
    gated delta nets, which is written too. What a kernel reads beyond that (a whole static cache,
    weights unpacked to memory) is waste and not in it: MBU is to fall for it.

    Args:
        scheme: as `EffectiveConfig.quantization` says. value_bytes: of what is not quantized.
        kv_dtype: as `EffectiveConfig.kv_dtype` says.

    Returns:
        None for a scheme whose storage is not known here.
    """
    scheme = stored_label(scheme)
    quantized, native = _QUANTIZED.get(scheme) or _prequantized(scheme), _NATIVE.get(scheme)
    if scheme != "none" and quantized is None and native is None:
        return None
    moe = shape.text.moe
    taken = 1.0 if moe is None else moe.top_k / moe.num_experts
    total = float(shape.text.hidden_size * value_bytes)
    for name, size in expected_tensors(shape).items():
        looked_up = name.endswith("embed_tokens.weight") and not shape.text.tied_head
        if ".visual." in name or looked_up:
            continue
        head = name.endswith(("lm_head.weight", "embed_tokens.weight"))
        of_experts = ".mlp.experts." in name
        read: float
        if native is not None and (head or is_decoder_matrix(name, size)):
            read = native_matrix_bytes(native, head, *matrix_size(size))
        elif quantized is not None and (
            is_quantizable(name, size) or (of_experts and scheme not in _QUANTIZED)
        ):
            read = quantized(*matrix_size(size))
        else:
            read = prod(size) * value_bytes
        total += read * (taken if of_experts else 1)
    cache = native_kv_bytes(shape, kv_dtype in _QUANTIZED_KV, value_bytes)
    return total + cache * context_tokens + 2 * shape.text.state_bytes(value_bytes)


def _prequantized(scheme: str) -> Callable[[int, int], float] | None:
    match = _PREQUANTIZED.fullmatch(scheme)
    if match is None:
        return None
    value_bytes = 0.5 if match[1] == "int4" else 1.0

    def matrix_bytes(rows: int, columns: int) -> float:
        groups = columns // int(match[2]) if match[2] else 1
        return rows * columns * value_bytes + 4 * rows * groups

    return matrix_bytes
