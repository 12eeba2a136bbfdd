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

from qwencli.engine.kernels.activation_quant import inverse_rms
from qwencli.engine.kernels.epilogue import load_row_constants, load_row_state, row_epilogue


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
    x_ptr,  # [K]; with SHARES the gain of its norm in it
    sum_squares_ptr,  # float32 [SHARES]
    w_ptr,  # [N, K], or [2 N, K] for SWIGLU; a float type, or int8 or fp8 with a scale a row
    scale_ptr,  # float32 [N], or [2 N]; None = no scales
    bias_ptr,  # [N]; None = no bias
    y_ptr,  # [N]
    seen_ptr,  # bool [N]
    penalty_ptr,  # float32 []
    best_ptr,  # int64 []
    next_gain_ptr,  # [N], of the norm of what reads the result; None = no norm
    act_values_ptr,
    act_scales_ptr,
    next_sum_squares_ptr,  # float32 [programs]
    N,
    eps,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    SHARES: tl.constexpr,
    SWIGLU: tl.constexpr,
    ADD: tl.constexpr,
    ARGMAX: tl.constexpr,
    ACT_FORMAT: tl.constexpr,
    ACT_GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = epilogue(W x), see `row_epilogue`.

    SHARES: programs that handed over x and the squares that norm it, 0 = no norm. SWIGLU:
    y = silu(W[:N] x) * (W[N:] x). ADD: the result is added to y. ACT_FORMAT: see
    `activation_quant`."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    w = row_tiles(w_ptr, rows, N, K, BLOCK, WHOLE)
    if SWIGLU:
        up = row_tiles(w_ptr + N.to(tl.int64) * K, rows, N, K, BLOCK, WHOLE)
    if scale_ptr is not None:
        row_scale = tl.load(scale_ptr + rows, mask=inside, other=0.0)
        if SWIGLU:
            up_scale = tl.load(scale_ptr + N + rows, mask=inside, other=0.0)
    constants = load_row_constants(rows, inside, bias_ptr, next_gain_ptr)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    xs = vector_tiles(x_ptr, K, BLOCK)
    norm = 1.0
    if SHARES > 0:
        norm = inverse_rms(sum_squares_ptr, K, eps, SHARES, AT_ONCE=512 if SHARES > 256 else 32)
    state = load_row_state(rows, inside, y_ptr, seen_ptr, ADD, ARGMAX)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    up_sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in tl.static_range((K + BLOCK - 1) // BLOCK):
        x = xs[i].to(tl.float32)
        sums += w[i].to(tl.float32) * x
        if SWIGLU:
            up_sums += up[i].to(tl.float32) * x
    y = tl.sum(sums, axis=1) * norm
    up_y = tl.sum(up_sums, axis=1) * norm
    if scale_ptr is not None:
        y *= row_scale
        if SWIGLU:
            up_y *= up_scale
    row_epilogue(
        y, up_y, rows, inside, constants, state, y_ptr, penalty_ptr, best_ptr, act_values_ptr,
        act_scales_ptr, next_sum_squares_ptr, N, SWIGLU, ARGMAX, ACT_FORMAT, ACT_GROUP,
        next_gain_ptr is not None,
    )  # fmt: skip
