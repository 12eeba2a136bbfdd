"""Gated DeltaNet between its projections, a few new tokens of each row: one kernel a layer.

A program has one value head of one row. It convolves the head's query, key and value, reads the
head's whole state into registers (64 KiB of a 128 by 128 state), runs the delta rule over the
tokens, norms, gates, and writes the state back: what a step costs is one read and one write of the
states. It is read before the wait for the projections, behind which a lone row's read then hides.

A state is cut up among programs by its columns (`StateCut`): more of them then share a processor,
and some read and write while others calculate. The norm needs the whole head, and is a kernel of
its own there. Steps of several tokens, which hardly move states, keep them whole.

Value heads that share a query and key head convolve it each. That is safe because the inputs of
the convolution are a ring: nobody writes what another program may still read.

References: `ops.gated_delta.delta_decode`, `delta_verify` and `adopt_accepted`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwencli.engine.ops.gated_delta import (
    L2_EPS,
    TAPS,
    DeltaInputs,
    DeltaRows,
    DeltaState,
    DeltaUpdates,
    GatedDelta,
)

Tensor = torch.Tensor


@dataclass(frozen=True)
class StateCut:
    """How states are cut up: a head's columns among so many programs, each of so many warps."""

    parts: int
    num_warps: int


# Registers for a state of 128 by 128 (64 a thread), and for two programs a multiprocessor.
WHOLE = StateCut(1, 8)
WARPS = WHOLE.num_warps
# Of one token: the fastest of those tried for 1 to 256 rows, see
# results/2026-11-30-h200x2-prompts-and-states.
IN_PARTS = StateCut(4, 2)
# Heads of a program of the norm, a power of two.
NORM_HEADS, NORM_WARPS = 16, 4
NORM_EPS: tl.constexpr = tl.constexpr(L2_EPS)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), which does not overflow."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def over_length(x):
    """What makes heads, along the last axis, of length 1."""
    return tl.rsqrt(tl.sum(x * x, axis=len(x.shape) - 1, keep_dims=True) + NORM_EPS)


@triton.jit
def load_before(
    ring_ptr,
    position,
    step,
    channel,
    CHANNELS: tl.constexpr,
    RING: tl.constexpr,
    LINES: tl.constexpr,
):
    """What the convolution sees of the tokens before `position` in the token `step` places behind
    it: [LINES, channels], the oldest token first; zeros where it sees others, or nothing."""
    place = position + step + 1 - LINES + tl.arange(0, LINES)
    seen = (place >= 0) & (place < position) & (place >= position + step - 3)
    at = ring_ptr + ((place + RING) % RING * CHANNELS)[:, None] + channel[None, :]
    return tl.load(at, mask=seen[:, None] & (channel >= 0)[None, :], other=0.0)


