"""Activation quantization: a vector is quantized once, by the kernel that makes it.

Every program of a product needs the same of its vector: the gain of the norm in it, and values
quantized to what can be multiplied several at a time. Done by every program again, between the
wait for the kernel in front and the product, it took longer than the product. So the kernel that
makes a vector stores it in one of the formats below, and for a norm also the sum of squares of each
program's share, which are all that is left to add up.

format  values                                  one scale for       what reads them
FLOATS  x * gain, bfloat16 or float32           -                   float products
BYTES   int8, x * gain / scale                  4 columns           int8 weights
HALVES  int8 likewise, in halves                8 columns           4-bit weights
FLOAT16 float16, in halves, x * gain / scale    4 columns           fp8 weights with groups

A group of columns with one scale (ACT_GROUP) is a word of weights: its scale is the largest value
over 127, or that value itself for float16. (llama.cpp's Q8_1 has such groups, of 32.) "In halves":
the first half of each group's values, of all groups, lies before the second halves, so that a
thread reads what meets the low and the high half of its words as words in a row.

FLOATS are of the weights' own type where that has float32's range: threads then hold of a vector
what they hold of a row, and no weight has to change threads to meet its column.

For `gemm_quantized_kernel`, 2 to 8 vectors are quantized the same way, so that a token verified is
the token that would have been chosen. The rounded values are then stored as float16, divided by the
largest value of their part of a chunk, in the order in which the lanes of a matrix instruction take
them. A chunk is what the 4 lanes of a row of weights read at once, 16 bytes each: 64 columns of 8
bits, 128 of 4. A part is as much of it as shares a group's scale: all of it, or 64 columns, or 32.
"""

from __future__ import annotations

from enum import IntEnum

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


class ActivationFormat(IntEnum):
    NONE = 0
    FLOATS = 1
    BYTES = 2
    HALVES = 3
    FLOAT16 = 4


# Columns of a block: those of a word of weights.
ACT_GROUPS = {
    ActivationFormat.FLOATS: 1,
    ActivationFormat.BYTES: 4,
    ActivationFormat.HALVES: 8,
    ActivationFormat.FLOAT16: 4,
}

FLOATS = tl.constexpr(int(ActivationFormat.FLOATS))
BYTES = tl.constexpr(int(ActivationFormat.BYTES))
HALVES = tl.constexpr(int(ActivationFormat.HALVES))
FLOAT16 = tl.constexpr(int(ActivationFormat.FLOAT16))


