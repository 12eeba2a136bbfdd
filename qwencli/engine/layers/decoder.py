"""The text decoder of every family: embedding, layers, head.

It knows neither families (`shapes`), nor rotary positions (`rope`), nor what kind of cache it
has, nor how an operation is computed (`DecoderOps`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from qwencli.engine.loading.weights import HEAD, Tensors
from qwencli.engine.ops.decoder_ops import (
    DecoderOps,
    Drafts,
    Layer,
    Matrix,
    RMSNorm,
    SamplingBuffers,
    Step,
)
from qwencli.engine.ops.gated_delta import GatedDelta
from qwencli.engine.ops.next_tokens import RowBuffers
from qwencli.engine.ops.rope import gains_of_halves
from qwencli.engine.quant.quantized_tensor import QuantizedTensor
from qwencli.models.shapes import MoeShape, TextShape

if TYPE_CHECKING:
    from qwencli.engine.ops.moe import Routing


@dataclass(frozen=True)
class DeepStack:
    """Features of the vision tower that the first layers add to the hidden state.

    Args:
        places: int64 [N], rows of the [B * S, hidden] state.
        features: one [N, hidden] a layer, for the first layers in order.
    """

    places: torch.Tensor
    features: Sequence[torch.Tensor]


class Decoder:
    """Weights [out, in] of one model on one device, and the forward pass over them.

    Args:
        matrices: those of the weights that are quantized.
        by_rows: keep every weight as it is, for operations that read its rows.
    """

    def __init__(
        self,
        shape: TextShape,
        weights: Tensors,
        matrices: Mapping[str, QuantizedTensor] | None = None,
        by_rows: bool = False,
    ) -> None:
        self.shape = shape
        pick = MatrixPicker(weights, matrices or {}, by_rows)
        self.embedding = weights["text.embed"]
        self.norm = make_norm(shape, weights, "text.norm")
        self.head = pick.head()
        self.layers = _layers(shape, weights, pick, self.norm, self.head)
        # Of all layers' query and key heads, [2, layers, heads, D]; None where some have no such
        # norms, where not all of a head rotates, and beside a head that drafts tokens.
        norms = [layer.qk_norm.gain for layer in self.layers if layer.qk_norm is not None]
        whole = len(norms) == shape.num_layers and shape.rope.rotary_dim is None
        whole = whole and not shape.draft_head
        self.head_gains = gains_of_halves(torch.stack(norms)) if whole else None

    @property
    def quantized_matrices(self) -> list[QuantizedTensor]:
        """The quantized matrices of all layers and of the head, each once."""
        layers = [part for layer in self.layers for part in vars(layer).values()]
        found = [part for part in (*layers, self.head) if isinstance(part, QuantizedTensor)]
        return list({id(part): part for part in found}.values())

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [N] -> hidden states [N, hidden]."""
        return F.embedding(ids, self.embedding)

    def forward(
        self, hidden: torch.Tensor, step: Step, deepstack: DeepStack | None = None
    ) -> torch.Tensor:
        """Run all layers on `hidden` [B * S, hidden], overwritten; the result is not normed.

        Stores the keys and values of the S tokens of each row at `step.slots`.
        """
        for layer in self.layers:
            hidden = run_layer(layer, hidden, step)
            if deepstack is not None and layer.index < len(deepstack.features):
                hidden.index_add_(0, deepstack.places, deepstack.features[layer.index])
        return hidden

    def logits(self, hidden: torch.Tensor, ops: DecoderOps) -> torch.Tensor:
        """Hidden states [N, hidden] of the last layer -> logits [N, V]."""
        return ops.norm_head(hidden, self.norm, self.head)

    def lm_head_argmax(
        self, hidden: torch.Tensor, ops: DecoderOps, sampling: SamplingBuffers
    ) -> None:
        """Hidden state [1, hidden] of the last layer -> the likeliest token, in `sampling`."""
        assert ops.lm_head_argmax is not None, "the caller looks whether these operations can"
        ops.lm_head_argmax(hidden, self.norm, self.head, sampling)

    def next_tokens(
        self, hidden: torch.Tensor, ops: DecoderOps, rows: RowBuffers, with_penalty: bool
    ) -> None:
        """Hidden states [B, hidden] of the last layer -> the likeliest token of each row."""
        if ops.lm_head_rows is not None:
            ops.lm_head_rows(hidden, self.norm, self.head, rows, with_penalty)
        else:
            ops.choose_likeliest(self.logits(hidden, ops), rows, with_penalty)

    def lm_head_verify(
        self, hidden: torch.Tensor, ops: DecoderOps, sampling: SamplingBuffers, drafts: Drafts
    ) -> None:
        """Hidden states [S, hidden] of the tokens fed -> those chosen, in `sampling`."""
        assert ops.lm_head_verify is not None, "the caller looks whether these operations can"
        ops.lm_head_verify(hidden, self.norm, self.head, sampling, drafts)


def run_layer(layer: Layer, hidden: torch.Tensor, step: Step) -> torch.Tensor:
    """One layer over hidden states [B * S, hidden], overwritten."""
    ops = step.ops
    projected = ops.norm_qkv(hidden, layer)
    if layer.delta is None:
        mixed = ops.attend(projected, layer, step)
    else:
        mixed = ops.mix_delta(projected, ops.norm_beta_decay(hidden, layer), layer, step)
    hidden = ops.o_residual(mixed, layer, hidden)
    if layer.routing is None:
        return ops.down_residual(ops.norm_gate_up(hidden, layer), layer, hidden)
    return ops.experts_residual(hidden, layer)


