"""Matrix-vector products with int4 weights in groups, as `native.quantized` packs them.

Two values come out of a word with one shift and one logical operation: four bits of each half,
under the exponent of 128 in bfloat16, read 128 + q. The upper one is used as a float32 as it
stands, the lower half being a constant and a trace of the lower value (at most 0.0003); the lower
one is shifted up. What that adds is the same for every column and is taken out once a group, with
the group's zero.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwencli.engine.kernels.epilogue import offer_best


@triton.jit
def word_tiles(w_ptr, rows, N, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Start reading rows of int32 [N, WORDS]: tiles [ROWS, BLOCK]."""
    columns = tl.arange(0, BLOCK)[None, :]
    at = rows.to(tl.int64)[:, None] * WORDS + columns
    tiles = ()
    for i in tl.static_range((WORDS + BLOCK - 1) // BLOCK):
        there = (rows < N)[:, None] & (i * BLOCK + columns < WORDS)
        tile = tl.load(w_ptr + at + i * BLOCK, mask=there, other=0, eviction_policy="evict_first")
        tiles += (tile,)  # type: ignore[assignment]
    return tiles


@triton.jit
def group_tiles(ptr, rows, N, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Start reading rows of float16 [N, GROUPS]: tiles [ROWS, BLOCK]."""
    columns = tl.arange(0, BLOCK)[None, :]
    at = rows[:, None] * GROUPS + columns
    tiles = ()
    for i in tl.static_range((GROUPS + BLOCK - 1) // BLOCK):
        there = (rows < N)[:, None] & (i * BLOCK + columns < GROUPS)
        tiles += (tl.load(ptr + at + i * BLOCK, mask=there, other=0.0),)  # type: ignore[assignment]
    return tiles


@triton.jit
def group_dots(word, xs, ROWS: tl.constexpr, GROUPS: tl.constexpr, WPG: tl.constexpr):
    """Sums over each group of (128 + q + what the upper half adds) * x: [ROWS, groups]."""
    sums = tl.zeros((ROWS, GROUPS * WPG), tl.float32)
    for place in tl.static_range(4):
        pair = ((word >> (4 * place)) & 0x000F000F) | 0x43004300
        sums += (pair << 16).to(tl.float32, bitcast=True) * xs[place]
        sums += pair.to(tl.float32, bitcast=True) * xs[place + 4]
    return tl.sum(tl.reshape(sums, (ROWS, GROUPS, WPG)), axis=2)


@triton.jit
def gemv_int4_kernel(
    x_ptr,  # [K]
    gain_ptr,  # [K], weight of the RMS norm of x
    w_ptr,  # int32 [N, K / 8], or [2 N, K / 8] for SWIGLU
    scale_ptr,  # float16 [N, K / G], or [2 N, K / G]
    zero_ptr,  # float16, as scale
    bias_ptr,  # [N]
    y_ptr,  # [N]
    seen_ptr,  # bool [N]
    penalty_ptr,  # float32 []
    best_ptr,  # int64 []
    N,
    eps,
    K: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    ARGMAX: tl.constexpr,
    PDL: tl.constexpr,
):
    """As `gemv_kernel`; BLOCK words at a time, a multiple of a group's."""
    WORDS: tl.constexpr = K // 8
    WPG: tl.constexpr = G // 8  # words of a group
    TILES: tl.constexpr = (WORDS + BLOCK - 1) // BLOCK
    GROUPS: tl.constexpr = K // G
    GB: tl.constexpr = BLOCK // WPG
    # What the upper values' lower halves add: 0x4300 in units of the last place of 128.
    UPPER: tl.constexpr = 0x4300 / 65536
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    w = word_tiles(w_ptr, rows, N, WORDS, BLOCK)
    scales = group_tiles(scale_ptr, rows, N, GROUPS, GB)
    zeros = group_tiles(zero_ptr, rows, N, GROUPS, GB)
    if SWIGLU:
        far = N.to(tl.int64)
        up = word_tiles(w_ptr + far * WORDS, rows, N, WORDS, BLOCK)
        up_scales = group_tiles(scale_ptr + far * GROUPS, rows, N, GROUPS, GB)
        up_zeros = group_tiles(zero_ptr + far * GROUPS, rows, N, GROUPS, GB)
    if BIAS:
        bias = tl.load(bias_ptr + rows, mask=inside, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if ADD:
        before = tl.load(y_ptr + rows, mask=inside, other=0.0)
    if ARGMAX:
        seen = tl.load(seen_ptr + rows, mask=inside, other=0) != 0
    sums = tl.zeros((ROWS, GB), tl.float32)
    up_sums = tl.zeros((ROWS, GB), tl.float32)
    squares = tl.zeros((1, BLOCK), tl.float32)
    words = tl.arange(0, BLOCK)[None, :]
    for i in tl.static_range(TILES):
        word = i * BLOCK + words
        column = word // WPG * G + word % WPG
        xs = ()
        upper = tl.zeros((1, BLOCK), tl.float32)
        whole = tl.zeros((1, BLOCK), tl.float32)
        for place in tl.static_range(8):
            at = column + place * WPG
            x = tl.load(x_ptr + at, mask=word < WORDS, other=0.0).to(tl.float32)
            if NORM:
                squares += x * x
                x *= tl.load(gain_ptr + at, mask=word < WORDS, other=0.0).to(tl.float32)
            whole += x
            if place >= 4:
                upper += x
            xs += (x,)  # type: ignore[assignment]
        ones = tl.sum(tl.reshape(whole, (1, GB, WPG)), axis=2)
        added = UPPER * tl.sum(tl.reshape(upper, (1, GB, WPG)), axis=2)
        dots = group_dots(w[i], xs, ROWS, GB, WPG) - added
        sums += scales[i].to(tl.float32) * (dots - (128.0 + zeros[i].to(tl.float32)) * ones)
        if SWIGLU:
            dots = group_dots(up[i], xs, ROWS, GB, WPG) - added
            up_sums += up_scales[i].to(tl.float32) * (
                dots - (128.0 + up_zeros[i].to(tl.float32)) * ones
            )
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(squares) / K + eps)
    y = tl.sum(sums, axis=1) * scale
    if SWIGLU:
        y = y * tl.sigmoid(y) * (tl.sum(up_sums, axis=1) * scale)
    if BIAS:
        y += bias.to(tl.float32)
    if ADD:
        y += before.to(tl.float32)
    if ARGMAX:
        offer_best(y, seen, rows, inside, penalty_ptr, best_ptr)
    else:
        tl.store(y_ptr + rows, y, mask=inside)
