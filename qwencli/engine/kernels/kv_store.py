"""Writes new keys and values into the cache, rounded where it is quantized."""

from __future__ import annotations

import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448)  # of e4m3; int8's is 127


@triton.jit
def store_new(
    key_low,  # [R, D / 2], of the type that is computed with
    key_high,
    values,  # [R, D]
    places,  # int64 [R], the slot of each
    new,  # [R], which are stored
    low,  # [1, D / 2], columns of `key_low` and of `key_high`
    high,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    SLOT: tl.constexpr,
    D: tl.constexpr,
    KV_MAX: tl.constexpr,
):
    """Store new keys and values, SLOT values from slot to slot; returns them as those who attend
    later see them."""
    full = tl.arange(0, D)[None, :]
    at = places[:, None] * SLOT
    stored_low, stored_high, stored_values = key_low, key_high, values
    if KV_MAX > 0:
        largest = tl.maximum(tl.max(tl.abs(key_low), axis=1), tl.max(tl.abs(key_high), axis=1))
        k_scale = row_scale(largest, KV_MAX)
        v_scale = row_scale(tl.max(tl.abs(values), axis=1), KV_MAX)
        low_steps = cut_down(key_low, k_scale, KV_MAX)
        high_steps = cut_down(key_high, k_scale, KV_MAX)
        value_steps = cut_down(values, v_scale, KV_MAX)
        stored_low = as_bytes(low_steps, KV_MAX)
        stored_high = as_bytes(high_steps, KV_MAX)
        stored_values = as_bytes(value_steps, KV_MAX)
        scale_at = places * (SLOT // D)
        tl.store(k_scales_ptr + scale_at, k_scale, mask=new)
        tl.store(v_scales_ptr + scale_at, v_scale, mask=new)
        key_low = (low_steps * k_scale[:, None]).to(key_low.dtype)
        key_high = (high_steps * k_scale[:, None]).to(key_low.dtype)
        values = (value_steps * v_scale[:, None]).to(key_low.dtype)
    tl.store(k_ptr + at + low, stored_low, mask=new[:, None])
    tl.store(k_ptr + at + high, stored_high, mask=new[:, None])
    tl.store(v_ptr + at + full, stored_values, mask=new[:, None])
    return key_low, key_high, values


@triton.jit
def row_scale(largest, KV_MAX: tl.constexpr):
    """Scales of rows with these largest magnitudes; a row of zeros gets one that divides."""
    return tl.maximum(largest.to(tl.float32), 1e-30) / KV_MAX


@triton.jit
def cut_down(x, scale, KV_MAX: tl.constexpr):
    """Rows x [R, n] over their scales [R], float32 rounded to the nearest value that is stored."""
    y = x.to(tl.float32) / scale[:, None]
    if KV_MAX == FP8_MAX:
        # To three bits after the point, and near zero to multiples of 2^-9.
        bits = y.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        y = tl.where(
            tl.abs(y) < 0.015625,
            nearest_multiple(y, 0.001953125),
            bits.to(tl.float32, bitcast=True),
        )
    else:
        y = nearest_multiple(y, 1.0)
    return y


# e4m3 has float16's bits with fewer of them: of 2^-8 of a value, the exponent is the same. So
# neither way needs an instruction of its own, which GPUs before compute capability 8.9 have not.


@triton.jit
def as_bytes(y, KV_MAX: tl.constexpr):
    """Values that can be stored exactly, as int8."""
    if KV_MAX == FP8_MAX:
        bits = (y * 0.00390625).to(tl.float16).to(tl.int16, bitcast=True)
        y = ((bits >> 8) & 0x80) | ((bits >> 7) & 0x7F)
    return y.to(tl.int8)


@triton.jit
def as_float32(stored, KV_MAX: tl.constexpr):
    """What bytes of a quantized cache stand for, before their scales; others as float32."""
    if KV_MAX == FP8_MAX:
        bits = stored.to(tl.int16)
        halves = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        stored = halves.to(tl.float32) * 256.0
    return stored.to(tl.float32)


@triton.jit
def nearest_multiple(y, STEP: tl.constexpr):
    """y rounded to the nearest multiple of a power of two, ties to even."""
    # Where float32 values are STEP apart; 1.5 leaves room on both sides.
    FAR: tl.constexpr = 1.5 * 8388608.0 * STEP
    return (y + FAR) - FAR
