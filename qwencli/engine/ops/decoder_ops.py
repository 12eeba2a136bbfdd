"""The six groups of operations that a decoder layer and the head consist of, in plain torch.

They are the readable reference: a faster kernel replaces one field of `DecoderOps` and is held to
it by a parity test. Each takes tensors and plain numbers only, allocates nothing but its result,
never synchronises, and can be captured in a CUDA graph.

RMSNorm: x / sqrt(mean(x^2) + eps) * weight over the last dimension, statistics in float32 (Zhang
and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from qwencli.engine.cache.kv_cache import KeysValues, KVCache
from qwencli.engine.cache.paged_kv import (
    DecodePages,
    PackedPrompts,
    PagedKVCache,
    QuantizedPagedKVCache,
)
from qwencli.engine.ops.attention import AttentionFunction, AttentionPlan
from qwencli.engine.ops.gated_delta import (
    DeltaInputs,
    DeltaRows,
    DeltaState,
    DeltaUpdates,
    GatedDelta,
    adopt_accepted,
    delta_decode,
    delta_prefill,
    delta_verify,
)
from qwencli.engine.ops.next_tokens import RowBuffers, advance_rows, choose_likeliest
from qwencli.engine.ops.paged_attention import paged_attention, prompt_attention
from qwencli.engine.ops.rope import ApplyRopeFn, CosSin, apply_rope, rotate
from qwencli.engine.quant.quantized_tensor import QuantizedTensor

if TYPE_CHECKING:
    from qwencli.engine.ops.moe import Routing


class RMSNorm:
    """One norm. `weight` is [n], or [heads, n] where each head has its own.

    On a GPU torch has it as one kernel. On the CPU it decomposes into about ten operators, which
    is a fifth of a small model's decode step; in float32 the same value takes four:
    x / hypot(|x|, sqrt(n eps)) * (sqrt(n) weight).

    The norm of x is `direction(x) * gain`, for callers that have something else to multiply by. A
    weight in float32 is multiplied by before the result is rounded to the type of x.

    Args:
        shift: of a zero-centred norm what `weight` has more than 1, in the type of the model: what
            kernels take that read two values at a time. 1 + shift has no such type.
    """

    def __init__(self, weight: torch.Tensor, eps: float, shift: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.shift = shift
        self.eps = eps
        self._size = (weight.shape[-1],)
        self._by_parts = weight.device.type == "cpu" and weight.dtype == torch.float32
        self.gain = weight
        if self._by_parts:
            self.gain = weight * math.sqrt(weight.shape[-1])
            self._root = torch.tensor(math.sqrt(weight.shape[-1] * eps))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Norm x [..., n], or [..., heads, n]; the result is a new tensor."""
        if self.weight.dtype != x.dtype:
            return F.rms_norm(x.float(), self._size, None, self.eps).mul_(self.weight).to(x.dtype)
        if self._by_parts or self.gain.dim() > 1:
            return self.direction(x).mul_(self.gain)
        return F.rms_norm(x, self._size, self.gain, self.eps)

    def direction(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of x but for its gain; a new tensor."""
        if self._by_parts:
            norm = torch.linalg.vector_norm(x, 2, -1, True)
            return x.div(norm.hypot_(self._root))
        return F.rms_norm(x, self._size, None, self.eps)


Tensor = torch.Tensor


def normed(x: Tensor, norm: RMSNorm) -> Tensor:
    """The norm of x [N, hidden], a new tensor."""
    return norm(x)


# See `add_norm`.
AddNormFn = Callable[[Tensor, Tensor | None, Tensor, Tensor | None, float], Tensor]


def add_norm(
    hidden: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """Add `update` to the hidden states [N, width] in place; returns the sum's LayerNorm, or its
    RMSNorm where there is no bias."""
    if update is not None:
        hidden.add_(update)
    if bias is None:
        return F.rms_norm(hidden, weight.shape, weight, eps)
    return F.layer_norm(hidden, weight.shape, weight, bias, eps)


Matrix = Tensor | QuantizedTensor
# A quantized matrix and a type -> the matrix [rows, columns] in it.
DequantizeFn = Callable[[QuantizedTensor, torch.dtype], Tensor]


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer, fused, and the numbers its operations need.

    Matrices are [in, out] views of the [out, in] weights, made once (a view costs a dispatch), or
    quantized.

    Args:
        qkv: [hidden, (H + 2 KVH) * D], q then k then v; with a gate [hidden, (2 H + 2 KVH) * D],
            each head of q in front of its gate; of a gated delta net [hidden, C + V], what goes
            through its convolution and then what gates its output. gate_up: [hidden, 2 I].
        gated: whether attention is, by the sigmoid of its gate.
        rotary_dim: dimensions of a head that rotate, the first ones; None = all.
        delta: of a layer whose tokens a gated delta net mixes; None = attention does.
        beta_decay: of such a layer, [hidden, 2 v_heads]: b then a. Never quantized.
        routing: of a mixture of experts, whose gate_up and down are those of all experts, one
            after the other; None = each token goes through the whole feed-forward.
        qk_norm: weight [H + KVH, D], the norms of the query and the key heads in one.
        next_norm, next_matrix: what reads the layer's result, of the next layer or the head.
    """

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attn_norm: RMSNorm
    qkv: Matrix
    qkv_bias: Tensor | None
    qk_norm: RMSNorm | None
    o: Matrix
    o_bias: Tensor | None
    mlp_norm: RMSNorm
    gate_up: Matrix
    down: Matrix
    next_norm: RMSNorm
    next_matrix: Matrix
    routing: Routing | None = None
    gated: bool = False
    rotary_dim: int | None = None
    delta: GatedDelta | None = None
    beta_decay: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """What all layers of one forward pass share: B rows of S tokens each.

    Args:
        rope: cosine and signed sine of each layer, [B, S, 1 or heads, D] each; None where `ops`
            look them up by `positions`. slots: int64 [S], where the new keys go; [B * S] in pages,
            where `ops` do not look them up by `pages`.
        ops: how the layers compute.
        positions: int64 [B], rotary, of a decode step.
        gained: `rope` has the gains of the heads' norms in it: one kernel a layer less.
        pages: what rows see of a pool of pages; None where each row has a cache of its own.
        states: of gated delta nets, by layer; None where the model has none.
        updates: where what tokens would do to those states goes, by layer; None = they do it.
    """

    batch: int
    length: int
    rope: Sequence[CosSin] | None
    slots: Tensor
    plan: AttentionPlan
    cache: KVCache
    attention: AttentionFunction
    ops: DecoderOps
    positions: Tensor | None = None
    gained: bool = False
    pages: DecodePages | PackedPrompts | None = None
    states: Mapping[int, DeltaState] | None = None
    updates: Mapping[int, DeltaUpdates] | None = None


@dataclass(frozen=True)
class SamplingBuffers:
    """What a greedy step reads and writes beside the logits, fixed buffers on the device.

    Args:
        token, slot, position, step: int64 [1]. done: bool [1]. See `DecodeState`.
        stop_ids: int64 [n, 1], -1 where unused. seen: bool [V]. penalty: float32 [].
    """

    token: Tensor
    slot: Tensor
    position: Tensor
    step: Tensor
    done: Tensor
    stop_ids: Tensor
    seen: Tensor
    penalty: Tensor


@dataclass(frozen=True)
class Drafts:
    """What a step that checks drafted tokens reads and writes beside `SamplingBuffers`, on the
    device; beside `RowBuffers`, R rows of each.

    Who drafts is nobody's business but that of who writes `input_ids`: a step feeds them and
    accepts those that the model would have chosen.

    Args:
        input_ids: int64 [MAX_VERIFY_TOKENS + 1], the last token chosen and the drafts of those
            after it.
        ids: int32 [max_seq_len], the tokens of prompt and answer by slot.
        last_slot: int64 [1], the slot of the last token that the request may choose.
        verify_output: int64 [2 + MAX_VERIFY_TOKENS], of the last step: how many tokens it chose (0
            once the answer has ended), how many of its drafts in a row were right, and its tokens.
    """

    input_ids: Tensor
    ids: Tensor
    last_slot: Tensor
    verify_output: Tensor


# See `ops.gated_delta`.
DeltaDecodeFn = Callable[[DeltaInputs, GatedDelta, DeltaState, DeltaRows], Tensor]
DeltaPrefillFn = Callable[[DeltaInputs, GatedDelta, DeltaState, PackedPrompts, Tensor], Tensor]
DeltaVerifyFn = Callable[[DeltaInputs, GatedDelta, DeltaState, DeltaRows, DeltaUpdates], Tensor]
AdoptAcceptedFn = Callable[[DeltaUpdates, Tensor, Tensor, Tensor, Tensor], None]
# See `mix_delta`.
MixDeltaFn = Callable[[Tensor, Tensor, Layer, Step], Tensor]
# Heads of all tokens [B, S, H + 2 KVH, D], see `qk_norm_rope_store`.
QkNormRopeStoreFn = Callable[[Tensor, Layer, Step], KeysValues]
# See `attend`.
AttendFn = Callable[[Tensor, Layer, Step], Tensor]
# q [N, H, D] over keys and values [M, KVH, D] of as many sequences -> [N, H * D]; queries of the
# longest, and where queries and keys of each begin, int32 [sequences + 1] on the device; None =
# there is one.
VarlenAttentionFn = Callable[[Tensor, Tensor, Tensor, int, Tensor | None, Tensor | None], Tensor]
# Hidden states and a layer with experts, see `experts_residual`.
ExpertsResidualFn = Callable[[Tensor, Layer], Tensor]


def dense(
    matrix: Matrix, like: Tensor, dequantize: DequantizeFn = QuantizedTensor.dequantize
) -> Tensor:
    """The matrix [in, out] in the type of `like`."""
    return matrix if isinstance(matrix, torch.Tensor) else dequantize(matrix, like.dtype).t()


def norm_qkv(
    hidden: Tensor, layer: Layer, dequantize: DequantizeFn = QuantizedTensor.dequantize
) -> Tensor:
    """hidden [B * S, hidden] -> [B * S, (H + 2 KVH) * D]."""
    x = layer.attn_norm(hidden)
    if layer.qkv_bias is None:
        return torch.mm(x, dense(layer.qkv, x, dequantize))
    return torch.addmm(layer.qkv_bias, x, dense(layer.qkv, x, dequantize))


def qk_norm_rope_store(split: Tensor, layer: Layer, step: Step) -> KeysValues:
    """Norm and rotate the queries and keys of `split` [B, S, H + 2 KVH, D], write the cache;
    queries stay in `split`, keys and values are those to attend to."""
    heads, kv_heads = layer.num_heads, layer.num_kv_heads
    qk = split.narrow(2, 0, heads + kv_heads)
    normed = qk
    if layer.qk_norm is not None:
        normed = layer.qk_norm.direction(qk) if step.gained else layer.qk_norm(qk)
    assert step.rope is not None, "only operations of any length do without"
    # Rotated in place, so that keys and values stay side by side and are stored in one go.
    if layer.rotary_dim is not None:
        qk.copy_(normed)
        normed = qk = qk.narrow(3, 0, layer.rotary_dim)
    rotate(normed, *step.rope[layer.index], out=qk)
    fresh = split.narrow(2, heads, 2 * kv_heads)
    return step.cache.write(layer.index, fresh, step.slots, step.plan.kv_len)


def attend(
    qkv: Tensor,
    layer: Layer,
    step: Step,
    place: QkNormRopeStoreFn = qk_norm_rope_store,
    prompts: VarlenAttentionFn | None = None,
) -> Tensor:
    """Norm and rotate queries and keys, write the cache, attend (by `prompts`, if given, where it
    is one sequence without a mask): -> [B * S, H * D]."""
    heads, dim = layer.num_heads, layer.head_dim
    split = qkv.view(step.batch, step.length, heads + 2 * layer.num_kv_heads, dim)
    keys, values = place(split, layer, step)
    if prompts is not None and step.batch == 1 and step.plan.mask is None:
        seen = keys[0].transpose(0, 1), values[0].transpose(0, 1)
        return prompts(split[0, :, :heads], *seen, step.length, None, None)
    attended = step.attention(split.narrow(2, 0, heads), keys, values, step.plan)
    return attended.view(-1, heads * dim)


def attend_pages(
    qkv: Tensor,
    layer: Layer,
    step: Step,
    place: QkNormRopeStoreFn = qk_norm_rope_store,
    rows: AttendFn | None = None,
    prompts: VarlenAttentionFn | None = None,
) -> Tensor:
    """`attend` of rows that share a pool of pages: their newest tokens (by `rows`, if given), or
    prompts side by side (by `prompts`, if given)."""
    if rows is not None and isinstance(step.pages, DecodePages):
        return rows(qkv, layer, step)
    if layer.gated:
        own, gate = split_gate(qkv, layer)
        ungated = replace(layer, gated=False)
        return attend_pages(own, ungated, step, place, None, prompts).mul_(gate.sigmoid())
    assert isinstance(step.cache, PagedKVCache), "pages come with their pool"
    split = qkv.view(step.batch, step.length, -1, layer.head_dim)
    fresh = place(split, layer, step)
    if isinstance(step.pages, PackedPrompts):
        keys, values = (
            (heads[0].transpose(0, 1) for heads in fresh)
            if step.pages.slots is None
            else step.cache.read(layer.index, step.pages.slots)
        )
        packed, q = step.pages, split[0, :, : layer.num_heads]
        if prompts is None:
            return prompt_attention(q, keys, values, packed)
        longest = max(packed.lengths)
        return prompts(q, keys, values, longest, packed.starts, packed.context_starts)
    assert step.pages is not None, "a step over pages says which"
    scales = None
    if isinstance(step.cache, QuantizedPagedKVCache):
        scales = step.cache.scales[layer.index]
    pool, q = step.cache.layers[layer.index], split[:, :, : layer.num_heads]
    return paged_attention(q, pool, step.pages, scales)


def split_gate(qkv: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """What a gated projection made [N, (2 H + 2 KVH) * D], in order: q, k and v
    [N, (H + 2 KVH) * D], and the gate [N, H * D]."""
    heads, dim = layer.num_heads, layer.head_dim
    pairs = qkv[:, : 2 * heads * dim].view(len(qkv), heads, 2, dim)
    own = torch.cat((pairs[:, :, 0].flatten(1), qkv[:, 2 * heads * dim :]), 1)
    return own, pairs[:, :, 1].flatten(1)


def norm_beta_decay(hidden: Tensor, layer: Layer) -> Tensor:
    """What the normed hidden state [N, hidden] says of a gated delta net's heads:
    [N, 2 v_heads]."""
    assert layer.beta_decay is not None, "a layer with a gated delta net"
    return torch.mm(layer.attn_norm(hidden), layer.beta_decay)


def mix_delta(
    projected: Tensor,
    beta_decay: Tensor,
    layer: Layer,
    step: Step,
    decode: DeltaDecodeFn = delta_decode,
    prefill: DeltaPrefillFn = delta_prefill,
    verify: DeltaVerifyFn = delta_verify,
) -> Tensor:
    """A gated delta net between its projections: -> [N, v_heads * v_dim].

    Args:
        projected: by `norm_qkv`. beta_decay: by `norm_beta_decay`.
    """
    delta, states, pages = layer.delta, step.states, step.pages
    assert delta is not None and states is not None, "the model made room for them"
    assert pages is not None and pages.states is not None, "states are those of rows over pages"
    channels = len(delta.conv)
    inputs = DeltaInputs(
        qkv=projected[:, :channels],
        z=projected[:, channels:],
        b=beta_decay[:, : delta.v_heads],
        a=beta_decay[:, delta.v_heads :],
    )
    state = states[layer.index]
    if isinstance(pages, PackedPrompts):
        return prefill(inputs, delta, state, pages, pages.states)
    assert pages.idle is not None, "rows that keep states say which are idle"
    rows = DeltaRows(pages.states, pages.places, pages.idle)
    if step.updates is None:
        return decode(inputs, delta, state, rows)
    return verify(inputs, delta, state, rows, step.updates[layer.index])


def o_residual(
    attended: Tensor,
    layer: Layer,
    hidden: Tensor,
    dequantize: DequantizeFn = QuantizedTensor.dequantize,
) -> Tensor:
    """hidden + W_o attended, [B * S, hidden], in place: the sum is part of the product."""
    hidden.addmm_(attended, dense(layer.o, hidden, dequantize))
    return hidden if layer.o_bias is None else hidden.add_(layer.o_bias)


def swiglu(both: Tensor) -> Tensor:
    """silu(gate) * up of [N, 2 I], gate in front of up."""
    gate, up = both.chunk(2, 1)
    return F.silu(gate).mul_(up)


def norm_gate_up(
    hidden: Tensor,
    layer: Layer,
    dequantize: DequantizeFn = QuantizedTensor.dequantize,
    activate: Callable[[Tensor], Tensor] = swiglu,
) -> Tensor:
    """SwiGLU of the normed hidden state: silu(gate) * up, [B * S, I]."""
    return activate(torch.mm(layer.mlp_norm(hidden), dense(layer.gate_up, hidden, dequantize)))


def down_residual(
    activated: Tensor,
    layer: Layer,
    hidden: Tensor,
    dequantize: DequantizeFn = QuantizedTensor.dequantize,
) -> Tensor:
    """hidden + W_down activated, [B * S, hidden], in place."""
    return hidden.addmm_(activated, dense(layer.down, hidden, dequantize))


def experts_residual(
    hidden: Tensor, layer: Layer, dequantize: DequantizeFn = QuantizedTensor.dequantize
) -> Tensor:
    """hidden + the mixture of the normed hidden state, [B * S, hidden], in place."""
    from qwencli.engine.ops.moe import mixture

    assert layer.routing is not None, "a layer with experts"
    x = layer.mlp_norm(hidden)
    return hidden.add_(mixture(x, layer.gate_up, layer.down, layer.routing, dequantize))


def norm_head(
    hidden: Tensor,
    norm: RMSNorm,
    head: Matrix,
    dequantize: DequantizeFn = QuantizedTensor.dequantize,
) -> Tensor:
    """Logits [N, V] of hidden states [N, hidden]; `head` is [hidden, V]."""
    return head_logits(norm(hidden), head, dequantize)


def head_logits(x: Tensor, head: Matrix, dequantize: DequantizeFn) -> Tensor:
    """Logits [N, V] of normed hidden states [N, hidden]. The head is the largest matrix of all, so
    a quantized one is never there whole."""
    if isinstance(head, torch.Tensor):
        return torch.mm(x, head)
    parts = [torch.mm(x, dense(head.part(rows), x, dequantize)) for rows in head.pieces()]
    return torch.cat(parts, 1)


@dataclass(frozen=True)
class Products:
    """The products of a layer and the head, with what is around them, for any number of rows.

    Args:
        norm_gate_up: its result is for `down_residual` alone.
    """

    norm_qkv: Callable[[Tensor, Layer], Tensor]
    o_residual: Callable[[Tensor, Layer, Tensor], Tensor]
    norm_gate_up: Callable[[Tensor, Layer], Tensor]
    down_residual: Callable[[Tensor, Layer, Tensor], Tensor]
    norm_head: Callable[[Tensor, RMSNorm, Matrix], Tensor]
    norm_beta_decay: Callable[[Tensor, Layer], Tensor] = norm_beta_decay
    normed: Callable[[Tensor, RMSNorm], Tensor] = normed


def activation_bits(matrix: QuantizedTensor) -> int | None:
    """None: vectors are multiplied in the type they have."""
    return None


@dataclass(frozen=True)
class DecoderOps:
    """The operations a decoder runs; every field can be replaced alone.

    Args:
        kv_len_on_device: `attend` reads on the device how long the sequence is and needs no plan.
        lm_head_argmax: the end of a greedy step in place of `norm_head` and the sampler: the
            likeliest token becomes `sampling.token`, and the rest of `sampling` is ready for the
            next step. Once `sampling.done` is set a step changes nothing.
        lm_head_verify: the end of a greedy step of the tokens at the front of `drafts.input_ids`:
            those it chooses, and what is drafted for the next one. As `ngram.accept` and
            `draft`.
        normed: the norm of rows that are not multiplied by a matrix alone.
        activation_bits: bits to which products with this matrix round their vector; None = not at
            all.
        dequantize: how products with more rows than a step has read quantized matrices.
        qk_norm_rope_store: how prompts do what is in front of attention. apply_rope: and vision
            towers, whose blocks end and begin with `add_norm`.
        attend_rows: `attend` of the newest tokens of each row over a pool of pages, which reads on
            the device how long each row is, and where. None = plain operators.
        attend_prompts: causal attention of prompts inside `attend`, the last query at the last
            key; None = the step's own, and torch's of packed prompts.
        attend_segments: by columns of a head, attention of a vision tower's segments of unequal
            length, each query over its whole segment; None = torch's.
        lm_head_rows: `choose_likeliest` of up to `max_batch_rows` hidden states in place of
            `norm_head`. choose_likeliest, advance_rows: the end of steps of rows.
        verify_rows: the end of a greedy step of S tokens a row, by logits [R * S, V]: as
            `ngram.accept` and `ngram.draft`, which None stands for.
        norm_beta_decay, mix_delta: of layers with a gated delta net, in place of `attend`.
            adopt_accepted: of all of them, once it is known which drafts were right.
        swiglu: how many rows that share a pool of pages are activated.
        experts_residual: the feed-forward of layers with experts, in place of `norm_gate_up` and
            `down_residual`. many_experts: likewise, where `many_rows` multiplies.
        many_rows: products of prompts and of steps of more rows than `max_batch_rows`; None = with
            dequantized matrices.
        max_batch_rows: up to which `norm_head` does without a dequantized head; 0 = never.
    """

    norm_qkv: Callable[[Tensor, Layer], Tensor] = norm_qkv
    attend: Callable[[Tensor, Layer, Step], Tensor] = attend
    o_residual: Callable[[Tensor, Layer, Tensor], Tensor] = o_residual
    norm_gate_up: Callable[[Tensor, Layer], Tensor] = norm_gate_up
    down_residual: Callable[[Tensor, Layer, Tensor], Tensor] = down_residual
    norm_head: Callable[[Tensor, RMSNorm, Matrix], Tensor] = norm_head
    normed: Callable[[Tensor, RMSNorm], Tensor] = normed
    experts_residual: ExpertsResidualFn = experts_residual
    many_experts: ExpertsResidualFn = experts_residual
    kv_len_on_device: bool = False
    lm_head_argmax: Callable[[Tensor, RMSNorm, Matrix, SamplingBuffers], None] | None = None
    lm_head_verify: Callable[[Tensor, RMSNorm, Matrix, SamplingBuffers, Drafts], None] | None = None
    activation_bits: Callable[[QuantizedTensor], int | None] = activation_bits
    dequantize: DequantizeFn = QuantizedTensor.dequantize
    qk_norm_rope_store: QkNormRopeStoreFn = qk_norm_rope_store
    apply_rope: ApplyRopeFn = apply_rope
    add_norm: AddNormFn = add_norm
    attend_rows: AttendFn | None = None
    attend_prompts: VarlenAttentionFn | None = None
    attend_segments: Callable[[int], VarlenAttentionFn | None] = lambda head_dim: None
    lm_head_rows: Callable[[Tensor, RMSNorm, Matrix, RowBuffers, bool], None] | None = None
    choose_likeliest: Callable[[Tensor, RowBuffers, bool], None] = choose_likeliest
    advance_rows: Callable[[Tensor, RowBuffers], None] = advance_rows
    verify_rows: Callable[[Tensor, RowBuffers, Drafts], None] | None = None
    norm_beta_decay: Callable[[Tensor, Layer], Tensor] = norm_beta_decay
    mix_delta: MixDeltaFn = mix_delta
    adopt_accepted: AdoptAcceptedFn = adopt_accepted
    swiglu: Callable[[Tensor], Tensor] = swiglu
    many_rows: Products | None = None
    max_batch_rows: int = 0


REFERENCE_OPS = DecoderOps()


def prompt_ops(step: DecoderOps) -> DecoderOps:
    """Operations on prompts in a model whose steps are `step`: its products of many rows, or plain
    torch, and the heads placed as `step` does it.

    A quantized head is an exception: few rows of a prompt's end go through the steps' own. The
    first token is then chosen from the logits that a step would give there, whose vector is rounded
    as in every step, and not from those of the dequantized head.
    """

    products = step.many_rows or _dequantized_products(step)

    def head(hidden: Tensor, norm: RMSNorm, matrix: Matrix) -> Tensor:
        if isinstance(matrix, torch.Tensor) or len(hidden) > step.max_batch_rows:
            return products.norm_head(hidden, norm, matrix)
        # Copies, as rows may lie apart, and as the next step overwrites its logits.
        return step.norm_head(hidden.clone(), norm, matrix).clone()

    return DecoderOps(
        attend=functools.partial(
            attend, place=step.qk_norm_rope_store, prompts=step.attend_prompts
        ),
        norm_qkv=products.norm_qkv,
        o_residual=products.o_residual,
        norm_gate_up=products.norm_gate_up,
        down_residual=products.down_residual,
        norm_head=head,
        norm_beta_decay=products.norm_beta_decay,
        normed=products.normed,
        experts_residual=step.many_experts,
    )


def _dequantized_products(step: DecoderOps) -> Products:
    """Products in plain torch, with the matrices dequantized as `step` does it."""
    return Products(
        norm_qkv=functools.partial(norm_qkv, dequantize=step.dequantize),
        o_residual=functools.partial(o_residual, dequantize=step.dequantize),
        norm_gate_up=functools.partial(norm_gate_up, dequantize=step.dequantize),
        down_residual=functools.partial(down_residual, dequantize=step.dequantize),
        norm_head=functools.partial(norm_head, dequantize=step.dequantize),
    )


def paged_ops(step: DecoderOps, few: bool) -> DecoderOps:
    """Operations over a pool of pages in a model whose lone steps are `step`.

    Args:
        few: of steps of up to `step.max_batch_rows` rows, which run the lone step's own products.
            More rows, and prompts, run those of prompts, which are matrices times matrices.
    """
    attend = functools.partial(
        attend_pages,
        place=step.qk_norm_rope_store,
        rows=step.attend_rows,
        prompts=step.attend_prompts,
    )
    if few:
        return replace(step, attend=attend)
    many = replace(
        prompt_ops(step),
        attend=attend,
        choose_likeliest=step.choose_likeliest,
        advance_rows=step.advance_rows,
        verify_rows=step.verify_rows,
        mix_delta=step.mix_delta,
        adopt_accepted=step.adopt_accepted,
    )
    if step.many_rows is not None:
        return many
    gate_up = functools.partial(norm_gate_up, dequantize=step.dequantize, activate=step.swiglu)
    return replace(many, norm_gate_up=gate_up)
