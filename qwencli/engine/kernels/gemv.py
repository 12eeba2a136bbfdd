"""Matrix-vector products of a decode step, with the operations around them in the same kernel.

A program owns `ROWS` output rows at a time and reads them whole. Its first rows are on their way
before it waits for the kernel in front of it (programmatic dependent launch), because weights are
never written: so the memory stays busy across the boundary between two kernels. After the wait it
may read what earlier kernels wrote.
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
def vector_tiles(ptr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Start reading a vector [K]: tiles [1, BLOCK]."""
    columns = tl.arange(0, BLOCK)[None, :]
    tiles = ()
    for i in tl.static_range((K + BLOCK - 1) // BLOCK):
        if (i + 1) * BLOCK <= K:
            tile = tl.load(ptr + i * BLOCK + columns)
        else:
            tile = tl.load(ptr + i * BLOCK + columns, mask=i * BLOCK + columns < K, other=0.0)
        tiles += (tile,)  # type: ignore[assignment]
    return tiles


@triton.jit
def gemv_kernel(
    x_ptr,  # [K]
    gain_ptr,  # [K], weight of the RMS norm of x
    w_ptr,  # [N, K], or [2 N, K] for SWIGLU; a float type, or int8 or fp8 with a scale a row
    scale_ptr,  # float32 [N], or [2 N]
    bias_ptr,  # [N]
    y_ptr,  # [N]
    seen_ptr,  # bool [N]
    penalty_ptr,  # float32 []
    best_ptr,  # int64 []
    N,
    eps,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    ARGMAX: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = epilogue(W norm(x)).

    NORM: x is normed with `gain`. SWIGLU: y = silu(W[:N] x) * (W[N:] x). BIAS: added. ADD: the
    result is added to y. ARGMAX: y is not written; the rows are offered to `best`.
    """
    TILES: tl.constexpr = (K + BLOCK - 1) // BLOCK
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    w = row_tiles(w_ptr, rows, N, K, BLOCK, WHOLE)
    if SWIGLU:
        up_ptr = w_ptr + N.to(tl.int64) * K
        up = row_tiles(up_ptr, rows, N, K, BLOCK, WHOLE)
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
    xs = vector_tiles(x_ptr, K, BLOCK)
    if ADD:
        before = tl.load(y_ptr + rows, mask=inside, other=0.0)
    if ARGMAX:
        seen = tl.load(seen_ptr + rows, mask=inside, other=0) != 0
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    up_sums = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((1, BLOCK), tl.float32)
    for i in tl.static_range(TILES):
        x = xs[i].to(tl.float32)
        if NORM:
            squares += x * x
            x *= gains[i].to(tl.float32)
        sums += w[i].to(tl.float32) * x
        if SWIGLU:
            up_sums += up[i].to(tl.float32) * x
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(squares) / K + eps)
    y = tl.sum(sums, axis=1) * scale
    up_y = tl.sum(up_sums, axis=1) * scale
    if SCALED:
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
