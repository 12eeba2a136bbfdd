"""Matrix-vector products of int8, int4 and fp8 weights.

At 8 bits and less a product is bound by instructions before it is bound by the memory, if every
weight is turned into a float32 first. So the vector comes in steps of what can be multiplied
several values at a time (`activation_quant`): int8, where one instruction multiplies and adds four
values (dp4a, compute capability 6.1 and later), or for fp8 weights float16, of which it takes two.

nf4 and fp4 are int8 too once looked up: the table's 16 values, rounded to int8 (0.3% off for nf4),
lie in four registers, of which three byte permutations take four values at a time (as llama.cpp
does it for its IQ4_NL).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwencli.engine.kernels.activation_quant import inverse_rms
from qwencli.engine.kernels.epilogue import load_row_constants, load_row_state, row_epilogue

BLOCK_WORDS = 4  # of int32: what a thread reads at once


@triton.jit
def dot4(a, b, c, ASM: tl.constexpr):
    """c + the products of the four int8 in each int32."""
    if ASM:
        c = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [a, b, c],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        for i in tl.static_range(4):
            c += ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
    return c


@triton.jit
def looked_up(w, codes, ASM: tl.constexpr):
    """The int8 that the lowest four nibbles of each int32 stand for, as one int32.

    `codes`: four words, see `Codebook`.
    """
    first = codes[0] + tl.zeros_like(w)
    second = codes[1] + tl.zeros_like(w)
    third = codes[2] + tl.zeros_like(w)
    last = codes[3] + tl.zeros_like(w)
    if ASM:
        result = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 below, within, low, high;
            and.b32 within, $1, 0x7777;
            prmt.b32 low, $2, $3, within;
            prmt.b32 high, $4, $5, within;
            and.b32 below, $1, 0x8888;
            shr.u32 below, below, 1;
            or.b32 below, below, 0x3210;
            prmt.b32 $0, low, high, below;
            }
            """,
            "=r,r,r,r,r,r",
            [w, first, second, third, last],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        result = tl.zeros_like(w)
        for i in tl.static_range(4):
            q = (w >> (4 * i)) & 15
            word = tl.where(q < 8, tl.where(q < 4, first, second), tl.where(q < 12, third, last))
            result |= ((word >> (8 * (q & 3))) & 0xFF) << (8 * i)
    return result


