"""Matrix-vector products of a decode step, with the operations around them in the same kernel.

A program owns `ROWS` output rows and reads them whole, once for up to 8 vectors. Its first rows are
on their way before it waits for the kernel in front of it (programmatic dependent launch), because
weights are never written: so the memory stays busy across the boundary between two kernels. After
the wait it may read what earlier kernels wrote.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwencli.engine.kernels.epilogue import offer_best


@triton.jit
def row_tiles(w_ptr, rows, N, K: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Start reading `rows` of a matrix [N, K]: tiles [ROWS, BLOCK], the last one masked."""
    columns = tl.arange(0, BLOCK)[None, :]
    at = rows.to(tl.int64)[:, None] * K + columns
    tiles = ()
    for i in tl.static_range((K + BLOCK - 1) // BLOCK):
        if WHOLE and (i + 1) * BLOCK <= K:
            tile = tl.load(w_ptr + at + i * BLOCK, eviction_policy="evict_first")
        else:
            inside = (rows < N)[:, None] & (i * BLOCK + columns < K)
            tile = tl.load(
                w_ptr + at + i * BLOCK, mask=inside, other=0.0, eviction_policy="evict_first"
            )
        tiles += (tile,)  # type: ignore[assignment]
    return tiles


@triton.jit
def vector_tile(ptr, i: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Start reading tile `i` of a vector [K]: [1, BLOCK]."""
    columns = tl.arange(0, BLOCK)[None, :]
    if (i + 1) * BLOCK <= K:
        tile = tl.load(ptr + i * BLOCK + columns)
    else:
        tile = tl.load(ptr + i * BLOCK + columns, mask=i * BLOCK + columns < K, other=0.0)
    return tile


@triton.jit
def vector_tiles(ptr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Start reading a vector [K]: tiles [1, BLOCK]."""
    tiles = ()
    for i in tl.static_range((K + BLOCK - 1) // BLOCK):
        tiles += (vector_tile(ptr, i, K, BLOCK),)  # type: ignore[assignment]
    return tiles


@triton.jit
def fold(tile, PACK: tl.constexpr):
    """Sums of PACK neighbours, which one thread holds: [R, C] -> [R, C / PACK]."""
    if PACK == 1:
        return tile
    shape: tl.constexpr = (tile.shape[0], tile.shape[1] // PACK, PACK)
    return tl.sum(tl.reshape(tile, shape), axis=2)


@triton.jit
def dots(w, up, gains, xs, x_ptr, K: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr):
    """Products of the rows in tiles `w`, and in `up` unless empty, with vectors [TOKENS, K].

    A single vector comes as tiles `xs`, of more there are too many to be held at once.

    Returns for each vector the sums of both, still spread over columns, and of its squares where
    `gains` norm it. Of several vectors a thread adds up what it holds of a tile at once: a sum for
    each place of a tile and each vector would not fit the registers.
    """
    ROWS: tl.constexpr = w[0].shape[0]
    # A thread reads 16 bytes of a row at a time.
    PACK: tl.constexpr = 1 if TOKENS == 1 else 128 // w[0].dtype.primitive_bitwidth
    sums = ()
    up_sums = ()
    squares = ()
    for _ in tl.static_range(TOKENS):
        sums += (tl.zeros((ROWS, BLOCK // PACK), tl.float32),)  # type: ignore[assignment]
        up_sums += (tl.zeros((ROWS, BLOCK // PACK), tl.float32),)  # type: ignore[assignment]
        squares += (tl.zeros((1, BLOCK // PACK), tl.float32),)  # type: ignore[assignment]
    for i in tl.static_range((K + BLOCK - 1) // BLOCK):
        new_sums = ()
        new_up_sums = ()
        new_squares = ()
        for token in tl.static_range(TOKENS):
            if TOKENS == 1:
                x = xs[i].to(tl.float32)
            else:
                x = vector_tile(x_ptr + token * K, i, K, BLOCK).to(tl.float32)
            square = squares[token]  # type: ignore[var-annotated]
            up_sum = up_sums[token]  # type: ignore[var-annotated]
            if len(gains) > 0:
                square += fold(x * x, PACK)
                x *= gains[i].to(tl.float32)
            new_squares += (square,)  # type: ignore[assignment]
            new_sums += (sums[token] + fold(w[i].to(tl.float32) * x, PACK),)  # type: ignore[assignment]
            if len(up) > 0:
                up_sum += fold(up[i].to(tl.float32) * x, PACK)
            new_up_sums += (up_sum,)  # type: ignore[assignment]
        sums = new_sums
        up_sums = new_up_sums
        squares = new_squares
    return sums, up_sums, squares


@triton.jit
def gemv_kernel(
    x_ptr,  # [TOKENS, K]
    gain_ptr,  # [K], weight of the RMS norm of x
    w_ptr,  # [N, K], or [2 N, K] for SWIGLU; a float type, or int8 or fp8 with a scale a row
    scale_ptr,  # float32 [N], or [2 N]
    bias_ptr,  # [N]
    y_ptr,  # [TOKENS, N]
    seen_ptr,  # bool [N]
    penalty_ptr,  # float32 []
    fed_ptr,  # int64 [TOKENS], the tokens of this step
    best_ptr,  # int64 [TOKENS]
    N,
    eps,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    WHOLE: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    ARGMAX: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = epilogue(W norm(x)) of each vector x.

    NORM: x is normed with `gain`. SWIGLU: y = silu(W[:N] x) * (W[N:] x). BIAS: added. ADD: the
    result is added to y. ARGMAX: y is not written; the rows are offered to `best`, where a token
    fed counts as seen for its own vector and those after it.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    w = row_tiles(w_ptr, rows, N, K, BLOCK, WHOLE)
    up = ()
    if SWIGLU:
        up_ptr = w_ptr + N.to(tl.int64) * K
        up = row_tiles(up_ptr, rows, N, K, BLOCK, WHOLE)
    gains = ()
    if NORM:
        gains = vector_tiles(gain_ptr, K, BLOCK)
    if SCALED:
        row_scale = tl.load(scale_ptr + rows, mask=inside, other=0.0)
        if SWIGLU:
            up_scale = tl.load(scale_ptr + N + rows, mask=inside, other=0.0)
    if BIAS:
        bias = tl.load(bias_ptr + rows, mask=inside, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    xs = ()
    if TOKENS == 1:
        xs = vector_tiles(x_ptr, K, BLOCK)
    before = ()
    if ADD:
        for token in tl.static_range(TOKENS):
            before += (tl.load(y_ptr + token * N + rows, mask=inside, other=0.0),)  # type: ignore[assignment]
    if ARGMAX:
        seen = tl.load(seen_ptr + rows, mask=inside, other=0) != 0
    sums, up_sums, squares = dots(w, up, gains, xs, x_ptr, K, BLOCK, TOKENS)
    for token in tl.static_range(TOKENS):
        scale = 1.0
        if NORM:
            scale = tl.rsqrt(tl.sum(squares[token]) / K + eps)
        y = tl.sum(sums[token], axis=1) * scale
        up_y = tl.sum(up_sums[token], axis=1) * scale
        if SCALED:
            y *= row_scale
            if SWIGLU:
                up_y *= up_scale
        if SWIGLU:
            y = y * tl.sigmoid(y) * up_y
        if BIAS:
            y += bias.to(tl.float32)
        if ADD:
            y += before[token].to(tl.float32)
        if ARGMAX:
            if token > 0:
                seen |= rows == tl.load(fed_ptr + token)
            offer_best(y, seen, rows, inside, penalty_ptr, best_ptr + token)
        else:
            tl.store(y_ptr + token * N + rows, y, mask=inside)
