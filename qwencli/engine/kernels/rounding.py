"""2 to 8 vectors made ready for `gemm_quantized_kernel`, once for all its programs.

The kernel that makes them does so (`splitk_epilogue`, `attention`), or one of its own. Each is
rounded to the steps that a single vector is rounded to (`activation_quant`), so that a token
checked is the token that would have been chosen. What is rounded becomes float16, in units of the
largest value of its part of a chunk, and lies as the lanes of a matrix instruction take it.

A chunk is what the 4 lanes of a row of weights read at once, 16 bytes each: 64 columns of 8 bits,
128 of 4. A part is as much of it as shares a group's scale: all of it, or 64 columns, or 32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwencli.engine.kernels.activation_quant import FLOAT16, HALVES

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