@triton.jit
def half(bits):
    """The lowest 16 bits as a float16, in float32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def dot4_fp8(w, low, high, ASM: tl.constexpr):
    """The products of four fp8 (e4m3) with two pairs of float16, float32.

    At most 4 * 448 with a vector of at most 1: float16 holds them.
    """
    if ASM:
        sums = tl.inline_asm_elementwise(
            """
            {
            .reg .b16 first, second;
            .reg .b32 a, b;
            .reg .f32 x, y;
            mov.b32 {first, second}, $1;
            cvt.rn.f16x2.e4m3x2 a, first;
            cvt.rn.f16x2.e4m3x2 b, second;
            mul.rn.f16x2 a, a, $2;
            fma.rn.f16x2 a, b, $3, a;
            mov.b32 {first, second}, a;
            cvt.f32.f16 x, first;
            cvt.f32.f16 y, second;
            add.f32 $0, x, y;
            }
            """,
            "=f,r,r,r",
            [w, low, high],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        sums = tl.zeros(w.shape, tl.float32)
        for i in tl.static_range(4):
            # With four bits of exponent in the place of float16's five, values are 2^8 too small.
            value = half(((w >> (8 * i) & 0x80) << 8) | ((w >> (8 * i) & 0x7F) << 7))
            sums += value * half((low if i < 2 else high) >> (16 * (i % 2)))
        sums *= 256.0
    return sums


@triton.jit
def to_float(x):
    """int32 below 2^22 in size -> float32, in two fast instructions rather than a slow one."""
    return (x + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def word_tiles(w_ptr, first, N, WORDS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):
    """Start reading ROWS rows from `first` on of int32 [N, WORDS]: tiles [ROWS * TILE], row by row.

    One axis leaves the compiler one way to share a tile among threads: four words each, in order.
    So what belongs to the words, loaded likewise, is where it is needed.
    """
    flat = tl.arange(0, ROWS * TILE)
    row = first + flat // TILE
    tiles = ()
    for i in tl.static_range((WORDS + TILE - 1) // TILE):
        word = i * TILE + flat % TILE
        there = (row < N) & (word < WORDS)
        at = row.to(tl.int64) * WORDS + word
        tiles += (tl.load(w_ptr + at, mask=there, other=0, eviction_policy="evict_first"),)  # type: ignore[assignment]
    return tiles


@triton.jit
def group_tiles(
    ptr,
    first,
    N,
    GROUPS: tl.constexpr,
    ACT_GROUP: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Start reading what belongs to the groups of blocks, ACT_GROUP blocks each: [ROWS * COUNT]."""
    flat = tl.arange(0, ROWS * COUNT)
    row = first + flat // COUNT
    tiles = ()
    for i in tl.static_range((GROUPS * ACT_GROUP + COUNT - 1) // COUNT):
        group = (i * COUNT + flat % COUNT) // ACT_GROUP
        there = (row < N) & (group < GROUPS)
        tiles += (tl.load(ptr + row * GROUPS + group, mask=there, other=0.0),)  # type: ignore[assignment]
    return tiles


@triton.jit
def of_words(blocks):
    """Values of blocks [n] as those of their four words, float32 [4 * n]."""
    COUNT: tl.constexpr = blocks.shape[0]
    spread = tl.broadcast_to(blocks.to(tl.float32)[:, None], (COUNT, 4))
    return tl.reshape(spread, (4 * COUNT,))


@triton.jit
def vector_words(x_ptr, i, WORDS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):
    """Words i * TILE on of [WORDS] for every row, [ROWS * TILE]; 0 behind their end."""
    word = i * TILE + tl.arange(0, ROWS * TILE) % TILE
    if WORDS % TILE == 0:
        x = tl.load(x_ptr + word)
    else:
        x = tl.load(x_ptr + word, mask=word < WORDS, other=0)
    return x


@triton.jit
def products(w, low, high, step, codes, BITS: tl.constexpr, FP8: tl.constexpr, ASM: tl.constexpr):
    """Words of weights times the vector's columns there, float32.

    low, high: what meets the low and the high half of a word; int8 has low alone. `codes`: of a
    table, else None.
    """
    if FP8:
        sums = dot4_fp8(w, low, high, ASM)
    else:
        q = tl.zeros_like(w)
        if BITS == 8:
            q = dot4(w, low, q, ASM)
        elif codes is not None:
            q = dot4(looked_up(w, codes, ASM), low, q, ASM)
            q = dot4(looked_up(w >> 16, codes, ASM), high, q, ASM)
        else:
            q = dot4(w & 0x0F0F0F0F, low, q, ASM)
            q = dot4((w >> 4) & 0x0F0F0F0F, high, q, ASM)
        sums = to_float(q)
    return sums * step


@triton.jit
def vector_sums(low, high, step, BITS: tl.constexpr, ASM: tl.constexpr):
    """Sums of the vector's columns at each word. Zeros are of int8 and int4 alone."""
    ones = tl.full(low.shape, 0x01010101, tl.int32)
    q = dot4(ones, low, tl.zeros_like(low), ASM)
    if BITS == 4:
        q = dot4(ones, high, q, ASM)
    return to_float(q) * step


@triton.jit
def gemv_quantized_kernel(
    x_ptr,  # int32, `activation_quant`'s values of [K]
    act_scales_ptr,  # float32 [WORDS], its steps
    sum_squares_ptr,  # float32 [SHARES]
    w_ptr,  # int32 [N, WORDS], or [2 N, ...] for SWIGLU
    scale_ptr,  # [N], or with GROUPED [N, K / G], or of 2 N
    zero_point_ptr,  # with GROUPED: as scale; None = no zeros
    codes_ptr,  # int32 [4], of a table; None = values are what they are
    bias_ptr,  # [N]; None = no bias
    y_ptr,  # [N]
    seen_ptr,  # bool [N]
    penalty_ptr,  # float32 []
    best_ptr,  # int64 []
    next_gain_ptr,  # [N], of the norm of what reads the result; None = no norm
    act_values_ptr,
    next_act_scales_ptr,
    next_sum_squares_ptr,  # float32 [programs]
    N,
    eps,
    K: tl.constexpr,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
    G: tl.constexpr,
    GROUPED: tl.constexpr,
    CODEBOOK_SCALE: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    SHARES: tl.constexpr,
    SWIGLU: tl.constexpr,
    ADD: tl.constexpr,
    ARGMAX: tl.constexpr,
    ACT_FORMAT: tl.constexpr,
    ACT_GROUP: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """As `gemv_kernel`, of weights of BITS in words, WORDS of them a row, COUNT blocks of four
    words at a time.

    ASM: with instructions that Triton's language does not have.

    GROUPED: G columns of a row share a scale and perhaps a zero. Otherwise rows have a scale each.
    CODEBOOK_SCALE: what a table's codes count.
    """
    WORDS: tl.constexpr = K * BITS // 32
    TILE: tl.constexpr = 4 * COUNT
    GROUPS: tl.constexpr = K // G
    BLOCKS: tl.constexpr = G * BITS // 128  # of a group
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    inside = rows < N
    w = word_tiles(w_ptr, first, N, WORDS, TILE, ROWS)
    if SWIGLU:
        up = word_tiles(w_ptr + N.to(tl.int64) * WORDS, first, N, WORDS, TILE, ROWS)
    if GROUPED:
        scales = group_tiles(scale_ptr, first, N, GROUPS, BLOCKS, COUNT, ROWS)
        if zero_point_ptr is not None:
            zeros = group_tiles(zero_point_ptr, first, N, GROUPS, BLOCKS, COUNT, ROWS)
        if SWIGLU:
            far = N * GROUPS
            up_scales = group_tiles(scale_ptr + far, first, N, GROUPS, BLOCKS, COUNT, ROWS)
            if zero_point_ptr is not None:
                up_zeros = group_tiles(zero_point_ptr + far, first, N, GROUPS, BLOCKS, COUNT, ROWS)
    else:
        row_scale = tl.load(scale_ptr + rows, mask=inside, other=0.0)
        if SWIGLU:
            up_scale = tl.load(scale_ptr + N + rows, mask=inside, other=0.0)
    codes = None
    if codes_ptr is not None:
        codes = (
            tl.load(codes_ptr),
            tl.load(codes_ptr + 1),
            tl.load(codes_ptr + 2),
            tl.load(codes_ptr + 3),
        )
    constants = load_row_constants(rows, inside, bias_ptr, next_gain_ptr)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    norm = 1.0
    if SHARES > 0:
        norm = inverse_rms(sum_squares_ptr, K, eps, SHARES)
    state = load_row_state(rows, inside, y_ptr, seen_ptr, ADD, ARGMAX)
    sums = tl.zeros((ROWS * TILE,), tl.float32)
    up_sums = tl.zeros((ROWS * TILE,), tl.float32)
    for i in tl.static_range((WORDS + TILE - 1) // TILE):
        low = vector_words(x_ptr, i, WORDS, TILE, ROWS)
        high = low
        if BITS == 4 or FP8:
            high = vector_words(x_ptr + WORDS, i, WORDS, TILE, ROWS)
        step = vector_words(act_scales_ptr, i, WORDS, TILE, ROWS)
        part = products(w[i], low, high, step, codes, BITS, FP8, ASM)
        if zero_point_ptr is not None:
            total = vector_sums(low, high, step, BITS, ASM)
            part -= of_words(zeros[i]) * total
        if GROUPED:
            part *= of_words(scales[i])
        sums += part
        if SWIGLU:
            part = products(up[i], low, high, step, codes, BITS, FP8, ASM)
            if zero_point_ptr is not None:
                part -= of_words(up_zeros[i]) * total
            if GROUPED:
                part *= of_words(up_scales[i])
            up_sums += part
    y = tl.sum(tl.reshape(sums, (ROWS, TILE)), axis=1) * (norm * CODEBOOK_SCALE)
    up_y = tl.sum(tl.reshape(up_sums, (ROWS, TILE)), axis=1) * (norm * CODEBOOK_SCALE)
    if not GROUPED:
        y *= row_scale
        if SWIGLU:
            up_y *= up_scale
    row_epilogue(
        y, up_y, rows, inside, constants, state, y_ptr, penalty_ptr, best_ptr, act_values_ptr,
        next_act_scales_ptr, next_sum_squares_ptr, N, SWIGLU, ARGMAX, ACT_FORMAT, ACT_GROUP,
        next_gain_ptr is not None,
    )  # fmt: skip
