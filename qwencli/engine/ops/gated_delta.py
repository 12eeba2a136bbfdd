"""Gated DeltaNet (Yang et al., "Gated Delta Networks", arXiv 2412.06464) in plain torch.

The readable reference of `kernels.gated_delta` and `kernels.chunked_delta`, and what runs where
there are none. A layer's state is a matrix S for each value head. One token does this to it:

    S = exp(g) S;  delta = beta (v - k S);  S = S + k^T delta;  o = q S

q, k and v come out of a causal convolution over the last four tokens, and o goes through a norm
that is gated by z. Everything but q, k and v as they leave the convolution is float32.

States lie in slots, which rows and prompts name by index. Two things differ from a KV cache:

- A state has no positions to mask. A sequence whose first token is at position 0 starts from zeros
  whatever its slot holds, so that nobody has to clear it; an idle row leaves its state alone.
- A state cannot be cut back. A step that checks drafts writes no state. It keeps what each token
  would add (`DeltaUpdates`, small), and `adopt_accepted` adds what was accepted.

The convolution's last inputs are a ring: the token at position p is at p % RING. A step that runs
a token twice writes the same again, and rejected drafts are overwritten before they are read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qwencli.engine.cache.paged_kv import PackedPrompts

Tensor = torch.Tensor

TAPS = 4  # tokens that the convolution sees, the newest included
CHUNK = 64  # tokens of a prompt whose updates are solved for at once
L2_EPS = 1e-6


@dataclass(frozen=True)
class GatedDelta:
    """Numbers and weights of one layer, but for its projections.

    Args:
        conv: [C, TAPS], C = 2 * k_heads * k_dim + v_heads * v_dim channels: queries, keys, values.
        a_log, dt_bias: [v_heads]. norm: [v_dim], of the gated norm, plain (not zero-centred).
    """

    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int
    conv: Tensor
    a_log: Tensor
    dt_bias: Tensor
    norm: Tensor
    eps: float

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., C] -> q, k [..., k_heads, k_dim] and v [..., v_heads, v_dim]."""
        keys, before = self.k_heads * self.k_dim, qkv.shape[:-1]
        q, k = qkv[..., :keys], qkv[..., keys : 2 * keys]
        return (
            q.reshape(*before, self.k_heads, self.k_dim),
            k.reshape(*before, self.k_heads, self.k_dim),
            qkv[..., 2 * keys :].reshape(*before, self.v_heads, self.v_dim),
        )


@dataclass(frozen=True)
class DeltaInputs:
    """What the projections made of N tokens; each may be part of a wider tensor.

    Args:
        qkv: [N, C]. z: [N, v_heads * v_dim]. a, b: [N, v_heads].
    """

    qkv: Tensor
    z: Tensor
    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class DeltaState:
    """The states of one layer, written in place.

    Args:
        conv: [slots, RING, C], inputs of the convolution. RING is 3 and the tokens of the longest
            step at least.
        recurrent: float32 [slots, v_heads, k_dim, v_dim].
    """

    conv: Tensor
    recurrent: Tensor


@dataclass(frozen=True)
class DeltaRows:
    """Which states the rows of a step read and write, on the device.

    Args:
        slots: int64 [R]. Rows that are not idle have a slot each.
        positions: int64 [R], how many tokens are in the state already.
        idle: bool [R], rows whose state stays as it is; their results mean nothing.
    """

    slots: Tensor
    positions: Tensor
    idle: Tensor


@dataclass(frozen=True)
class DeltaUpdates:
    """What T tokens of R rows would do to the states of a layer, or of all (then [L, ...] each).

    The state after n tokens is: for each of them S = exp(g) S + k^T delta.

    Args:
        k: float32 [R, T, k_heads, k_dim]. delta: float32 [R, T, v_heads, v_dim].
        g: float32 [R, T, v_heads].
    """

    k: Tensor
    delta: Tensor
    g: Tensor

    @classmethod
    def empty(
        cls,
        layers: int,
        rows: int,
        tokens: int,
        keys: tuple[int, int],
        values: tuple[int, int],
        device: torch.device,
    ) -> DeltaUpdates:
        """Buffers for the updates of all layers.

        Args:
            keys, values: heads, and the dimensions of each.
        """

        def buffer(*size: int) -> Tensor:
            return torch.zeros(layers, rows, tokens, *size, device=device)

        return cls(buffer(*keys), buffer(*values), buffer(values[0]))

    def shaped(self, rows: int, tokens: int) -> DeltaUpdates:
        """The same memory as updates of `rows` rows of `tokens` tokens, no more in all."""
        layers, most = self.g.shape[0], self.g.shape[1] * self.g.shape[2]
        assert rows * tokens <= most, "the buffers are for so many tokens"

        def part(whole: Tensor) -> Tensor:
            size = (layers, rows, tokens, *whole.shape[3:])
            return whole.view(-1)[: math.prod(size)].view(size)

        return DeltaUpdates(part(self.k), part(self.delta), part(self.g))

    def of_layer(self, index: int) -> DeltaUpdates:
        return DeltaUpdates(self.k[index], self.delta[index], self.g[index])


