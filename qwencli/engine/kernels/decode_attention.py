"""Attention of the newest tokens over a KV cache, from the raw projections to the result.

One kernel norms and rotates queries and keys, writes keys and values into the cache, and attends.
The sequence is cut into parts that run at once; the last program of a head to finish joins them
(flash-decoding, Dao et al. 2023). How long the sequence is is read on the device, so one captured
graph serves every length.

A sequence takes 1 to 8 new tokens a step, in consecutive slots, each seeing itself and those before
it. The queries of tokens that share a key head are the rows of one matrix, as many as a matrix
instruction takes: the cache is read once for them. Further tokens are further programs' work, at
the same time, which find what they read in the second-level cache.

The cache is a static one, whose rows are equally long, or a pool of pages, whose rows differ: each
then has a slot, a position and a page table of its own. How many parts a row has depends on its
length; programs of parts that it does not have end at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwencli.engine.kernels.activation_quant import (
    HALVES,
    store_activation,
    store_activation_chunks,
)
from qwencli.engine.kernels.flash_decode import flash_decode_combine
from qwencli.engine.kernels.kv_store import FP8_MAX, as_float32, store_new
from qwencli.engine.kernels.quantized_kv_attention import (
    attend_cached,
    key_words,
    slot_scales,
    value_words,
)


@triton.jit
def norm_and_rotate(a, b, gain_a, gain_b, cos, sin, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Halves [R, D / 2] of heads -> halves of the normed and rotated heads, float32."""
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D + eps)[:, None]
        a *= scale * gain_a.to(tl.float32)
        b *= scale * gain_b.to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def first_of_pairs(D: tl.constexpr, ROTARY: tl.constexpr):
    """Columns [1, D / 2] of a head: of each pair that rotates the first, and then half of those
    that do not."""
    at = tl.arange(0, D // 2)[None, :]
    return at if ROTARY == D else tl.where(at < ROTARY // 2, at, at + ROTARY // 2)


@triton.jit
def second_of_pairs(D: tl.constexpr, ROTARY: tl.constexpr):
    """The others, in the order of `first_of_pairs`."""
    at = tl.arange(0, D // 2)[None, :]
    apart: tl.constexpr = ROTARY // 2
    return at + D // 2 if ROTARY == D else tl.where(at < apart, at + apart, at + D // 2)


@triton.jit
def load_angles(angles_ptr, turned, D: tl.constexpr, ROTARY: tl.constexpr):
    """Cosine and signed sine of pairs, float32; those that are not `turned` stay as they are."""
    sin_ptr = angles_ptr + ROTARY + ROTARY // 2
    if ROTARY == D:
        cos, sin = tl.load(angles_ptr), tl.load(sin_ptr)
    else:
        cos = tl.load(angles_ptr, mask=turned, other=1.0)
        sin = tl.load(sin_ptr, mask=turned, other=0.0)
    return cos.to(tl.float32), sin.to(tl.float32)


@triton.jit(do_not_specialize=["max_seq_len", "table_stride"])
def decode_attention_kernel(
    qkv_ptr,  # [B * TOKENS, (H + 2 KVH) * D]; GATED: (2 H + 2 KVH) * D, each query and its gate
    q_gain_ptr,  # [D], weight of the queries' norm
    k_gain_ptr,  # [D]
    angles_ptr,  # [positions, 2, ROTARY]: cosine and signed sine, see ops.rope
    position_ptr,  # int64 [B], of the first new token
    # Keys, then values; the type of qkv, or bytes: [B, 2 * KVH, max_seq_len, D], or pages
    # [pages, PAGE, 2 * KVH, D].
    cache_ptr,
    scales_ptr,  # float32 of int8 and fp8, likewise but for D
    slot_ptr,  # int64 [1], of the first new token in its sequence; [B] where there are pages
    page_table_ptr,  # int32 [B, pages] with `table_stride` from row to row
    out_ptr,  # [B * TOKENS, H * D]
    acc_ptr,  # float32 [B * KVH * QUERY_TILES, SPLITS, LANES, D]
    row_max_ptr,  # float32 [B * KVH * QUERY_TILES, SPLITS, LANES]: largest score
    row_sum_ptr,  # float32 [B * KVH * QUERY_TILES, SPLITS, LANES]: sum of weights
    semaphore_ptr,  # int32 [B * KVH * QUERY_TILES], zero
    # Of one token see `activation_quant`, of several `quantize_activation_chunks_kernel`.
    act_values_ptr,
    act_scales_ptr,
    act_group_scales_ptr,
    act_offsets_ptr,
    max_seq_len,
    table_stride,
    eps,
    KVH: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    GATED: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    EACH: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    SHORTEST: tl.constexpr,
    NORM: tl.constexpr,
    KV_MAX: tl.constexpr,
    ACT_FORMAT: tl.constexpr,
    ACT_GROUP: tl.constexpr,
    IN_CHUNKS: tl.constexpr,
    RUN: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WARPS: tl.constexpr,
    KV_IN_WORDS: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program ((b * KVH + kv head) * QUERY_TILES + query_tile, split). ACT_FORMAT: what the next
    product wants of the result, see `activation_quant`; IN_CHUNKS: as several vectors are rounded;
    RUN: see `words_in_a_row`.

    PAGE is how many tokens a page has, a multiple of BLOCK; 0 where the cache is a static one. A
    part has SHORTEST slots at least, a multiple of BLOCK.

    KV_MAX is the largest value that a quantized cache stores (see `cache.kv_cache`), 0 where it
    is not quantized. A slot's scales are multiplied with its scores and its weights: what is read
    needs no arithmetic but the conversion. KV_IN_WORDS: it is read as `quantized_kv_attention`
    does.

    The first ROTARY columns of a head rotate, in pairs ROTARY / 2 apart. Heads are worked on in two
    parts that have a column of each pair, see `first_of_pairs`. GATED: results are multiplied by
    the sigmoid of their gates.

    A query tile is EACH tokens, a power of two; the last one may have fewer. HEADS is GROUP rounded
    up to a power of two, LANES is HEADS * EACH: lane t * HEADS + g is query head g of a tile's
    token t. Scores are in powers of two: exp2 is one instruction."""
    QUERY_TILES: tl.constexpr = (TOKENS + EACH - 1) // EACH
    LANES: tl.constexpr = HEADS * EACH
    HALF: tl.constexpr = D // 2
    H: tl.constexpr = KVH * GROUP
    QUERIES: tl.constexpr = 2 * H if GATED else H
    APART: tl.constexpr = 2 * D if GATED else D  # from one query head to the next
    WIDTH: tl.constexpr = (QUERIES + 2 * KVH) * D
    tl.static_assert(ROTARY == D or not KV_IN_WORDS)
    TYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    # What a matrix unit takes at least: of the operand whose rows queries are, or columns.
    LEAST: tl.constexpr = 8 if KV_IN_WORDS and TOKENS == 1 else 16
    ROWS: tl.constexpr = LEAST if LANES < LEAST else LANES
    query_tile = tl.program_id(0) % QUERY_TILES
    pair = tl.program_id(0) // QUERY_TILES
    split = tl.program_id(1)
    batch = pair // KVH
    head = pair % KVH
    low, high = first_of_pairs(D, ROTARY), second_of_pairs(D, ROTARY)
    full = tl.arange(0, D)[None, :]
    if PAGE > 0:
        tl.static_assert(PAGE % BLOCK == 0)
        slot_ptr += batch
        page_table_ptr += batch * table_stride
        # The part's first page if parts are short, on its way before it is known that they are.
        likely = split * SHORTEST // PAGE
        first_page = tl.load(page_table_ptr + likely, mask=likely < table_stride, other=0)
    slot = tl.load(slot_ptr).to(tl.int32)  # = number of slots before the new ones
    part = tl.maximum(tl.cdiv(tl.cdiv(slot, SPLITS), BLOCK) * BLOCK, SHORTEST)
    kv_splits = tl.maximum(tl.cdiv(slot, part), 1)
    start = split * part
    end = tl.minimum(start + part, slot)
    if PAGE > 0:  # noqa: SIM102
        # Of short rows beside long ones there are many. The row's first program waits.
        if split >= kv_splits:
            return

    # No earlier kernel of this step writes any of this: it is read before the wait.
    SLOT: tl.constexpr = 2 * KVH * D if PAGE > 0 else D  # from one slot of a head to the next
    if PAGE > 0:
        k_ptr = cache_ptr + head * D
        v_ptr = k_ptr + KVH * D
        k_scales_ptr = scales_ptr + head
        v_scales_ptr = k_scales_ptr + KVH
        page_ptr = page_table_ptr + start // PAGE
        first_page = tl.load(page_ptr, mask=(part > SHORTEST) & (start < end), other=first_page)
    else:
        k_ptr = cache_ptr + (batch * 2 * KVH + head).to(tl.int64) * max_seq_len * D
        v_ptr = k_ptr + KVH * max_seq_len.to(tl.int64) * D
        k_scales_ptr = scales_ptr + (batch * 2 * KVH + head).to(tl.int64) * max_seq_len
        v_scales_ptr = k_scales_ptr + KVH * max_seq_len.to(tl.int64)
    own = tl.arange(0, 1 if TOKENS == 1 else 16)
    own_places = slot.to(tl.int64) + own
    if PAGE > 0:
        own_page = tl.load(page_table_ptr + own_places // PAGE, mask=own < TOKENS, other=0)
        own_places = own_page.to(tl.int64) * PAGE + own_places % PAGE
    if KV_IN_WORDS:
        k_words = key_words(k_ptr, start, end, D, BLOCK, WARPS)
        v_words = value_words(v_ptr, start, end, D, BLOCK, WARPS)
        k_scale = slot_scales(k_scales_ptr, start, end, BLOCK)
        v_scale = slot_scales(v_scales_ptr, start, end, BLOCK)
    else:
        slots = start + tl.arange(0, BLOCK)
        there = (slots < end)[:, None]
        places = slots
        if PAGE > 0:
            places = first_page.to(tl.int64) * PAGE + start % PAGE + tl.arange(0, BLOCK)
        k_low = tl.load(k_ptr + places[:, None] * SLOT + low, mask=there, other=0.0)
        k_high = tl.load(k_ptr + places[:, None] * SLOT + high, mask=there, other=0.0)
        v = tl.load(v_ptr + places[:, None] * SLOT + full, mask=there, other=0.0)
        if KV_MAX > 0:
            scale_at = places * (SLOT // D)
            k_scale = tl.load(k_scales_ptr + scale_at, mask=slots < end, other=0.0)
            v_scale = tl.load(v_scales_ptr + scale_at, mask=slots < end, other=0.0)
    angles_ptr += tl.load(position_ptr + batch) * 2 * ROTARY
    pair_at = tl.arange(0, HALF)[None, :]
    turned = pair_at < ROTARY // 2
    if TOKENS == 1:
        turn = pair_at
    else:
        token = query_tile * EACH + tl.arange(0, ROWS) // HEADS
        turn = tl.minimum(token, TOKENS - 1)[:, None] * 2 * ROTARY + pair_at
    cos, sin = load_angles(angles_ptr + turn, turned, D, ROTARY)
    if NORM:
        q_gain_low = tl.load(q_gain_ptr + low)
        q_gain_high = tl.load(q_gain_ptr + high)
        k_gain_low = tl.load(k_gain_ptr + low)
        k_gain_high = tl.load(k_gain_ptr + high)
    else:
        q_gain_low, q_gain_high = cos, cos
        k_gain_low, k_gain_high = cos, cos
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if split >= kv_splits:
        return

    lanes = tl.arange(0, ROWS)
    if TOKENS == 1:
        real = lanes < GROUP
        qkv_ptr += batch * WIDTH
        q_at = (head * GROUP + lanes)[:, None] * APART
    else:
        real = (lanes < LANES) & (token < TOKENS) & (lanes % HEADS < GROUP)
        qkv_ptr += batch * TOKENS * WIDTH
        q_at = token[:, None] * WIDTH + (head * GROUP + lanes % HEADS)[:, None] * APART
    q_low = tl.load(qkv_ptr + q_at + low, mask=real[:, None], other=0.0)
    q_high = tl.load(qkv_ptr + q_at + high, mask=real[:, None], other=0.0)
    if TOKENS == 1:
        new_low = tl.load(qkv_ptr + (QUERIES + head) * D + low)
        new_high = tl.load(qkv_ptr + (QUERIES + head) * D + high)
        new_v = tl.load(qkv_ptr + (QUERIES + KVH + head) * D + full)
    else:
        # On their way while queries are worked on.
        fresh = tl.arange(0, 16)  # the least that a matrix unit takes
        new = (fresh < tl.where(split == 0, TOKENS, 0))[:, None]
        new_ptr = qkv_ptr + (QUERIES + head) * D + fresh[:, None] * WIDTH
        new_low = tl.load(new_ptr + low, mask=new, other=0.0)
        new_high = tl.load(new_ptr + high, mask=new, other=0.0)
        new_v = tl.load(new_ptr + KVH * D + full, mask=new, other=0.0)
        new_angles_ptr = angles_ptr + fresh[:, None] * 2 * ROTARY + pair_at
        if ROTARY == D:
            new_cos = tl.load(new_angles_ptr, mask=new, other=0.0).to(tl.float32)
            new_sin = tl.load(new_angles_ptr + D + HALF, mask=new, other=0.0).to(tl.float32)
        else:
            new_cos, new_sin = load_angles(new_angles_ptr, new & turned, D, ROTARY)
    q_low, q_high = norm_and_rotate(q_low, q_high, q_gain_low, q_gain_high, cos, sin, eps, D, NORM)
    scale: tl.constexpr = D**-0.5 * 1.4426950408889634
    q_low *= scale
    q_high *= scale

    # The new tokens: their keys and values go to the cache, and are the first that are looked at.
    running_max = tl.full((ROWS,), float("-inf"), tl.float32)
    running_sum = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    if split == 0:
        if TOKENS == 1:
            key_low, key_high = norm_and_rotate(
                new_low, new_high, k_gain_low, k_gain_high, cos, sin, eps, D, NORM
            )
            key_low, key_high, new_v = store_new(
                key_low.to(TYPE), key_high.to(TYPE), new_v, own_places, tl.arange(0, 1) < 1,
                low, high, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, SLOT, D, KV_MAX,
            )  # fmt: skip
            running_max = tl.sum(q_low * key_low.to(tl.float32), axis=1)
            running_max += tl.sum(q_high * key_high.to(tl.float32), axis=1)
            running_sum += 1.0
            acc += new_v.to(tl.float32)
        else:
            key_low, key_high = norm_and_rotate(
                new_low, new_high, k_gain_low, k_gain_high, new_cos, new_sin, eps, D, NORM
            )
            key_low, key_high, new_v = store_new(
                key_low.to(TYPE), key_high.to(TYPE), new_v, own_places,
                fresh < tl.where(query_tile == 0, TOKENS, 0), low, high, k_ptr, v_ptr, k_scales_ptr,
                v_scales_ptr, SLOT, D, KV_MAX,
            )  # fmt: skip
            seen = (fresh[None, :] <= token[:, None]) & (fresh < TOKENS)[None, :]
            running_max, running_sum, acc = attend_new(
                q_low.to(TYPE), q_high.to(TYPE), key_low, key_high, new_v, seen, PRECISION
            )

    if KV_IN_WORDS:
        running_max, running_sum, acc = attend_cached(
            q_low, q_high, k_words, v_words, k_scale, v_scale, k_ptr, v_ptr, k_scales_ptr,
            v_scales_ptr, start, end, running_max, running_sum, acc, KV_MAX == FP8_MAX, BLOCK,
            WARPS,
        )  # fmt: skip
    else:
        q_low = q_low.to(TYPE)
        q_high = q_high.to(TYPE)
        while start < end:
            # The next block is read while this one is worked on.
            start += BLOCK
            slots = start + tl.arange(0, BLOCK)
            there = (slots < end)[:, None]
            if PAGE > 0:
                next_places = slot_places(start, end, page_table_ptr, BLOCK, PAGE)
            else:
                next_places = slots.to(tl.int64)
            at = next_places[:, None] * SLOT
            next_low = tl.load(k_ptr + at + low, mask=there, other=0.0)
            next_high = tl.load(k_ptr + at + high, mask=there, other=0.0)
            next_v = tl.load(v_ptr + at + full, mask=there, other=0.0)
            if KV_MAX > 0:
                k_low, k_high = as_float32(k_low, KV_MAX), as_float32(k_high, KV_MAX)
                v = as_float32(v, KV_MAX)
            scores = tl.dot(q_low, tl.trans(k_low.to(TYPE)), input_precision=PRECISION)
            scores = tl.dot(q_high, tl.trans(k_high.to(TYPE)), scores, input_precision=PRECISION)
            if KV_MAX > 0:
                scores *= k_scale[None, :]
            scores = tl.where((slots - BLOCK < end)[None, :], scores, float("-inf"))
            new_max = tl.maximum(running_max, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_max[:, None])
            shrink = tl.exp2(running_max - new_max)
            running_sum = running_sum * shrink + tl.sum(weights, axis=1)
            if KV_MAX > 0:
                weights *= v_scale[None, :]
                next_scale_at = next_places * (SLOT // D)
                k_scale = tl.load(k_scales_ptr + next_scale_at, mask=slots < end, other=0.0)
                v_scale = tl.load(v_scales_ptr + next_scale_at, mask=slots < end, other=0.0)
            acc = tl.dot(
                weights.to(TYPE), v.to(TYPE), acc * shrink[:, None], input_precision=PRECISION
            )
            running_max = new_max
            k_low, k_high, v = next_low, next_high, next_v

    if kv_splits == 1:
        if TOKENS == 1:
            out_at = (batch * H + head * GROUP + lanes)[:, None] * D + full
        else:
            row = (batch * TOKENS + token) * H + head * GROUP + lanes % HEADS
            out_at = row[:, None] * D + full
        attended = acc / running_sum[:, None]
        if GATED:
            gates = tl.load(qkv_ptr + q_at + D + full, mask=real[:, None], other=0.0)
            attended *= tl.sigmoid(gates.to(tl.float32))
        tl.store(out_ptr + out_at, attended, mask=real[:, None])
        if ACT_FORMAT > 0:
            if not IN_CHUNKS:
                store_heads(
                    attended,
                    out_at,
                    real,
                    out_ptr,
                    act_values_ptr,
                    act_scales_ptr,
                    H * D,
                    ACT_FORMAT,
                    ACT_GROUP,
                )
            else:
                store_heads_in_chunks(
                    attended, head * GROUP + lanes % HEADS,
                    batch * TOKENS + (token if TOKENS > 1 else lanes // ROWS), real, out_ptr,
                    act_values_ptr, act_group_scales_ptr, act_offsets_ptr, ACT_FORMAT, RUN,
                )  # fmt: skip
    else:
        first = tl.program_id(0) * SPLITS * LANES
        mine = first + split * LANES + lanes
        tl.store(acc_ptr + mine[:, None] * D + full, acc, mask=real[:, None])
        tl.store(row_max_ptr + mine, running_max, mask=real)
        tl.store(row_sum_ptr + mine, running_sum, mask=real)
        # Every thread's part is stored before one of them says so.
        tl.debug_barrier()
        semaphore_ptr += tl.program_id(0)
        if tl.atomic_add(semaphore_ptr, 1, sem="acq_rel") == kv_splits - 1:
            tl.store(semaphore_ptr, 0)  # for the next layer
            joined = flash_decode_combine(
                acc_ptr + first * D, row_max_ptr + first, row_sum_ptr + first, kv_splits,
                D, LANES, SPLITS, AT_ONCE,
            )  # fmt: skip
            query = tl.arange(0, LANES)
            asker = query_tile * EACH + query // HEADS
            asked = (asker < TOKENS) & (query % HEADS < GROUP)
            out_row = (batch * TOKENS + asker) * H + head * GROUP + query % HEADS
            place = out_row[:, None] * D + full
            if GATED:
                gate_at = asker[:, None] * WIDTH + (head * GROUP + query % HEADS)[:, None] * APART
                gate_ptr = qkv_ptr + gate_at + D + full
                gates = tl.load(gate_ptr, mask=asked[:, None], other=0.0)
                joined *= tl.sigmoid(gates.to(tl.float32))
            tl.store(out_ptr + place, joined, mask=asked[:, None])
            if ACT_FORMAT > 0:
                if not IN_CHUNKS:
                    store_heads(
                        joined,
                        place,
                        asked,
                        out_ptr,
                        act_values_ptr,
                        act_scales_ptr,
                        H * D,
                        ACT_FORMAT,
                        ACT_GROUP,
                    )
                else:
                    store_heads_in_chunks(
                        joined, head * GROUP + query % HEADS, batch * TOKENS + asker, asked,
                        out_ptr, act_values_ptr, act_group_scales_ptr, act_offsets_ptr, ACT_FORMAT,
                        RUN,
                    )  # fmt: skip


@triton.jit
def slot_places(first, end, page_table_ptr, COUNT: tl.constexpr, PAGE: tl.constexpr):
    """Where COUNT slots of a sequence from `first` on, all of one page, are in the pool: int64
    [COUNT]; anywhere from `end` on."""
    page = tl.load(page_table_ptr + first // PAGE, mask=first < end, other=0).to(tl.int64)
    return page * PAGE + first % PAGE + tl.arange(0, COUNT)


@triton.jit
def store_heads(
    heads,  # float32 [R, D]
    columns,  # [R, D]
    real,  # [R]
    out_ptr,
    act_values_ptr,
    act_scales_ptr,
    K,
    ACT_FORMAT: tl.constexpr,
    ACT_GROUP: tl.constexpr,
):
    """Hand over heads as those who read them would see them stored."""
    SIZE: tl.constexpr = heads.shape[0] * heads.shape[1]
    x = heads.to(out_ptr.dtype.element_ty).to(tl.float32)
    inside = tl.broadcast_to(real[:, None], heads.shape)
    store_activation(
        tl.reshape(x, (SIZE,)), tl.reshape(columns, (SIZE,)), tl.reshape(inside, (SIZE,)),
        act_values_ptr, act_scales_ptr, K, ACT_FORMAT, ACT_GROUP,
    )  # fmt: skip


@triton.jit
def store_heads_in_chunks(
    heads,  # float32 [R, D]
    head,  # [R], which each is
    row,  # [R], and of which vector
    real,  # [R]
    out_ptr,
    act_values_ptr,
    act_group_scales_ptr,
    act_offsets_ptr,
    ACT_FORMAT: tl.constexpr,
    RUN: tl.constexpr,
):
    """Round heads of several tokens as those who read them would see them stored."""
    COLUMNS: tl.constexpr = 128 if ACT_FORMAT == HALVES else 64
    EACH: tl.constexpr = heads.shape[1] // COLUMNS  # chunks of a head
    COUNT: tl.constexpr = heads.shape[0] * EACH
    heads = tl.where(real[:, None], heads, 0.0)  # lanes that only fill up have no weights
    x = tl.reshape(heads.to(out_ptr.dtype.element_ty).to(tl.float32), (COUNT, COLUMNS))
    chunk = head[:, None] * EACH + tl.arange(0, EACH)[None, :]
    row = tl.broadcast_to(row[:, None], chunk.shape)
    real = tl.broadcast_to(real[:, None], chunk.shape)
    store_activation_chunks(
        x, tl.reshape(chunk, (COUNT,)), tl.reshape(row, (COUNT,)), tl.reshape(real, (COUNT,)),
        act_values_ptr, act_group_scales_ptr, act_offsets_ptr, ACT_FORMAT, RUN,
    )  # fmt: skip


@triton.jit
def attend_new(
    q_low,  # [ROWS, D / 2]
    q_high,
    key_low,  # [16, D / 2], of the new tokens
    key_high,
    values,  # [16, D]
    seen,  # [ROWS, 16], which of them a query may see: one at least, or its results are NaN
    PRECISION: tl.constexpr,
):
    """What queries see of the new tokens, of which a matrix unit takes all at once.

    Returns the largest scores, the sums of weights [ROWS] and the weighted values [ROWS, D].
    """
    scores = tl.dot(q_low, tl.trans(key_low), input_precision=PRECISION)
    scores = tl.dot(q_high, tl.trans(key_high), scores, input_precision=PRECISION)
    scores = tl.where(seen, scores, float("-inf"))
    running_max = tl.max(scores, axis=1)
    weights = tl.exp2(scores - running_max[:, None])
    values = values.to(q_low.dtype)
    acc = tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    return running_max, tl.sum(weights, axis=1), acc
