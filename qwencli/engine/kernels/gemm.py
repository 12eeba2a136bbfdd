"""Matrix products of a step of 2 to 8 tokens, with the operations around them in the same kernel.

What `gemv` and `gemv_quantized` do for one vector, for several: each weight is read once, and
matrix units multiply it with all vectors, so the memory stays what a step waits for. A program owns
ROWS rows of the result. A tile of its weights is cut into PARTS along the columns, one for each
warp at least, whose products are added up at the end. While one tile is worked on the next is read;
the first one is on its way before the wait for the kernel in front (programmatic dependent launch).

Vectors are rounded as those handed over one at a time are (`activation_quant`), so that a token
checked is the token that would have been chosen: to the type they have, after their norm. Weights
that are multiplied in words have a kernel of their own (`gemm_quantized`)."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwencli.engine.kernels.epilogue import load_tile_state, store_tile


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
    w_ptr,  # [N, K], or [2 N, K] for SWIGLU
    scale_ptr,  # float32 [N] or [2 N], where SCALED
    bias_ptr,  # [N], or None
    y_ptr,  # [TOKENS, N]
    seen_ptr,  # bool [N]
    penalty_ptr,  # float32 []
    input_ids_ptr,  # int64 [TOKENS], the tokens of this step
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
    ADD: tl.constexpr,
    ARGMAX: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As `gemv_kernel` for each vector."""
    BLOCK: tl.constexpr = PARTS * PART
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = tl.arange(0, 8)  # what a matrix unit takes at least
    up_ptr = w_ptr + N.to(tl.int64) * K
    w = weight_tile(w_ptr, 0, rows, N, K, PARTS, PART)
    if SWIGLU:
        up = weight_tile(up_ptr, 0, rows, N, K, PARTS, PART)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if NORM:
        norms = row_scales(x_ptr, eps, K, BLOCK, TOKENS)
    acc = tl.zeros((PARTS, ROWS, 8), tl.float32)
    up_acc = tl.zeros((PARTS, ROWS, 8), tl.float32)
    part = tl.arange(0, PARTS)[:, None, None]
    for start in tl.range(0, K, BLOCK, num_stages=1):
        after = start + BLOCK
        next_w = weight_tile(w_ptr, after, rows, N, K, PARTS, PART)
        if SWIGLU:
            next_up = weight_tile(up_ptr, after, rows, N, K, PARTS, PART)
        columns = start + part * PART + tl.arange(0, PART)[None, :, None]
        there = (columns < K) & (tokens < TOKENS)[None, None, :]
        x = tl.load(x_ptr + tokens[None, None, :] * K + columns, mask=there, other=0.0)
        if NORM:
            gain = tl.load(gain_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
            x = (x.to(tl.float32) * norms[None, None, :] * gain).to(x.dtype)
        acc = tl.dot(w.to(x.dtype), x, acc, input_precision=PRECISION)
        if SWIGLU:
            up_acc = tl.dot(up.to(x.dtype), x, up_acc, input_precision=PRECISION)
        w = next_w
        if SWIGLU:
            up = next_up

    inside = rows < N
    y = tl.sum(acc, axis=0)  # [ROWS, 8]
    up_y = tl.sum(up_acc, axis=0)
    if SCALED:
        y *= tl.load(scale_ptr + rows, mask=inside, other=0.0)[:, None]
        if SWIGLU:
            up_y *= tl.load(scale_ptr + N + rows, mask=inside, other=0.0)[:, None]
    if SWIGLU:
        y = y * tl.sigmoid(y) * up_y
    state = load_tile_state(
        rows, N, bias_ptr, y_ptr, seen_ptr, penalty_ptr, input_ids_ptr, TOKENS, ADD, ARGMAX
    )
    store_tile(y, state, rows, N, y_ptr, best_ptr, y_ptr, TOKENS, ARGMAX, False)
