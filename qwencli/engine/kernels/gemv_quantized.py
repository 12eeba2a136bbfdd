"""Matrix-vector products of int8, int4 and fp8 weights.

At 8 bits and less a product is bound by instructions before it is bound by the memory, if every
weight is turned into a float32 first. So the vector is rounded to what can be multiplied several
values at a time, in blocks of a scale each (as the Q8_0 and Q8_1 blocks of llama.cpp are): to int8,
where one instruction multiplies and adds four values (dp4a, compute capability 6.1 and later), or
for fp8 weights to float16, of which it takes two. Each program rounds the vector for itself, while
the weights it asked for are on their way.

nf4 and fp4 are int8 too once looked up: the table's 16 values, rounded to int8 (0.3% off for nf4),
lie in four registers, of which three byte permutations take four values at a time (as llama.cpp
does it for its IQ4_NL).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwencli.engine.kernels.epilogue import offer_best

BLOCK_WORDS = 4  # of int32: what a thread reads at once


def pieces(columns: int, bits: int, block: int) -> tuple[tuple[int, int], ...]:
    """A row's blocks as (first, count) with counts of powers of two, `block` columns at most."""
    per_block = BLOCK_WORDS * 32 // bits
    most, there = block // per_block, columns // per_block
    cut = [(i * most, most) for i in range(there // most)]
    size = most // 2
    while size:
        if there & size:
            cut.append((there // (2 * size) * 2 * size, size))
        size //= 2
    return tuple(cut)


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

    `codes`: four words, see `Table`.
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
def word_blocks(w_ptr, rows, N, PIECES: tl.constexpr, WORDS: tl.constexpr):
    """Start reading rows of int32 [N, WORDS]: a tile [ROWS, count, 4] a piece."""
    tiles = ()
    for i in tl.static_range(len(PIECES)):
        blocks = PIECES[i][0] + tl.arange(0, PIECES[i][1])
        words = blocks[:, None] * 4 + tl.arange(0, 4)[None, :]
        at = rows.to(tl.int64)[:, None, None] * WORDS + words[None, :, :]
        there = (rows < N)[:, None, None]
        tile = tl.load(w_ptr + at, mask=there, other=0, eviction_policy="evict_first")
        tiles += (tile,)  # type: ignore[assignment]
    return tiles


@triton.jit
def group_values(ptr, rows, N, PIECES: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr):
    """Start reading what belongs to the groups of blocks, SPAN blocks each: [ROWS, count]."""
    tiles = ()
    for i in tl.static_range(len(PIECES)):
        groups = (PIECES[i][0] + tl.arange(0, PIECES[i][1])) // SPAN
        at = rows[:, None] * GROUPS + groups[None, :]
        tiles += (tl.load(ptr + at, mask=(rows < N)[:, None], other=0.0),)  # type: ignore[assignment]
    return tiles


@triton.jit
def scaled(
    x_ptr,
    gain_ptr,
    order_ptr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    C: tl.constexpr,
    NORM: tl.constexpr,
):
    """Blocks of the vector, of C columns: their values at most 1 [COUNT, C], what those stand for
    [COUNT], and the sum of the squares."""
    at = (FIRST + tl.arange(0, COUNT))[:, None] * C + tl.arange(0, C)[None, :]
    if order_ptr is not None:
        at = tl.load(order_ptr + at)
    x = tl.load(x_ptr + at).to(tl.float32)
    squares = 0.0
    if NORM:
        squares = tl.sum(x * x)
        x *= tl.load(gain_ptr + at).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-30)
    return x * (1.0 / largest)[:, None], largest, squares


@triton.jit
def packed(x, BITS: tl.constexpr, FP8: tl.constexpr):
    """Rounded blocks [COUNT, C] as words that meet a word of weights, [COUNT, 4] twice, and their
    sums [COUNT] in steps.

    fp8: two float16 a word, the first two and the last two columns. int4: four int8, the low and
    the high halves of the bytes. int8: only the first is of use.
    """
    COUNT: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    if FP8:
        bits = x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        bits = bits << (16 * (tl.arange(0, C) % 2))[None, :]
        low, high = tl.split(tl.sum(tl.reshape(bits, (COUNT, 4, 2, 2)), axis=3))
        sums = tl.sum(x, axis=1)
    else:
        # Adding 1.5 * 2^23 rounds to an integer, in the lowest bits of the result.
        q = (x * 127.0 + 12582912.0).to(tl.int32, bitcast=True)
        bits = (q & 0xFF) << (8 * (tl.arange(0, C) % 4))[None, :]
        if BITS == 8:
            low = tl.sum(tl.reshape(bits, (COUNT, 4, 4)), axis=2)
            high = low
        else:
            low, high = tl.split(tl.sum(tl.reshape(bits, (COUNT, 4, 2, 4)), axis=3))
        sums = tl.sum(q - 0x4B400000, axis=1).to(tl.float32)
    return low, high, sums


@triton.jit
def products(w, low, high, codes, BITS: tl.constexpr, FP8: tl.constexpr, ASM: tl.constexpr):
    """Blocks of weights times the packed vector: [ROWS, COUNT], in steps of both.

    `codes`: of a table, else None.
    """
    low = tl.broadcast_to(low[None, :, :], w.shape)
    high = tl.broadcast_to(high[None, :, :], w.shape)
    if FP8:
        result = tl.sum(dot4_fp8(w, low, high, ASM), axis=2)
    else:
        sums = tl.zeros_like(w)
        if BITS == 8:
            sums = dot4(w, low, sums, ASM)
        elif codes is not None:
            sums = dot4(looked_up(w, codes, ASM), low, sums, ASM)
            sums = dot4(looked_up(w >> 16, codes, ASM), high, sums, ASM)
        else:
            sums = dot4(w & 0x0F0F0F0F, low, sums, ASM)
            sums = dot4((w >> 4) & 0x0F0F0F0F, high, sums, ASM)
        result = to_float(tl.sum(sums, axis=2))
    return result


@triton.jit
def gemv_quantized_kernel(
    x_ptr,  # [K]
    gain_ptr,  # [K], weight of the RMS norm of x
    w_ptr,  # int32 [N, K * BITS / 32], or [2 N, ...] for SWIGLU
    scale_ptr,  # [N], or with GROUPED [N, K / G], or of 2 N
    zero_ptr,  # with GROUPED: as scale; None = no zeros
    codes_ptr,  # int32 [4], of a table; None = values are what they are
    order_ptr,  # int32 [K], which column of the matrix each is; None = in order
    bias_ptr,  # [N]
    y_ptr,  # [N]
    seen_ptr,  # bool [N]
    penalty_ptr,  # float32 []
    best_ptr,  # int64 []
    N,
    eps,
    K: tl.constexpr,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
    G: tl.constexpr,
    GROUPED: tl.constexpr,
    STEP: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    ARGMAX: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """As `gemv_kernel`, of weights of BITS; PIECES are `pieces` of a row.

    ASM: with instructions that Triton's language does not have.

    GROUPED: G columns of a row share a scale and perhaps a zero. Otherwise rows have a scale each.
    STEP: what a table's codes count.
    """
    WORDS: tl.constexpr = K * BITS // 32
    GROUPS: tl.constexpr = K // G
    SPAN: tl.constexpr = G * BITS // 128  # blocks of a group
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    w = word_blocks(w_ptr, rows, N, PIECES, WORDS)
    if SWIGLU:
        up = word_blocks(w_ptr + N.to(tl.int64) * WORDS, rows, N, PIECES, WORDS)
    if GROUPED:
        scales = group_values(scale_ptr, rows, N, PIECES, GROUPS, SPAN)
        if zero_ptr is not None:
            zeros = group_values(zero_ptr, rows, N, PIECES, GROUPS, SPAN)
        if SWIGLU:
            far = N * GROUPS
            up_scales = group_values(scale_ptr + far, rows, N, PIECES, GROUPS, SPAN)
            if zero_ptr is not None:
                up_zeros = group_values(zero_ptr + far, rows, N, PIECES, GROUPS, SPAN)
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
    if BIAS:
        bias = tl.load(bias_ptr + rows, mask=inside, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if ADD:
        before = tl.load(y_ptr + rows, mask=inside, other=0.0)
    if ARGMAX:
        seen = tl.load(seen_ptr + rows, mask=inside, other=0) != 0
    y = tl.zeros((ROWS,), tl.float32)
    up_y = tl.zeros((ROWS,), tl.float32)
    squares = 0.0
    for i in tl.static_range(len(PIECES)):
        x, step, square = scaled(
            x_ptr, gain_ptr, order_ptr, PIECES[i][0], PIECES[i][1], 128 // BITS, NORM
        )
        squares += square
        low, high, total = packed(x, BITS, FP8)
        if not FP8:
            step /= 127.0
        if codes_ptr is not None:
            step *= STEP
        total = (total * step)[None, :]
        step = step[None, :]
        sums = products(w[i], low, high, codes, BITS, FP8, ASM) * step
        if GROUPED:
            if zero_ptr is None:
                sums *= scales[i].to(tl.float32)
            else:
                sums = scales[i].to(tl.float32) * (sums - zeros[i].to(tl.float32) * total)
        y += tl.sum(sums, axis=1)
        if SWIGLU:
            sums = products(up[i], low, high, codes, BITS, FP8, ASM) * step
            if GROUPED:
                if zero_ptr is None:
                    sums *= up_scales[i].to(tl.float32)
                else:
                    sums = up_scales[i].to(tl.float32) * (sums - up_zeros[i].to(tl.float32) * total)
            up_y += tl.sum(sums, axis=1)
    norm = 1.0
    if NORM:
        norm = tl.rsqrt(squares / K + eps)
    y *= norm
    up_y *= norm
    if not GROUPED:
        y *= row_scale
        if SWIGLU:
            up_y *= up_scale
    if SWIGLU:
        y = y * tl.sigmoid(y) * up_y
    if BIAS:
        y += bias.to(tl.float32)
    if ADD:
        y += before.to(tl.float32)
    if ARGMAX:
        offer_best(y, seen, rows, inside, penalty_ptr, best_ptr)
    else:
        tl.store(y_ptr + rows, y, mask=inside)