@triton.jit
def load_weights(weight_ptr, channel, LINES: tl.constexpr):
    """Of the convolution, in the last four lines: float32 [LINES, channels]."""
    tap = tl.arange(0, LINES) + (4 - LINES)
    at = weight_ptr + channel[None, :] * 4 + tap[:, None]
    inside = (tap >= 0)[:, None] & (channel >= 0)[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def convolve(
    before,  # [LINES, channels], as `load_before` has it
    new_ptr,  # of the row's first new token
    stride,
    weights,  # float32 [LINES, channels]
    step,
    channel,
    ring_ptr,  # where the new token's input goes
    stores,  # whether it does
    LINES: tl.constexpr,
):
    """SiLU of the convolution in the token `step` places behind the first new one, rounded to the
    type of the inputs: float32 [channels]."""
    token = step + 1 - LINES + tl.arange(0, LINES)
    new = (token >= 0) & (token >= step - 3)
    new = new[:, None] & (channel >= 0)[None, :]
    own = tl.load(new_ptr + (token * stride)[:, None] + channel[None, :], mask=new, other=0.0)
    newest = (token == tl.where(stores, step, -LINES))[:, None] & (channel >= 0)[None, :]
    at = ring_ptr + tl.zeros((LINES,), tl.int32)[:, None] + channel[None, :]
    tl.store(at, own, mask=newest)
    x = tl.where(new, own, before).to(tl.float32)
    return silu(tl.sum(x * weights, axis=0)).to(own.dtype).to(tl.float32)


@triton.jit
def convolve_all(
    new_ptr,  # of the row's first new token
    stride,
    weight_ptr,
    position,
    channel,
    ring_ptr,
    stores,  # whether new tokens' inputs go to the ring
    CHANNELS: tl.constexpr,
    RING: tl.constexpr,
    TOKENS: tl.constexpr,
    LINES: tl.constexpr,
):
    """As `convolve` of all new tokens at once: float32 [LINES, channels], of which TOKENS count."""
    step = tl.arange(0, LINES)
    mixed = tl.zeros((LINES, channel.shape[0]), tl.float32)
    for tap in tl.static_range(4):
        token = step + (tap - 3)
        there = step < TOKENS
        new = tl.load(
            new_ptr + (token * stride)[:, None] + channel[None, :],
            mask=(there & (token >= 0))[:, None] & (channel >= 0)[None, :],
            other=0.0,
        )
        place = position + token
        ring = ring_ptr + ((place + RING) % RING * CHANNELS)[:, None] + channel[None, :]
        seen = there & (token < 0) & (place >= 0)
        before = tl.load(ring, mask=seen[:, None] & (channel >= 0)[None, :], other=0.0)
        if tap == 3:
            stored = step < tl.where(stores, TOKENS, 0)
            tl.store(ring, new, mask=stored[:, None] & (channel >= 0)[None, :])
        weight = tl.load(weight_ptr + channel * 4 + tap).to(tl.float32)
        mixed += tl.where((token >= 0)[:, None], new, before).to(tl.float32) * weight[None, :]
    return silu(mixed).to(new_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def by_rows(x, LINES: tl.constexpr):
    """The same [K], made in a way that the compiler cannot make again for each place that uses it:
    a vector along the state's first axis is 16 values a thread, and so would be all that it is
    made of."""
    first = (tl.arange(0, LINES) == 0)[:, None]
    return tl.sum(tl.where(first, x[None, :], 0.0), axis=0)


@triton.jit
def gated_norm(o, z, gain, eps, V: tl.constexpr):
    """RMSNorm of o [..., V] with its gain, times silu(z); float32."""
    inverse = tl.rsqrt(tl.sum(o * o, axis=len(o.shape) - 1, keep_dims=True) / V + eps)
    return o * inverse * gain * silu(z)


@triton.jit(do_not_specialize=["kept_tokens"])
def delta_step_kernel(
    qkv_ptr,  # [R * TOKENS, C] with `qkv_stride` from token to token
    z_ptr,  # [R * TOKENS, V_HEADS * V], likewise
    a_ptr,  # [R * TOKENS, V_HEADS], likewise
    b_ptr,  # [R * TOKENS, V_HEADS], likewise
    weight_ptr,  # [C, 4], of the convolution
    a_log_ptr,  # [V_HEADS]
    dt_bias_ptr,  # [V_HEADS]
    gain_ptr,  # [V], of the norm
    conv_ptr,  # [slots, RING, C]
    state_ptr,  # float32 [slots, V_HEADS, K, V]
    slot_ptr,  # int64 [R]
    position_ptr,  # int64 [R]
    idle_ptr,  # bool [R]
    out_ptr,  # [R * TOKENS, V_HEADS * V]; of several parts without the norm
    # What tokens would do to the state: float32 [R, kept_tokens, ...] each; None = they do it.
    kept_k_ptr,
    kept_delta_ptr,
    kept_g_ptr,
    # Of steps of several tokens: float32 [R, V_HEADS, LINES * (2 K + V)], as they are mixed.
    mixed_ptr,
    kept_tokens,
    qkv_stride,
    z_stride,
    a_stride,
    b_stride,
    eps,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    RING: tl.constexpr,
    TOKENS: tl.constexpr,
    LINES: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (value head and part of its state's columns, row).

    LINES: of what the convolution sees, of which the last four count; as many as there are warps
    make a thread's part of it lie as its part of a whole state does, or that would change threads.
    """
    CHANNELS: tl.constexpr = 2 * K_HEADS * K + V_HEADS * V
    EACH: tl.constexpr = V_HEADS // K_HEADS  # value heads that share a key head
    COLUMNS: tl.constexpr = V // PARTS
    head = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    row = tl.program_id(1).to(tl.int64)
    key = tl.arange(0, K)
    value = part * COLUMNS + tl.arange(0, COLUMNS)
    q_channel = head // EACH * K + key
    k_channel = K_HEADS * K + q_channel
    v_channel = 2 * K_HEADS * K + head * V + value

    # No earlier kernel of this step writes any of this: it is read before the wait.
    slot = tl.load(slot_ptr + row).to(tl.int64)
    position = tl.load(position_ptr + row).to(tl.int32)
    idle = tl.load(idle_ptr + row).to(tl.int32) != 0
    # One 64-bit address for all, or each thread keeps many.
    state_ptr += (slot * V_HEADS + head) * (K * V)
    at = key[:, None] * V + value[None, :]
    state = tl.load(state_ptr + at, mask=(key < tl.where(position > 0, K, 0))[:, None], other=0.0)
    conv_ptr += slot * RING * CHANNELS
    if TOKENS == 1:
        q_before = load_before(conv_ptr, position, 0, q_channel, CHANNELS, RING, LINES)
        k_before = load_before(conv_ptr, position, 0, k_channel, CHANNELS, RING, LINES)
        v_before = load_before(conv_ptr, position, 0, v_channel, CHANNELS, RING, LINES)
        q_weights = load_weights(weight_ptr, q_channel, LINES)
        k_weights = load_weights(weight_ptr, k_channel, LINES)
        v_weights = load_weights(weight_ptr, v_channel, LINES)
    gain = tl.load(gain_ptr + value).to(tl.float32)
    rate = tl.exp(tl.load(a_log_ptr + head).to(tl.float32))
    dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()

    qkv_ptr += row * TOKENS * qkv_stride
    out_ptr += row * TOKENS * (V_HEADS * V) + head * V + value
    if idle:
        for step in range(TOKENS):
            zeros = tl.zeros((COLUMNS,), out_ptr.dtype.element_ty)
            tl.store(out_ptr + step * (V_HEADS * V), zeros)
        return
    first = (head % EACH == 0) & (part == 0)
    if TOKENS > 1:
        # All that the tokens' mixing does not need the state for, so that what follows each other
        # is short. Vectors along the state's first axis are read back as its threads need them.
        mixed_ptr += (row * V_HEADS + head) * (2 * LINES * K + LINES * V)
        line = tl.arange(0, LINES)[:, None]
        q_all = convolve_all(
            qkv_ptr, qkv_stride, weight_ptr, position, q_channel, conv_ptr, first,
            CHANNELS, RING, TOKENS, LINES,
        )  # fmt: skip
        tl.store(mixed_ptr + line * K + key[None, :], q_all * over_length(q_all) * K**-0.5)
        k_all = convolve_all(
            qkv_ptr, qkv_stride, weight_ptr, position, k_channel, conv_ptr, first,
            CHANNELS, RING, TOKENS, LINES,
        )  # fmt: skip
        tl.store(mixed_ptr + LINES * K + line * K + key[None, :], k_all * over_length(k_all))
        v_all = convolve_all(
            qkv_ptr, qkv_stride, weight_ptr, position, v_channel, conv_ptr, head >= 0,
            CHANNELS, RING, TOKENS, LINES,
        )  # fmt: skip
        tl.store(mixed_ptr + 2 * LINES * K + line * V + value[None, :], v_all)
        tl.debug_barrier()
    for step in range(TOKENS):
        token = row * TOKENS + step
        a = tl.load(a_ptr + token * a_stride + head).to(tl.float32)
        b = tl.load(b_ptr + token * b_stride + head).to(tl.float32)
        if TOKENS > 1:
            q_rows = tl.load(mixed_ptr + step * K + key)
            k_rows = tl.load(mixed_ptr + (LINES + step) * K + key)
            v = tl.load(mixed_ptr + 2 * LINES * K + step * V + value)
        else:
            place = conv_ptr + position % RING * CHANNELS
            q = convolve(
                q_before, qkv_ptr, qkv_stride, q_weights, 0, q_channel, place, first, LINES
            )
            k = convolve(
                k_before, qkv_ptr, qkv_stride, k_weights, 0, k_channel, place, first, LINES
            )
            v = convolve(
                v_before, qkv_ptr, qkv_stride, v_weights, 0, v_channel, place, head >= 0, LINES
            )
            q_rows = by_rows(q * over_length(q) * K**-0.5, LINES)
            k_rows = by_rows(k * over_length(k), LINES)
        g = -rate * softplus(a + dt_bias)
        state *= tl.exp(g)
        known = tl.sum(state * k_rows[:, None], axis=0)
        delta = (v - known) * tl.sigmoid(b)
        state += k_rows[:, None] * delta[None, :]
        o = tl.sum(state * q_rows[:, None], axis=0)
        if PARTS == 1:
            z = tl.load(z_ptr + token * z_stride + head * V + value).to(tl.float32)
            o = gated_norm(o, z, gain, eps, V)
        tl.store(out_ptr + step * (V_HEADS * V), o.to(out_ptr.dtype.element_ty))
        if kept_k_ptr is not None:
            kept = row * kept_tokens + step
            tl.store(kept_delta_ptr + (kept * V_HEADS + head) * V + value, delta)
            tl.store(kept_g_ptr + kept * V_HEADS + head, g)
            if first:
                tl.store(kept_k_ptr + kept * (K_HEADS * K) + q_channel, k_rows)
    if kept_k_ptr is None:
        tl.store(state_ptr + at, state)


@triton.jit
def gated_norm_kernel(
    o_ptr,  # float32 [R, V_HEADS * V]
    z_ptr,  # [R, V_HEADS * V] with `z_stride` from row to row
    gain_ptr,  # [V]
    out_ptr,  # [R, V_HEADS * V]
    z_stride,
    eps,
    V_HEADS: tl.constexpr,
    V: tl.constexpr,
    HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (HEADS value heads, row)."""
    row = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    value = tl.arange(0, V)
    at = head[:, None] * V + value[None, :]
    gain = tl.load(gain_ptr + value).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    o = tl.load(o_ptr + row * (V_HEADS * V) + at)
    z = tl.load(z_ptr + row * z_stride + at).to(tl.float32)
    out = gated_norm(o, z, gain[None, :], eps, V)
    tl.store(out_ptr + row * (V_HEADS * V) + at, out.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["accepted_stride", "tokens", "slots"])
def adopt_accepted_kernel(
    kept_k_ptr,  # float32 [L, rows, tokens, K_HEADS, K]
    kept_delta_ptr,  # float32 [L, rows, tokens, V_HEADS, V]
    kept_g_ptr,  # float32 [L, rows, tokens, V_HEADS]
    state_ptr,  # float32 [L, slots, V_HEADS, K, V]
    slot_ptr,  # int64 [R]
    position_ptr,  # int64 [R], after the step
    accepted_ptr,  # int64 [R] with `accepted_stride` from row to row
    accepted_stride,
    tokens,
    slots,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
):
    """Program (value head, row, layer)."""
    EACH: tl.constexpr = V_HEADS // K_HEADS
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    layer = tl.program_id(2).to(tl.int64)
    accepted = tl.load(accepted_ptr + row * accepted_stride)
    if accepted == 0:
        return
    key = tl.arange(0, K)
    value = tl.arange(0, V)
    slot = layer * slots + tl.load(slot_ptr + row)
    begun = tl.load(position_ptr + row) > accepted
    # One 64-bit address for all, or each thread keeps many.
    state_ptr += (slot * V_HEADS + head) * (K * V)
    at = key[:, None] * V + value[None, :]
    state = tl.load(state_ptr + at, mask=(key < tl.where(begun, K, 0))[:, None], other=0.0)
    kept = (layer * tl.num_programs(1) + row) * tokens
    for _ in range(accepted):
        k = tl.load(kept_k_ptr + (kept * K_HEADS + head // EACH) * K + key)
        delta = tl.load(kept_delta_ptr + (kept * V_HEADS + head) * V + value)
        state *= tl.exp(tl.load(kept_g_ptr + kept * V_HEADS + head))
        state += k[:, None] * delta[None, :]
        kept += 1
    tl.store(state_ptr + at, state)


def runs_in_registers(*sides: int) -> bool:
    """Whether the kernels take states of this size: powers of two, up to 128 by 128."""
    return all(16 <= side <= 128 and side & (side - 1) == 0 for side in sides)


class DeltaStep:
    """Launches for steps of rows.

    Args:
        options: launch options for a number of warps.
        cut: how states are cut up in a step of one token.
    """

    def __init__(
        self, options: Callable[[int], Mapping[str, Any]], cut: StateCut = IN_PARTS
    ) -> None:
        self._options, self._cut = options, cut

    def decode(
        self, inputs: DeltaInputs, layer: GatedDelta, state: DeltaState, rows: DeltaRows
    ) -> Tensor:
        """As `ops.gated_delta.delta_decode`; idle rows get zeros."""
        return self._step(inputs, layer, state, rows, None)

    def verify(
        self,
        inputs: DeltaInputs,
        layer: GatedDelta,
        state: DeltaState,
        rows: DeltaRows,
        updates: DeltaUpdates,
    ) -> Tensor:
        """As `ops.gated_delta.delta_verify`, likewise."""
        return self._step(inputs, layer, state, rows, updates)

    def _step(
        self,
        inputs: DeltaInputs,
        layer: GatedDelta,
        state: DeltaState,
        rows: DeltaRows,
        updates: DeltaUpdates | None,
    ) -> Tensor:
        count, ring = len(rows.slots), state.conv.shape[1]
        tokens = len(inputs.qkv) // count
        assert ring >= TAPS - 1 + tokens, "drafts must not overwrite what comes in front of them"
        assert state.conv.is_contiguous() and state.recurrent.is_contiguous()
        assert all(each.stride(1) == 1 for each in vars(inputs).values()), "a token's side by side"
        cut = self._cut if updates is None else WHOLE
        values = layer.v_heads * layer.v_dim
        out = inputs.z.new_empty(len(inputs.z), values)
        summed = out if cut.parts == 1 else out.new_empty(out.shape, dtype=torch.float32)
        kept = (None, None, None) if updates is None else (updates.k, updates.delta, updates.g)
        kept_tokens = 0 if updates is None else updates.g.stride(0) // updates.g.stride(1)
        sides = 2 * layer.k_dim + layer.v_dim
        mixed = None
        if tokens > 1:
            assert cut.parts == 1 and tokens <= cut.num_warps, "a line for each"
            mixed = torch.empty(
                count * layer.v_heads * cut.num_warps * sides,
                dtype=torch.float32,
                device=out.device,
            )
        delta_step_kernel[layer.v_heads * cut.parts, count](
            inputs.qkv,
            inputs.z,
            inputs.a,
            inputs.b,
            layer.conv,
            layer.a_log,
            layer.dt_bias,
            layer.norm,
            state.conv,
            state.recurrent,
            rows.slots,
            rows.positions,
            rows.idle,
            summed,
            *kept,
            mixed,
            kept_tokens,
            inputs.qkv.stride(0),
            inputs.z.stride(0),
            inputs.a.stride(0),
            inputs.b.stride(0),
            layer.eps,
            K_HEADS=layer.k_heads,
            V_HEADS=layer.v_heads,
            K=layer.k_dim,
            V=layer.v_dim,
            RING=ring,
            TOKENS=tokens,
            LINES=max(cut.num_warps, TAPS),
            PARTS=cut.parts,
            **self._options(cut.num_warps),
        )
        if cut.parts > 1:
            heads = math.gcd(layer.v_heads, NORM_HEADS)
            gated_norm_kernel[layer.v_heads // heads, count](
                summed,
                inputs.z,
                layer.norm,
                out,
                inputs.z.stride(0),
                layer.eps,
                V_HEADS=layer.v_heads,
                V=layer.v_dim,
                HEADS=heads,
                **self._options(NORM_WARPS),
            )
        return out


def adopt_accepted(
    updates: DeltaUpdates, recurrent: Tensor, slots: Tensor, positions: Tensor, accepted: Tensor
) -> None:
    """As `ops.gated_delta.adopt_accepted`: all layers' states in one launch."""
    assert recurrent.is_contiguous() and updates.k.is_contiguous()
    assert updates.delta.is_contiguous() and updates.g.is_contiguous()
    layers, num_slots, v_heads, k_dim, v_dim = recurrent.shape
    adopt_accepted_kernel[v_heads, len(slots), layers](
        updates.k,
        updates.delta,
        updates.g,
        recurrent,
        slots,
        positions,
        accepted,
        accepted.stride(0),
        updates.k.shape[2],
        num_slots,
        K_HEADS=updates.k.shape[3],
        V_HEADS=v_heads,
        K=k_dim,
        V=v_dim,
        num_warps=WARPS,
    )