def causal_conv1d_update(x: Tensor, weight: Tensor, conv_state: Tensor, rows: DeltaRows) -> Tensor:
    """SiLU of the convolution of T new tokens of each row; their inputs go to the ring.

    Args:
        x: [R, T, C]. weight: [C, TAPS]. conv_state: [slots, RING, C].

    Returns:
        [R, T, C] in the type of `x`.
    """
    tokens, ring = x.shape[1], conv_state.shape[1]
    assert ring >= TAPS - 1 + tokens, "drafts must not overwrite what comes in front of them"
    before = rows.positions[:, None] + torch.arange(1 - TAPS, 0, device=x.device)  # [R, 3]
    seen = conv_state[rows.slots[:, None], before % ring]  # [R, 3, C]
    seen = torch.where((before >= 0).unsqueeze(-1), seen, 0)
    places = (rows.positions[:, None] + torch.arange(tokens, device=x.device)) % ring
    at = rows.slots[:, None].expand_as(places)
    kept = torch.where(rows.idle[:, None, None], conv_state[at, places], x.to(conv_state.dtype))
    conv_state.index_put_((at, places), kept)
    return _convolve(torch.cat((seen.to(x.dtype), x), dim=1), weight)


def causal_conv1d_prefill(
    x: Tensor, weight: Tensor, conv_state: Tensor, prompts: PackedPrompts, slots: Tensor
) -> Tensor:
    """`causal_conv1d_update` of prompts side by side.

    Args:
        x: [N, C]. slots: int64 [parts].

    Returns:
        [N, C] in the type of `x`.
    """
    out, ring = torch.empty_like(x), conv_state.shape[1]
    begin = 0
    for part, (length, context) in enumerate(zip(prompts.lengths, prompts.contexts, strict=True)):
        own, slot = x[begin : begin + length], slots[part : part + 1]
        before = torch.arange(context - TAPS + 1, context, device=x.device)
        seen = conv_state.index_select(0, slot)[0, before % ring].to(x.dtype)
        seen = torch.where((before >= 0).unsqueeze(-1), seen, 0)
        out[begin : begin + length] = _convolve(torch.cat((seen, own))[None], weight)[0]
        last = torch.arange(max(length - TAPS + 1, 0), length, device=x.device)
        places = (context + last) % ring
        conv_state.index_put_((slot.expand_as(places), places), own[last].to(conv_state.dtype))
        begin += length
    return out


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    """x [R, 3 + T, C] -> SiLU of the convolution [R, T, C], added up in float32."""
    taps = weight.float().t()  # [TAPS, C]
    length = x.shape[1] - TAPS + 1
    total = sum(x[:, tap : tap + length].float() * taps[tap] for tap in range(TAPS))
    assert isinstance(total, torch.Tensor)
    return F.silu(total).to(x.dtype)


def gates(a: Tensor, b: Tensor, layer: GatedDelta) -> tuple[Tensor, Tensor]:
    """a, b [..., v_heads] -> g, the logarithm of what is kept of a state, and beta, how much of a
    new value is written; float32 both."""
    g = -layer.a_log.float().exp() * F.softplus(a.float() + layer.dt_bias.float())
    return g, b.float().sigmoid()


