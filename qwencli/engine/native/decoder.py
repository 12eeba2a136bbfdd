"""The text decoder of every family: embedding, layers, head.

It knows neither families (`shapes`), nor rotary positions (`rope`), nor what kind of cache it
has, nor how an operation is computed (`DecoderOps`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qwencli.engine.native.decoder_ops import Choice, DecoderOps, Layer, Step
from qwencli.engine.native.rms_norm import RMSNorm
from qwencli.engine.native.weights import Tensors
from qwencli.models.shapes import TextShape


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
        by_rows: keep every weight as it is, for operations that read its rows.
    """

    def __init__(self, shape: TextShape, weights: Tensors, by_rows: bool = False) -> None:
        self.shape = shape
        self.layers = [_layer(shape, weights, i, by_rows) for i in range(shape.num_layers)]
        self.embedding = weights["text.embed"]
        self.norm = RMSNorm(weights["text.norm"], shape.rms_norm_eps)
        self.head = (self.embedding if shape.tied_head else weights["text.head"]).t()

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [N] -> hidden states [N, hidden]."""
        return F.embedding(ids, self.embedding)

    def forward(
        self, hidden: torch.Tensor, step: Step, deepstack: DeepStack | None = None
    ) -> torch.Tensor:
        """Run all layers on `hidden` [B * S, hidden], overwritten; the result is not normed.

        Stores the keys and values of the S tokens of each row at `step.slots`.
        """
        ops = step.ops
        for layer in self.layers:
            attended = ops.attend(ops.norm_qkv(hidden, layer), layer, step)
            hidden = ops.o_residual(attended, layer, hidden)
            hidden = ops.down_residual(ops.norm_gate_up(hidden, layer), layer, hidden)
            if deepstack is not None and layer.index < len(deepstack.features):
                hidden.index_add_(0, deepstack.places, deepstack.features[layer.index])
        return hidden

    def logits(self, hidden: torch.Tensor, ops: DecoderOps) -> torch.Tensor:
        """Hidden states [N, hidden] of the last layer -> logits [N, V]."""
        return ops.norm_head(hidden, self.norm, self.head)

    def choose(self, hidden: torch.Tensor, ops: DecoderOps, choice: Choice) -> None:
        """Hidden state [1, hidden] of the last layer -> the likeliest token, in `choice`."""
        assert ops.choose is not None, "the caller looks whether these operations can"
        ops.choose(hidden, self.norm, self.head, choice)


def _layer(shape: TextShape, weights: Tensors, index: int, by_rows: bool) -> Layer:
    at = f"text.{index}."
    qk_norm = None
    if shape.qk_norm:
        queries = weights[at + "q_norm"].expand(shape.num_heads, -1)
        keys = weights[at + "k_norm"].expand(shape.num_kv_heads, -1)
        qk_norm = RMSNorm(torch.cat((queries, keys)), shape.rms_norm_eps)
    return Layer(
        index=index,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        attn_norm=RMSNorm(weights[at + "attn_norm"], shape.rms_norm_eps),
        qkv=_columns(weights, at + "qkv", by_rows),
        qkv_bias=weights.get(at + "qkv_bias"),
        qk_norm=qk_norm,
        o=_columns(weights, at + "o", by_rows),
        o_bias=weights.get(at + "o_bias"),
        mlp_norm=RMSNorm(weights[at + "mlp_norm"], shape.rms_norm_eps),
        gate_up=_columns(weights, at + "gate_up", by_rows),
        down=_columns(weights, at + "down", by_rows),
    )


def _columns(weights: Tensors, name: str, by_rows: bool) -> torch.Tensor:
    """The [in, out] view of a weight [out, in].

    A matrix-vector product on the CPU in float32 is a quarter faster when the outputs of one
    input lie in a row, so the weight is stored that way there (one at a time, in its own place).
    """
    weight = weights[name]
    if not by_rows and weight.device.type == "cpu" and weight.dtype == torch.float32:
        weights[name] = weight = weight.t().contiguous().t()
    return weight.t()