def _layers(
    shape: TextShape, weights: Tensors, pick: MatrixPicker, norm: RMSNorm, head: Matrix
) -> list[Layer]:
    """All layers; `norm` and `head` read the last one's result."""
    layers: list[Layer] = []
    for index in reversed(range(shape.num_layers)):
        attends, moe = shape.mixer(index) == "attention", shape.experts(index)
        layer = make_layer(
            shape, weights, f"text.{index}.", index, pick, norm, head, attends=attends, moe=moe
        )
        layers.insert(0, layer)
        norm, head = layer.attn_norm, layer.qkv
    return layers


def make_layer(
    shape: TextShape,
    weights: Tensors,
    at: str,
    index: int,
    pick: MatrixPicker,
    next_norm: RMSNorm,
    next_matrix: Matrix,
    *,
    attends: bool,
    moe: MoeShape | None,
) -> Layer:
    """The layer whose tensors' names begin with `at`.

    Args:
        next_norm, next_matrix: what reads its result. attends: else a gated delta net mixes.
        moe: its experts; None = its feed-forward is whole.
    """
    qk_norm = None
    if shape.qk_norm and attends:
        queries = _gain(shape, weights, at + "q_norm").expand(shape.num_heads, -1)
        keys = _gain(shape, weights, at + "k_norm").expand(shape.num_kv_heads, -1)
        qk_norm = RMSNorm(torch.cat((queries, keys)), shape.rms_norm_eps)
    return Layer(
        index=index,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        attn_norm=make_norm(shape, weights, at + "attn_norm"),
        qkv=pick.columns(at + "qkv"),
        qkv_bias=weights.get(at + "qkv_bias"),
        qk_norm=qk_norm,
        o=pick.columns(at + "o"),
        o_bias=weights.get(at + "o_bias"),
        mlp_norm=make_norm(shape, weights, at + "mlp_norm"),
        gate_up=pick.columns(at + "gate_up", cut=moe is not None),
        down=pick.columns(at + "down", cut=moe is not None),
        routing=None if moe is None else _routing(moe, weights, at, pick),
        next_norm=next_norm,
        next_matrix=next_matrix,
        gated=shape.gated_attention and attends,
        rotary_dim=shape.rope.rotary_dim,
        delta=None if attends else _gated_delta(shape, weights, at),
        beta_decay=None if attends else weights[at + "beta_decay"].t(),
    )


def _gain(shape: TextShape, weights: Tensors, name: str) -> torch.Tensor:
    """What a norm multiplies by: its weight, or 1 and its weight, in float32."""
    weight = weights[name]
    return weight + 1 if shape.zero_centred_norms else weight


def make_norm(shape: TextShape, weights: Tensors, name: str) -> RMSNorm:
    """The norm of that name; where norms are stored around 0, its gain is 1 + its weight."""
    if not shape.zero_centred_norms:
        return RMSNorm(weights[name], shape.rms_norm_eps)
    shift = weights[name].to(weights["text.embed"].dtype)
    return RMSNorm(shift.float() + 1, shape.rms_norm_eps, shift)


def _gated_delta(shape: TextShape, weights: Tensors, at: str) -> GatedDelta:
    delta = shape.delta
    assert delta is not None, "the shape has such layers"
    return GatedDelta(
        k_heads=delta.num_k_heads,
        v_heads=delta.num_v_heads,
        k_dim=delta.k_head_dim,
        v_dim=delta.v_head_dim,
        conv=weights[at + "conv"],
        a_log=weights[at + "decay_log"],
        dt_bias=weights[at + "decay_bias"],
        norm=weights[at + "out_norm"],
        eps=shape.rms_norm_eps,
    )


def _routing(moe: MoeShape, weights: Tensors, at: str, pick: MatrixPicker) -> Routing:
    from qwencli.engine.ops.moe import Routing

    alone = None
    if moe.shared_intermediate_size and not moe.shared_is_stacked:
        alone = pick.columns(at + "shared_gate_up"), pick.columns(at + "shared_down")
    return Routing(
        router=weights[at + "router"],
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        renormalize=moe.renormalize,
        shared=int(moe.shared_is_stacked),
        shared_mlp=alone,
    )


@dataclass(frozen=True)
class MatrixPicker:
    """Picks each matrix in the form that the operations want."""

    weights: Tensors
    quantized: Mapping[str, QuantizedTensor]
    by_rows: bool

    def columns(self, name: str, cut: bool = False) -> Matrix:
        """The quantized matrix of this name, or else the [in, out] view of a weight [out, in].

        A matrix-vector product on the CPU in float32 is a quarter faster when the outputs of one
        input lie in a row, so the weight is stored that way there (one at a time, in its own
        place), unless it is cut into parts of its outputs.
        """
        if name in self.quantized:
            return self.quantized[name]
        weight, by_rows = self.weights[name], self.by_rows or cut
        if not by_rows and weight.device.type == "cpu" and weight.dtype == torch.float32:
            self.weights[name] = weight = weight.t().contiguous().t()
        return weight.t()

    def head(self) -> Matrix:
        """The head, which is the embedding where the checkpoint has none of its own."""
        if HEAD in self.quantized:
            return self.quantized[HEAD]
        return self.weights.get(HEAD, self.weights["text.embed"]).t()