def l2_norm(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def normed_heads(q: Tensor, k: Tensor, v_heads: int) -> tuple[Tensor, Tensor]:
    """q, k [..., k_heads, k_dim] -> float32 [..., v_heads, k_dim]: of length 1, queries over
    sqrt(k_dim); each serves as many value heads side by side as there are more of those."""
    q, k = l2_norm(q) * q.shape[-1] ** -0.5, l2_norm(k)
    each = v_heads // q.shape[-2]
    return q.repeat_interleave(each, -2), k.repeat_interleave(each, -2)


def recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, rows: DeltaRows
) -> Tensor:
    """One new token of each row; its state is written in place.

    Args:
        q, k: [R, k_heads, k_dim], as they leave the convolution. v: [R, v_heads, v_dim].
        g, beta: float32 [R, v_heads]. state: float32 [slots, v_heads, k_dim, v_dim].

    Returns:
        float32 [R, v_heads, v_dim].
    """
    q, k = normed_heads(q, k, v.shape[-2])
    old = state.index_select(0, rows.slots)
    new, _, o = _next_state(_beginning(old, rows.positions > 0), q, k, v, g, beta)
    kept = torch.where(rows.idle[:, None, None, None], old, new)
    state.index_copy_(0, rows.slots, kept)
    return o


def verify_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    rows: DeltaRows,
    updates: DeltaUpdates,
) -> Tensor:
    """T tokens of each row, all but the first of them drafts; states stay as they are, `updates`
    [R, T, ...] get what each token would do to them.

    Args:
        q, k: [R, T, k_heads, k_dim]. v: [R, T, v_heads, v_dim]. g, beta: float32 [R, T, v_heads].

    Returns:
        float32 [R, T, v_heads, v_dim].
    """
    updates.k.copy_(l2_norm(k))
    updates.g.copy_(g)
    q, k = normed_heads(q, k, v.shape[-2])
    now = _beginning(state.index_select(0, rows.slots), rows.positions > 0)
    results = []
    for token in range(q.shape[1]):
        now, delta, o = _next_state(
            now, q[:, token], k[:, token], v[:, token], g[:, token], beta[:, token]
        )
        updates.delta[:, token].copy_(delta)
        results.append(o)
    return torch.stack(results, dim=1)


def adopt_accepted(
    updates: DeltaUpdates, recurrent: Tensor, slots: Tensor, positions: Tensor, accepted: Tensor
) -> None:
    """Bring states to where the first `accepted` tokens of a step that checked drafts leave them.

    Args:
        updates: of L layers, [L, R, T, ...]. recurrent: float32 [L, slots, v_heads, k_dim, v_dim].
        slots: int64 [R]. positions: int64 [R], how many tokens are in the state afterwards.
        accepted: int64 [R], tokens, the step's first included; 0 = the state stays as it is, as
            that of an idle row.
    """
    each = recurrent.shape[2] // updates.k.shape[-2]
    old = recurrent.index_select(1, slots)
    now = _beginning(old, positions > accepted)
    for token in range(updates.k.shape[2]):
        k = updates.k[:, :, token].repeat_interleave(each, -2)
        kept = updates.g[:, :, token].exp()[..., None, None] * now
        new = kept + k.unsqueeze(-1) * updates.delta[:, :, token].unsqueeze(-2)
        now = torch.where((token < accepted)[:, None, None, None], new, now)
    stays = (accepted == 0)[:, None, None, None]
    recurrent.index_copy_(1, slots, torch.where(stays, old, now))


def _beginning(state: Tensor, begun: Tensor) -> Tensor:
    """States [..., R, v_heads, k_dim, v_dim], or zeros where a sequence begins."""
    return torch.where(begun[:, None, None, None], state, 0.0)


