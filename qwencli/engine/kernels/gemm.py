"""Matrix products of a step of 2 to 8 tokens, with the operations around them in the same kernel.

What `gemv` and `gemv_quantized` do for one vector, for several: each weight is read once, and
matrix units multiply it with all vectors, so the memory stays what a step waits for. A program owns
ROWS rows of the result. A tile of its weights is cut into PARTS along the columns, one for each
warp at least, whose products are added up at the end. While one tile is worked on the next is read;
the first one is on its way before the wait for the kernel in front (programmatic dependent launch).

Vectors are rounded as those handed over one at a time are (`handover`), so that a token checked is
the token that would have been chosen: for float weights to the type they have, after their norm;
for quantized ones in blocks of SPAN columns, to the same steps. What is rounded is then multiplied
in float16, in units of each part's largest value.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwencli.engine.kernels.epilogue import ordered_bits


@triton.jit
def weight_tile(
    w_ptr, start, rows, N, WIDTH: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr
):
    """Start reading columns from `start` on of `rows` of [N, WIDTH]: [PARTS, ROWS, PART]."""
    part = tl.arange(0, PARTS)[:, None, None]
    columns = start + part * PART + tl.arange(0, PART)[None, None, :]
    at = rows.to(tl.int64)[None, :, None] * WIDTH + columns
    there = (rows < N)[None, :, None] & (columns < WIDTH)
    return tl.load(w_ptr + at, mask=there, other=0.0, eviction_policy="evict_first")


@triton.jit
def group_tile(
    ptr,
    start,
    rows,
    N,
    K: tl.constexpr,
    G: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """Start reading what belongs to each part's group of G columns, float16 [N, K / G]:
    [PARTS, ROWS, 1]."""
    GROUPS: tl.constexpr = K // G
    group = (start + tl.arange(0, PARTS)[:, None, None] * PART) // G
    there = (rows < N)[None, :, None] & (group < GROUPS)
    return tl.load(ptr + rows[None, :, None] * GROUPS + group, mask=there, other=0.0)


@triton.jit
def unpacked(words, PARTS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """int32 words of groups -> 1024 + q of each column, float16 [PARTS, ROWS, 8 * WORDS].

    Four bits under the exponent of 1024 in float16 read 1024 + q.
    """
    nibbles = ()
    for place in tl.static_range(8):
        q = ((words >> (4 * place)) & 15) | 0x6400
        nibbles += (q.to(tl.int16).to(tl.float16, bitcast=True),)  # type: ignore[assignment]
    quads = tl.join(
        tl.join(tl.join(nibbles[0], nibbles[4]), tl.join(nibbles[2], nibbles[6])),  # type: ignore[misc]
        tl.join(tl.join(nibbles[1], nibbles[5]), tl.join(nibbles[3], nibbles[7])),  # type: ignore[misc]
    )  # place = 4 * first + 2 * second + third of the last three axes
    ordered = tl.permute(quads, (0, 1, 2, 5, 3, 4))
    return tl.reshape(ordered, (PARTS, ROWS, 8 * WORDS))


@triton.jit
def row_scales(x_ptr, eps, K: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr):
    """What the RMS norm multiplies each of 8 vectors [TOKENS, K] with: [8]."""
    tokens = tl.arange(0, 8)[:, None]
    squares = tl.zeros((8, BLOCK), tl.float32)
    for start in tl.static_range(0, K, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        there = (tokens < TOKENS) & (columns < K)
        x = tl.load(x_ptr + tokens * K + columns, mask=there, other=0.0).to(tl.float32)
        squares += x * x
    return tl.rsqrt(tl.sum(squares, axis=1) / K + eps)


@triton.jit
def gemm_kernel(
    x_ptr,  # [TOKENS, K]
    gain_ptr,  # [K], weight of the RMS norm of x
    w_ptr,  # [N, K], or [2 N, K] for SWIGLU; int32 [.., K / 8] for int4
    scale_ptr,  # float32 [N] or [2 N]; int4: float16 [.., K / G]
    zero_ptr,  # int4: float16, as scale
    bias_ptr,  # [N]
    y_ptr,  # [TOKENS, N]
    seen_ptr,  # bool [N]
    penalty_ptr,  # float32 []
    fed_ptr,  # int64 [TOKENS], the tokens of this step
    best_ptr,  # int64 [TOKENS]
    N,
    eps,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    ARGMAX: tl.constexpr,
    SCALED: tl.constexpr,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
    SPAN: tl.constexpr,
    G: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As `gemv_kernel` for each vector. BITS: of weights whose vectors are rounded in blocks, of
    SPAN columns, else 0; int4 has groups of G columns.

    A token fed counts as seen for its own vector and those after it.
    """
    BLOCK: tl.constexpr = PARTS * PART
    PACKED: tl.constexpr = 8 if BITS == 4 else 1  # columns of an item
    WIDTH: tl.constexpr = K // PACKED
    ITEMS: tl.constexpr = PART // PACKED
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = tl.arange(0, 8)  # what a matrix unit takes at least
    up_ptr = w_ptr + N.to(tl.int64) * WIDTH
    w = weight_tile(w_ptr, 0, rows, N, WIDTH, PARTS, ITEMS)
    if SWIGLU:
        up = weight_tile(up_ptr, 0, rows, N, WIDTH, PARTS, ITEMS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if NORM:
        norms = row_scales(x_ptr, eps, K, BLOCK, TOKENS)
    acc = tl.zeros((PARTS, ROWS, 8), tl.float32)
    up_acc = tl.zeros((PARTS, ROWS, 8), tl.float32)
    part = tl.arange(0, PARTS)[:, None, None]
    for start in tl.range(0, K, BLOCK, num_stages=1):
        after = (start + BLOCK) // PACKED
        next_w = weight_tile(w_ptr, after, rows, N, WIDTH, PARTS, ITEMS)
        if SWIGLU:
            next_up = weight_tile(up_ptr, after, rows, N, WIDTH, PARTS, ITEMS)
        columns = start + part * PART + tl.arange(0, PART)[None, :, None]
        there = (columns < K) & (tokens < TOKENS)[None, None, :]
        x = tl.load(x_ptr + tokens[None, None, :] * K + columns, mask=there, other=0.0)
        if NORM:
            gain = tl.load(gain_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
        if BITS == 0:
            if NORM:
                x = (x.to(tl.float32) * norms[None, None, :] * gain).to(x.dtype)
            acc = tl.dot(w.to(x.dtype), x, acc, input_precision=PRECISION)
            if SWIGLU:
                up_acc = tl.dot(up.to(x.dtype), x, up_acc, input_precision=PRECISION)
        else:
            wide = x.to(tl.float32)
            if NORM:
                wide *= gain
            q, step = in_steps(wide, FP8, SPAN)
            acc += quantized_dots(
                w, q, step, scale_ptr, zero_ptr, start, rows, N, K, BITS, G, PARTS, PART
            )
            if SWIGLU:
                far = N.to(tl.int64) * (K // G)
                up_acc += quantized_dots(
                    up, q, step, scale_ptr + far, zero_ptr + far, start, rows, N,
                    K, BITS, G, PARTS, PART,
                )  # fmt: skip
        w = next_w
        if SWIGLU:
            up = next_up

    inside = rows < N
    y = tl.sum(acc, axis=0)  # [ROWS, 8]
    up_y = tl.sum(up_acc, axis=0)
    if NORM and BITS > 0:
        y *= norms[None, :]
        up_y *= norms[None, :]
    if SCALED:
        y *= tl.load(scale_ptr + rows, mask=inside, other=0.0)[:, None]
        if SWIGLU:
            up_y *= tl.load(scale_ptr + N + rows, mask=inside, other=0.0)[:, None]
    if SWIGLU:
        y = y * tl.sigmoid(y) * up_y
    if BIAS:
        y += tl.load(bias_ptr + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
    at = tokens[None, :] * N + rows[:, None]
    there = inside[:, None] & (tokens < TOKENS)[None, :]
    if ADD:
        y += tl.load(y_ptr + at, mask=there, other=0.0).to(tl.float32)
    if ARGMAX:
        seen = (tl.load(seen_ptr + rows, mask=inside, other=0) != 0)[:, None]
        seen = seen | (tokens < 0)[None, :]
        for i in tl.static_range(1, TOKENS):
            seen |= (rows == tl.load(fed_ptr + i))[:, None] & (tokens >= i)[None, :]
        penalty = tl.load(penalty_ptr)
        y = tl.where(seen, tl.where(y < 0, y * penalty, y / penalty), y)
        key = (ordered_bits(y).to(tl.int64) << 32) | (0xFFFFFFFF - rows.to(tl.int64))[:, None]
        mine = tl.max(tl.where(there, key, -0x8000000000000000), axis=0)
        # Most programs see larger ones and leave the addresses that all share alone.
        real = tokens < TOKENS
        known = tl.load(best_ptr + tokens, mask=real, other=0, volatile=True)
        tl.atomic_max(best_ptr + tokens, mine, mask=real & (mine > known), sem="relaxed")
    else:
        tl.store(y_ptr + at, y, mask=there)


@triton.jit
def in_steps(x, FP8: tl.constexpr, SPAN: tl.constexpr):
    """Vectors [PARTS, PART, 8], float32, rounded as `hand_over` rounds them: in units of a part's
    largest value, float16, and those units [PARTS, 1, 8]."""
    PARTS: tl.constexpr = x.shape[0]
    PART: tl.constexpr = x.shape[1]
    unit = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-30)[:, None, :]
    x = tl.reshape(x, (PARTS, PART // SPAN, SPAN, 8))
    largest = tl.maximum(tl.max(tl.abs(x), axis=2), 1e-30)[:, :, None, :]
    x *= 1.0 / largest
    if FP8:
        x = x.to(tl.float16).to(tl.float32) * largest
    else:
        # Adding 1.5 * 2^23 rounds to an integer, in the lowest bits of the result.
        q = (x * 127.0 + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        x = q.to(tl.float32) * (largest * (1.0 / 127.0))
    x = tl.reshape(x, (PARTS, PART, 8)) * (1.0 / unit)
    return x.to(tl.float16), unit


@triton.jit
def quantized_dots(
    w,
    q,
    step,
    scale_ptr,
    zero_ptr,
    start,
    rows,
    N,
    K: tl.constexpr,
    BITS: tl.constexpr,
    G: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """Products of a tile of weights with vectors in units of `step`: [PARTS, ROWS, 8]."""
    if BITS == 8:
        products = tl.dot(w.to(q.dtype), q)
    else:
        total = tl.sum(q.to(tl.float32), axis=1)[:, None, :]
        sums = tl.dot(unpacked(w, PARTS, rows.shape[0], PART // 8), q) - 1024.0 * total
        scale = group_tile(scale_ptr, start, rows, N, K, G, PARTS, PART).to(tl.float32)
        zero = group_tile(zero_ptr, start, rows, N, K, G, PARTS, PART).to(tl.float32)
        products = scale * (sums - zero * total)
    return products * step
