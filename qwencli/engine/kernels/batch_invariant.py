"""Kernels whose sums for a token do not depend on what runs beside it.

One product and one attention serve prompts and steps of any number of rows, so a token's result is
the same bits in any batch, behind any cut of its prompt, and behind a reused beginning. A product
is cut into tiles by its matrix alone, and adds up its columns in one order; a step of one row fills
up a tile as a prompt does. Attention goes through a row's pages from the first to the last, which
no other row's length changes; what lies behind a token counts as nothing, exactly. Quantized
matrices are read back before they are multiplied. Held to `ops.batch_invariant`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwencli.engine.cache.paged_kv import (
    PAGE_SIZE,
    DecodePages,
    PackedPrompts,
    PagedKVCache,
    QuantizedPagedKVCache,
)
from qwencli.engine.kernels.kv_store import as_float32
from qwencli.engine.kernels.moe import FEWEST_TOKENS, grouped_experts
from qwencli.engine.ops.decoder_ops import DecoderOps, Layer, Matrix, RMSNorm, Step, dense
from qwencli.engine.quant.quantized_tensor import LARGEST

Tensor = torch.Tensor

ROWS = 64  # of a product's tile, and lanes of attention: rows of the widest matrix instruction
WARPS = 4
# A matrix with more results than this has programs enough with wide tiles.
WIDE_FROM = 16_384


@triton.jit(do_not_specialize=["M"])
def fixed_gemm_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]
    y_ptr,  # [M, N]
    M,
    N,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (ROWS rows, COLUMNS columns) of y = x w^T, in steps of DEPTH along K."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x_at = x_ptr + row[:, None].to(tl.int64) * K
    w_at = w_ptr + column[None, :].to(tl.int64) * K
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, DEPTH):
        k = start + tl.arange(0, DEPTH)
        x = tl.load(x_at + k[None, :], mask=(row < M)[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(w_at + k[:, None], mask=(column < N)[None, :] & (k < K)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    there = (row < M)[:, None] & (column < N)[None, :]
    at = y_ptr + row[:, None].to(tl.int64) * N + column[None, :]
    tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["table_stride"])
def page_attention_kernel(
    q_ptr,  # [tokens, ..], H heads of D columns in front; normed and rotated
    pool_ptr,  # [pages, PAGE, 2 * KVH, D]: keys, then values; the type of q, or bytes
    scales_ptr,  # float32 of int8 and fp8, likewise but for D
    table_ptr,  # int32 [sequences, ..]
    start_ptr,  # int32 [sequences + 1], where each one's tokens begin
    place_ptr,  # int64 [sequences], of the first of them in its sequence
    out_ptr,  # [tokens, H * D]
    q_stride,
    table_stride,
    KVH: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    EACH: tl.constexpr,
    KV_MAX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (sequence, key head, EACH tokens). Lane t * HEADS + g is query head g of token t;
    HEADS is GROUP, and WIDTH is D, rounded up to a power of two."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(start_ptr + sequence)
    count = tl.load(start_ptr + sequence + 1) - first
    if tl.program_id(2) * EACH >= count:
        return
    TYPE: tl.constexpr = q_ptr.dtype.element_ty
    SLOT: tl.constexpr = 2 * KVH * D
    lane = tl.arange(0, EACH * HEADS)
    token = tl.program_id(2) * EACH + lane // HEADS
    query = head * GROUP + lane % HEADS
    column = tl.arange(0, WIDTH)[None, :]
    real = ((token < count) & (lane % HEADS < GROUP))[:, None] & (column < D)
    q_at = (first + token).to(tl.int64)[:, None] * q_stride + query[:, None] * D + column
    q = tl.load(q_ptr + q_at, mask=real, other=0.0)
    begin = tl.load(place_ptr + sequence).to(tl.int32)
    place = begin + token
    end = begin + tl.minimum(tl.program_id(2) * EACH + EACH, count)
    scale: tl.constexpr = D**-0.5 * 1.4426950408889634
    row_max = tl.full((EACH * HEADS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((EACH * HEADS,), tl.float32)
    acc = tl.zeros((EACH * HEADS, WIDTH), tl.float32)
    for page_start in range(0, end, PAGE):
        page = tl.load(table_ptr + sequence * table_stride + page_start // PAGE)
        slot = page_start + tl.arange(0, PAGE)
        at = page.to(tl.int64) * PAGE + tl.arange(0, PAGE)
        there = (slot < end)[:, None] & (column < D)
        kv_at = pool_ptr + at[:, None] * SLOT + head * D + column
        k = tl.load(kv_at, mask=there, other=0.0)
        v = tl.load(kv_at + KVH * D, mask=there, other=0.0)
        if KV_MAX > 0:
            k, v = as_float32(k, KV_MAX), as_float32(v, KV_MAX)
        scores = tl.dot(q, tl.trans(k.to(TYPE)), input_precision=PRECISION) * scale
        if KV_MAX > 0:
            scale_at = scales_ptr + at * (2 * KVH) + head
            scores *= tl.load(scale_at, mask=slot < end, other=0.0)[None, :]
        scores = tl.where(slot[None, :] <= place[:, None], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, axis=1)
        if KV_MAX > 0:
            weights *= tl.load(scale_at + KVH, mask=slot < end, other=0.0)[None, :]
        acc = tl.dot(weights.to(TYPE), v.to(TYPE), acc * shrink[:, None], input_precision=PRECISION)
        row_max = new_max
    out_at = (first + token).to(tl.int64)[:, None] * (KVH * GROUP * D) + query[:, None] * D + column
    tl.store(out_ptr + out_at, (acc / row_sum[:, None]).to(TYPE), mask=real)


def product(x: Tensor, matrix: Tensor, out: torch.dtype | None = None) -> Tensor:
    """x [M, K] times matrix [K, N], the view of a contiguous [N, K] -> [M, N] of type `out`."""
    weight, x = matrix.t(), x.contiguous()
    assert weight.is_contiguous(), "kernels read rows of the weight"
    (count, depth), width = x.shape, len(weight)
    y = torch.empty(count, width, dtype=out or x.dtype, device=x.device)
    exact = x.dtype is torch.float32
    wide = width > WIDE_FROM and not exact
    columns = 128 if wide else 32
    grid = (triton.cdiv(count, ROWS), triton.cdiv(width, columns))
    fixed_gemm_kernel[grid](
        x,
        weight,
        y,
        count,
        width,
        K=depth,
        ROWS=ROWS,
        COLUMNS=columns,
        DEPTH=32 if exact else 64 if wide else 128,
        PRECISION="ieee" if exact else "tf32",
        num_warps=WARPS,
        num_stages=3,
    )
    return y


def page_attention(
    q: Tensor, cache: PagedKVCache, layer: int, pages: DecodePages | PackedPrompts
) -> Tensor:
    """q [N, H, D], heads side by side, of a step or of prompts, whose keys and values are in their
    pages already -> [N, H * D]."""
    assert pages.tables is not None, "the runner gives prompts theirs"
    if isinstance(pages, DecodePages):
        longest, places = 1, pages.places
        starts = torch.arange(len(places) + 1, dtype=torch.int32, device=q.device)
    else:
        longest, starts = max(pages.lengths), pages.starts
        places = (pages.context_starts.diff() - starts.diff()).to(torch.int64)
    pool = scales = cache.layers[layer]
    kv_max = 0
    if isinstance(cache, QuantizedPagedKVCache):
        pool, scales, kv_max = pool.view(torch.int8), cache.scales[layer], LARGEST[cache.scheme]
    count, heads, dim = q.shape
    group = heads // cache.num_kv_heads
    lanes = triton.next_power_of_2(group)
    each = max(ROWS // lanes, 1)
    exact = q.dtype is torch.float32
    out = torch.empty(count, heads * dim, dtype=q.dtype, device=q.device)
    page_attention_kernel[len(places), cache.num_kv_heads, triton.cdiv(longest, each)](
        q,
        pool,
        scales,
        pages.tables,
        starts,
        places,
        out,
        q.stride(0),
        pages.tables.stride(0),
        KVH=cache.num_kv_heads,
        GROUP=group,
        HEADS=lanes,
        D=dim,
        WIDTH=triton.next_power_of_2(dim),
        PAGE=PAGE_SIZE,
        EACH=each,
        KV_MAX=kv_max,
        PRECISION="ieee" if exact else "tf32",
        num_warps=2 * WARPS if exact else WARPS,
        num_stages=1 if exact else 2,
    )
    return out


class BatchInvariantOps:
    """The operations of a model whose lone steps are `step`, of which what works row by row stays.

    Norms, rotation, SwiGLU and the choice of the likeliest token are a program or more a row.
    """

    def __init__(self, step: DecoderOps) -> None:
        self._step = step

    def ops(self) -> DecoderOps:
        return DecoderOps(
            norm_qkv=self.norm_qkv,
            attend=self.attend,
            o_residual=self.o_residual,
            norm_gate_up=self.norm_gate_up,
            down_residual=self.down_residual,
            norm_head=self.norm_head,
            experts_residual=self.experts_residual,
            kv_len_on_device=True,
            choose_likeliest=self._step.choose_likeliest,
            advance_rows=self._step.advance_rows,
        )

    def norm_qkv(self, hidden: Tensor, layer: Layer) -> Tensor:
        qkv = self._product(layer.attn_norm(hidden), layer.qkv)
        return qkv if layer.qkv_bias is None else qkv.add_(layer.qkv_bias)

    def attend(self, qkv: Tensor, layer: Layer, step: Step) -> Tensor:
        assert isinstance(step.cache, PagedKVCache) and step.pages is not None, "only rows run so"
        split = qkv.view(step.batch, step.length, -1, layer.head_dim)
        self._step.qk_norm_rope_store(split, layer, step)
        queries = split.flatten(0, 1)[:, : layer.num_heads]
        return page_attention(queries, step.cache, layer.index, step.pages)

    def o_residual(self, attended: Tensor, layer: Layer, hidden: Tensor) -> Tensor:
        hidden.add_(self._product(attended, layer.o))
        return hidden if layer.o_bias is None else hidden.add_(layer.o_bias)

    def norm_gate_up(self, hidden: Tensor, layer: Layer) -> Tensor:
        return self._step.swiglu(self._product(layer.mlp_norm(hidden), layer.gate_up))

    def down_residual(self, activated: Tensor, layer: Layer, hidden: Tensor) -> Tensor:
        return hidden.add_(self._product(activated, layer.down))

    def experts_residual(self, hidden: Tensor, layer: Layer) -> Tensor:
        routing = layer.routing
        assert routing is not None, "a layer with experts"
        x = layer.mlp_norm(hidden)
        logits = product(x, routing.router.t(), torch.float32)
        alone = None
        if routing.shared_mlp is not None:
            gate_up, down = routing.shared_mlp
            alone = self._product(self._step.swiglu(self._product(x, gate_up)), down)
            alone = alone * logits[:, routing.num_experts :].sigmoid().to(x.dtype)
        precision = "ieee" if x.dtype is torch.float32 else "tf32"
        hidden = grouped_experts(hidden, layer, x, logits, precision, FEWEST_TOKENS)
        return hidden if alone is None else hidden.add_(alone)

    def norm_head(self, hidden: Tensor, norm: RMSNorm, head: Matrix) -> Tensor:
        """Logits [N, V], float32; a quantized head is never there whole."""
        x = norm(hidden)
        if isinstance(head, torch.Tensor):
            return product(x, head, torch.float32)
        pieces = [head.part(rows) for rows in head.pieces()]
        dequantize = self._step.dequantize
        return torch.cat(
            [product(x, dense(each, x, dequantize), torch.float32) for each in pieces], 1
        )

    def _product(self, x: Tensor, matrix: Matrix) -> Tensor:
        return product(x, dense(matrix, x, self._step.dequantize))


def batch_invariant_ops(step: DecoderOps) -> DecoderOps:
    """See `BatchInvariantOps`."""
    return BatchInvariantOps(step).ops()