def _next_state(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One token, of normed heads: the new state, what was written to it, and the result."""
    state = state * g.exp()[..., None, None]
    known = (state * k.unsqueeze(-1)).sum(-2)
    delta = (v.float() - known) * beta.unsqueeze(-1)
    state = state + k.unsqueeze(-1) * delta.unsqueeze(-2)
    return state, delta, (state * q.unsqueeze(-1)).sum(-2)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    prompts: PackedPrompts,
    slots: Tensor,
) -> Tensor:
    """Prompts side by side; what each leaves goes to its state, in place.

    Chunks of a prompt follow each other, the tokens of one are done at once: with decays
    G_i = g_1 + ... + g_i in a chunk that begins with state S,

        delta_i = beta_i (v_i - exp(G_i) k_i S - sum over j < i of exp(G_i - G_j) (k_i k_j) delta_j)

    is a triangular system (the UT transform of arXiv 2406.06484), and then

        o_i = exp(G_i) q_i S + sum over j <= i of exp(G_i - G_j) (q_i k_j) delta_j
        S = exp(G) S + sum over j of exp(G - G_j) k_j^T delta_j.

    Args:
        q, k: [N, k_heads, k_dim], as they leave the convolution. v: [N, v_heads, v_dim].
        g, beta: float32 [N, v_heads]. state: float32 [slots, v_heads, k_dim, v_dim].
        slots: int64 [parts].

    Returns:
        float32 [N, v_heads, v_dim].
    """
    q, k = normed_heads(q, k, v.shape[1])
    q, k, values = (x.transpose(0, 1) for x in (q, k, v.float()))  # [v_heads, N, ...]
    out = torch.empty_like(values)
    begin = 0
    for part, (length, context) in enumerate(zip(prompts.lengths, prompts.contexts, strict=True)):
        slot = slots[part : part + 1]
        now = state.index_select(0, slot)[0]
        if context == 0:
            now = torch.zeros_like(now)
        for first in range(begin, begin + length, CHUNK):
            own = slice(first, min(first + CHUNK, begin + length))
            now, out[:, own] = _chunk(
                now, q[:, own], k[:, own], values[:, own], g[own].t(), beta[own].t()
            )
        state.index_copy_(0, slot, now[None])
        begin += length
    return out.transpose(0, 1)


def _chunk(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk of a prompt, [v_heads, tokens, ...]: its last state and its results."""
    decay = g.cumsum(-1)  # [v_heads, tokens]
    # What is kept of token j when token i comes; above the diagonal it would overflow.
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).tril().exp().tril()
    system = (beta.unsqueeze(-1) * (k @ k.mT) * between).tril(-1)
    system = system + torch.eye(system.shape[-1], device=k.device)
    known = decay.exp().unsqueeze(-1) * (k @ state)
    delta = torch.linalg.solve_triangular(
        system, beta.unsqueeze(-1) * (v - known), upper=False, unitriangular=True
    )
    o = decay.exp().unsqueeze(-1) * (q @ state) + ((q @ k.mT) * between) @ delta
    left = k * (decay[:, -1:] - decay).exp().unsqueeze(-1)
    return state * decay[:, -1, None, None].exp() + left.mT @ delta, o


def gated_rms_norm(o: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm(o) * weight * silu(z) of [..., v_dim], in float32; in the type of `z`."""
    normed = F.rms_norm(o.float(), weight.shape, weight.float(), eps)
    return (normed * F.silu(z.float())).to(z.dtype)


def delta_decode(
    inputs: DeltaInputs, layer: GatedDelta, state: DeltaState, rows: DeltaRows
) -> Tensor:
    """A layer between its projections, one token a row: [R, v_heads * v_dim]."""
    x = causal_conv1d_update(inputs.qkv.unsqueeze(1), layer.conv, state.conv, rows)
    q, k, v = layer.split(x.squeeze(1))
    o = recurrent_gated_delta_rule(
        q, k, v, *gates(inputs.a, inputs.b, layer), state.recurrent, rows
    )
    return _gated(o, inputs, layer)


def delta_verify(
    inputs: DeltaInputs,
    layer: GatedDelta,
    state: DeltaState,
    rows: DeltaRows,
    updates: DeltaUpdates,
) -> Tensor:
    """T tokens a row, [R * T, ...] each, without a change of `state.recurrent`; `updates`
    [R, T, ...] are for `adopt_accepted`."""
    size = len(rows.slots), len(inputs.qkv) // len(rows.slots), -1
    x = causal_conv1d_update(inputs.qkv.reshape(size), layer.conv, state.conv, rows)
    g, beta = (each.view(size) for each in gates(inputs.a, inputs.b, layer))
    o = verify_gated_delta_rule(*layer.split(x), g, beta, state.recurrent, rows, updates)
    return _gated(o.flatten(0, 1), inputs, layer)


def delta_prefill(
    inputs: DeltaInputs,
    layer: GatedDelta,
    state: DeltaState,
    prompts: PackedPrompts,
    slots: Tensor,
) -> Tensor:
    """Prompts side by side, whose states are at `slots` (int64 [parts]): [N, v_heads * v_dim]."""
    x = causal_conv1d_prefill(inputs.qkv, layer.conv, state.conv, prompts, slots)
    q, k, v = layer.split(x)
    o = chunk_gated_delta_rule(
        q, k, v, *gates(inputs.a, inputs.b, layer), state.recurrent, prompts, slots
    )
    return _gated(o, inputs, layer)


def _gated(o: Tensor, inputs: DeltaInputs, layer: GatedDelta) -> Tensor:
    z = inputs.z.reshape(-1, layer.v_heads, layer.v_dim)
    return gated_rms_norm(o, z, layer.norm, layer.eps).flatten(-2)