@triton.jit
def store_activation(
    x,  # float32 [M], with the gain in it
    columns,  # int32 [M], in order in every block
    inside,  # bool [M], equal in every block
    act_values_ptr,  # [K], of the form's type
    act_scales_ptr,  # float32 [K / ACT_GROUP]
    K,
    ACT_FORMAT: tl.constexpr,
    ACT_GROUP: tl.constexpr,
):
    """Store a share of a vector in the form that the next matrix reads."""
    if ACT_FORMAT == FLOATS:
        tl.store(act_values_ptr + columns, x.to(act_values_ptr.dtype.element_ty), mask=inside)
    else:
        COUNT: tl.constexpr = x.shape[0] // ACT_GROUP
        x = tl.reshape(x, (COUNT, ACT_GROUP))
        columns = tl.reshape(columns, (COUNT, ACT_GROUP))
        inside = tl.reshape(inside, (COUNT, ACT_GROUP))
        largest = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-30)
        x *= (1.0 / largest)[:, None]
        at = columns
        if ACT_FORMAT != BYTES:
            HALF: tl.constexpr = ACT_GROUP // 2
            at = (columns // HALF % 2) * (K // 2) + columns // ACT_GROUP * HALF + columns % HALF
        if ACT_FORMAT == FLOAT16:
            step = largest
            act_values_ptr = act_values_ptr.to(tl.pointer_type(tl.float16))
            tl.store(act_values_ptr + at, x.to(tl.float16), mask=inside)
        else:
            step = largest * (1.0 / 127.0)
            # Adding 1.5 * 2^23 rounds to an integer, in the lowest bits of the result.
            q = (x * 127.0 + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
            tl.store(act_values_ptr + at, q.to(tl.int8), mask=inside)
        # One lane of a block stores its step.
        block = columns // ACT_GROUP
        first = inside & (columns % ACT_GROUP == 0)
        tl.store(
            act_scales_ptr + block, tl.broadcast_to(step[:, None], (COUNT, ACT_GROUP)), mask=first
        )


@triton.jit
def inverse_rms(sum_squares_ptr, K, eps, SHARES: tl.constexpr, AT_ONCE: tl.constexpr = 32):
    """What the RMS norm multiplies a vector [K] with, from the squares of SHARES programs.

    AT_ONCE: up to 32, a warp's width, each warp adds up all of them for itself, without a barrier;
    of many shares that can be more to read than the weights are.
    """
    squares = tl.zeros((AT_ONCE,), tl.float32)
    for i in tl.static_range((SHARES + AT_ONCE - 1) // AT_ONCE):
        share = i * AT_ONCE + tl.arange(0, AT_ONCE)
        squares += tl.load(sum_squares_ptr + share, mask=share < SHARES, other=0.0)
    return tl.rsqrt(tl.sum(squares) / K + eps)


@triton.jit
def quantize_activation_kernel(
    x_ptr,  # [K]
    gain_ptr,  # [K]; None = no norm
    g_idx_sort_ptr,  # int32 [K], which column of the matrix each is; None = in order
    act_values_ptr,
    act_scales_ptr,
    sum_squares_ptr,  # float32 [programs]
    K,
    ACT_FORMAT: tl.constexpr,
    ACT_GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Hand over a vector that no kernel of ours made, or that the next matrix wants in an order of
    its own."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    at = columns
    if g_idx_sort_ptr is not None:
        at = tl.load(g_idx_sort_ptr + columns, mask=inside, other=0)
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if gain_ptr is not None:
        tl.store(sum_squares_ptr + tl.program_id(0), tl.sum(x * x))
        x *= gain
    store_activation(x, columns, inside, act_values_ptr, act_scales_ptr, K, ACT_FORMAT, ACT_GROUP)


LANE_BYTES = 16
LANES = 4  # that share a chunk of a row


def chunk_columns(bits: int) -> int:
    return LANES * LANE_BYTES * 8 // bits


def words_in_a_row(group: int, columns: int) -> int:
    """Words of 4 bits that a lane takes in a row: a chunk may not end one group and begin another
    within one instruction."""
    if group == columns or group % 128 == 0:
        return 4
    return 2 if group % 64 == 0 else 1


@triton.jit
def store_activation_chunks(
    x,  # float32 [R, COLUMNS of a chunk], with the gain in it
    chunk,  # int32 [R], which chunk of its vector each row is
    token,  # int32 [R], and of which vector
    real,  # bool [R]
    act_values_ptr,  # these three as in `quantize_activation_chunks_kernel`
    act_group_scales_ptr,
    act_offsets_ptr,
    ACT_FORMAT: tl.constexpr,
    RUN: tl.constexpr,
):
    """Round chunks to the steps of ACT_FORMAT (`activation_quant`), in units of each part's largest
    value."""
    BITS: tl.constexpr = 4 if ACT_FORMAT == HALVES else 8
    ACT_GROUP: tl.constexpr = 32 // BITS  # columns of a word, which share a step
    PARTS: tl.constexpr = 4 // RUN
    R: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    blocks = tl.reshape(x, (R, COLUMNS // ACT_GROUP, ACT_GROUP))
    largest = tl.maximum(tl.max(tl.abs(blocks), axis=2), 1e-30)[:, :, None]
    blocks *= 1.0 / largest
    if ACT_FORMAT == FLOAT16:
        blocks = blocks.to(tl.float16).to(tl.float32) * largest
    else:
        # Adding 1.5 * 2^23 rounds to an integer, in the lowest bits of the result.
        q = (blocks * 127.0 + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        blocks = q.to(tl.float32) * (largest * (1.0 / 127.0))
    parts = tl.reshape(blocks, (R, PARTS, COLUMNS // PARTS))
    unit = tl.maximum(tl.max(tl.abs(parts), axis=2), 1e-30)  # [R, PARTS]
    units = (parts * (1.0 / unit)[:, :, None]).to(tl.float16)
    total = tl.sum(units.to(tl.float32), axis=2)
    part = (chunk[:, None] * PARTS + tl.arange(0, PARTS)[None, :]) * 8 + token[:, None]
    # fp8 is read as float16 with an exponent that is 8 too small.
    tl.store(
        act_group_scales_ptr + part,
        unit * 256.0 if ACT_FORMAT == FLOAT16 else unit,
        mask=real[:, None],
    )
    start = total * (-1152.0 if BITS == 8 else -1024.0)
    tl.store(act_offsets_ptr + part, start, mask=real[:, None])
    # Where the thread takes each from that multiplies it.
    at = tl.arange(0, COLUMNS)
    word = at // ACT_GROUP
    lane = word // RUN % 4
    word = word // (4 * RUN) * RUN + word % RUN
    place = at % ACT_GROUP
    if BITS == 8:
        step = word
        turn = place % 2 * 2 + place // 2
    else:
        nibble = place % 4 * 2 + place // 4
        pair = nibble % 4
        step = word * 2 + pair // 2
        turn = pair % 2 * 2 + nibble // 4
    to = (step // 2 * 32 + lane) * 8 + step % 2 * 4 + turn
    to = chunk[:, None] * (COLUMNS * 8) + token[:, None] * 32 + to[None, :]
    tl.store(act_values_ptr + to, tl.reshape(units, (R, COLUMNS)), mask=real[:, None])


@triton.jit
def quantize_activation_chunks_kernel(
    x_ptr,  # [TOKENS, K]
    gain_ptr,  # [K], or None
    act_values_ptr,  # float16 [chunks, steps, 8, 4, 4], `steps` instructions of 16 columns a chunk
    act_group_scales_ptr,  # float32 [chunks * PARTS, 8], PARTS of a chunk with a unit each
    act_offsets_ptr,  # float32, as units
    sum_squares_ptr,  # float32 [programs, 8]
    K,
    ACT_FORMAT: tl.constexpr,
    RUN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Round a chunk of a vector that no kernel in front has rounded."""
    chunk = tl.program_id(0)
    token = tl.program_id(1)
    COLUMNS: tl.constexpr = 128 if ACT_FORMAT == HALVES else 64
    columns = chunk * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < K
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + token * K + columns, mask=inside, other=0.0).to(tl.float32)
    if gain_ptr is not None:
        tl.store(sum_squares_ptr + chunk * 8 + token, tl.sum(x * x))
        x *= gain
    one = tl.arange(0, 1)
    store_activation_chunks(
        x[None, :],
        one + chunk,
        one + token,
        one == 0,
        act_values_ptr,
        act_group_scales_ptr,
        act_offsets_ptr,
        ACT_FORMAT,
        RUN,
    )


@triton.jit
def inverse_rms_of_rows(sum_squares_ptr, eps, K: tl.constexpr, SHARES: tl.constexpr):
    """What the RMS norm multiplies each of 8 vectors with, from SHARES sums of squares: [8]."""
    squares = tl.zeros((32, 8), tl.float32)
    for i in tl.static_range((SHARES + 31) // 32):
        share = i * 32 + tl.arange(0, 32)[:, None]
        at = sum_squares_ptr + share * 8 + tl.arange(0, 8)[None, :]
        squares += tl.load(at, mask=share < SHARES, other=0.0)
    return tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
